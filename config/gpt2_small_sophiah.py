"""125M with Sophia-H."""

include = "gpt2_small.py"

optimizer = "sophiah"
learning_rate = 6e-4  # Levanter's config
out_dir = "out/gpt2_small_sophiah"
