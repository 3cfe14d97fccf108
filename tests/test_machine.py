"""The machine of a run: what it knows of a GPU, and what it sets there."""

import os
import subprocess
import sys

import pytest
import torch

from run.machine import Machine, set_matmul_precision
from run.settings import ROOT, read
from tests.conftest import needs_compiler

PEAKS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    # slower or faster than those whose names they begin with
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 3090 Ti": None,
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
}


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_is_that_of_the_devices_model(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    cuda = torch.device("cuda", 0)
    assert Machine(cuda, torch.bfloat16, compile=False).peak_flops() == PEAKS[name]
    assert Machine(cuda, torch.float32, compile=False).peak_flops() is None


@pytest.mark.parametrize(("device", "option", "expected"), [("cpu", [], "highest"), ("cuda", [], "high"),
    ("cuda", ["--float32_matmul_precision=highest"], "highest")])  # fmt: skip
def test_float32_products_are_rounded_on_cuda_and_nowhere_else(device, option, expected):
    assert torch.get_float32_matmul_precision() == "highest"
    set_matmul_precision(read(option), torch.device(device))
    assert torch.get_float32_matmul_precision() == expected
    torch.set_float32_matmul_precision("highest")


def test_an_empty_variable_of_torchrun_counts_as_unset(train, refuses, monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    assert train(tmp_path / "run", max_iters=1)[-1]["step"] == 1
    refuses("error: n_head = 0", n_head=0)


SWITCHES = """
import os, sys, torch
from run.machine import set_up
from run.settings import read
set_up(read(["--device=cpu", *sys.argv[1:]]))
import torch._inductor.config as inductor
print(torch.are_deterministic_algorithms_enabled(), inductor.deterministic, os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
print(inductor.compile_threads)
"""


def switches(*options, **environment):
    """What a run finds of PyTorch's switches, in a process of its own: a line on exactness, one on compilers."""
    command = [sys.executable, "-c", SWITCHES, *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("option", "found"), [([], "False False None"),
    (["--deterministic=True"], "True True :4096:8")])  # fmt: skip
def test_deterministic_turns_all_of_the_switches_of_pytorch(option, found):
    assert switches(*option)[0] == found


@pytest.mark.parametrize(("environment", "workers"), [({"LOCAL_WORLD_SIZE": "1000"}, 1),
    ({"LOCAL_WORLD_SIZE": "2", "TORCHINDUCTOR_COMPILE_THREADS": "3"}, 3)])  # fmt: skip
def test_the_ranks_of_a_machine_share_its_cores_for_compiling(environment, workers):
    assert switches(**environment)[1] == str(workers)


UPDATE = """
import torch
from run.machine import set_up
from run.settings import read
from sophia import SophiaG

def updated(compile):
    torch.manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(35))
    optimizer = SophiaG([weights], lr=0.1, compile=compile)
    optimizer.update_hessian([torch.rand(35)])
    weights.grad = torch.randn(35)
    optimizer.step()
    return weights.detach()

set_up(read(["--device=cpu"]))
torch.testing.assert_close(updated(True), updated(False))
print(torch.backends.cpu.get_cpu_capability())
"""


@needs_compiler
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this processor has no AVX-512")
def test_processors_of_two_kinds_may_share_a_compile_cache(tmp_path):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for kind in ("avx512", "avx2"):
        settings = environment | {"ATEN_CPU_CAPABILITY": kind}
        done = subprocess.run([sys.executable, "-c", UPDATE], cwd=ROOT, env=settings, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"{kind.upper()}\n"), done.stderr
    assert len(list(tmp_path.iterdir())) == 2
