"""125M with Sophia-G."""

include = "gpt2_small.py"

optimizer = "sophiag"
learning_rate = 6e-4  # released table of the Sophia repository
rho = 0.05  # released table of the Sophia repository
out_dir = "out/gpt2_small_sophiag"
