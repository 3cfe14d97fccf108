"""What training would do on one H100, on the device of tests/cuda/fake_cuda.py, which is not there.

    python -m tests.cuda.scenarios passes [CONFIG.py …] [--name=value …]

prints, as JSON, what a micro-batch of training takes, an update of the optimizer and, with Sophia, an estimate of
curvature: bytes of memory, bytes that Triton's kernels move, calls of library functions. Settings are train.py's.

The tests' own scenarios are `run` and `checks`.
"""

import contextlib
import dataclasses
import gc
import json
import os
import sys
import types
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tests.cuda import fake_cuda  # isort: skip - before torch

import torch
from torch._dynamo.utils import counters

import sample
import train
from run.machine import set_up
from run.settings import Settings, read
from tests.conftest import OPTIMIZERS, TINY, arguments, text_dataset
from tools.benchmark import random_tokens
from training import checkpoint_writer
from training.batches import Batches
from training.curvature import Curvature
from training.meter import StepResult
from training.optimizers import Optimizer, make_optimizer, parameters
from training.start import make_model

UPDATE = train.update
STEPS = 10  # the next step begins with an estimate
PASSES = {  # of the 125M model, with fewer layers
    "sophiah": ["config/gpt2_small_sophiah.py", "--n_layer=1", "--micro_batch_size=24"],
    "sophiag": ["config/gpt2_small_sophiag.py", "--n_layer=1", "--micro_batch_size=12"],
    "checkpointed": ["config/gpt2_small.py", "--n_layer=2", "--micro_batch_size=96", "--checkpoint_activations=True"],
}
RUN = TINY | {
    "n_embd": 64, "block_size": 64, "max_iters": STEPS, "eval_interval": 5, "log_interval": 3, "device": "cuda",
    "dtype": "auto", "compile": True,
}  # fmt: skip


def passes(settings: Settings) -> dict[str, dict[str, Any]]:
    """What is taken by "training", one micro-batch; "update", one of the optimizer; and, with Sophia, "curvature", an
    estimate from as many sequences (in whole groups) and the update of its average. The optimizer's state is there
    already; so are the gradients, but not during the estimate.
    """
    size = settings.micro_batch_size
    settings = dataclasses.replace(settings, batch_size=size, device="cuda")
    usages = {}
    with fake_cuda.Gpu() as gpu:
        machine, data = set_up(settings), random_tokens(settings)
        model, batches = make_model(settings, data, machine, None), Batches(data, settings, machine)
        optimizer = make_optimizer(model, settings, machine)
        train.accumulate_gradients(1, model, batches)
        optimizer.step()
        with gpu.measuring() as usages["training"]:
            train.accumulate_gradients(2, model, batches)
        with gpu.measuring() as usages["update"]:
            optimizer.step()
        model.zero_grad()
        if settings.uses_curvature:
            group = settings.hessian_group_size if settings.hessian_estimator == "averaged" else 1
            sequences = max(size // group, 1) * group
            settings = dataclasses.replace(settings, batch_size=sequences, hessian_batch_size=sequences)
            curvature = Curvature(model, settings, machine, Batches(data, settings, machine))
            with gpu.measuring() as usages["curvature"]:
                optimizer.update_hessian(curvature.estimate(1, parameters(optimizer)))
    return {name: vars(usage) for name, usage in usages.items()}


def run(folder: str, *names: str) -> dict[str, Any]:
    """For each of these optimizers a run of train.py, text from its checkpoint, and two more steps not compiled."""
    dataset = text_dataset(Path(folder, "data"))
    checkpoint_writer.ThreadPoolExecutor = SameThread
    results = {}
    for name in names:
        out_dir = Path(folder, name)
        layers = 2 if name in ("adamw", "sophiah") else 1  # a second one takes time, and shows the same each time
        options = {"dataset": dataset, "out_dir": out_dir, "n_layer": layers} | OPTIMIZERS[name]
        command = arguments(**RUN | options)
        torch.compiler.reset()
        counters.clear()
        with fake_cuda.Gpu() as gpu:
            result = {"live_bytes": {}, "updates": []}
            train.update = watched_update(gpu, result)
            call(train, command)
            result |= {"waits": gpu.waits, "graphs": [(graph.name, graph.step) for graph in gpu.graphs]}
            gpu.waits = []
            options = arguments(out_dir=out_dir, device="cuda", max_new_tokens=3, top_k=5, start="a")
            call(sample, [*options, "--ignore_eos"])
            result["waits_of_sampling"] = gpu.waits
            gpu.waits = []
            eager = ["--init_from=resume", f"--max_iters={STEPS + 2}", "--compile=False"]
            if name == "sophiah":  # without an estimate: eager forward mode fails with numbers and fake tensors
                eager.append("--hessian_interval=20")
            call(train, command + eager)
            result["waits_of_eager_steps"] = gpu.waits
        result["graph_breaks"] = dict(counters["graph_break"])
        result["rows"] = [json.loads(row)["step"] for row in (out_dir / "metrics.jsonl").read_text().splitlines()]
        results[name] = result
    return results


def call(script: types.ModuleType, command: list[str]) -> None:
    sys.argv = [script.__file__, *command]
    script.main()


def watched_update(gpu: fake_cuda.Gpu, result: dict[str, Any]) -> Callable:
    """train.update, which tells the device of its step and notes what it finds."""

    def update(step: int, model: torch.nn.Module, optimizer: Optimizer, *rest: Any) -> StepResult:
        gpu.step = step
        gc.collect()  # fake tensors in circles
        result["live_bytes"][step] = gpu.live_bytes  # before it
        if step == STEPS and isinstance(optimizer, torch.optim.Optimizer):  # Muon's is two
            measuring = gpu.measuring()
            optimizer.register_step_pre_hook(lambda *_: result["updates"].append(vars(measuring.__enter__())))
            optimizer.register_step_post_hook(lambda *_: measuring.__exit__(None, None, None))
        return UPDATE(step, model, optimizer, *rest)

    return update


class SameThread:
    """A ThreadPoolExecutor that does all at once: fake tensors are for one thread."""

    def __init__(self, _: int):
        pass

    def submit(self, function: Callable, *args: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*args))
        return future


def checks() -> dict[str, Any]:
    """Small programs about which it is known what the device has to say; then `passes` of PASSES."""
    with fake_cuda.Gpu() as gpu:
        check_waits(gpu)
        check_graphs(gpu)
        check_memory(gpu)
    found = {}
    for name, options in PASSES.items():
        torch.compiler.reset()
        found[name] = passes(read(options))
    return found


def check_waits(gpu: fake_cuda.Gpu) -> None:
    """Whether each of these waits, or is an error."""
    x, host, pinned = torch.ones(4, device="cuda"), torch.ones(4), torch.ones(4).pin_memory()
    for program, expected in (
        (lambda: x.sum().item(), True),
        (lambda: bool((x > 0).all()), True),
        (lambda: x.tolist(), True),
        (lambda: x.cpu(), True),
        (lambda: x.to("cpu", non_blocking=True), False),
        (lambda: host.copy_(x), True),
        (lambda: pinned.copy_(x, non_blocking=True), False),
        (lambda: host.to("cuda"), True),
        (lambda: host.to("cuda", non_blocking=True), True),
        (lambda: pinned.to("cuda"), True),
        (lambda: pinned.to("cuda", non_blocking=True), False),
        (lambda: torch.zeros(4, device="cuda") + x * 2, False),
        (lambda: torch.tensor([1, 2], device="cuda"), True),
        (lambda: (x > 0).nonzero(), "DynamicOutputShapeException"),
        (lambda: x + host, "FakeTensorDeviceMismatchError"),
    ):
        gpu.waits = []
        try:
            program()
            found = bool(gpu.waits)
        except Exception as error:
            found = type(error).__name__
        assert found == expected, (program.__code__.co_firstlineno, found)


def check_graphs(gpu: fake_cuda.Gpu) -> None:
    """A function that breaks its graph, and is called with two shapes."""

    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x.sin()
        print("a line", file=sys.stderr)
        return x.cos()

    counters.clear()
    compiled = torch.compile(broken, dynamic=False)
    for gpu.step, (count, graphs) in enumerate(((4, 2), (4, 2), (8, 4))):
        compiled(torch.ones(count, device="cuda"))
        assert len(gpu.graphs) == graphs  # before and after the break, for each shape
    assert gpu.graphs[-1].step == 2
    assert counters["graph_break"].total() > 0


def check_memory(gpu: fake_cuda.Gpu) -> None:
    """Two programs on tensors of 1 MiB."""
    weight = torch.ones(512, 512, device="cuda", requires_grad=True)

    def pointwise(x: torch.Tensor) -> torch.Tensor:
        return (x.exp() - x.sin()).exp()

    def products(x: torch.Tensor) -> torch.Tensor:
        return x @ weight @ weight @ weight

    def mib(called: Callable) -> list[float]:
        """Forward and backward at most, in the end, and moved by kernels."""
        x, gradient = (torch.ones(512, 512, device="cuda", requires_grad=True) for _ in range(2))
        weight.grad = None
        with gpu.measuring() as forward:
            y = called(x)
        with gpu.measuring() as backward:
            y.backward(gradient)
        moved = forward.bytes_moved + backward.bytes_moved
        return [x / 2**20 for x in (forward.peak_bytes, backward.peak_bytes, gpu.live_bytes, moved)]

    # weight, x and the gradient of y are there throughout. Eager: exp, sin and their difference, or the result.
    forward, _, end, _ = mib(pointwise)
    assert (forward, end) == (3 + 3, 5)  # y and the gradient of x are left
    # compiled: y; the gradient of x; one kernel reads x, another one x, y and the gradient of y
    assert mib(torch.compile(pointwise, dynamic=False)) == [3 + 1, 3 + 2, 5, 2 + 4]
    # two products and y are kept for the backward pass, and let go one by one, where two gradients need room
    assert mib(products)[0] == 3 + 3
    assert mib(torch.compile(products, dynamic=False))[:3] == [3 + 3, 3 + 3 + 2, 3 + 1 + 2]  # left: y, two gradients


SCENARIOS = {
    "passes": lambda *settings: passes(read(list(settings))),
    "run": run,
    "checks": checks,
}

if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = SCENARIOS[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(answer, indent=4), flush=True)
    os._exit(0)  # as autograd's thread for the device may abort an interpreter that is being taken down
