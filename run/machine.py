"""Where a run computes: device, number format, compiler, and the rank it has in a torchrun job."""

import contextlib
import hashlib
import os
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._functorch.config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._triton import has_triton
from tqdm import tqdm

from run.errors import RankError, UserError
from run.ranks import Ranks, environment, join
from run.settings import Settings

# TFLOP/s of dense bfloat16 products with float32 sums, by model. Sources: NVIDIA's data sheets (half of what they give
# with sparsity) and, for the RTX cards, its white papers on GA102, Ada and RTX Blackwell.
PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "GH200": 989, "H200": 989, "H200 NVL": 835, "H100": 989, "H100 NVL": 835,
    "H100 PCIe": 756, "A100": 312, "A100 PCIe": 312, "L40S": 362, "L4": 121,
    "RTX PRO 6000 Blackwell Workstation Edition": 503.8, "RTX 6000 Ada Generation": 364.2,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71,
}  # fmt: skip
SHORT_CONTEXT = 256  # tokens, up to which a CPU is faster with plain attention than with PyTorch's fused one


@dataclass(frozen=True)
class Machine:
    device: torch.device
    dtype: torch.dtype
    compile: bool
    ranks: Ranks = Ranks()
    plain_attention: bool = False

    @contextlib.contextmanager
    def forward_context(self):
        """Around every forward pass: products in `dtype`, and the attention kernel that is fast here."""
        attention = sdpa_kernel(SDPBackend.MATH) if self.plain_attention else contextlib.nullcontext()
        with attention, torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            yield

    def peak_flops(self) -> float | None:
        """The data-sheet peak of this device in FLOP/s for bfloat16, or None where it is not known or not used."""
        if self.device.type != "cuda" or self.dtype != torch.bfloat16:
            return None
        name = torch.cuda.get_device_name(self.device)
        model = re.sub(r"NVIDIA |GeForce |[ -](SXM4|PCIE|\d+GB?|HBM3e?)\b", "", name)  # vendor, form factor, memory
        return 1e12 * PEAK_TFLOPS[model] if model in PEAK_TFLOPS else None

    def note(self, text: str) -> None:
        if self.ranks.is_main:
            tqdm.write(text, file=sys.stderr)  # which keeps clear of a progress bar


def find_device(name: str) -> torch.device:
    """The device a `device` setting means on this machine; UserError where there is none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:(0|[1-9]\d?))?", name):
        raise UserError(f"device = {name!r}: must be auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type != "cpu" and not getattr(torch, device.type).is_available():
        raise UserError(f"device = {name!r}: this machine has no {device.type.upper()} device; use auto or cpu")
    if device.type != "cuda":
        return device
    if device.index is not None and environment()[1] > 1:
        raise UserError(f"device = {name!r}: each rank takes its own device; use --device=cuda")
    index = int(os.environ.get("LOCAL_RANK") or 0) if device.index is None else device.index
    if index >= (count := torch.cuda.device_count()):
        raise RankError(f"device = {name!r}: device {index} is asked for, but there are {count}, numbered from 0")
    return torch.device("cuda", index)


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
    if device.type == "cuda" and not has_triton():
        return False
    names = (os.environ.get("CXX"), "g++", "clang++")
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return headers and any(shutil.which(name) for name in names if name)


def set_matmul_precision(settings: Settings, device: torch.device) -> None:
    if device.type == "cuda":  # the switch is oneDNN's too, and would change what a CPU computes
        torch.set_float32_matmul_precision(settings.float32_matmul_precision)


def separate_compile_cache() -> None:
    """Give every kind of processor a folder of its own in torch.compile's cache, to be called before it compiles."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # slow to import, and not always needed

    # PyTorch's keys leave the instruction set out (2.13): a machine with AVX2 would take code for AVX-512, which
    # computes half of its numbers there
    kind = torch.backends.cpu.get_cpu_capability(), sorted(torch.cpu.get_capabilities().items())
    name = hashlib.sha256(repr(kind).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir())
    if folder.name != name:  # as it is in a process that another one started
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / name)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cores() -> None:
    """Give torch.compile as many workers as this rank has cores for itself; to be called before it is imported."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # each would start up to 32 workers by itself
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, min(32, cores() // local_ranks))))


def set_up(settings: Settings) -> Machine:
    """Find the device, the number format and the compiler, and join the other ranks if there are any."""
    if settings.compile:
        os.environ.setdefault("TORCHINDUCTOR_CPP_USE_DECOMPOSE_TANH", "1")  # GELU in half the time on a CPU
        share_cores()
        separate_compile_cache()
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or products are refused; read when CUDA starts
        torch.use_deterministic_algorithms(True)  # and torch.compile's own switch
    device = find_device(settings.device)
    if settings.backend == "nccl" and device.type != "cuda":
        raise UserError(f"backend = nccl: it joins CUDA devices, not {device.type}; use --backend=auto")
    dtype = find_dtype(settings.dtype, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    set_matmul_precision(settings, device)
    torch.set_flush_denormal(True)  # denormal numbers slow some CPU runs by half
    plain_attention = device.type == "cpu" and dtype == torch.bfloat16 and settings.block_size <= SHORT_CONTEXT
    # without this PyTorch computes plain attention in float32; despite its name the flag is a CPU's too
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(plain_attention)
    # without this, attention that is compiled and checkpointed draws its dropout on CUDA from generators that
    # torch.manual_seed does not set (torch 2.13): a resumed run would draw other masks
    torch._functorch.config.graphsafe_rng_functionalization = False
    compile = settings.compile and has_compiler(device)
    machine = Machine(device, dtype, compile, join(device, settings.backend, settings.timeout), plain_attention)
    if settings.compile and not compile:
        machine.note("no compiler found for torch.compile: going on without it, which is slower")
    return machine
