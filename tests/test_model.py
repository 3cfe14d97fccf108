"""GPT-2: its loss in chunks against the plain one, dropout, attention (the architecture: test_pretrained.py)."""

import contextlib
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import head as head_file
from head import ChunkLoss, mean_in_chunks
from model import GPT, GPTConfig
from run.machine import Machine
from sophia import hutchinson, labels_from_uniforms
from tests.conftest import COMPILERS, plain_loss, random_model
from training.curvature import SampledLabelLoss

TINY = GPTConfig(block_size=16, vocab_size=64, n_layer=3, n_head=2, n_embd=16)
SHALLOW = replace(TINY, n_layer=1)


def test_defaults_are_gpt2_small():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert sum(p.numel() for p in model.parameters()) == 50304 * 768 + 1024 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768
    # 6 operations a weight and 12 * n_layer * n_embd * T for attention
    assert model.flops_per_token() == 6 * (50304 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768) + 12 * 12 * 768 * 1024


# The head goes over the positions in chunks


@pytest.fixture
def head(monkeypatch):
    """A float64 model whose head takes at most 8 positions at a time, tokens, and targets some of which are -1."""
    monkeypatch.setattr(head_file, "CPU_BYTES", 8 * TINY.vocab_size * 2 * 8)
    torch.manual_seed(0)
    model = GPT(SHALLOW).double()
    with torch.no_grad():
        model.wte.weight.mul_(20)  # a model with preferences
    idx, targets = torch.randint(64, (2, 2, 16))
    targets[0, 3:9] = -1
    return model, idx, targets


def gradients(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that an operation in this context returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(result) if torch.is_tensor(x))])
        return result


@pytest.mark.parametrize("compile", COMPILERS)
@pytest.mark.parametrize("labels", ["given", "sampled"])
def test_the_loss_in_chunks_has_the_value_and_the_gradient_of_the_plain_one(head, labels, compile):
    model, idx, targets = head
    idx, targets = idx[:, :11], targets[:, :11]  # 22 positions make chunks of 8, 8 and 6
    chunk_loss, given = model.chunk_loss, targets
    if labels == "sampled":
        chunk_loss, given = SampledLabelLoss(), torch.rand(2, *idx.shape)
        with torch.no_grad():
            targets = labels_from_uniforms(model(idx), given)
    expected = plain_loss(model, idx, targets)
    if compile:
        torch.compiler.reset()
        chunk_loss.compile(dynamic=False)
    hidden, count = model.hidden(idx).flatten(0, 1), int((targets >= 0).sum())
    with contextlib.nullcontext() if compile else LargestTensor() as largest:
        loss = mean_in_chunks(hidden, model.wte.weight, given.flatten(-2), count, chunk_loss)
    assert compile or largest.elements < 22 * TINY.vocab_size  # the logits of all positions
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradients(3 * loss, model), gradients(3 * expected, model), rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert labels == "sampled" or model(idx, targets).item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_second_derivative_is_refused(head):
    """In place of one without the head's part."""
    model, idx, targets = head
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(RuntimeError, match="once"):
        hutchinson(model(idx, targets), model.parameters())


@pytest.mark.parametrize("compile", COMPILERS)
@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_the_logits_in_float32_however_large_they_are(dtype, scale, compile):
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(64, 16), torch.randn(512, 16), torch.randint(512, (64,))
    loss = ChunkLoss()
    if compile:
        torch.compiler.reset()
        loss.compile(dynamic=False)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = F.linear(hidden, scale * weight)
        found = mean_in_chunks(hidden, scale * weight, labels, 64, loss)
    assert logits.dtype == dtype
    assert found.item() == pytest.approx(F.cross_entropy(logits.float(), labels).item(), rel=1e-5, abs=1e-3)


# Dropout


def test_dropout_is_at_the_embedding_and_three_places_of_each_block_and_for_training_alone(monkeypatch):
    used, dropout, attention = [], F.dropout, F.scaled_dot_product_attention

    def noted(x, p=0.5, training=True, *rest):
        used.append(p if training else 0.0)
        return dropout(x, p, training, *rest)

    def noted_attention(*heads, dropout_p=0.0, **options):
        used.append(dropout_p)
        return attention(*heads, dropout_p=dropout_p, **options)

    monkeypatch.setattr(F, "dropout", noted)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted_attention)
    model, idx = GPT(replace(TINY, dropout=0.3)), torch.zeros(1, 16, dtype=torch.int64)
    assert not torch.equal(model(idx), model(idx))
    assert used == [0.3] * 2 * (1 + 3 * TINY.n_layer)
    model.eval()
    used.clear()
    assert torch.equal(model(idx), model(idx))
    assert set(used) == {0.0}


@pytest.mark.parametrize("compile", COMPILERS)
def test_activations_that_are_computed_again_have_the_dropout_of_the_first_time(compile):
    torch.manual_seed(0)
    model = GPT(replace(SHALLOW if compile else TINY, dropout=0.3)).double()
    idx, targets = torch.randint(64, (2, 2, 16))
    torch.compiler.reset()
    if compile:
        model.compile()

    def two_micro_batches():
        torch.manual_seed(1)
        return [gradients(model(idx, targets), model) for _ in range(2)]

    kept = two_micro_batches()
    assert not torch.allclose(*kept)  # the masks are others
    model.h.checkpoint_activations = True
    torch.testing.assert_close(two_micro_batches(), kept, rtol=1e-10, atol=1e-12)


# Attention


@pytest.fixture
def plain_attention():
    """The machine of a CPU run in bfloat16 with a short context, and its global flag."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    yield Machine(torch.device("cpu"), torch.bfloat16, compile=False, plain_attention=True)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


@pytest.mark.parametrize("scaled", [False, True])
def test_plain_attention_in_bfloat16_is_as_accurate_as_the_fused_one(plain_attention, scaled):
    model = random_model(replace(TINY, scale_attn_by_inverse_layer_idx=scaled), 0.2)
    idx = torch.randint(64, (4, 16))
    exact, found = model(idx), []
    for machine in (plain_attention, replace(plain_attention, plain_attention=False)):
        with machine.forward_context():
            found.append(model(idx))
    assert not torch.equal(*found)
    errors = [(logits.float() - exact).norm() / exact.norm() for logits in found]
    assert errors[0] < 0.02
    assert errors[0] < 1.5 * errors[1]


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


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="17 tokens is longer than block_size 16"):
        GPT(TINY)(torch.zeros(1, 17, dtype=torch.long))
