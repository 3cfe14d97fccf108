"""The curvature step of the loop: sophia.py's estimates over micro-batches, groups and formats."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.token_files import TokenData, Tokens, open_data
from model import GPT, GPTConfig
from run import randomness, settings
from run.machine import Machine
from run.ranks import Ranks
from sophia import hutchinson, labels_from_uniforms, normal_like
from tests.conftest import COMPILERS, OPTIMIZERS, TINY, arguments, needs_compiler
from train import accumulate_gradients
from training import hessian_product
from training.batches import Batches
from training.curvature import Curvature
from training.parallel import DataParallel
from training.start import shape_of

STEP = 3
EVERYTHING = {"bias": True, "scale_attn_by_inverse_layer_idx": True, "exact_gelu": True}


@pytest.fixture
def curvature(dataset):
    """curvature(**settings) is the Curvature of a tiny model, whose weights are in float64 unless told otherwise."""

    def make(dtype=torch.float64, machine=None, **options):
        s = settings.read(arguments(**TINY | {"dataset": dataset, "hessian_batch_size": 8} | options))
        machine = machine or Machine(torch.device("cpu"), torch.float32, compile=False)
        torch.manual_seed(0)
        data = open_data(s.dataset, s.block_size)
        model = GPT(shape_of(s, data, checkpoint=None)).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64).to(dtype))
        return Curvature(model, s, machine, Batches(data, s, machine))

    return make


def estimate(curvature):
    return curvature.estimate(STEP, list(curvature.model.parameters()))


def distance(left, right):
    """Relative, over all tensors."""
    return (flat(left) - flat(right)).norm() / flat(right).norm()


def flat(tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def first_sequences(curvature):
    return next(curvature.batches.curvature(STEP, 8))[0]


def plain_loss(model, x, y):
    """From the logits, as the model's own loss can be differentiated only once."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("compile", COMPILERS)
def test_hutchinsons_estimate_equals_double_backward(curvature, monkeypatch, checkpointed, compile):
    monkeypatch.setattr(hessian_product, "QUERIES_PER_BLOCK", 6)  # the 16 tokens of a sequence do not divide
    torch.compiler.reset()
    machine = Machine(torch.device("cpu"), torch.float32, compile)
    c = curvature(machine=machine, optimizer="sophiah", micro_batch_size=4, n_layer=3, **EVERYTHING)
    params = list(c.model.parameters())[::-1]  # an optimizer has them in an order of its own, too
    with sdpa_kernel(SDPBackend.MATH):
        loss = plain_loss(c.model, *first_sequences(c))
        seed = randomness.torch_seed(c.settings.seed, randomness.DIRECTIONS, STEP)
        expected = hutchinson(loss, params, torch.Generator().manual_seed(seed))
    c.model.h.checkpoint_activations = checkpointed
    assert distance(c.estimate(STEP, params), expected) < 1e-10


def test_an_estimate_takes_equal_parts(curvature):
    c = curvature(optimizer="sophiag")
    for ranks, most, expected in ((1, 3, [2, 2, 2, 2]), (1, 8, [8]), (3, 2, [1, 1, 1]), (16, 2, [1])):
        batches = dataclasses.replace(c.batches, machine=dataclasses.replace(c.machine, ranks=Ranks(ranks - 1, ranks)))
        assert [len(x) for (x, _), _ in batches.curvature(STEP, most)] == expected


def sampled_gradient(c, first, last):
    """The gradient for sequences first to last, with the labels of the step's own draw."""
    x, _ = first_sequences(c)
    logits = c.model(x)
    labels = labels_from_uniforms(logits, c.batches.label_uniforms(STEP))
    loss = F.cross_entropy(logits[first:last].flatten(0, 1), labels[first:last].flatten())
    return torch.autograd.grad(loss, list(c.model.parameters()))


def test_the_papers_estimate_squares_one_gradient_of_all_sequences(curvature):
    for micro_batch_size in (1, 2, 8):
        c = curvature(optimizer="sophiag", micro_batch_size=micro_batch_size)
        expected = [8 * 16 * g * g for g in sampled_gradient(c, 0, 8)]
        assert distance(estimate(c), expected) < 1e-10


@pytest.mark.parametrize("group", [1, 2, 4])
def test_the_averaged_estimate_is_the_mean_of_the_groups_squares(curvature, group):
    c = curvature(optimizer="sophiag", hessian_estimator="averaged", hessian_group_size=group)
    squares = [[group * 16 * g * g for g in sampled_gradient(c, i, i + group)] for i in range(0, 8, group)]
    expected = [torch.stack(parts).mean(dim=0) for parts in zip(*squares, strict=True)]
    assert distance(estimate(c), expected) < 1e-10


class SameSequences(TokenData):
    """The sequences of step 1 at every step, so that steps differ in their draws of labels alone."""

    def train_rows(self, seed, step, batch_size, start, stop):
        return super().train_rows(seed, 1, batch_size, start, stop)


def test_averaging_over_n_groups_divides_the_variance_by_n():
    tokens = np.random.default_rng(0).integers(0, 7, 5000, dtype=np.uint16)
    data = SameSequences(Path(), "bytes", 7, Tokens([tokens], ""), Tokens([tokens], ""), 16, True)
    here = Machine(torch.device("cpu"), torch.float32, compile=False)
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 7, 1, 2, 4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def moments(groups, draws):
        options = {"optimizer": "sophiag", "block_size": 16, "batch_size": 64, "hessian_batch_size": 64}
        if groups > 1:
            options |= {"hessian_estimator": "averaged", "hessian_group_size": 64 // groups}
        s = settings.read(arguments(**options, micro_batch_size=64))
        c = Curvature(model, s, here, Batches(data, s, here))
        estimates = torch.stack([flat(c.estimate(step, list(model.parameters()))) for step in range(draws)])
        return estimates.mean(dim=0), estimates.var(dim=0).sum()

    mean, variance = moments(1, 500)
    averaged_mean, averaged_variance = moments(8, 250)
    assert variance / averaged_variance == pytest.approx(8, rel=0.15)
    assert (averaged_mean - mean).norm() < 0.1 * mean.norm()


BFLOAT16 = Machine(torch.device("cpu"), torch.bfloat16, compile=False)


def test_hutchinson_in_bfloat16_is_near_float64(curvature):
    c = curvature(torch.float32, BFLOAT16, optimizer="sophiah")
    generator = torch.Generator().manual_seed(randomness.torch_seed(c.settings.seed, randomness.DIRECTIONS, STEP))
    directions = [u.double() for u in normal_like(list(c.model.parameters()), generator)]
    model = copy.deepcopy(c.model).double()
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(
            plain_loss(model, *first_sequences(c)), list(model.parameters()), create_graph=True
        )
    products = torch.autograd.grad(gradient, list(model.parameters()), grad_outputs=directions)
    assert distance(estimate(c), [u * product for u, product in zip(directions, products, strict=True)]) < 0.03


def test_gauss_newton_bartlett_in_bfloat16_is_near_float32(curvature):
    exact = estimate(curvature(torch.float32, optimizer="sophiag"))
    rough = estimate(curvature(torch.float32, BFLOAT16, optimizer="sophiag"))
    assert distance(rough, exact) < 0.5  # a rounded softmax changes some labels


@pytest.mark.parametrize(
    ("name", "compile"),
    [("adamw", False), pytest.param("adamw", True, marks=needs_compiler), ("sophiah", False), ("sophiag", False)],
)
def test_checkpointed_activations_change_no_estimate_and_no_gradient(curvature, name, compile):
    """compile: compiled and with checkpoints, against neither."""
    results = []
    for checkpointed in (False, True):
        c = curvature(**OPTIMIZERS[name], n_layer=1 if compile else 2)
        c.model.h.checkpoint_activations = checkpointed
        if compile and checkpointed:
            torch.compiler.reset()
            c.model.h.compile(dynamic=False)
        if name == "adamw":
            accumulate_gradients(STEP, DataParallel(c.model, c.machine), c.batches)
            results.append([parameter.grad for parameter in c.model.parameters()])
        else:
            results.append(estimate(c))
            assert c.model.h.checkpoint_activations == checkpointed
    assert distance(*results) < 1e-10


@pytest.mark.parametrize("optimizer", ["sophiah", "sophiag"])
def test_an_estimate_depends_on_seed_and_step_alone(curvature, optimizer):
    c = curvature(optimizer=optimizer)
    once = estimate(c)
    torch.rand(7)
    assert all(torch.equal(a, b) for a, b in zip(once, estimate(c), strict=True))
    assert distance(c.estimate(STEP + 1, list(c.model.parameters())), once) > 0.1
    c.settings = dataclasses.replace(c.settings, seed=5)
    c.batches = dataclasses.replace(c.batches, settings=c.settings)
    assert distance(estimate(c), once) > 0.1


def test_the_first_step_has_an_estimate_and_then_every_interval(curvature):
    c = curvature(optimizer="sophiag", hessian_interval=4)
    assert [step for step in range(1, 14) if c.is_due(step)] == [1, 5, 9, 13]
    assert not curvature(optimizer="adamw").is_due(1)
    every = curvature(optimizer="sophiah", hessian_interval=1)
    assert every.is_due(1) and every.is_due(2)
