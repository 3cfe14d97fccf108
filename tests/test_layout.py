"""The layout: imports go down from floor to floor, and never in a circle."""

import ast
from graphlib import TopologicalSorter

from run.settings import ROOT

FLOORS = {"run": 0, "head": 0, "sophia": 0, "lion": 0, "data": 1, "model": 1, "training": 2, "train": 3, "sample": 3,
          "plot": 3, "studies": 4, "tools": 5}  # fmt: skip


def imports(path):
    """The files of the repository that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {file for name in names if (file := ROOT / f"{name.replace('.', '/')}.py").exists()}


def test_imports_go_down_and_never_in_a_circle():
    files = [path for name in FLOORS for path in (ROOT / f"{name}.py", *(ROOT / name).rglob("*.py")) if path.exists()]
    graph = {path: imports(path) for path in files}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(files) > 40  # CycleError where there is a circle
    for path, imported in graph.items():
        for other in imported:
            here, there = (file.relative_to(ROOT).with_suffix("").parts[0] for file in (path, other))
            assert here == there or FLOORS[here] > FLOORS[there], f"{path} imports {other}"
