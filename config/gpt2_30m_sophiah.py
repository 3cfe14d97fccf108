"""30M with Sophia-H."""

include = "gpt2_30m.py"

optimizer = "sophiah"
learning_rate = 1e-3  # not in the sources: 0.8 x AdamW's, this project's starting point to tune
out_dir = "out/gpt2_30m_sophiah"
