"""125M with AdamW."""

include = "gpt2_small.py"

optimizer = "adamw"
learning_rate = 6e-4  # released table of the Sophia repository
out_dir = "out/gpt2_small_adamw"
