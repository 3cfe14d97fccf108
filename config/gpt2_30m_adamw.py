"""30M with AdamW."""

include = "gpt2_30m.py"

optimizer = "adamw"
learning_rate = 1.2e-3  # from memory of the paper's table: a starting point to tune
out_dir = "out/gpt2_30m_adamw"
