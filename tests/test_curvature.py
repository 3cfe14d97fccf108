"""The curvature step of the loop: sophia.py's estimates over micro-batches, groups and formats."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT, GPTConfig
from run import randomness, settings
from run.machine import Machine
from run.ranks import Ranks
from sophia import normal_like
from tests.conftest import COMPILERS, OPTIMIZERS, TINY, arguments, needs_compiler
from tokens.batches import Batches
from tokens.token_files import TokenData, Tokens, open_data, pairs
from train import accumulate_gradients
from training import hessian_product
from training.curvature import Curvature
from training.hessian_product import TangentLoss, attention_tangent
from training.memory import HUTCHINSON, TRAINING, hutchinson_sequences, peak_bytes
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
    return pairs(curvature.batches.data.train_rows(curvature.settings.seed, STEP, 8, 0, 8))


def plain_loss(model, x, y):
    """From the logits, as the model's own loss can be differentiated only once."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def double_backward(c, params):
    """Hutchinson's estimate for `params` in float64, along the directions that are drawn in the weights' format."""
    seed = randomness.torch_seed(c.settings.seed, randomness.DIRECTIONS, STEP)
    directions = [u.double() for u in normal_like(params, torch.Generator().manual_seed(seed))]
    names = {param: name for name, param in c.model.named_parameters()}
    model = copy.deepcopy(c.model).double()
    twins = [model.get_parameter(names[param]) for param in params]
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(plain_loss(model, *first_sequences(c)), twins, create_graph=True)
    products = torch.autograd.grad(gradient, twins, grad_outputs=directions)
    return [u * product for u, product in zip(directions, products, strict=True)]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("compile", COMPILERS)
def test_hutchinsons_estimate_equals_double_backward(curvature, monkeypatch, checkpointed, compile):
    monkeypatch.setattr(hessian_product, "QUERIES", 6)  # the 16 tokens of a sequence do not divide
    torch.compiler.reset()
    machine = Machine(torch.device("cpu"), torch.float32, compile)
    c = curvature(machine=machine, optimizer="sophiah", micro_batch_size=4, n_layer=3, **EVERYTHING)
    params = list(c.model.parameters())[::-1]  # an optimizer has them in an order of its own, too
    expected = double_backward(c, params)
    c.model.h.checkpoint_activations = checkpointed
    assert distance(c.estimate(STEP, params), expected) < 1e-10


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("shape", [(12, 12, 768), (36, 20, 1280)])  # of 125M and 770M
def test_a_hutchinson_pass_takes_as_many_sequences_as_training_has_memory_for(shape, checkpointed):
    config = GPTConfig(1024, 50304, *shape)
    weights = 4 * 12 * shape[0] * shape[2] ** 2
    for micro_batch_size in (16, 64):
        training = peak_bytes(TRAINING, config, micro_batch_size, checkpointed)
        n = hutchinson_sequences(config, micro_batch_size, checkpointed, weights)
        assert 1 <= n < micro_batch_size
        if n > 1:
            assert peak_bytes(HUTCHINSON, config, n, checkpointed) + weights <= training
        assert peak_bytes(HUTCHINSON, config, n + 1, checkpointed) + weights > training
    assert hutchinson_sequences(config, 1, checkpointed, weights) == 1

    def of_a_sequence(kind):
        return peak_bytes(kind, config, 128, checkpointed) - peak_bytes(kind, config, 64, checkpointed)

    assert checkpointed or of_a_sequence(HUTCHINSON) <= 2 * of_a_sequence(TRAINING)


def test_an_estimate_takes_equal_parts(curvature):
    c = curvature(optimizer="sophiag")
    for ranks, most, expected in ((1, 3, [2, 2, 2, 2]), (1, 8, [8]), (3, 2, [1, 1, 1]), (16, 2, [1])):
        batches = dataclasses.replace(c.batches, machine=dataclasses.replace(c.machine, ranks=Ranks(ranks - 1, ranks)))
        assert [len(x) for (x, _), _ in batches.curvature(STEP, most)] == expected


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
    assert distance(estimate(c), double_backward(c, list(c.model.parameters()))) < 0.02


def test_a_softmax_of_inputs_that_all_grow_alike_stays_as_it_is_in_bfloat16_too():
    """Scores of attention grow alike for all keys, logits for all tokens: both tangents are zero."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 32, 8).bfloat16()
    none, growth = torch.zeros_like(q), torch.randn(8).bfloat16()
    tangent = attention_tangent(q, k, v, none, growth.expand_as(k), none, torch.tensor(8**-0.5))
    assert tangent.abs().max() < 1e-4
    hidden, weight, labels = torch.randn(64, 8).bfloat16(), torch.randn(300, 8).bfloat16(), torch.randint(300, (64,))
    rate = TangentLoss()
    rate.direction = growth.expand_as(weight)
    assert rate.loss(torch.cat((hidden, torch.zeros_like(hidden)), dim=1), weight, labels).abs() / 64 < 3e-5


def test_gauss_newton_bartlett_in_bfloat16_is_near_float32(curvature):
    options = {"optimizer": "sophiag", "hessian_estimator": "averaged", "hessian_group_size": 1}
    exact, rough = (estimate(curvature(torch.float32, machine, **options)) for machine in (None, BFLOAT16))
    assert distance(rough, exact) < 0.4  # a rounded softmax changes some labels
    assert flat(rough).sum() / flat(exact).sum() == pytest.approx(1, abs=0.05)


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
