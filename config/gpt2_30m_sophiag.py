"""30M with Sophia-G."""

include = "gpt2_30m.py"

optimizer = "sophiag"
learning_rate = 1e-3  # not in the sources: 0.8 x AdamW's, this project's starting point to tune
rho = 0.05  # released table of the Sophia repository
out_dir = "out/gpt2_30m_sophiag"
