"""What needs a GPU: CUDA's losses beside the CPU's, compiled beside eager, two cards beside one, resuming bit for bit;
and a test of the rest of the suite, imported here to run on CUDA.

`make gpu-check` runs it. With TEST_DEVICE=cpu the same lines run on a CPU.
"""

import functools
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from run.machine import has_compiler
from sophia import normal_like
from tests.conftest import OPTIMIZERS, last_checkpoint, rows_of, same_weights, text_dataset, without_timings
from tests.stress.compare_ranks import settings_of, torchrun
from tests.test_train import test_bfloat16_and_compile_agree_with_plain_float32  # noqa: F401
from training import curvature

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
ON_DEVICE = {"device": DEVICE, "float32_matmul_precision": "highest"}
SMALL = {"n_embd": 64, "block_size": 64, "warmup_iters": 0}
# Where rounding decides a sign, it decides an update, and two runs part. On a CPU, noise of 1e-5 of the gradient's size
# made 1e-5 nats in FIRST steps with Lion and Muon, 1e-6 with others, and moved AdamW's weights by 2e-4 of their norm.
FIRST, NATS, OF_WEIGHTS = 8, 5e-5, 1e-3

pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def train(train):
    """The suite's, on the device."""
    return functools.partial(train, **ON_DEVICE)


def check_agreement(left, right, optimizer):
    """Hold the first losses of two runs of 20 steps, and AdamW's weights after all of them, against each other."""
    one, other = rows_of(left), rows_of(right)
    assert [row["step"] for row in one] == [row["step"] for row in other] == list(range(21))
    assert abs(one[0]["val/loss"] - other[0]["val/loss"]) < NATS
    assert max(abs(one[step]["train/loss"] - other[step]["train/loss"]) for step in range(1, FIRST + 1)) < NATS
    assert one[1]["train/loss"] - one[20]["train/loss"] > 0.01  # it learnt something to disagree about
    if optimizer == "adamw":
        weights, others = (weights_of(folder) for folder in (left, right))
        assert (weights - others).norm() < OF_WEIGHTS * weights.norm()


def weights_of(out_dir):
    """All weights of a run's last checkpoint, in one tensor."""
    tensors = load_file(last_checkpoint(out_dir) / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_cuda_gives_the_losses_of_the_cpu(train, tmp_path, monkeypatch, optimizer):
    def drawn_on_the_cpu(params, generator):  # the generators of CUDA and of the CPU draw other numbers for one seed
        return normal_like(params, torch.Generator().manual_seed(generator.initial_seed()))

    monkeypatch.setattr(curvature, "normal_like", drawn_on_the_cpu)
    for name, device in (("host", "cpu"), ("device", DEVICE)):
        train(tmp_path / name, **SMALL | OPTIMIZERS[optimizer], device=device)
    check_agreement(tmp_path / "host", tmp_path / "device", optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_compiled_model_gives_the_losses_of_the_eager_one(train, tmp_path, optimizer):
    assert has_compiler(torch.device(DEVICE)), "torch.compile lacks a C++ compiler, Python's headers or Triton"
    torch.compiler.reset()
    options = SMALL | OPTIMIZERS[optimizer] | {"n_layer": 1}
    eager, compiled = (train(tmp_path / str(compile), **options, compile=compile) for compile in (False, True))
    check_agreement(tmp_path / "False", tmp_path / "True", optimizer)
    assert without_timings(eager) != without_timings(compiled)  # compiled code rounds in other places


def check_resume(train, tmp_path, **options):
    """Hold two whole runs against each other, and against one that is resumed half-way."""
    whole, again, parts = (tmp_path / name for name in ("whole", "again", "parts"))
    rows = train(whole, **options)
    train(again, **options)
    assert same_weights(last_checkpoint(whole), last_checkpoint(again)), "two runs differ: kernels without fixed order"
    shutil.copytree(whole, parts)
    shutil.rmtree(last_checkpoint(parts))
    assert without_timings(train(parts, **options, init_from="resume")) == without_timings(rows)
    assert same_weights(last_checkpoint(whole), last_checkpoint(parts))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_ends_bit_identical(train, tmp_path, optimizer):
    check_resume(train, tmp_path, **SMALL | OPTIMIZERS[optimizer], dropout=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "sophiah", "sophiag"])  # every kind of backward pass
def test_deterministic_makes_resuming_exact_in_bfloat16_and_compiled(train, tmp_path, optimizer):
    torch.compiler.reset()
    long = {"block_size": 1024, "dataset": text_dataset(tmp_path / "data", validation=2000), "eval_sequences": 1}
    few = {"n_layer": 1, "max_iters": 4, "eval_interval": 2, "hessian_interval": 2}
    exact = {"deterministic": True, "dtype": "bfloat16", "compile": True}  # attention has other kernels in float32
    try:
        check_resume(train, tmp_path, **SMALL | OPTIMIZERS[optimizer] | long | few | exact)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() == 1, reason="only one CUDA device")
def test_two_ranks_give_the_losses_of_one(train, tmp_path):
    text_dataset(tmp_path / "data")
    done = torchrun(2, *(settings_of(tmp_path, name, 2) | ON_DEVICE for name in OPTIMIZERS))
    assert done.returncode == 0, done.stderr
    for name in OPTIMIZERS:
        train(**settings_of(tmp_path, name, 1) | ON_DEVICE)
        check_agreement(tmp_path / f"{name}-1", tmp_path / f"{name}-2", name)
