"""Where a run computes: device, number format, compiler, and the rank it has in a torchrun job."""

import contextlib
import ctypes
import os
import platform
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from run import ranks
from run.errors import RankError, UserError
from run.ranks import Ranks
from run.settings import Settings

# Dense bfloat16 matrix-multiply peaks of data sheets, FLOP/s, by words of the device's name
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Machine:
    device: torch.device
    dtype: torch.dtype
    compile: bool
    ranks: Ranks = Ranks()

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def peak_flops(self) -> float | None:
        """The data-sheet peak of this device in FLOP/s for bfloat16, or None where it is not known or not used."""
        if self.device.type != "cuda" or self.dtype != torch.bfloat16:
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((peak for words, peak in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", name)), None)

    def note(self, text: str) -> None:
        if self.ranks.is_main:
            tqdm.write(text, file=sys.stderr)  # which keeps clear of a progress bar


def find_device(name: str) -> torch.device:
    """The device a `device` setting means on this machine; UserError where there is none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device = {name!r}: must be auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device = {name!r}: this machine has no CUDA device; use --device=auto or --device=cpu")
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise RankError(f"device = {name!r}: device {index} is asked for, but there are {count}, numbered from 0")
        if device.index is not None and ranks.environment()[1] > 1:
            raise UserError(f"device = {name!r}: of several ranks each takes its own device; use --device=cuda")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device = {name!r}: this machine has no MPS device; use --device=auto or --device=cpu")
    if device.type not in ("cpu", "mps"):
        raise UserError(f"device = {name!r}: must be auto, cpu, cuda, cuda:N or mps")
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format of matrix products; `auto` is bfloat16 where the device multiplies it in hardware."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can build code for the device: a C++ compiler, Python's headers, and Triton on CUDA."""
    if device.type == "cuda" and not torch.utils._triton.has_triton():
        return False
    names = (os.environ.get("CXX"), "g++", "clang++", "cl" if platform.system() == "Windows" else None)
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return headers and any(shutil.which(name) for name in names if name)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next allocation, as PyTorch does on CUDA, unless the environment tells it
    something (MALLOC_…). Large blocks that go back to the system come again page by page, zeroed, which takes time;
    kept, they take more memory, as a block may not fit where another was (docs/performance.md has both).
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def set_up(settings: Settings) -> Machine:
    """Find the device, the number format and the compiler, and join the other ranks if there are any."""
    device = find_device(settings.device)
    if settings.backend == "nccl" and device.type != "cuda":
        raise UserError(f"backend = nccl: it joins CUDA devices, not {device.type}; use --backend=auto")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_flush_denormal(True)  # denormal numbers slow some CPU runs by half
    if device.type == "cpu":
        keep_freed_memory()
    machine = Machine(
        device=device,
        dtype=find_dtype(settings.dtype, device),
        compile=settings.compile and has_compiler(device),
        ranks=ranks.join(device, settings.backend, settings.timeout),
    )
    if settings.compile and not machine.compile:
        machine.note("no compiler found for torch.compile: going on without it, which is slower")
    return machine
