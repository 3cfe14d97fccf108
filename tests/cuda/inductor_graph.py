"""The Triton source that Inductor generates for a graph, and what can be read from it: buffers and their lives, kernels
and the bytes they move, calls of libraries. Written for torch 2.13.
"""

import ast
import re
import types
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class Layout(NamedTuple):
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str = "cuda"

    @property
    def bytes(self) -> int:
        """On the device."""
        if 0 in self.size or self.device != "cuda":
            return 0
        return self.dtype.itemsize * (1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True)))


class Statement(NamedTuple):
    """A buffer that a statement makes, or `alias` under another name, and names that it deletes."""

    made: str | None
    bytes: int
    alias: str | None
    deleted: tuple[str, ...]


class Result(NamedTuple):
    """A buffer or an input that is returned, under a size, a stride and an offset of its own if there are such."""

    name: str
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None


@dataclass
class Graph:
    """A graph that torch.compile made."""

    name: str  # of the compiled function
    source: str  # the kernels and their wrapper, a function `call`
    layouts: dict[str, Layout]  # of the buffers
    step: int = 0  # in which it was compiled
    inputs: list[str] = field(init=False)
    statements: list[Statement] = field(init=False)
    results: list[Result | None] = field(init=False)
    kernels: Counter[str] = field(init=False)  # how often each Triton kernel is started
    calls: Counter[str] = field(init=False)  # how often each library function is called
    bytes_moved: float = field(init=False)  # that the Triton kernels read and write

    def __post_init__(self) -> None:
        wrapper = re.search(r"def call\(self, args\):\n(.*?)\n +return (\(.*?\))\n", self.source, re.DOTALL)
        lines = [line.strip() for line in wrapper[1].splitlines() if not line.lstrip().startswith("#")]
        self.inputs = [name for line in lines if line.endswith(" = args") for name in re.findall(r"\w+", line)[:-1]]
        self.statements = [statement for line in lines if (statement := self._statement(line))]
        self.results = [self._result(element) for element in ast.parse(wrapper[2], mode="eval").body.elts]
        self.kernels = Counter(re.findall(r"(triton_\w+)\.run\(", wrapper[1]))
        self.calls = Counter(re.findall(r"\b(extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", wrapper[1]))
        gigabytes = dict(re.findall(r"'kernel_name': '(\w+)'.*?'kernel_num_gb': ([\d.e-]+)", self.source))
        self.bytes_moved = sum(1e9 * float(gigabytes[name]) * count for name, count in self.kernels.items())

    def _statement(self, line: str) -> Statement | None:
        deleted = tuple(re.findall(r"\bdel (\w+)", line))
        assignment = re.match(r"(buf\d+|workspace\w*) = (?:reinterpret_tensor\()?(.*)", line)
        if not assignment:
            return Statement(None, 0, None, deleted) if deleted else None
        name, value = assignment.groups()
        if alias := re.match(r"(\w+)(?:$|,|;| )", value):
            return Statement(name, 0, alias[1], deleted)
        if made := re.match(r"empty_strided_cuda\((\(.*?\)), (\(.*?\)), torch\.(\w+)\)", value):
            size, stride = map(ast.literal_eval, made.groups()[:2])
            return Statement(name, Layout(size, stride, getattr(torch, made[3])).bytes, None, deleted)
        return Statement(name, self.layouts[name].bytes if name in self.layouts else 0, None, deleted)

    def _result(self, element: ast.expr) -> Result | None:
        if isinstance(element, ast.Call):  # reinterpret_tensor(name, size, stride, offset)
            return Result(element.args[0].id, tuple(map(ast.literal_eval, element.args[1:])))
        return Result(element.id, None) if isinstance(element, ast.Name) else None

    def simulate(self, storages: dict[str, Hashable], sizes: dict[Hashable, int]) -> int:
        """The most that its tensors take at a time, in bytes. `storages` tells for each input which storage it has, and
        afterwards for each result; `sizes` tells the bytes of each storage that are to count.
        """
        names = Counter(storages.values())
        live = peak = sum(sizes[storage] for storage in names)
        for number, (made, size, alias, deleted) in enumerate(self.statements):
            if made:
                storage = storages[made] = storages[alias] if alias else number
                sizes.setdefault(storage, size)
                live += sizes[storage] * (not names[storage])
                names[storage] += 1
                peak = max(peak, live)
            for name in deleted:
                storage = storages.pop(name)
                names[storage] -= 1
                live -= sizes[storage] * (not names[storage])
        return peak


def read_graph(lowering: Any) -> Graph:
    """Generate the source of a `torch._inductor.graph.GraphLowering`."""
    code, _ = lowering.codegen()
    layouts = {}
    for buffer, node in lowering.name_to_buffer.items():
        layout = node.maybe_get_layout()
        if hasattr(layout, "stride"):
            size, stride = (tuple(map(int, numbers)) for numbers in (layout.size, layout.stride))
            layouts[buffer] = Layout(size, stride, layout.dtype, layout.device.type)
    name = torch._guards.TracingContext.get().traced_code[0].co_qualname
    return Graph(name + " backward" * lowering.is_backward, code.value, layouts)


def stop_at_source(take: Callable[[Graph], Callable]) -> None:
    """Have Inductor generate a graph's source for an H100 and stop there. What `take` makes of the graph is called with
    a list of the graph's inputs, in the place of what Triton would build.
    """
    import torch._inductor.fx_passes.joint_graph
    import torch.utils._triton
    from torch._inductor.graph import GraphLowering
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_benchmarker=lambda: None)
    driver._active = driver._default = target
    torch.utils._triton.triton_hash_with_backend = lambda *_: "fake"
    torch._inductor.fx_passes.joint_graph.constant_fold_uniform_value = lambda _: None  # it computes on the device
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # to see whether it is aligned

    def compile_to_module(lowering: GraphLowering) -> types.SimpleNamespace:
        return types.SimpleNamespace(call=take(read_graph(lowering)), __file__="")

    GraphLowering.compile_to_module = compile_to_module
