"""770M with Sophia-H."""

include = "gpt2_large.py"

optimizer = "sophiah"
learning_rate = 3e-4  # Levanter's config
out_dir = "out/gpt2_large_sophiah"
