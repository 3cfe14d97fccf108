"""Curvature estimators against brute force: exact Hessian and Gauss-Newton diagonals of a tiny GPT in float64."""

import math
from statistics import NormalDist

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT, GPTConfig
from sophia import gauss_newton_bartlett, hutchinson, sample_labels

CONFIDENCE = 0.999
DRAWS = 1500


@pytest.fixture(scope="module")
def tiny():
    """A GPT of 256 parameters in float64, 3 sequences of 4 tokens, and their targets."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=4, vocab_size=7, n_layer=1, n_head=2, n_embd=4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    idx, targets = torch.randint(7, (3, 4)), torch.randint(7, (3, 4))
    return model, list(model.parameters()), idx, targets


def loss_of(model, idx, targets):
    """From the logits, as the model's own loss can be differentiated only once."""
    return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())


@pytest.fixture(scope="module")
def exact_hessian(tiny):
    """(P, P), row by row."""
    model, params, idx, targets = tiny
    with sdpa_kernel(SDPBackend.MATH):
        gradient = flat(torch.autograd.grad(loss_of(model, idx, targets), params, create_graph=True))
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


@pytest.fixture(scope="module")
def gauss_newton_draws(tiny):
    model, params, idx, _ = tiny
    generator = torch.Generator().manual_seed(1)
    return torch.stack([flat(gauss_newton_bartlett(model(idx), params, generator)) for _ in range(DRAWS)])


def test_gauss_newton_bartlett_is_unbiased_for_the_gauss_newton_diagonal(
    gauss_newton_draws, exact_gauss_newton_diagonal
):
    assert torch.all(gauss_newton_draws >= 0)
    assert_unbiased(gauss_newton_draws, exact_gauss_newton_diagonal)


@pytest.fixture(scope="module")
def hutchinson_draws(tiny):
    model, params, idx, targets = tiny
    generator = torch.Generator().manual_seed(1)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.stack([flat(hutchinson(loss_of(model, idx, targets), params, generator)) for _ in range(DRAWS)])


def test_hutchinson_is_unbiased_for_the_hessian_diagonal(hutchinson_draws, exact_hessian):
    assert_unbiased(hutchinson_draws, exact_hessian.diagonal())


def test_hutchinsons_variance_is_that_of_gaussian_directions(hutchinson_draws, exact_hessian):
    """For u ~ N(0, I) the variance of u_i (H u)_i is 2 h_ii^2 + sum over j != i of h_ij^2."""
    expected = (exact_hessian**2).sum(dim=1) + exact_hessian.diagonal() ** 2
    assert hutchinson_draws.var(dim=0).sum() / expected.sum() == pytest.approx(1, abs=0.1)


def test_the_interval_notices_true_labels_in_place_of_sampled_ones(tiny, gauss_newton_draws):
    model, params, idx, targets = tiny
    empirical_fisher = idx.numel() * flat(torch.autograd.grad(model(idx, targets), params)) ** 2
    with pytest.raises(AssertionError):
        assert_unbiased(gauss_newton_draws, empirical_fisher)


@pytest.mark.parametrize("estimator", [gauss_newton_bartlett, hutchinson])
def test_a_generator_decides_the_draw_and_the_global_one_is_not_touched(tiny, estimator):
    model, params, idx, targets = tiny

    def draw(seed):
        with sdpa_kernel(SDPBackend.MATH):
            given = model(idx) if estimator is gauss_newton_bartlett else loss_of(model, idx, targets)
            return flat(estimator(given, params, torch.Generator().manual_seed(seed)))

    before = torch.get_rng_state()
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("estimator", [gauss_newton_bartlett, hutchinson])
def test_checkpointed_activations_give_the_same_estimate(tiny, estimator):
    model, params, idx, targets = tiny

    def draw(checkpointed):
        model.h.checkpoint_activations = checkpointed
        with sdpa_kernel(SDPBackend.MATH):
            given = model(idx) if estimator is gauss_newton_bartlett else loss_of(model, idx, targets)
            return flat(estimator(given, params, torch.Generator().manual_seed(3)))

    assert torch.equal(draw(False), draw(True))
    model.h.checkpoint_activations = False


@pytest.mark.parametrize("estimator", [gauss_newton_bartlett, hutchinson])
def test_an_unused_parameter_gets_zeros(estimator):
    used, unused = torch.randn(3, 5, requires_grad=True), torch.randn(2, requires_grad=True)
    given = used * 2.0 if estimator is gauss_newton_bartlett else (used**3).sum()
    estimates = estimator(given, [used, unused])
    assert estimates[0].shape == used.shape
    assert torch.any(estimates[0] != 0)
    assert torch.equal(estimates[1], torch.zeros(2))


def test_hutchinson_says_what_to_do_about_fused_attention_and_detached_losses():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=32))
    idx = torch.randint(16, (2, 8))
    loss = loss_of(model, idx, idx)
    with pytest.raises(RuntimeError, match="SDPBackend.MATH"):
        hutchinson(loss, model.parameters())
    with pytest.raises(ValueError, match="carries no graph"):
        hutchinson(loss.detach(), model.parameters())


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
        ("one possible", torch.tensor([-math.inf, 0.0, -math.inf])),
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
    cells = [counts[common], counts[~common].sum(dim=0, keepdim=True)]
    laws = [expected[common], expected[~common].sum(dim=0, keepdim=True)]
    cells, laws = torch.cat(cells), torch.cat(laws)
    cells, laws = cells[laws > 0.5], laws[laws > 0.5]
    statistic = ((cells - laws) ** 2 / laws).sum().item()
    if len(laws) > 1:
        assert scipy.stats.chi2.sf(statistic, len(laws) - 1) > 1e-3
    else:
        assert cells.item() == n


def test_labels_keep_the_shape_of_the_positions():
    assert sample_labels(torch.randn(2, 3, 5)).shape == (2, 3)
    assert sample_labels(torch.randn(5)).shape == ()
