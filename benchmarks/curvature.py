"""What Sophia costs: passes for curvature against one for training on the same sequences, and the updates."""

import dataclasses
import functools
from argparse import Namespace
from typing import Any

import torch

from benchmarks.common import alternate, measure, random_tokens
from run.machine import Machine
from run.settings import Settings, complete
from tokens.batches import Batches, check_batch
from train import accumulate_gradients
from training.curvature import Curvature
from training.optimizers import make_optimizer, parameters
from training.parallel import DataParallel
from training.start import make_model

PAPER_BATCH = 480  # sequences of a step
# The settings of each estimator, and how many sequences of a step it takes
ESTIMATORS = {
    "hutchinson": ({"optimizer": "sophiah"}, 32),
    "gnb": ({"optimizer": "sophiag", "hessian_estimator": "paper"}, 240),
    "gnb_averaged": ({"optimizer": "sophiag", "hessian_estimator": "averaged"}, 32),
}


def curvature(options: Namespace, settings: Settings, machine: Machine) -> dict[str, Any]:
    """Seconds and memory of passes over batch_size sequences, and of updates. From these follow the overheads: by how
    much a step of 480 sequences is longer than AdamW's, on average over hessian_interval steps.
    """
    size, data = settings.batch_size, random_tokens(settings)
    model, updated = (make_model(settings, data, machine, None) for _ in range(2))
    parallel, batches, params = DataParallel(model, machine), Batches(data, settings, machine), list(model.parameters())

    def train() -> None:
        accumulate_gradients(1, parallel, batches)
        model.zero_grad()

    functions = {"train": train}
    for name, (changes, _) in ESTIMATORS.items():
        chosen = complete(dataclasses.replace(settings, hessian_batch_size=size, **changes))
        check_batch(chosen, ranks=1)
        estimates = Curvature(model, chosen, machine, Batches(data, chosen, machine))
        functions[name] = functools.partial(estimates.estimate, 1, params)
    for param in updated.parameters():
        param.grad = torch.randn_like(param)
    for name in ("adamw", "lion", "sophiag"):
        chosen = complete(dataclasses.replace(settings, hessian_batch_size=size, optimizer=name))
        optimizer = make_optimizer(updated, chosen, machine)
        functions[f"update_{name}"] = functools.partial(update, optimizer)
    estimate = [torch.rand_like(param) for param in parameters(optimizer)]
    functions["update_hessian"] = functools.partial(optimizer.update_hessian, estimate)
    calls = {name: functools.partial(measure, function, machine.device) for name, function in functions.items()}
    measured = alternate(calls, options.rounds)
    seconds = {name: measurement.seconds for name, measurement in measured.items()}

    def overhead(name: str, sequences: int) -> float:
        estimate = (sequences / size * seconds[name] + seconds["update_hessian"]) / settings.hessian_interval
        gradient = PAPER_BATCH / size * seconds["train"]
        return (gradient + seconds["update_sophiag"] + estimate) / (gradient + seconds["update_adamw"]) - 1

    result = {"sequences": size} | {f"seconds_{name}": value for name, value in seconds.items()}
    result |= {f"peak_bytes_{name}": measured[name].peak_bytes for name in ("train", *ESTIMATORS)}
    result |= {f"{name}_over_train": seconds[name] / seconds["train"] for name in ESTIMATORS}
    return result | {
        "sophia_over_adamw_fused": seconds["update_sophiag"] / seconds["update_adamw"],
        "lion_over_adamw_fused": seconds["update_lion"] / seconds["update_adamw"],
        **{f"overhead_{name}_{count}": overhead(name, count) for name, (_, count) in ESTIMATORS.items()},
    }


def update(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.999  # it changes at every step, as a schedule's does
    optimizer.step()
