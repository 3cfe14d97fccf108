"""The training step as train.py takes it: its speed beside other projects', and where its time goes."""

import functools
import multiprocessing
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from benchmarks import peers
from benchmarks.common import WARM_UP, Measurement, alternate, measure, random_tokens
from model import GPT
from records.checkpoint_writer import CheckpointWriter
from run.errors import UserError
from run.machine import Machine, set_up
from run.settings import Settings
from tokens.batches import Batches
from tokens.token_files import TokenData
from train import update
from training.curvature import Curvature
from training.meter import StepResult
from training.optimizers import make_optimizer
from training.parallel import DataParallel
from training.start import make_model, shape_of

TOP = 12  # operations that a profile lists


def our_update(
    settings: Settings, machine: Machine, data: TokenData
) -> tuple[Callable[[int], StepResult], GPT, torch.optim.Optimizer]:
    """The update of train.py, which takes the number of the step; its model, and its optimizer."""
    model, batches = make_model(settings, data, machine, None), Batches(data, settings, machine)
    optimizer, curvature = make_optimizer(model, settings, machine), Curvature(model, settings, machine, batches)
    writer = CheckpointWriter(Path(settings.out_dir), model, optimizer, settings, data, machine)
    parallel = DataParallel(model, machine)
    return lambda step: update(step, parallel, optimizer, batches, curvature, writer), model, optimizer


def our_step(settings: Settings) -> Callable[[bool], None]:
    """An update, with an estimate of curvature if told so."""
    update_number, _, _ = our_update(settings, set_up(settings), random_tokens(settings))
    numbers = {True: 1, False: 2}  # of the next updates with and without an estimate

    def step(with_estimate: bool) -> None:
        update_number(numbers[with_estimate])
        numbers[with_estimate] += settings.hessian_interval

    return step


class Contender:
    """A step in a process of its own, so that neither the memory nor the set-up of one project is another's."""

    def __init__(self, name: str, device: torch.device, estimates: bool, *build: Any):
        """`build` is a function and its arguments, which make the step there, and `estimates` whether it can."""
        self.name, self.device, self.estimates, self.build = name, device, estimates, build
        self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.seconds_to_first_step: float | None = None

    def step(self, with_estimate: bool) -> Measurement:
        started = time.perf_counter()
        try:
            measurement = self.process.submit(measure_step, with_estimate, self.device, *self.build).result()
        except Exception as error:
            raise UserError(f"the step of {self.name} failed: {type(error).__name__}: {error}") from None
        self.seconds_to_first_step = self.seconds_to_first_step or time.perf_counter() - started
        return measurement


def measure_step(with_estimate: bool, device: torch.device, *build: Any) -> Measurement:
    """In the process of a contender."""
    sys.stdout = sys.stderr  # where peers may print what they like
    return measure(functools.partial(built(*build), with_estimate), device)


@functools.cache
def built(function: Callable, *arguments: Any) -> Callable[[bool], None]:
    return function(*arguments)


def train(options: Namespace, settings: Settings, machine: Machine) -> dict[str, Any]:
    """Seconds and memory of a step. Sophia's is the mean over hessian_interval steps, of which one estimates."""
    contenders = [Contender("ours", machine.device, settings.uses_curvature, our_step, settings)]
    for folder in options.peer:
        for name, theirs in peers.machines(folder, machine).items():
            build = peers.step, settings, theirs, folder
            contenders.append(Contender(name, machine.device, peers.is_sophia(folder), *build))
    rate = matmul_rate(machine, options.rounds)
    # a step with an estimate comes first, as in a run
    dues = [(c, due) for c in contenders for due in sorted({c.estimates, False}, reverse=True)]
    steps = {(c, due): functools.partial(c.step, due) for c, due in dues}
    measured = alternate(steps, options.rounds)
    tokens = settings.batch_size * settings.block_size
    with torch.device("meta"):
        flops = tokens * GPT(shape_of(settings, random_tokens(settings), None)).flops_per_token()
    peak_flops = machine.peak_flops()
    result = {"tokens_per_step": tokens, "matmul_flops_per_second": rate}
    for contender in contenders:
        name, (seconds, peak) = contender.name, measured[contender, contender.estimates]
        if contender.estimates:
            plain = measured[contender, False].seconds
            result |= {f"seconds_plain_{name}": plain, f"seconds_with_estimate_{name}": seconds}
            seconds = plain + (seconds - plain) / settings.hessian_interval
            result[f"curvature_share_{name}"] = 1 - plain / seconds
        result |= {
            f"seconds_{name}": seconds,
            f"tokens_per_second_{name}": tokens / seconds,
            f"mfu_{name}": peak_flops and flops / seconds / peak_flops,
            f"mfu_of_matmul_rate_{name}": flops / seconds / rate,
            f"peak_bytes_{name}": peak,
            f"seconds_to_first_step_{name}": contender.seconds_to_first_step,
        }
        if name != "ours":
            result[f"speed_over_{name}"] = seconds / result["seconds_ours"]
    return result | ({"notes": peers.NOTES} if options.peer else {})


def matmul_rate(machine: Machine, rounds: int) -> float:
    """FLOP/s of a product of large square matrices in the machine's format."""
    size = 8192 if machine.device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=machine.device, dtype=machine.dtype) for _ in range(2))
    products = {"product": lambda: measure(lambda: left @ right, machine.device)}
    return 2 * size**3 / alternate(products, rounds)["product"].seconds


def profile(options: Namespace, settings: Settings, machine: Machine) -> dict[str, Any]:
    """Shares of the operations in the time of `--rounds` steps without an estimate, and the share in which none ran:
    no kernel on CUDA, no operator or compiled kernel on a CPU.
    """
    if options.trace and not os.access(options.trace.parent, os.W_OK):
        raise UserError(f"--trace {options.trace} cannot be written")
    step = our_step(settings)
    measure(lambda: [step(False) for _ in range(WARM_UP)], machine.device)
    with torch.profiler.profile() as profiler:
        seconds = measure(lambda: [step(False) for _ in range(options.rounds)], machine.device).seconds
    if options.trace:
        profiler.export_chrome_trace(str(options.trace))
    averages = [average for average in profiler.key_averages() if not average.is_user_annotation]
    if machine.device.type == "cuda":
        times = {a.key: a.self_device_time_total for a in averages if a.device_type == DeviceType.CUDA}
    else:  # what has other names is Python's and autograd's own
        names = "aten::", "## Call CompiledFxGraph"
        times = {a.key: a.self_cpu_time_total for a in averages if a.key.startswith(names)}
    shares = {f"share {name}": time / 1e6 / seconds for name, time in sorted(times.items(), key=lambda x: -x[1])}
    idle = 1 - sum(shares.values())
    return {"seconds_step": seconds / options.rounds, "idle_share": idle} | dict(list(shares.items())[:TOP])
