"""540M with AdamW."""

include = "gpt2_540m.py"

optimizer = "adamw"
learning_rate = 3e-4  # from memory of the paper's table: a starting point to tune
out_dir = "out/gpt2_540m_adamw"
