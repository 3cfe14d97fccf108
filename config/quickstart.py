"""A small GPT on Python's own sources, with Sophia-G: minutes on two CPU cores.

Learning rate, beta1 and rho are the best of 8 runs. Over 512 validation blocks it ends at 1.46 nats per byte; AdamW,
tuned in as many runs, ends at 1.43 (--optimizer=adamw --learning_rate=4e-3 --beta1=0.8). A short run is not what Sophia
is made for: its Hessian average needs about a hundred estimates to fill up.
"""

dataset = "stdlib"
out_dir = "out/quickstart"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 32
micro_batch_size = 32

optimizer = "sophiag"
hessian_estimator = "averaged"
hessian_batch_size = 16
learning_rate = 1e-3
beta1 = 0.8
rho = 0.1
max_iters = 1000
warmup_iters = 100

eval_interval = 60
eval_sequences = 128
compile = False  # compiling takes longer here than it saves
