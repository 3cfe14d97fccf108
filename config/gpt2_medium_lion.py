"""355M with Lion."""

include = "gpt2_medium.py"

optimizer = "lion"
learning_rate = 1e-4  # released table of the Sophia repository
out_dir = "out/gpt2_medium_lion"
