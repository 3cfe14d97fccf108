"""770M with Lion."""

include = "gpt2_large.py"

optimizer = "lion"
learning_rate = 8e-5  # released table of the Sophia repository
out_dir = "out/gpt2_large_lion"
