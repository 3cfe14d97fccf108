"""What the benchmarks share: measurements in alternation, and the model on random tokens."""

import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils import collect_env

from run.machine import Machine
from run.settings import Settings
from tokens.token_files import TokenData, Tokens
from tokens.tokenizers import GPT2

WARM_UP = 3  # rounds before those that count


class Measurement(NamedTuple):
    seconds: float
    peak_bytes: int | None  # of CUDA's allocator, or on a CPU under Linux of the whole process


def measure(function: Callable[[], Any], device: torch.device) -> Measurement:
    """Call the function, and wait until the device is done."""
    linux = sys.platform == "linux"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif linux:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM
    started = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    seconds = time.perf_counter() - started
    if device.type == "cuda":
        return Measurement(seconds, torch.cuda.max_memory_allocated(device))
    kilobytes = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1] if linux else None
    return Measurement(seconds, kilobytes and 1024 * int(kilobytes))


def alternate(
    functions: dict[Any, Callable[[], Measurement]], rounds: int, warm_up: int = WARM_UP
) -> dict[Any, Measurement]:
    """Call all of them in turn, round after round. Returns the median seconds and the last peak of each."""
    taken: dict[Any, list[Measurement]] = {name: [] for name in functions}
    for _ in range(warm_up + rounds):
        for name, function in functions.items():
            taken[name].append(function())
    median = {name: statistics.median(m.seconds for m in taken[name][warm_up:]) for name in taken}
    return {name: Measurement(median[name], taken[name][-1].peak_bytes) for name in taken}


def random_tokens(settings: Settings) -> TokenData:
    ids = np.random.default_rng(0).integers(GPT2.vocab_size, size=100 * settings.block_size + 1, dtype=np.uint16)
    tokens = Tokens([ids], "random tokens")
    return TokenData(Path(), GPT2.name, GPT2.vocab_size, tokens, tokens, settings.block_size, has_meta=True)


def describe(machine: Machine) -> dict[str, Any]:
    """What figures were taken on, and with."""
    cuda = machine.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(machine.device) if cuda else machine.device.type,
        "driver": collect_env.get_nvidia_driver_version(collect_env.run),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "dtype": str(machine.dtype)[6:],
        "compile": machine.compile,
    }
