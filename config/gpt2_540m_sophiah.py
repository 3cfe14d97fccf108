"""540M with Sophia-H."""

include = "gpt2_540m.py"

optimizer = "sophiah"
learning_rate = 4e-4  # from memory of the paper's table: a starting point to tune
out_dir = "out/gpt2_540m_sophiah"
