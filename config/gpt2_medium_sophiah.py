"""355M with Sophia-H."""

include = "gpt2_medium.py"

optimizer = "sophiah"
learning_rate = 4e-4  # Levanter's config
out_dir = "out/gpt2_medium_sophiah"
