"""The curvature step of the loop: sophia.py's estimates over micro-batches, groups and formats."""

import copy
import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.token_files import open_data, pairs
from run import randomness, settings
from run.machine import Machine
from run.ranks import Ranks
from sophia import normal_like
from tests.conftest import COMPILERS, TINY, arguments, plain_loss, random_model, write_dataset
from train import accumulate_gradients
from training import hessian_product
from training.batches import Batches
from training.curvature import Curvature
from training.hessian_product import TangentLoss, attention_tangent
from training.start import shape_of

STEP = 3
EVERYTHING = {"bias": True, "scale_attn_by_inverse_layer_idx": True, "exact_gelu": True}


@pytest.fixture
def curvature(dataset):
    """curvature(**settings) is the Curvature of a tiny model, whose weights are in float64 unless told otherwise."""

    def make(dtype=torch.float64, machine=None, **options):
        s = settings.read(arguments(**TINY | {"dataset": dataset, "hessian_batch_size": 8} | options))
        machine = machine or Machine(torch.device("cpu"), torch.float32, compile=False)
        data = open_data(s.dataset, s.block_size)
        model = random_model(shape_of(s, data, checkpoint=None)).to(dtype)
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
    monkeypatch.setattr(hessian_product, "QUERIES_PER_BLOCK", 6)  # the 16 tokens of a sequence do not divide
    torch.compiler.reset()
    machine = Machine(torch.device("cpu"), torch.float32, compile)
    c = curvature(machine=machine, optimizer="sophiah", micro_batch_size=4, n_layer=3, **EVERYTHING)
    params = list(c.model.parameters())[::-1]  # an optimizer has them in an order of its own, too
    expected = double_backward(c, params)
    c.model.h.checkpoint_activations = checkpointed
    assert distance(c.estimate(STEP, params), expected) < 1e-10


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
    du = growth.expand_as(weight)
    assert rate.loss(torch.cat((hidden, torch.zeros_like(hidden)), dim=1), weight, labels, du).abs() / 64 < 3e-5


def test_gauss_newton_bartlett_in_bfloat16_is_near_float32(curvature):
    options = {"optimizer": "sophiag", "hessian_estimator": "averaged", "hessian_group_size": 1}
    exact, rough = (estimate(curvature(torch.float32, machine, **options)) for machine in (None, BFLOAT16))
    assert distance(rough, exact) < 0.4  # a rounded softmax changes some labels
    assert flat(rough).sum() / flat(exact).sum() == pytest.approx(1, abs=0.05)


class Alone(Ranks):
    """A rank that hears nothing of the others."""

    def all_reduce(self, tensors): ...


def test_every_rank_has_dropout_masks_of_its_own(curvature, tmp_path):
    write_dataset(tmp_path, [5] * 99, [5] * 99)  # of one token, so that nothing but the masks can differ
    draws = itertools.count()

    def pass_of(rank, step):
        machine = Machine(torch.device("cpu"), torch.float32, False, Alone(rank, 2))
        c = curvature(torch.float32, machine, dataset=tmp_path, optimizer="sophiag", dropout=0.3)
        loss = accumulate_gradients(step, c.model, c.batches)
        training_seed = torch.initial_seed()
        torch.rand(next(draws))  # by somebody else, which must not matter
        total = flat(c.estimate(step, list(c.model.parameters()))).sum()
        assert torch.initial_seed() != training_seed
        return loss.item(), total.item()

    passes = [pass_of(*place) for place in ((0, 1), (1, 1), (0, 2), (0, 1))]
    assert passes[0] == passes[3]
    assert all(len(set(values)) == 3 for values in zip(*passes, strict=True))
