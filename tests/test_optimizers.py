"""SophiaG, SophiaH and Lion as optimizers: torch.optim's habits (their formulas: test_replay.py)."""

import copy
import itertools
import math
import os

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.optim import SGD, AdamW

from lion import Lion
from sophia import SophiaG, SophiaH
from tests.conftest import needs_compiler
from training.optimizers import parameters

SHAPES = [(7, 5), (11,), (3, 2, 4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_unclipped_fraction_is_an_exact_count_over_groups_with_a_rho_each(dtype):
    size = 2**24 + 4  # which float32 cannot tell from one less
    large, small, unused = (torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (size, 6, 9))
    optimizer = SophiaG([{"params": [large, unused], "rho": 0.5}, {"params": [small], "rho": 2.0}])
    assert optimizer.unclipped_fraction() == 0
    momentum, curvature = torch.ones(size, dtype=dtype), torch.full((size,), 4, dtype=dtype)
    momentum[0] = 2  # as much as rho * h: at the edge, and so not below it
    optimizer.state[large] = {"exp_avg": momentum, "hessian": curvature}
    few = torch.tensor([[1, -1, -1, 0, 0, math.nan], [0.75, 0.75, 0.25, 0.25, -1, 1]], dtype=dtype)
    optimizer.state[small] = {"exp_avg": few[0], "hessian": few[1]}
    assert optimizer.unclipped_fraction() == (size - 1 + 3) / (size + 6)


def fraction_of_shards(rank, folder):
    """On two ranks, of which the first has two rows of three, the only row of one, and all rows of the last."""
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    placements = [Shard(0), Shard(0), Replicate()]
    values = torch.tensor([[3.0, -1.0, 1.0], [0.0, 1.0, 4.0]])  # momentum, curvature
    params = []
    for rows, placement in zip((3, 1, 2), placements, strict=True):
        params.append(torch.nn.Parameter(distribute_tensor(torch.zeros(rows, 3), mesh, [placement])))
    optimizer = SophiaG(params, rho=0.5)
    for param, placement in zip(params, placements, strict=True):
        m, h = (distribute_tensor(value.expand(len(param), 3).contiguous(), mesh, [placement]) for value in values)
        optimizer.state[param] = {"exp_avg": m, "hessian": h}
    assert optimizer.unclipped_fraction() == 1 / 3, optimizer.unclipped_fraction()
    os._exit(0)  # as gloo's threads may abort an interpreter that is being taken down


def test_the_unclipped_fraction_of_sharded_parameters_counts_every_coordinate_once(tmp_path):
    torch.multiprocessing.spawn(fraction_of_shards, (tmp_path,), nprocs=2)


def test_the_unclipped_fraction_may_span_devices():
    """With fake tensors, as there may be one device only: they have devices, and no number to read."""
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.zeros(3, device=device)) for device in ("cpu", "cuda")]
        optimizer = SophiaG(params)
        optimizer.update_hessian([torch.ones_like(param) for param in params])
        with pytest.raises(DataDependentOutputException, match="scalar"):
            optimizer.unclipped_fraction()


def test_the_defaults_are_the_papers():
    params, sophia = [torch.nn.Parameter(torch.ones(1))], {"lr": 6e-4, "betas": (0.96, 0.99), "weight_decay": 0.2}
    assert SophiaG(params).defaults == sophia | {"rho": 0.05, "eps": 1e-12}
    assert SophiaH(params).defaults == sophia | {"rho": 0.01, "eps": 1e-12}
    assert Lion(params).defaults == {"lr": 1e-4, "betas": (0.95, 0.98), "weight_decay": 0.0}


@needs_compiler
@pytest.mark.parametrize("optimizer_class", [SophiaG, Lion])
def test_the_compiled_update_gives_the_same_float32_numbers_and_is_compiled_once(optimizer_class):
    """Whatever numbers change between steps. Estimates are of both signs and of very different sizes."""
    torch.compiler.reset()
    runs = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for compile, beginning in ((False, {}), (True, {"lr": 1.0, "betas": (0.0, 0.5)}), (True, {})):
            random = torch.Generator().manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in SHAPES]
            groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
            optimizer = optimizer_class(groups, compile=compile, **beginning)
            for step in range(12):
                rate = 1e-2 * (1 + math.cos(step / 20))
                numbers = {"lr": rate, "betas": (0.8 + 5 * rate, 0.9 + rate), "rho": 1 + rate, "eps": rate}
                numbers["weight_decay"] = rate
                for group in optimizer.param_groups:
                    group.update({name: numbers[name] for name in optimizer.defaults})
                if optimizer_class is SophiaG and step % 5 == 0:
                    draws = [torch.randn(2, *shape, generator=random) for shape in SHAPES]
                    optimizer.update_hessian([value * 10**size for value, size in draws])
                for param in params:
                    param.grad = torch.randn(param.shape, generator=random)
                optimizer.step()
            runs.append(params)
    for plain, *compiled in zip(*runs, strict=True):
        for each in compiled:
            torch.testing.assert_close(plain, each, rtol=1e-6, atol=1e-7)


def quadratic(optimizer_class, **options):
    params = [torch.nn.Parameter(torch.full((4,), 2.0)), torch.nn.Parameter(torch.full((3, 2), -1.0))]
    return params, optimizer_class(params, **options)


def backward(params):
    sum((param**2).sum() for param in params).backward()


@pytest.mark.parametrize("optimizer_class", [SophiaG, SophiaH, Lion])
def test_closures_and_tensor_learning_rates_work(optimizer_class):
    params, optimizer = quadratic(optimizer_class, lr=torch.tensor(0.01))

    def closure():
        optimizer.zero_grad()
        backward(params)
        return torch.tensor(7.0)

    assert optimizer.step(closure) == 7.0
    assert torch.allclose(params[0], torch.full((4,), 2.0 - 0.01), atol=0.005)


@pytest.mark.parametrize("optimizer_class", [SophiaG, SophiaH, Lion])
def test_state_round_trips_and_copies_go_on_alike(optimizer_class):
    params, optimizer = quadratic(optimizer_class, lr=0.01)
    backward(params)
    if optimizer_class is not Lion:
        optimizer.update_hessian([param.detach() ** 2 for param in params])
    optimizer.step()
    names = {"exp_avg"} if optimizer_class is Lion else {"exp_avg", "hessian"}
    assert all(set(optimizer.state[param]) == names for param in params)
    twin_params, twin = copy.deepcopy((params, optimizer_class(params, lr=0.5)))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for stepper in (optimizer, twin, copy.deepcopy(optimizer)):
        stepper.zero_grad()
        backward(parameters(stepper))
        stepper.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twin_params, strict=True))


@pytest.mark.parametrize("optimizer_class", [SophiaG, SophiaH, Lion])
def test_parameters_without_gradients_stay_and_new_groups_join(optimizer_class):
    params, optimizer = quadratic(optimizer_class, lr=0.01, weight_decay=0.1)
    backward(params[:1])
    optimizer.step()
    assert torch.all(params[1] == -1)
    assert params[1] not in optimizer.state
    late = torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    backward([late])
    optimizer.step()
    assert late.max() < 0.6


ALL = [{"lr": -1e-3}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"weight_decay": -1}, {"lr": math.nan}]
SOPHIAS = [{"rho": -1.0}, {"eps": 0.0}]


@pytest.mark.parametrize(
    ("optimizer_class", "bad"),
    [*itertools.product([SophiaG, SophiaH, Lion], ALL), *itertools.product([SophiaG], SOPHIAS)],
)
def test_bad_hyperparameters_are_refused_also_of_a_group(optimizer_class, bad):
    with pytest.raises(ValueError, match="must be"):
        optimizer_class([torch.nn.Parameter(torch.ones(1))], **bad)
    optimizer = optimizer_class([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="must be"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], **bad})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_coordinate_without_gradient_or_curvature_stays(dtype):
    param = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = SophiaG([param], lr=0.25, weight_decay=0.0)
    param.grad = torch.tensor([0.0, 1.0, -1.0], dtype=dtype)
    optimizer.step()
    assert param.tolist() == [1.0, 0.75, 1.25]


def test_parameters_of_two_dtypes_have_a_least_denominator_each():
    params = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float32, torch.float16)]
    optimizer = SophiaG(params, lr=0.1, weight_decay=0.0)
    optimizer.update_hessian([torch.full((3,), 1e-2)] * 2)
    for param in params:
        param.grad = torch.full_like(param, 2.5e-5)
    optimizer.step()
    # 0.04 * 2.5e-5 / (0.05 * 0.01 * 1e-2), a fifth of lr
    torch.testing.assert_close(params[0].detach(), torch.full((3,), 1 - 0.2 * 0.1), rtol=1e-6, atol=0)


def test_what_is_not_finite_in_an_estimate_leaves_the_hessian_as_it_is():
    params = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float64, torch.float16)]
    optimizer = SophiaG(params, betas=(0.9, 0.5))
    for estimate in ([1, 1, 1], [math.inf, math.nan, 3], [2, 2, 2]):
        optimizer.update_hessian([torch.tensor(estimate, dtype=torch.float64)] * 2)
    for param in params:
        assert optimizer.state[param]["hessian"].tolist() == [1.25, 1.25, 1.875]
    optimizer.update_hessian([torch.full((3,), 1e30)] * 2)  # which float16 cannot hold
    assert optimizer.state[params[1]]["hessian"].tolist() == [1.25, 1.25, 1.875]


def with_gradient(param, gradient):
    param.grad_dtype = None  # any
    param.grad = gradient


@pytest.mark.parametrize("optimizer_class", [SophiaG, Lion])
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda it, a, b: with_gradient(b, torch.ones(3).bfloat16()), "gradient 1 is torch.bfloat16 .* torch.float32"),
        (lambda it, a, b: with_gradient(b, torch.ones(3).to_sparse()), "gradient 1 is sparse"),
        (lambda it, a, b: it.state[b].update(exp_avg=torch.ones(3).bfloat16()), "exp_avg 1 is torch.bfloat16"),
        (lambda it, a, b: it.state[b].update(exp_avg=torch.ones(2)), r"exp_avg 1 is .* \(2,\), .* \(3,\)"),
        (lambda it, a, b: it.state[b].update(exp_avg_sq=torch.ones(3)), "state of parameter 1 is .*exp_avg_sq"),
        (lambda it, a, b: it.add_param_group({"params": torch.ones(2) * 1j}), "parameter 2 is torch.complex64"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(optimizer_class, change, complaint):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in "ab"]
    optimizer = optimizer_class(params)
    backward(params)
    optimizer.step()
    change(optimizer, *params)
    before = copy.deepcopy((params, list(optimizer.state.values())))
    calls = [optimizer.step]
    if optimizer_class is not Lion:
        calls.append(lambda: optimizer.update_hessian([torch.ones_like(p) for p in parameters(optimizer)]))
    for call in calls:
        with pytest.raises(RuntimeError if "sparse" in complaint else ValueError, match=complaint):
            call()
    assert str((params, list(optimizer.state.values()))) == str(before)


@pytest.mark.parametrize(
    ("optimizer_class", "other"),
    [(each, other) for each in (SophiaG, Lion) for other in (AdamW, SGD, SophiaG, Lion) if each is not other],
)
def test_the_state_of_another_optimizer_is_refused_and_changes_nothing(optimizer_class, other):
    params, optimizer = quadratic(optimizer_class)
    their_params, theirs = quadratic(other, lr=0.01)
    for each, stepper in ((params, optimizer), (their_params, theirs)):
        backward(each)
        stepper.step()
    before = str(optimizer.state_dict())
    with pytest.raises(ValueError, match="another optimizer's"):
        optimizer.load_state_dict(theirs.state_dict())
    assert str(optimizer.state_dict()) == before
    optimizer.step()


def test_an_estimate_that_does_not_fit_is_refused_and_changes_nothing():
    params, optimizer = quadratic(SophiaG)
    with pytest.raises(ValueError, match="1 tensors, the optimizer 2 parameters"):
        optimizer.update_hessian([params[0]])
    with pytest.raises(ValueError, match=r"estimate 1 is .* \(4,\), its parameter .* \(3, 2\)"):
        optimizer.update_hessian([params[0], params[0]])
    with pytest.raises(RuntimeError, match="estimate 1 is sparse"):  # as that of Embedding(…, sparse=True) is
        optimizer.update_hessian([params[0], params[1].detach().to_sparse()])
    assert not optimizer.state
