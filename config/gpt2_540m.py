"""The 540M model. From memory of the paper's table: a starting point."""

n_layer = 30
n_head = 18
n_embd = 1152

# The paper needs this for AdamW and Lion from 355M up (without it their largest stable learning rate at 355M is 1.5e-4)
# and says that Sophia-H does not; the released Sophia-G configs have it on. On for all, so that one model is compared.
scale_attn_by_inverse_layer_idx = True

micro_batch_size = 15  # for 40 GB and more, 24 GB hold 5; divides 480 sequences over 1, 2, 4, 8 or 16 devices
