"""What the benchmarks share: a model, data, and timing in alternation."""

import ctypes
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from model import GPT, GPTConfig
from run import machine
from run.settings import Settings
from tokens.token_files import TokenData, Tokens

VOCAB_SIZE = 50257
WARM_UP = 3


def make_model(s: Settings, here: machine.Machine) -> GPT:
    torch.manual_seed(s.seed)
    vocab_size = random_tokens(s).padded_vocab_size
    model = GPT(
        GPTConfig(
            s.block_size,
            vocab_size,
            s.n_layer,
            s.n_head,
            s.n_embd,
            s.dropout,
            s.bias,
            s.scale_attn_by_inverse_layer_idx,
        )
    )
    model.checkpoint_activations = s.checkpoint_activations
    if here.compile:
        model.compile(dynamic=False)
    return model.to(here.device)


def random_tokens(s: Settings) -> TokenData:
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, 100 * s.block_size + 1, dtype=np.uint16)
    stream = Tokens([tokens], "random tokens")
    return TokenData(Path(), "gpt2", VOCAB_SIZE, stream, stream, s.block_size, True)


def alternate(
    functions: dict[str, Callable], here: machine.Machine, rounds: int, peaks: dict[str, int] | None = None
) -> dict[str, float]:
    """Median seconds of each function, all of them called in turn, round after round. `peaks` gets the bytes in use
    when they were the most during one more call: of CUDA's allocator, or of the whole process on a CPU under Linux.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(-WARM_UP, rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            synchronize(here)
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    for name, function in functions.items() if peaks is not None else ():
        reset_peak_memory(here)
        function()
        if (peak := peak_memory(here)) is not None:
            peaks[f"peak_bytes_{name}"] = peak
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize(here: machine.Machine) -> None:
    if here.device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak_memory(here: machine.Machine) -> None:
    synchronize(here)
    if here.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        if give_back := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's, of free memory
            give_back(0)
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM


def peak_memory(here: machine.Machine) -> int | None:
    if here.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        line = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(line[1]) * 1024
    return None
