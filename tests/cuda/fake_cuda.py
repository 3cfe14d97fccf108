"""A CUDA device that is not there, for a build of PyTorch without CUDA: one H100 whose tensors are fake. They have a
shape, a type and a device but no numbers; tensors of the host stay real. torch.compile goes all the way to Inductor's
Triton source, and then does as if it ran.

    from tests.cuda import fake_cuda  # before torch, so in a process of its own

    with fake_cuda.Gpu() as gpu, gpu.measuring() as usage:
        …                        # device="cuda" works, and a tensor on the wrong device is an error
    gpu.graphs                   # what torch.compile made
    gpu.waits                    # where the host waited for the device
    usage.peak_bytes             # the most that tensors took at a time

Memory is that of tensors: neither the allocator's rounding nor what library functions allocate for themselves is in it.
It needs g++ and the package triton, in the folder `triton` of the virtual environment (`make .venv/triton`). It reaches
into torch's internals, as they are in version 2.13.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import math
import os
import subprocess
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent


def load_guard() -> None:
    """Build and load fake_cuda_guard.cpp. torch looks for what it registers once, while it is imported."""
    if "torch" in sys.modules:
        raise ImportError("tests.cuda.fake_cuda must be imported before torch")
    torch_folder = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    source = Path(__file__).with_name("fake_cuda_guard.cpp")
    key = hashlib.sha256(source.read_bytes() + (torch_folder / "version.py").read_bytes()).hexdigest()[:16]
    library = ROOT / ".pytest_cache" / f"fake_cuda_guard_{key}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        scratch = library.with_suffix(f".{os.getpid()}")
        includes = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include"]
        command = ["g++", "-shared", "-fPIC", "-std=c++20", "-O1", source, *(f"-I{path}" for path in includes)]
        command += [f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run([*command, "-o", scratch], check=True)
        scratch.rename(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


load_guard()
# Inductor's settings as variables, which reach every thread: autograd compiles in one of its own
os.environ |= {
    "TORCHINDUCTOR_PROFILE": "1",  # writes beside each kernel the bytes that it moves
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TORCHINDUCTOR_SHAPE_PADDING": "0",  # it times products
    "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
    "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
}

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import arg_tree_leaves, tree_map_only  # noqa: E402

from tests.cuda.inductor_graph import Graph, stop_at_source  # noqa: E402

aten = torch.ops.aten
H100 = types.SimpleNamespace(  # what torch asks of a device's properties
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536, gcnArchName="",
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
)  # fmt: skip


def pretend() -> None:
    """Have torch.cuda answer as it does where there is one H100, and Triton be found."""
    sys.path.append(str(Path(sys.prefix, "triton")))
    stream = types.SimpleNamespace(stream_id=0, device_index=0, device_type=1, cuda_stream=0)
    for name, answer in {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (H100.major, H100.minor),
        "get_device_properties": H100,
        "_get_device_properties": H100,
        "get_device_name": H100.name,
        "set_device": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "_lazy_init": None,
        "current_stream": stream,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for name in ("Stream", "Event", "stream"):
        setattr(torch.cuda, name, getattr(torch.cpu, name))  # which do nothing
    torch.cuda.default_generators = (torch.Generator("cuda"),)
    for name, answer in {"setDevice": None, "getDevice": 0, "getDeviceCount": 1, "getCurrentRawStream": 0}.items():
        setattr(torch._C, f"_cuda_{name}", lambda *_, answer=answer: answer)
    torch.version.cuda = "12.9"
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") copies where `Gpu` sees it


pretend()


class Wait(NamedTuple):
    """A moment at which the host waits until the device has done all it was told."""

    step: int
    what: str  # the operation
    where: str  # the project's function that asked for it


@dataclass
class Usage:
    """What a part of a program took. `kernels` and the bytes they move are Triton's; `calls` are of library functions
    in compiled graphs; `eager` are the operations outside of these, which start one or more kernels each.
    """

    resident_bytes: int  # of the tensors that were there when it began
    peak_bytes: int  # of all tensors, at the worst moment
    kernels: int = 0
    bytes_moved: float = 0.0
    calls: Counter[str] = field(default_factory=Counter)
    eager: Counter[str] = field(default_factory=Counter)


class Gpu(TorchDispatchMode):
    """The device, as long as this context lasts, for one thread and autograd's. `step` is for the caller to set; graphs
    and waits note it.
    """

    supports_higher_order_operators = True  # of which the graph of a checkpointed block has one

    def __init__(self) -> None:
        super().__init__()
        from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

        # without a device constants stay on the host; it asks torch.cuda, which says here that there is one
        FakeTensorMode.avoid_device_init = property(lambda mode: True)
        self.mode, self.FakeTensor = FakeTensorMode(), FakeTensor
        self.step = 0
        self.graphs: list[Graph] = []
        self.waits: list[Wait] = []
        self.usage = Usage(0, 0)
        self._storages: dict[int, weakref.ref] = {}  # that are alive
        self.live_bytes = 0  # of tensors on the device
        self._in_graph = False

    def __enter__(self) -> "Gpu":
        stop_at_source(self._take)
        return super().__enter__()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @contextlib.contextmanager
    def measuring(self) -> Iterator[Usage]:
        """What is done in this context; not to be nested."""
        self.usage = Usage(self.live_bytes, self.live_bytes)
        yield self.usage
        self.usage = Usage(0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        on_device = any(isinstance(argument, self.FakeTensor) for argument in arg_tree_leaves(*args, **kwargs))
        if not on_device and torch.device(kwargs.get("device") or "cpu").type != "cuda":
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self._note_wait(func)
            return torch.ones((), dtype=args[0].dtype).item()
        if func in (aten._to_copy.default, aten.copy_.default):
            self._check_copy(func, args, kwargs)
        real: dict[int, Tensor] = {}  # the host's tensors, by the identity of a fake one in their place

        def fake(tensor: Tensor) -> Tensor:
            if isinstance(tensor, self.FakeTensor):
                return tensor
            with self.mode:
                substitute = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            real[id(substitute)] = tensor
            return substitute

        def result(tensor: Tensor) -> Tensor:
            if tensor.device.type == "cpu":  # ones, as there are no numbers
                pinned = bool(kwargs.get("pin_memory"))
                return real.get(id(tensor), torch.ones(tensor.shape, dtype=tensor.dtype, pin_memory=pinned))
            self._keep_account(tensor)
            return tensor

        fake_args, fake_kwargs = tree_map_only(Tensor, fake, (args, kwargs))
        with self.mode:
            results = func(*fake_args, **fake_kwargs)
        if not (self._in_graph or func.namespace != "aten" or func.is_view or str(func).startswith("aten.empty")):
            self.usage.eager[str(func)] += 1
        return tree_map_only(self.FakeTensor, result, results)

    def _check_copy(self, func: Any, args: tuple, kwargs: dict) -> None:
        """A copy between host and device waits, unless it is told not to and the host's memory is pinned."""
        if func is aten.copy_.default:
            source, target, asynchronous = args[1], args[0].device, any(args[2:])
            pinned = args[1 if target.type == "cuda" else 0].is_pinned()
        else:
            source, target = args[0], kwargs.get("device") or args[0].device
            asynchronous = kwargs.get("non_blocking", False)
            pinned = target.type == "cpu" or source.is_pinned()  # torch pins what it makes for such a copy
        if target.type != source.device.type and not (asynchronous and pinned):
            self._note_wait(func)

    def _note_wait(self, func: Any) -> None:
        self.waits.append(Wait(self.step, str(func), calling_function()))

    def _keep_account(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()

        def free(_: weakref.ref) -> None:
            del self._storages[key]
            self.live_bytes -= size

        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, free)
            self.live_bytes += size
            self.usage.peak_bytes = max(self.usage.peak_bytes, self.live_bytes)

    def _take(self, graph: Graph) -> Callable:
        graph.step = self.step
        self.graphs.append(graph)
        return functools.partial(self._run, graph)

    def _run(self, graph: Graph, inputs: list[Any]) -> list[Tensor | None]:
        """Do as if a compiled graph ran. `inputs` are its own to delete, as they are those of Inductor's wrappers."""
        before, returned = self.live_bytes, {result.name for result in graph.results if result}
        on_device = {name: x for name, x in zip(graph.inputs, inputs, strict=True) if isinstance(x, self.FakeTensor)}
        storages = {name: name for name in graph.inputs}  # the host's are of no account
        storages |= {name: tensor.untyped_storage()._cdata for name, tensor in on_device.items()}
        sizes = dict.fromkeys(storages.values(), 0)
        sizes |= {storages[name]: tensor.untyped_storage().nbytes() for name, tensor in on_device.items()}
        tensors = {name: tensor for name, tensor in on_device.items() if name in returned}
        del on_device
        inputs.clear()
        # what has gone by now was kept by `inputs` alone, and goes within the graph
        sizes |= {storage: 0 for storage in sizes if storage in self._storages}
        outside = before - sum(sizes.values())
        peak = graph.simulate(storages, sizes)
        self.usage.peak_bytes = max(self.usage.peak_bytes, outside + peak)
        self.usage.kernels += graph.kernels.total()
        self.usage.bytes_moved += graph.bytes_moved
        self.usage.calls += graph.calls
        return self._results(graph, tensors, storages, sizes)

    def _results(
        self, graph: Graph, tensors: dict[str, Tensor], storages: dict[str, Any], sizes: dict[Any, int]
    ) -> list[Tensor | None]:
        """What a graph returns: some of its inputs, `tensors`, and new tensors, which share storages as told."""
        made: dict[Any, Tensor] = {}  # a flat tensor for each new storage
        results = []
        self._in_graph = True
        with torch._C._AutoDispatchBelowAutograd():  # to autograd, results are no views
            for result in graph.results:
                tensor = tensors.get(result.name) if result else None
                if result and tensor is None:
                    layout, storage = graph.layouts[result.name], storages[result.name]
                    if layout.device != "cuda":
                        made[storage] = torch.empty(math.prod(layout.size), dtype=layout.dtype)
                    elif storage not in made:
                        count = max(sizes[storage], layout.bytes) // layout.dtype.itemsize
                        made[storage] = torch.empty(count, dtype=layout.dtype, device="cuda")
                    tensor = made[storage].view(layout.dtype).as_strided(layout.size, layout.stride)
                if result and result.view:
                    tensor = tensor.as_strided(*result.view)
                results.append(tensor)
        self._in_graph = False
        return results


def calling_function() -> str:
    """The innermost function of the project, tests apart, that this thread is in."""
    frame = sys._getframe()
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in ("tests", ".venv"):
            return frame.f_code.co_qualname
        frame = frame.f_back
    return "?"
