"""30M with Lion."""

include = "gpt2_30m.py"

optimizer = "lion"
learning_rate = 4e-4  # from memory of the paper's table: a starting point to tune
out_dir = "out/gpt2_30m_lion"
