"""Measure training and sampling: medians over rounds in alternation, after a warm-up, on random tokens.

    python -m tools.benchmark train       the training step, beside --peer DIR: nanoGPT, the released Sophia
    python -m tools.benchmark curvature   what Sophia costs: curvature passes and updates, against training and AdamW
    python -m tools.benchmark sample      500 tokens after 16, in float32; the --peer is nanoGPT with the same weights

Other arguments are config files and settings, as train.py takes them; batch_size is one micro-batch if not given.
"""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.token_files import TokenData, Tokens
from data.tokenizers import GPT2
from model import GPT
from run import errors
from run.machine import Machine, set_up
from run.options import Parser, between
from run.settings import Settings, complete, read
from studies import peers
from train import accumulate_gradients, update
from training.batches import Batches, check_batch
from training.curvature import Curvature
from training.optimizers import make_optimizer, parameters
from training.start import make_model, shape_of, wrap

WARM_UP = 3  # rounds before those that count
PAPER_BATCH = 480  # sequences of a step
PROMPT, TOKENS = 16, 500  # in a text
# The settings of each estimator, and how many sequences of a step it takes
ESTIMATORS = {
    "hutchinson": ({"optimizer": "sophiah"}, 32),
    "gnb": ({"optimizer": "sophiag", "hessian_estimator": "paper"}, 240),
    "gnb_averaged": ({"optimizer": "sophiag", "hessian_estimator": "averaged"}, 32),
}


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, until the device is done."""
    started = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started


def alternate(functions: dict[Any, Callable[[], float]], rounds: int, warm_up: int = WARM_UP) -> dict[Any, float]:
    """Call all of them in turn, round after round. Returns the median seconds of each."""
    taken: dict[Any, list[float]] = {name: [] for name in functions}
    for _ in range(warm_up + rounds):
        for name, function in functions.items():
            taken[name].append(function())
    return {name: statistics.median(seconds[warm_up:]) for name, seconds in taken.items()}


def random_tokens(settings: Settings) -> TokenData:
    ids = np.random.default_rng(0).integers(GPT2.vocab_size, size=100 * settings.block_size + 1, dtype=np.uint16)
    tokens = Tokens([ids], "random tokens")
    return TokenData(Path(), GPT2.name, GPT2.vocab_size, tokens, tokens, settings.block_size)


def our_step(settings: Settings) -> Callable[[bool], None]:
    """The update of train.py, with an estimate of curvature if told so."""
    machine, data = set_up(settings), random_tokens(settings)
    model, batches = make_model(settings, data, machine, None), Batches(data, settings, machine)
    optimizer, curvature = make_optimizer(model, settings, machine), Curvature(model, settings, machine, batches)
    parallel, numbers = wrap(model, machine), {True: 1, False: 2}  # the next updates with and without an estimate

    def step(with_estimate: bool) -> None:
        update(numbers[with_estimate], parallel, optimizer, batches, curvature)
        numbers[with_estimate] += settings.hessian_interval

    return step


class Contender:
    """A step in a process of its own, so that neither the memory nor the set-up of one project is another's."""

    def __init__(self, name: str, device: torch.device, estimates: bool, *build: Any):
        """`build` is a function and its arguments, which make the step there, and `estimates` whether it can."""
        self.name, self.device, self.estimates, self.build = name, device, estimates, build
        self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.seconds_to_first_step: float | None = None
        self.peak_bytes = 0

    def step(self, with_estimate: bool) -> float:
        started = time.perf_counter()
        try:
            seconds, self.peak_bytes = self.process.submit(take, with_estimate, self.device, *self.build).result()
        except Exception as error:
            raise errors.UserError(f"the step of {self.name} failed: {type(error).__name__}: {error}") from None
        self.seconds_to_first_step = self.seconds_to_first_step or time.perf_counter() - started
        return seconds


def take(with_estimate: bool, device: torch.device, *build: Any) -> tuple[float, int]:
    """In the process of a contender: seconds of a step, and the most bytes so far, of the GPU or of the process."""
    sys.stdout = sys.stderr  # where peers may print what they like
    seconds = timed(functools.partial(built(*build), with_estimate), device)
    if device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated(device)
    return seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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
    # a step with an estimate comes first, as in a run
    dues = [(c, due) for c in contenders for due in sorted({c.estimates, False}, reverse=True)]
    measured = alternate({(c, due): functools.partial(c.step, due) for c, due in dues}, options.rounds)
    tokens = settings.batch_size * settings.block_size
    with torch.device("meta"):
        flops = tokens * GPT(shape_of(settings, random_tokens(settings), None)).flops_per_token()
    peak_flops, result = machine.peak_flops(), {"tokens_per_step": tokens}
    for contender in contenders:
        name, plain = contender.name, measured[contender, False]
        extra = (measured[contender, contender.estimates] - plain) / settings.hessian_interval
        seconds = plain + extra
        result |= {
            f"seconds_{name}": seconds,
            f"curvature_share_{name}": extra / seconds,
            f"tokens_per_second_{name}": tokens / seconds,
            f"mfu_{name}": peak_flops and flops / seconds / peak_flops,
            f"peak_bytes_{name}": contender.peak_bytes,
            f"seconds_to_first_step_{name}": contender.seconds_to_first_step,
        }
        if name != "ours":
            result[f"speed_over_{name}"] = seconds / result["seconds_ours"]
    return result | ({"notes": peers.NOTES} if options.peer else {})


def curvature(options: Namespace, settings: Settings, machine: Machine) -> dict[str, Any]:
    """Seconds of passes over batch_size sequences and of updates, and from these Sophia's overheads over AdamW."""
    size, data = settings.batch_size, random_tokens(settings)
    model, updated = (make_model(settings, data, machine, None) for _ in range(2))
    batches, params = Batches(data, settings, machine), list(model.parameters())

    def gradients() -> None:
        accumulate_gradients(1, model, batches)
        model.zero_grad()

    functions = {"train": gradients}
    for name, (changes, _) in ESTIMATORS.items():
        chosen = complete(dataclasses.replace(settings, hessian_batch_size=size, **changes))
        check_batch(chosen, ranks=1)
        estimates = Curvature(model, chosen, machine, Batches(data, chosen, machine))
        functions[name] = functools.partial(estimates.estimate, 1, params)
    for param in updated.parameters():
        param.grad = torch.randn_like(param)
    for name in ("adamw", "lion", "muon", "sophiag"):
        chosen = complete(dataclasses.replace(settings, hessian_batch_size=size, optimizer=name))
        optimizer = make_optimizer(updated, chosen, machine)
        functions[f"update_{name}"] = functools.partial(update_alone, optimizer)
    estimate = [torch.rand_like(param) for param in parameters(optimizer)]
    functions["update_hessian"] = functools.partial(optimizer.update_hessian, estimate)
    calls = {name: functools.partial(timed, function, machine.device) for name, function in functions.items()}
    seconds = alternate(calls, options.rounds)

    def overhead(name: str, sequences: int) -> float:
        estimate = (sequences / size * seconds[name] + seconds["update_hessian"]) / settings.hessian_interval
        gradient = PAPER_BATCH / size * seconds["train"]
        return (gradient + seconds["update_sophiag"] + estimate) / (gradient + seconds["update_adamw"]) - 1

    updates = ("lion", "muon", "sophiag")
    return {
        "sequences": size,
        **{f"seconds_{name}": value for name, value in seconds.items()},
        **{f"{name}_over_train": seconds[name] / seconds["train"] for name in ESTIMATORS},
        **{f"{name}_over_adamw_fused": seconds[f"update_{name}"] / seconds["update_adamw"] for name in updates},
        **{f"overhead_{name}_{count}": overhead(name, count) for name, (_, count) in ESTIMATORS.items()},
    }


def update_alone(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.999  # it changes at every step, as a schedule's does
    optimizer.step()


def sample(options: Namespace, settings: Settings, machine: Machine) -> dict[str, Any]:
    """Seconds and tokens a second of one text."""
    ours = GPT(shape_of(settings, random_tokens(settings), None))
    models = {"ours": ours}
    for folder in options.peer:
        peers.machines(folder, machine)  # refuses what is no peer
        with contextlib.redirect_stdout(sys.stderr):  # where peers may print what they like
            theirs = models[folder.resolve().name] = peers.model(settings, folder)
        theirs.transformer.load_state_dict(ours.state_dict())
    prompt = torch.randint(ours.config.vocab_size, (1, PROMPT), device=machine.device)
    functions = {}
    for name, model in models.items():
        generate = functools.partial(model.to(machine.device).eval().generate, prompt, TOKENS, top_k=200)
        functions[name] = functools.partial(timed, generate, machine.device)
    result: dict[str, Any] = {"tokens": TOKENS, "dtype": "float32", "compile": False}
    for name, seconds in alternate(functions, options.rounds, warm_up=1).items():
        result |= {f"seconds_{name}": seconds, f"tokens_per_second_{name}": TOKENS / seconds}
        if name != "ours":
            result[f"speed_over_{name}"] = seconds / result["seconds_ours"]
    return result


def describe(machine: Machine) -> dict[str, Any]:
    """What figures were taken on, and with."""
    return {
        "device": device_name(machine.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "dtype": str(machine.dtype)[6:],
        "compile": machine.compile,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    amx = torch.cpu._is_amx_tile_supported()  # with which products are three times as fast and the rest is not
    return f"{(names or [platform.processor()])[0]}, {torch.get_num_threads()} threads{', AMX' if amx else ''}"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("benchmark", choices=["train", "curvature", "sample"])
    parser.add_argument("--rounds", type=between(1), default=10, help="rounds that are timed (default 10)")
    parser.add_argument("--peer", nargs="+", type=Path, metavar="DIR", default=[], help="what to compare with")
    parser.add_argument("--json", action="store_true", help="print the result on one line")
    options, arguments = parser.parse_known_args()
    settings = read([f"--batch_size={read(arguments).micro_batch_size}", *arguments])
    check_batch(settings, ranks=1)
    machine = set_up(settings)
    measure = {"train": train, "curvature": curvature, "sample": sample}[options.benchmark]
    result = describe(machine) | {"rounds": options.rounds} | measure(options, settings, machine)
    print(json.dumps(result, indent=None if options.json else 4))


if __name__ == "__main__":
    errors.run(main)
