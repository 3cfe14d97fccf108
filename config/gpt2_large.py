"""The 770M model. GPT-2 large."""

n_layer = 36
n_head = 20
n_embd = 1280

# The paper needs this for AdamW and Lion from 355M up (without it their largest stable learning rate at 355M is 1.5e-4)
# and says that Sophia-H does not; the released Sophia-G configs have it on. On for all, so that one model is compared.
scale_attn_by_inverse_layer_idx = True

# for 40 GB and more, or 24 GB with checkpoint_activations; divides 480 sequences over 1, 2, 4, 8 or 16 devices
micro_batch_size = 10
