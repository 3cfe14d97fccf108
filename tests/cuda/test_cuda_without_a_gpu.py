"""Training on CUDA, as far as it can be told without a GPU: devices, waits, compilation and memory."""

import functools
import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from run.settings import ROOT
from tests.conftest import OPTIMIZERS

TRITON = Path(sys.prefix, "triton")


def missing():
    """Why there can be no such device here, or None."""
    if torch.backends.cuda.is_built():
        return "this PyTorch is made for CUDA: it cannot be told another device"
    if not shutil.which("g++"):
        return "g++ is missing"
    if not importlib.machinery.PathFinder.find_spec("triton", [str(TRITON), *sys.path]):
        return f"Triton is missing: `make .venv/triton` installs it ({TRITON})"
    return None


pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SET_UP = """
from tests.cuda import fake_cuda
import sys
from run.machine import set_up
from run.settings import read
assert "torch._dynamo" not in sys.modules  # which would import what a fresh process lacks
machine = set_up(read(["--device=cuda"]))
print(machine.device, machine.dtype, machine.compile, machine.peak_flops())
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The ends of processes in which torch is imported after tests/cuda/fake_cuda.py, two at a time."""
    folder = str(tmp_path_factory.mktemp("cuda"))
    scenarios = ["-m", "tests.cuda.scenarios"]
    commands = {
        "run of sophiah": [*scenarios, "run", folder, "sophiah"],
        "runs of others": [*scenarios, "run", folder, *(name for name in OPTIMIZERS if name != "sophiah")],
        "checks": [*scenarios, "checks"],
        "set_up": ["-c", SET_UP],
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = functools.partial(subprocess.run, cwd=ROOT, env=environment, capture_output=True, text=True)
    with ThreadPoolExecutor(2) as pool:
        ends = pool.map(start, ([sys.executable, *command] for command in commands.values()))
        return dict(zip(commands, ends, strict=True))


@pytest.fixture(scope="module")
def output(processes):
    """output(name) is what a process printed."""

    def of(name):
        assert processes[name].returncode == 0, processes[name].stderr[-5000:]
        return processes[name].stdout

    return of


@pytest.fixture(params=OPTIMIZERS)
def name(request):
    return request.param


@pytest.fixture
def found(name, output):
    """What was found of a run with an optimizer."""
    return json.loads(output("run of sophiah" if name == "sophiah" else "runs of others"))[name]


# Training


def test_a_run_is_set_up_in_a_fresh_process(output):
    assert output("set_up").split() == ["cuda:0", "torch.bfloat16", "True", "989000000000000.0"]


def test_a_run_comes_to_its_end_and_is_resumed(found):
    assert found["rows"] == [0, 3, 5, 6, 9, 10, 12]


def test_the_host_waits_only_to_log_to_evaluate_and_to_write(name, found):
    def expected(logged, evaluated):
        waits = {(step, "Meter.finish_row") for step in logged}
        waits |= {(step, where) for step in evaluated for where in ("evaluate", "on_the_host")}
        return waits | {(step, "_Sophia.unclipped_fraction") for step in logged if name.startswith("sophia")}

    def waits(of, after):
        return {(step, where.partition(".<locals>")[0]) for step, _, where in found[of] if step > after}

    assert waits("waits", 0) == expected((3, 5, 6, 9, 10), (5, 10))
    assert waits("waits_of_eager_steps", 10) == expected((12,), (12,))


def test_sampling_waits_for_the_tokens_alone(found):
    waits = Counter(what for _, what, _ in found["waits_of_sampling"])
    assert waits["aten._local_scalar_dense.default"] == 3  # which are printed
    functions = {where.split(".")[0] for _, _, where in found["waits_of_sampling"]}
    assert functions == {"main", "write"}  # and not the model's


def test_every_function_is_compiled_once_and_whole_before_the_second_step(name, found):
    blocks = {"Blocks.forward": 2, "Blocks.forward backward": 1, "ChunkLoss.forward": 2}  # with and without gradients
    others = {
        "adamw": {},
        "muon": {},
        "lion": {"_lion_update": 1},
        # each part once, forward and backward, for two layers
        "sophiah": dict.fromkeys(["on_pairs.<locals>.run", "on_pairs.<locals>.run backward"], 3)
        | dict.fromkeys(["attention_tangent", "attention_tangent_backward", "_sophia_update"], 1)
        | {"ChunkLoss.forward": 3},
        "sophiag": {"ChunkLoss.forward": 3, "_sophia_update": 1},
        # whose groups are smaller than the micro-batch
        "sophiag-averaged": {"Blocks.forward": 3, "Blocks.forward backward": 2}
        | {"ChunkLoss.forward": 3, "_sophia_update": 1},
    }
    assert Counter(graph for graph, _ in found["graphs"]) == blocks | others[name]
    assert {step for _, step in found["graphs"]} == {0, 1}
    assert found["graph_breaks"] == {}


def test_an_update_of_the_optimizer_is_a_handful_of_kernels(name, found):
    if name == "muon":
        pytest.skip("PyTorch's Muon is not compiled")
    (update,) = found["updates"]
    assert 1 <= update["kernels"] + sum(update["eager"].values()) <= 4
    assert update["peak_bytes"] == update["resident_bytes"]  # in place
    if update["kernels"]:  # and reads weights, gradients and state once, writes weights and momentum once
        tensors = 5 if name == "lion" else 6
        assert update["bytes_moved"] == pytest.approx(tensors * found["live_bytes"]["1"], rel=1e-3)  # first the weights


def test_memory_does_not_grow_from_step_to_step(found):
    assert len({found["live_bytes"][step] for step in ("4", "7", "10")}) == 1  # after a row each


def test_the_device_tells_waits_and_memory_and_an_estimate_takes_about_that_of_a_micro_batch(output):
    passes = json.loads(output("checks"))  # which first holds the device against what is known
    for usage in (passes["sophiah"], passes["sophiag"]):
        assert usage["curvature"]["peak_bytes"] <= 1.1 * usage["training"]["peak_bytes"]
