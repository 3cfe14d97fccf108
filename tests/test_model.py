import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import model as model_file
from model import GPT, GPTConfig
from run.machine import has_compiler

TINY = GPTConfig(block_size=16, vocab_size=64, n_layer=3, n_head=2, n_embd=16)
SHALLOW = replace(TINY, n_layer=1)


def hugging_face(**settings):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_positions=32, vocab_size=97, n_layer=3, n_head=4, n_embd=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that biases and gains matter too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("inverse_layer_scaling", [False, True])
def test_logits_equal_those_of_transformers(tmp_path, inverse_layer_scaling):
    theirs = hugging_face(scale_attn_by_inverse_layer_idx=inverse_layer_scaling)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    assert ours.config.scale_attn_by_inverse_layer_idx == inverse_layer_scaling
    idx = torch.randint(97, (3, 32))
    with torch.no_grad():
        expected = theirs(idx).logits
        assert (ours(idx) - expected).abs().max() < 1e-4
    assert expected.abs().max() > 1  # or the comparison would mean nothing


def test_from_pretrained_can_shorten_the_context(tmp_path):
    hugging_face().save_pretrained(tmp_path)
    whole, short = GPT.from_pretrained(str(tmp_path)), GPT.from_pretrained(str(tmp_path), block_size=8)
    idx = torch.randint(97, (2, 8))
    assert torch.equal(whole(idx), short(idx))
    with pytest.raises(ValueError, match="fewer than block_size 64"):
        GPT.from_pretrained(str(tmp_path), block_size=64)


def test_defaults_are_gpt2_small():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert sum(p.numel() for p in model.parameters()) == 50304 * 768 + 1024 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768
    # 6 operations a weight and 12 * n_layer * n_embd * T for attention
    assert model.flops_per_token() == 6 * (50304 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768) + 12 * 12 * 768 * 1024


def test_loss_is_the_mean_over_targets_that_are_not_minus_one():
    torch.manual_seed(0)
    model = GPT(TINY)
    idx, targets = torch.randint(64, (2, 16)), torch.randint(64, (2, 16))
    targets[0, 3:] = -1
    log_probabilities = model(idx).log_softmax(dim=-1)
    kept = [-log_probabilities[b, t, targets[b, t]] for b in range(2) for t in range(16) if targets[b, t] >= 0]
    assert torch.allclose(model(idx, targets), torch.stack(kept).mean())


@pytest.fixture
def in_parts(monkeypatch):
    """A float64 model whose head works on 8 of 32 positions at a time, tokens, and targets some of which are -1."""
    monkeypatch.setattr(model_file, "CPU_LOGITS", 8 * TINY.vocab_size)
    torch.manual_seed(0)
    model = GPT(SHALLOW).double()
    with torch.no_grad():
        model.wte.weight.mul_(20)  # a model with preferences
    idx, targets = torch.randint(64, (2, 2, 16))
    targets[0, 3:9] = -1
    return model, idx, targets


def plain_loss(model, idx, targets):
    return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)


def gradients(loss, model, **options):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), **options)])


@pytest.mark.parametrize("compile", [False, True])
def test_a_loss_in_parts_has_the_value_and_the_gradient_of_the_whole(in_parts, compile):
    model, idx, targets = in_parts
    expected = plain_loss(model, idx, targets)
    if compile:
        if not has_compiler(torch.device("cpu")):
            pytest.skip("no compiler here")
        torch.compiler.reset()
        model.compile(dynamic=False)
    loss = model(idx, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    exact = gradients(3 * expected, model)
    for again in (False,) if compile else (True, False):  # torch.compile frees what it has used
        found = gradients(3 * loss, model, retain_graph=again)
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert model(idx, targets).item() == pytest.approx(expected.item(), rel=1e-12)


def test_no_part_of_a_loss_has_more_logits_than_allowed(in_parts, monkeypatch):
    model, idx, targets = in_parts
    sizes = []

    def counting(hidden, *others):
        sizes.append(len(hidden))
        return model_file.head_pass(hidden, *others)

    monkeypatch.setattr(model, "head_pass", counting)
    model(idx, targets)
    model(idx[:, :11], targets[:, :11])  # 22 positions, which 3 does not divide
    assert sizes == [8] * 4 + [8, 8, 6]


def test_a_loss_in_parts_has_a_second_derivative(in_parts):
    model, idx, targets = in_parts
    direction = torch.randn(SHALLOW.parameters, dtype=torch.float64)
    products = []
    for loss_of in (model, lambda *given: plain_loss(model, *given)):
        with sdpa_kernel(SDPBackend.MATH):
            gradient = gradients(loss_of(idx, targets), model, create_graph=True)
        products.append(gradients(gradient @ direction, model))
    torch.testing.assert_close(*products, rtol=1e-9, atol=1e-9)


def test_a_loss_without_targets_is_nan_and_its_gradient_zero(in_parts):
    model, idx, targets = in_parts
    loss = model(idx, torch.full_like(targets, -1))
    assert loss.isnan()
    assert not gradients(loss, model).any()
    with pytest.raises(ValueError, match=r"shape \(2, 15\) for tokens of shape \(2, 16\)"):
        model(idx, targets[:, 1:])


def test_a_frozen_embedding_leaves_the_other_gradients_alone(in_parts):
    model, idx, targets = in_parts
    params = [parameter for parameter in model.parameters() if parameter is not model.wte.weight]
    expected = torch.autograd.grad(model(idx, targets), params)
    model.wte.weight.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH):
        for create_graph in (False, True):
            found = torch.autograd.grad(model(idx, targets), params, create_graph=create_graph)
            assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(found, expected, strict=True))


def test_a_copy_of_a_compiled_model_is_one_of_its_own(in_parts):
    model, idx, targets = in_parts
    before = model(idx, targets)
    model.compile(dynamic=False)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        model.wte.weight.zero_()
    assert all(twin(idx, targets) == before for twin in copies)


def test_targets_may_depend_on_the_logits(in_parts):
    model, idx, targets = in_parts
    given = torch.stack((targets, torch.randint(64, targets.shape)))  # (2, B, T)

    def draw(logits, given):
        return (logits.argmax(dim=-1) + given[1]) % 64

    labels = (model(idx).argmax(dim=-1) + given[1]) % 64
    drawn, expected = model(idx, given, draw), plain_loss(model, idx, labels)
    assert drawn.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradients(drawn, model), gradients(expected, model), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
def test_short_attention_in_bfloat16_is_that_of_longer_contexts(monkeypatch, scaled):
    torch.manual_seed(0)
    config = GPTConfig(
        block_size=16, vocab_size=64, n_layer=3, n_head=2, n_embd=16, scale_attn_by_inverse_layer_idx=scaled
    )
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    idx = torch.randint(64, (4, 16))
    exact = model(idx)
    with torch.autocast("cpu", torch.bfloat16):
        short = model(idx)
        monkeypatch.setattr(model_file, "SHORT", 0)
        long = model(idx)
    errors = [(logits.float() - exact).norm() / exact.norm() for logits in (short, long)]
    assert not torch.equal(short, long)
    assert errors[0] < 0.02 and errors[0] < 1.5 * errors[1]


def test_a_token_sees_only_what_came_before():
    torch.manual_seed(0)
    model = GPT(TINY)
    idx = torch.randint(64, (1, 16))
    changed = idx.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 64
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            before, after = model(idx), model(changed)
        assert torch.equal(before[0, :10], after[0, :10])
        assert not torch.allclose(before[0, 10:], after[0, 10:])


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    config = GPTConfig(block_size=64, vocab_size=512, n_layer=8, n_head=4, n_embd=128, bias=True)
    for name, parameter in GPT(config).named_parameters():
        if parameter.dim() == 1:
            assert torch.all(parameter == (0 if name.endswith("bias") else 1)), name
        else:
            expected = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name


def test_generation_follows_the_seed_and_the_options():
    torch.manual_seed(0)
    model = GPT(TINY).eval()
    with torch.no_grad():
        model.wte.weight.mul_(50)  # a model with preferences
    idx = torch.randint(64, (2, 5))

    def draw(seed, **options):
        return model.generate(idx, 20, generator=torch.Generator().manual_seed(seed), **options)

    assert draw(1).shape == (2, 25)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1)[:, :5], idx)
    greedy = draw(1, temperature=0)
    assert torch.equal(greedy, draw(2, temperature=0.7, top_k=1))
    assert torch.equal(greedy[:, 5], model(idx)[:, -1].argmax(dim=-1))


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="17 tokens is longer than block_size 16"):
        GPT(TINY)(torch.zeros(1, 17, dtype=torch.long))
