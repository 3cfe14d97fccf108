"""770M with Sophia-G."""

include = "gpt2_large.py"

optimizer = "sophiag"
learning_rate = 3e-4  # released table of the Sophia repository
rho = 0.05  # released table of the Sophia repository
out_dir = "out/gpt2_large_sophiag"
