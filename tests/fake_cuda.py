"""A CUDA device that is not there, for a build of PyTorch without CUDA: one H100 whose tensors are fake. They have a
shape, a type and a device but no numbers; tensors of the host stay real. torch.compile goes all the way to Inductor's
Triton source, of which the graph is then run on fake tensors.

    from tests import fake_cuda  # before torch, so in a process of its own

    with fake_cuda.Gpu() as gpu, gpu.measuring() as usage:
        …                        # device="cuda" works, and a tensor on the wrong device is an error
    gpu.graphs                   # what torch.compile made, with the Triton source
    gpu.waits                    # where the host waited for the device
    usage.peak_bytes             # the most that tensors took at a time

Memory is that of tensors: neither the allocator's rounding nor what library calls allocate for themselves is in it.
Needs g++ and the package triton, which is looked for in `triton` beside the interpreter's `lib` (`make .venv/triton`).
It reaches into torch's internals, as they are in version 2.13.
"""

import contextlib
import copy
import ctypes
import functools
import hashlib
import importlib.util
import math
import os
import re
import subprocess
import sys
import types
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent


def load_guard() -> None:
    """Build and load fake_cuda_guard.cpp. torch looks for what it registers once, while it is imported."""
    if "torch" in sys.modules:
        raise ImportError("tests.fake_cuda must be imported before torch")
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

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import arg_tree_leaves, tree_leaves, tree_map_only  # noqa: E402

H100 = types.SimpleNamespace(  # what torch asks of a device's properties
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)


def pretend() -> None:
    """Have torch.cuda answer as it does where there is one H100."""
    stream = types.SimpleNamespace(stream_id=0, device_index=0, device_type=1, cuda_stream=0)
    state = torch.zeros(16, dtype=torch.uint8)
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
        "get_rng_state": state,
        "set_rng_state": None,
    }.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.default_generators = (torch.Generator("cuda"),)
    for name, answer in {"setDevice": None, "getDevice": 0, "getDeviceCount": 1, "getCurrentRawStream": 0}.items():
        setattr(torch._C, f"_cuda_{name}", lambda *_, answer=answer: answer)
    torch.version.cuda = "12.9"


pretend()


# What Inductor generates


class Statement(NamedTuple):
    """A statement of a generated wrapper: buffers that it makes or gives another name, and names that it deletes."""

    made: str | None = None
    bytes: int = 0
    alias: str | None = None
    deleted: tuple[str, ...] = ()


@dataclass
class Graph:
    """A graph that torch.compile made."""

    name: str  # of the compiled function
    step: int  # in which it was compiled
    source: str  # the wrapper and the Triton kernels
    sizes: dict[str, int]  # bytes of the buffers, by name
    inputs: list[str] = field(init=False)
    statements: list[Statement] = field(init=False)
    kernels: Counter[str] = field(init=False)  # how often the wrapper starts each Triton kernel
    calls: Counter[str] = field(init=False)  # and calls each library function
    bytes_moved: float = field(init=False)  # that the Triton kernels read and write

    def __post_init__(self) -> None:
        body = re.search(r"def call\(self, args\):\n(.*?)\n        return \(", self.source, re.DOTALL)[1]
        lines = [line for line in map(str.strip, body.splitlines()) if not line.startswith("#")]
        self.inputs = next(re.findall(r"\w+", line[: -len("= args")]) for line in lines if line.endswith("= args"))
        self.statements = [statement for line in lines if (statement := self._statement(line)) != Statement()]
        self.kernels = Counter(re.findall(r"(triton_\w+)\.run\(", body))
        self.calls = Counter(re.findall(r"\b(extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", body))
        gigabytes = dict(re.findall(r"'kernel_name': '(\w+)'.*?'kernel_num_gb': ([\d.e-]+)", self.source))
        self.bytes_moved = sum(1e9 * float(gigabytes[name]) * count for name, count in self.kernels.items())

    def _statement(self, line: str) -> Statement:
        deleted = tuple(re.findall(r"\bdel (\w+)", line))
        assignment = re.match(r"(\w+) = (?:reinterpret_tensor\()?(.*)", line)
        if not assignment or re.match(r"raw_stream\d+$", assignment[1]):
            return Statement(deleted=deleted)
        name, value = assignment.groups()
        if alias := re.match(r"(\w+)(?:$|,|;| )", value):
            return Statement(name, alias=alias[1], deleted=deleted)
        if made := re.match(r"empty_strided_cuda\(\((.*?)\), \((.*?)\), torch\.(\w+)\)", value):
            sizes, strides = ([int(x) for x in re.findall(r"\d+", part)] for part in made.groups()[:2])
            count = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
            return Statement(name, count * getattr(torch, made[3]).itemsize * (math.prod(sizes) > 0), deleted=deleted)
        return Statement(name, self.sizes.get(name, 0), deleted=deleted)

    def peak_bytes(self, owned: dict[str, tuple[int, int]] | None = None) -> int:
        """The most that its buffers take at a time, with those `owned` inputs that nothing else keeps: the identity
        and the bytes of their storages, by name.
        """
        storages: dict[str, Any] = {name: id_ for name, (id_, _) in (owned or {}).items()}
        bytes_ = dict((owned or {}).values())
        peak = sum(bytes_.values())
        for number, (made, size, alias, deleted) in enumerate(self.statements):
            if made:
                storages[made] = storages.get(alias) if alias else f"{number}"
                bytes_.setdefault(storages[made], size)
                peak = max(peak, sum(bytes_[storage] for storage in set(storages.values())))
            for name in deleted:
                storages.pop(name, None)
        return peak


# The device


class Wait(NamedTuple):
    """A moment at which the host waits until the device has done all it was told."""

    step: int
    what: str  # the operation
    where: str  # the project's function that asked for it


@dataclass
class Usage:
    """What a part of a program took. `kernels` and what they move are Triton's; `calls` are of libraries in compiled
    graphs; `eager` are operations outside of them, which start one or more kernels each.
    """

    resident_bytes: int  # of tensors when it began
    peak_bytes: int  # of all tensors, at the worst moment
    kernels: int = 0
    bytes_moved: float = 0.0
    calls: Counter[str] = field(default_factory=Counter)
    eager: Counter[str] = field(default_factory=Counter)


class Gpu(TorchDispatchMode):
    """The device, as long as this context lasts. `step` is for the caller to set; graphs and waits note it."""

    active: "Gpu | None" = None
    supports_higher_order_operators = True  # of which the graph of a checkpointed block has one

    def __init__(self) -> None:
        super().__init__()
        from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

        prepare_inductor()
        # constants stay on the host, as they do without a GPU; this asks torch.cuda, which says otherwise here
        FakeTensorMode.avoid_device_init = property(lambda mode: True)
        self.mode, self.FakeTensor = FakeTensorMode(allow_non_fake_inputs=True), FakeTensor
        self.step = 0
        self.graphs: list[Graph] = []
        self.waits: list[Wait] = []
        self.usage = Usage(0, 0)
        self._storages: dict[int, tuple[weakref.ref, int]] = {}  # that are alive, and their bytes
        self._in_graph = False

    def __enter__(self) -> "Gpu":
        Gpu.active = self
        return super().__enter__()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @property
    def live_bytes(self) -> int:
        return sum(bytes_ for _, bytes_ in list(self._storages.values()))

    @contextlib.contextmanager
    def measuring(self) -> Iterator[Usage]:
        """What is done in this context; not to be nested."""
        self.usage = Usage(self.live_bytes, self.live_bytes)
        yield self.usage
        self.usage = Usage(0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in arg_tree_leaves(*args, **kwargs) if isinstance(leaf, Tensor)]
        on_device = any(isinstance(tensor, self.FakeTensor) for tensor in tensors)
        if not on_device and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            self._note_wait(func)
            return torch.ones((), dtype=args[0].dtype).item()
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self._check_copy(func, args, kwargs)
        real: dict[int, Tensor] = {}  # the host's tensors, by the identity of a fake one in their place

        def fake(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, self.FakeTensor):
                with self.mode:
                    substitute = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                real[id(substitute)] = tensor
                return substitute
            return tensor

        def result(tensor: Tensor) -> Tensor:
            if tensor.device.type == "cpu":  # ones, as there are no numbers
                return real[id(tensor)] if id(tensor) in real else torch.ones(tensor.shape, dtype=tensor.dtype)
            self._keep_account(tensor)
            return tensor

        args, kwargs = tree_map_only(Tensor, fake, (args, kwargs))
        with self.mode:
            results = func(*args, **kwargs)
        if func.namespace == "aten" and not (self._in_graph or func.is_view):
            self.usage.eager[str(func)] += 1
        return tree_map_only(self.FakeTensor, result, results)

    def _check_copy(self, func: Any, args: tuple, kwargs: dict) -> None:
        """A copy between host and device waits, unless told not to; from memory that is not pinned it waits anyway."""
        if func is torch.ops.aten.copy_.default:
            target, source, asynchronous = args[0].device, args[1], any(args[2:]) or kwargs.get("non_blocking", False)
        else:
            target, source, asynchronous = kwargs.get("device"), args[0], kwargs.get("non_blocking", False)
        if target is not None and target.type != source.device.type:
            to_device = target.type == "cuda"
            if not (asynchronous and (source.is_pinned() if to_device else True)):
                self._note_wait(func)

    def _note_wait(self, func: Any) -> None:
        if not self._in_graph:
            self.waits.append(Wait(self.step, str(func), calling_function()))

    def _keep_account(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, storages = storage._cdata, self._storages
        if self._in_graph or key in storages:
            return
        storages[key] = weakref.ref(storage, lambda _: storages.pop(key)), storage.nbytes()
        self.usage.peak_bytes = max(self.usage.peak_bytes, self.live_bytes)

    def run(self, graph: Graph, module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        """Run a compiled graph. `inputs` are its own to delete, as those of Inductor's wrappers are."""
        before = self.live_bytes
        on_device = {name: x for name, x in zip(graph.inputs, inputs, strict=True) if isinstance(x, self.FakeTensor)}
        storages = {name: x.untyped_storage() for name, x in on_device.items()}
        candidates = {name: (storage._cdata, storage.nbytes()) for name, storage in storages.items()}
        del on_device, storages
        self._in_graph = True
        try:
            results = torch.fx.Interpreter(module).boxed_run(inputs)
        finally:
            self._in_graph = False
        owned = {name: value for name, value in candidates.items() if value[0] not in self._storages}
        outside = before - sum(dict(owned.values()).values())
        usage = self.usage
        usage.peak_bytes = max(usage.peak_bytes, outside + graph.peak_bytes(owned))
        usage.kernels += graph.kernels.total()
        usage.bytes_moved += graph.bytes_moved
        usage.calls += graph.calls
        for result in tree_leaves(results):
            if isinstance(result, self.FakeTensor):
                self._keep_account(result)
        return results


def calling_function() -> str:
    """The innermost function of the project, tests apart, that is being called in this thread."""
    frame = sys._getframe()
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in ("tests", ".venv"):
            return frame.f_code.co_qualname
        frame = frame.f_back
    return "?"


def prepare_inductor() -> None:
    """Have Inductor stop at the source of a graph, which `Gpu.run` then stands in for."""
    sys.path.append(str(Path(sys.prefix, "triton")))
    import torch._functorch.config
    import torch._inductor.compile_fx as compile_fx
    import torch._inductor.config as config
    import torch.utils._triton
    from torch._inductor.graph import GraphLowering
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_benchmarker=lambda: None)
    driver._active = driver._default = target
    torch.utils._triton.triton_hash_with_backend = lambda *_: "fake"
    config.compile_threads, config.fx_graph_cache = 1, False
    torch._functorch.config.enable_autograd_cache = False
    config.joint_graph_constant_folding = False  # it computes on the device
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # it asks whether it is aligned
    config.profile_bandwidth = config.benchmark_kernel = True  # writes beside each kernel the bytes that it moves
    compile_graph = compile_fx.compile_fx_inner

    def compile_and_keep(module: torch.fx.GraphModule, examples: Any, **options: Any) -> Any:
        Gpu.active.compiling = copy.deepcopy(module)  # as compiling changes it
        return compile_graph(module, examples, **options)

    compile_fx.compile_fx = functools.partial(compile_fx.compile_fx, inner_compile=compile_and_keep)
    GraphLowering.compile_to_module = note_source


def note_source(lowering: Any) -> types.SimpleNamespace:
    """In the place of GraphLowering.compile_to_module: what it returns has the function to call."""
    gpu, context = Gpu.active, torch._guards.TracingContext.try_get()
    code, _ = lowering.codegen()
    sizes = {}
    for name, buffer in lowering.name_to_buffer.items():
        layout = buffer.maybe_get_layout()
        if hasattr(layout, "stride") and layout.device.type == "cuda":
            count = 1 + sum((int(size) - 1) * int(step) for size, step in zip(layout.size, layout.stride, strict=True))
            sizes[name] = count * layout.dtype.itemsize
    name = context.traced_code[0].co_qualname + " backward" * lowering.is_backward
    graph = Graph(name, gpu.step, code.value, sizes)
    gpu.graphs.append(graph)
    call = functools.partial(gpu.run, graph, gpu.compiling)
    return types.SimpleNamespace(call=call, __file__="")
