"""770M with Sophia-H."""

include = "gpt2_large.py"

optimizer = "sophiah"
learning_rate = 3e-4  # Levanter's config
hessian_micro_batch_size = 4  # a sequence takes 3.4 GB in a Hutchinson pass: on 40 GB half a micro-batch is too many
out_dir = "out/gpt2_large_sophiah"
