import math

import pytest
import torch

from model import GPT, GPTConfig

TINY = GPTConfig(block_size=16, vocab_size=64, n_layer=3, n_head=2, n_embd=16)


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


def test_a_token_sees_only_what_came_before():
    torch.manual_seed(0)
    model = GPT(TINY)
    idx = torch.randint(64, (1, 16))
    changed = idx.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 64
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
