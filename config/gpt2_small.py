"""The 125M model. GPT-2 small."""

n_layer = 12
n_head = 12
n_embd = 768
micro_batch_size = 30  # for 24 GB and more; divides 480 sequences over 1, 2, 4, 8 or 16 devices
