"""355M with AdamW."""

include = "gpt2_medium.py"

optimizer = "adamw"
learning_rate = 3e-4  # released table of the Sophia repository
out_dir = "out/gpt2_medium_adamw"
