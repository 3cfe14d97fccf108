"""The 125M model. GPT-2 small."""

n_layer = 12
n_head = 12
n_embd = 768
