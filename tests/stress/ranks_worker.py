"""What the tests have torchrun start: train.py's main, once for each JSON object of settings, with a fault on rank 1.

torchrun --nproc_per_node=2 -m tests.stress.ranks_worker none '{"out_dir": "out", "n_layer": 2, …}' …
"""

import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

import train
from run import errors, ranks
from tests.conftest import arguments

STEP = 3  # in which the fault happens
FAULTS = ("none", "hang", "nan", "signal")


def with_fault(fault: str):
    """train.accumulate_gradients on a rank that hangs, whose own gradient is not a number, or that is asked to stop."""
    correct = train.accumulate_gradients

    def accumulate_gradients(step, model, batches):
        if step != STEP:
            return correct(step, model, batches)
        if fault == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun would wait 30 seconds for it
            time.sleep(3600)
        if fault == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
            return correct(step, model, batches)
        handle = next(model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
        try:
            return correct(step, model, batches)
        finally:
            handle.remove()

    return accumulate_gradients


def main() -> None:
    fault, *runs = sys.argv[1:]
    assert fault in FAULTS, fault
    if fault != "none" and os.environ["RANK"] == "1":
        train.accumulate_gradients = with_fault(fault)
    torch.set_num_threads(1)
    for run in runs:
        sys.argv = ["train.py", *arguments(**json.loads(run))]
        errors.run(train.main)
        if dist.is_initialized():
            dist.destroy_process_group()
    ranks.leave(0)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as stop:
        ranks.leave(stop.code)
