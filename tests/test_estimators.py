"""Curvature estimators against brute force: exact Hessian and Gauss-Newton diagonals of a tiny GPT in float64."""

import math
from statistics import NormalDist

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT, GPTConfig
from sophia import gauss_newton_bartlett, hutchinson, labels_from_uniforms, sample_labels
from tests.conftest import plain_loss, random_model

CONFIDENCE = 0.999
DRAWS = 1500


@pytest.fixture(scope="module")
def tiny():
    """A GPT of 256 parameters in float64, 3 sequences of 4 tokens, and their targets."""
    model = random_model(GPTConfig(block_size=4, vocab_size=7, n_layer=1, n_head=2, n_embd=4), 0.3).double()
    idx, targets = torch.randint(7, (3, 4)), torch.randint(7, (3, 4))
    return model, list(model.parameters()), idx, targets


@pytest.fixture(scope="module")
def exact_hessian(tiny):
    """(P, P), row by row."""
    model, params, idx, targets = tiny
    with sdpa_kernel(SDPBackend.MATH):
        gradient = flat(torch.autograd.grad(plain_loss(model, idx, targets), params, create_graph=True))
        rows = [flat(torch.autograd.grad(entry, params, retain_graph=True)) for entry in gradient]
    return torch.stack(rows)


@pytest.fixture(scope="module")
def exact_gauss_newton_diagonal(tiny):
    """The diagonal of the mean over positions of J^T (diag(p) - p p^T) J, J the Jacobian of a position's logits."""
    model, params, idx, _ = tiny
    logits = model(idx).flatten(0, 1)  # (12, 7)
    jacobian = torch.stack([flat(torch.autograd.grad(z, params, retain_graph=True)) for z in logits.flatten()])
    jacobian = jacobian.unflatten(0, logits.shape)  # (12, 7, P)
    p = logits.softmax(dim=-1)
    inner = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)  # (12, 7, 7)
    return torch.einsum("bip,bij,bjp->p", jacobian, inner, jacobian) / len(logits)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def assert_unbiased(draws, exact):
    """Every coordinate's mean lies within its confidence interval; all intervals hold together at CONFIDENCE."""
    error = (draws.mean(dim=0) - exact).abs()
    deviation = draws.std(dim=0) / math.sqrt(len(draws))
    bound = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * len(exact)))
    assert torch.all(error <= bound * deviation + 1e-12)
    # the interval is narrow enough to mean something
    assert deviation.mean() < 0.25 * exact.abs().mean()


def test_gauss_newton_bartlett_is_unbiased_for_the_gauss_newton_diagonal(tiny, exact_gauss_newton_diagonal):
    model, params, idx, targets = tiny
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([flat(gauss_newton_bartlett(model(idx), params, generator)) for _ in range(DRAWS)])
    assert torch.all(draws >= 0)
    assert_unbiased(draws, exact_gauss_newton_diagonal)
    empirical_fisher = idx.numel() * flat(torch.autograd.grad(model(idx, targets), params)) ** 2
    with pytest.raises(AssertionError):  # true labels in the place of sampled ones would be noticed
        assert_unbiased(draws, empirical_fisher)


def test_hutchinson_is_unbiased_for_the_hessian_diagonal_with_the_variance_of_gaussian_directions(tiny, exact_hessian):
    """For u ~ N(0, I) the variance of u_i (H u)_i is 2 h_ii^2 + sum over j != i of h_ij^2."""
    model, params, idx, targets = tiny
    generator = torch.Generator().manual_seed(1)
    with sdpa_kernel(SDPBackend.MATH):
        draws = [flat(hutchinson(plain_loss(model, idx, targets), params, generator)) for _ in range(DRAWS)]
    assert_unbiased(torch.stack(draws), exact_hessian.diagonal())
    expected = (exact_hessian**2).sum(dim=1) + exact_hessian.diagonal() ** 2
    assert torch.stack(draws).var(dim=0).sum() / expected.sum() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("estimator", [gauss_newton_bartlett, hutchinson])
def test_a_generator_alone_decides_the_draw(tiny, estimator):
    """The global one is not touched, and checkpointed activations are the same."""
    model, params, idx, targets = tiny

    def draw(seed):
        with sdpa_kernel(SDPBackend.MATH):
            given = model(idx) if estimator is gauss_newton_bartlett else plain_loss(model, idx, targets)
            return flat(estimator(given, params, torch.Generator().manual_seed(seed)))

    before, first = torch.get_rng_state(), draw(3)
    assert torch.equal(draw(3), first)
    assert not torch.equal(draw(4), first)
    assert torch.equal(torch.get_rng_state(), before)
    model.h.checkpoint_activations = True
    assert torch.equal(draw(3), first)
    model.h.checkpoint_activations = False


@pytest.mark.parametrize("estimator", [gauss_newton_bartlett, hutchinson])
def test_what_takes_no_gradient_gets_zeros(estimator):
    used, unused, late = (torch.randn(3, 5, requires_grad=True) for _ in range(3))
    frozen = torch.randn(3, 5)
    products = used * 2.0 * late * frozen
    late.requires_grad_(False)  # frozen after the forward pass
    given = products if estimator is gauss_newton_bartlett else (products**3).sum()
    first, *others = estimator(given, [used, unused, late, frozen])
    assert torch.any(first != 0)
    assert all(torch.equal(each, torch.zeros(3, 5)) for each in others)


def test_gauss_newton_bartlett_under_float16_autocast_is_near_float32():
    torch.manual_seed(0)
    layers = [torch.nn.Embedding(50, 32), torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 50)]
    model, idx = torch.nn.Sequential(*layers), torch.randint(50, (128, 128))
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0.1)
    estimates = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            logits = model(idx)
        estimates.append(gauss_newton_bartlett(logits, model.parameters(), torch.Generator().manual_seed(1)))
    for wide, narrow in zip(*estimates, strict=True):
        assert narrow.sum() / wide.sum() == pytest.approx(1, abs=0.02)


def test_the_logits_of_one_position_need_no_other_dimension_and_those_of_one_class_are_refused():
    assert sample_labels(torch.randn(2, 3, 5)).shape == (2, 3)
    logits = torch.randn(5, requires_grad=True)
    (estimate,) = gauss_newton_bartlett(logits * 1.0, [logits], torch.Generator().manual_seed(0))
    label = sample_labels(logits.detach(), torch.Generator().manual_seed(0))
    expected = (logits.softmax(dim=0) - F.one_hot(label, 5)) ** 2
    torch.testing.assert_close(estimate, expected.detach())
    with pytest.raises(ValueError, match=r"at least 2, not of shape \(4, 1\)"):
        gauss_newton_bartlett(torch.randn(4, 1, requires_grad=True) * 1.0, [logits])


def test_the_estimators_say_what_to_do_about_fused_attention_and_detached_losses():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=32))
    idx = torch.randint(16, (2, 8))
    loss = plain_loss(model, idx, idx)
    with pytest.raises(RuntimeError, match="SDPBackend.MATH"):
        hutchinson(loss, model.parameters())
    with pytest.raises(ValueError, match="carries no graph"):
        hutchinson(loss.detach(), model.parameters())
    with pytest.raises(ValueError, match="carries no graph"):
        gauss_newton_bartlett(model(idx).detach(), model.parameters())


def normal(size, seed):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "logits"),
    [
        ("ordinary", normal(64, 1)),
        ("several blocks", 2 * normal(1000, 2)),
        ("padded vocabulary", torch.cat((normal(700, 4), torch.full((68,), -1e4)))),
        ("impossible tokens", torch.cat((torch.full((300,), -math.inf), normal(300, 5)))),
        ("extreme", torch.tensor([1e4, 1e4 - 1, -1e4, 1e4 - 2])),
        ("bfloat16", (3 * normal(600, 3)).bfloat16()),
    ],
)
def test_labels_follow_the_softmax(name, logits):
    n = 200_000
    labels = sample_labels(logits.expand(n, -1), torch.Generator().manual_seed(0))
    assert labels.dtype == torch.int64
    counts = torch.bincount(labels, minlength=len(logits)).double()
    expected = n * logits.double().softmax(dim=-1)
    assert torch.all(counts[expected == 0] == 0)
    common = expected >= 5  # the chi-square law needs about five in a cell; the rest is one cell
    cells, laws = (torch.cat((x[common], x[~common].sum(dim=0, keepdim=True))) for x in (counts, expected))
    cells, laws = cells[laws > 0.5], laws[laws > 0.5]
    statistic = ((cells - laws) ** 2 / laws).sum().item()
    assert scipy.stats.chi2.sf(statistic, len(laws) - 1) > 1e-3


def test_the_default_dtype_does_not_change_the_labels():
    logits = normal(300, 0).expand(1000, -1)
    labels = sample_labels(logits, torch.Generator().manual_seed(0))
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(sample_labels(logits, torch.Generator().manual_seed(0)), labels)
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("size", [2, 5, 256, 300, 1000])
def test_numbers_next_to_one_give_the_last_possible_token_and_zero_the_first(size):
    uniforms = torch.tensor([1 - 1e-9, 1 - 2.0**-53], dtype=torch.float64).expand(2, -1)  # 1 in float32
    for impossible in (0, 1, 255, 400):
        logits = F.pad(normal(size, 0), (0, impossible), value=-math.inf).expand(2, -1)
        assert torch.equal(labels_from_uniforms(logits, uniforms), torch.full((2,), size - 1))
        logits = F.pad(normal(size, 0), (impossible, 0), value=-math.inf)
        assert labels_from_uniforms(logits, torch.zeros(2)).item() == impossible
