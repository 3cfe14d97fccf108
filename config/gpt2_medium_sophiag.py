"""355M with Sophia-G."""

include = "gpt2_medium.py"

optimizer = "sophiag"
learning_rate = 7e-4  # released table of the Sophia repository
rho = 0.08  # released table of the Sophia repository
out_dir = "out/gpt2_medium_sophiag"
