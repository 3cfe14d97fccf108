"""What the tests have torchrun start: train.py's main, once for each JSON object of settings, with a fault on rank 1.

torchrun --nproc_per_node=2 -m tests.stress.ranks_worker none '{"out_dir": "out", "n_layer": 2, …}' …
"""

import json
import os
import sys
import time

import torch
import torch.distributed as dist

import train
from run import errors
from tests.conftest import arguments
from training import steps

STEP = 3  # in which the fault happens
correct = steps.accumulate_gradients


def with_fault(model, batches, step):
    if step == STEP and os.environ["RANK"] == "1":
        if fault == "hang":
            time.sleep(3600)
        elif fault == "nan":
            first = next(model.parameters())
            handle = first.register_hook(lambda gradient: gradient * float("nan"))
            try:
                return correct(model, batches, step)
            finally:
                handle.remove()
    return correct(model, batches, step)


fault, *runs = sys.argv[1:]
if fault in ("hang", "nan"):
    steps.accumulate_gradients = with_fault
torch.set_num_threads(1)
for run in runs:
    other = {"seed": 1} if fault == "other" and os.environ["RANK"] == "1" else {}
    sys.argv = ["train.py", *arguments(**json.loads(run) | other)]
    errors.run(train.main)
    if dist.is_initialized():
        dist.destroy_process_group()
