"""The 355M model. GPT-2 medium."""

n_layer = 24
n_head = 16
n_embd = 1024

# The paper needs this for AdamW and Lion from 355M up (without it their largest stable learning rate at 355M is 1.5e-4)
# and says that Sophia-H does not; the released Sophia-G configs have it on. On for all, so that one model is compared.
scale_attn_by_inverse_layer_idx = True

micro_batch_size = 20  # for 40 GB and more, 24 GB hold 12; divides 480 sequences over 1, 2, 4 or 8 devices
