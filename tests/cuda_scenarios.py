"""What training would do on one H100, on tests/fake_cuda.py's device that is not there.

    python -m tests.cuda_scenarios passes [CONFIG.py …] [--name=value …]

prints, as one JSON object, what one micro-batch of training takes and, with Sophia, one pass for curvature: bytes of
memory, bytes that Triton's kernels move, calls of libraries. Settings are train.py's. Bytes are linear in n_layer, so
that two small numbers of layers give those of any other.
"""

import dataclasses
import json
import sys
from typing import Any

from tests import fake_cuda  # isort: skip - before torch

from benchmarks.common import random_tokens
from run.machine import set_up
from run.settings import Settings, complete, read
from tokens.batches import Batches
from train import accumulate_gradients
from training.curvature import Curvature
from training.optimizers import make_optimizer, parameters
from training.parallel import DataParallel
from training.start import make_model


def passes(arguments: list[str]) -> dict[str, Any]:
    settings = read([*arguments, "--device=cuda"])
    with fake_cuda.Gpu() as gpu:
        return {name: usage | vars(usage.pop("usage")) for name, usage in measure_passes(gpu, settings).items()}


def measure_passes(gpu: fake_cuda.Gpu, settings: Settings) -> dict[str, dict[str, Any]]:
    """{"training": {"sequences": …, "usage": …}} of one micro-batch, gradients and the optimizer's state being there
    already; with Sophia also "curvature", of an estimate from as many sequences, and its update of the state.
    """
    size = settings.micro_batch_size
    group = settings.hessian_group_size if settings.hessian_estimator == "averaged" else 1
    sequences = max(size // group, 1) * group  # of the estimate
    settings = complete(dataclasses.replace(settings, batch_size=size, hessian_batch_size=min(size, sequences)))
    machine, data = set_up(settings), random_tokens(settings)
    model, batches = make_model(settings, data, machine, None), Batches(data, settings, machine)
    parallel, optimizer = DataParallel(model, machine), make_optimizer(model, settings, machine)
    accumulate_gradients(1, parallel, batches)
    optimizer.step()
    with gpu.measuring() as usage:
        accumulate_gradients(2, parallel, batches)
    measured = {"training": {"sequences": size, "usage": usage}}
    optimizer.zero_grad()
    if settings.uses_curvature:
        settings = dataclasses.replace(settings, batch_size=size * group, hessian_batch_size=sequences)
        curvature = Curvature(model, settings, machine, Batches(data, settings, machine))
        with gpu.measuring() as usage:
            optimizer.update_hessian(curvature.estimate(1, parameters(optimizer)))
        measured["curvature"] = {"sequences": sequences, "usage": usage}
    return measured


SCENARIOS = {"passes": passes}

if __name__ == "__main__":
    print(json.dumps(SCENARIOS[sys.argv[1]](sys.argv[2:]), indent=4))
