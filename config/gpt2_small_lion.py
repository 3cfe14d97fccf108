"""125M with Lion."""

include = "gpt2_small.py"

optimizer = "lion"
learning_rate = 1e-4  # released table of the Sophia repository
out_dir = "out/gpt2_small_lion"
