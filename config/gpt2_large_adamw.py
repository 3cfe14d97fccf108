"""770M with AdamW."""

include = "gpt2_large.py"

optimizer = "adamw"
learning_rate = 2e-4  # released table of the Sophia repository
out_dir = "out/gpt2_large_adamw"
