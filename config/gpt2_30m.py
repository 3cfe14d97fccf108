"""The 30M model. From memory of the paper's table: a starting point."""

n_layer = 6
n_head = 6
n_embd = 384
