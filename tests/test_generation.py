"""Generation with cached keys and values against the model without, the options of drawing, and sample.py's modes."""

from dataclasses import replace

import pytest
import torch

import sample
from model import GPTConfig, draw
from tests.conftest import random_model, write_dataset

TINY = GPTConfig(block_size=16, vocab_size=64, n_layer=3, n_head=2, n_embd=16, bias=True)


def model_with_preferences(**shape):
    return random_model(replace(TINY, **shape), 0.3).requires_grad_(False)


def uncached(model, prompt, count):
    """The likeliest continuation of a list of tokens, by the whole model for every token. A context that is full loses
    its older half.
    """
    size, context, new = model.config.block_size, prompt[-model.config.block_size :], []
    for _ in range(count):
        new.append(model(torch.tensor([context]))[0, -1].argmax().item())
        if len(context) == size:
            context = context[(size + 1) // 2 :]
        context = [*context, new[-1]]
    return new


@pytest.mark.parametrize("size", [16, 15, 1])
def test_a_text_goes_on_as_without_a_cache_also_beyond_the_context(size):
    model = model_with_preferences(block_size=size, scale_attn_by_inverse_layer_idx=size == 15)
    for length in (1, 15, 16, 17, 40):
        prompt = torch.randint(64, (1, length))
        text = model.generate(prompt, 45, temperature=0)[0, length:].tolist()
        assert text == uncached(model, prompt[0].tolist(), 45)
        assert len(set(text)) > 5 or size == 1  # it depends on the context
        assert torch.equal(model.generate(prompt, 3)[:, :length], prompt)
    assert torch.equal(model.generate(prompt, 0), prompt)


# Drawing


def frequencies(logits, top_k=None, top_p=1.0):
    generator = torch.Generator().manual_seed(0)
    drawn = draw(logits.expand(20_000, -1), 0.7, top_k, top_p, generator).flatten()
    return drawn.bincount(minlength=logits.shape[-1]) / len(drawn)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (None, 0.9), (None, 0.5), (None, 1e-9), (None, 0), (4, 0.8)])
def test_top_p_draws_from_the_smallest_set_that_reaches_it(top_k, top_p):
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 12)
    probabilities = (logits / 0.7).softmax(dim=-1)[0].tolist()
    order = sorted(range(12), key=lambda token: -probabilities[token])[:top_k]
    whole, kept = sum(probabilities[token] for token in order), []
    for token in order:
        kept.append(token)
        if sum(probabilities[token] for token in kept) >= top_p * whole:
            break
    total = sum(probabilities[token] for token in kept)
    expected = torch.tensor([probabilities[token] / total if token in kept else 0 for token in range(12)])
    found = frequencies(logits, top_k, top_p)
    assert torch.equal(found > 0, (expected > 0) & (found > 0))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.015)
    assert len(kept) == {1.0: 12, 1e-9: 1, 0: 1}.get(top_p, len(kept))


# sample.py


def test_sample_continues_texts_as_the_seed_says_and_each_of_a_file_as_it_would_alone(train, call, tmp_path):
    train(tmp_path / "run", max_iters=3)
    options = [sample, "--out_dir", tmp_path / "run", "--max_new_tokens", 20]
    lines, rule = ["12 squared is", "Grüße", " 7"], "-" * 40
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n\n")
    prompts = [*options, "--prompts", tmp_path / "lines.txt"]
    texts = call(*prompts, "--temperature", 0).split(f"\n{rule}\n")
    for line, text in zip(lines, texts, strict=True):
        alone = [call(*options, "--start", line, *drawn) for drawn in (["--temperature", 0], ["--top_k", 1])]
        assert text.startswith(line) and alone == [text.rstrip("\n") + "\n"] * 2
    drawn = [*prompts, "--top_p", 0.9, "--num_samples", 2]
    first = call(*drawn)
    assert first.count(rule) == 5
    assert first == call(*drawn)
    assert first != call(*drawn, "--seed", 5)
    assert call(*options, "--dtype", "bfloat16", "--start", lines[0]).startswith(lines[0])


def test_a_sample_stops_where_its_document_ends(train, call, tmp_path, monkeypatch):
    write_dataset(tmp_path / "data", list(b"hi\0" * 1000), list(b"hi\0" * 50))
    train(tmp_path / "run", dataset=tmp_path / "data", max_iters=150, learning_rate=0.01, eval_interval=150)
    looked_up, forward = [], torch.nn.Embedding.forward
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda self, idx: looked_up.append(idx) or forward(self, idx))
    options = [sample, "--out_dir", tmp_path / "run", "--temperature", 0]
    (tmp_path / "lines.txt").write_text("hihi\nh\nhi")
    assert call(*options, "--start", "h") == "hi\n"
    rule = "\n\n" + "-" * 40 + "\n"
    assert call(*options, "--prompts", tmp_path / "lines.txt") == rule.join(["hihi", "hi", "hi"]) + "\n"
    assert len(looked_up) < 50  # rather than for 500 tokens each
    found = call(*options, "--start", "h", "--max_new_tokens", 7, "--ignore_eos")
    assert found == "hi<|endoftext|>hi<|endoftext|>hi\n"


def test_sample_refuses_what_it_cannot_use(refused, call, train, tmp_path):
    train(run := tmp_path / "run", max_iters=1)
    (tmp_path / "blank.txt").write_text("\n \n")
    for options, complaint in {
        (f"--out_dir={tmp_path}",): "no checkpoint in",
        (f"--seed={2**70}",): f"--seed: {2**70} is not",
        ("--num_samples=-1",): "--num_samples: -1 is not",
        ("--temprature=1",): "unrecognized arguments: --temprature",
        ("--top_p=1.5",): "--top_p: 1.5 is not from 0 to 1",
        ("--dtype=int8",): "--dtype: invalid choice: 'int8'",
        ("--start=a", "--prompts=b"): "--prompts: not allowed with argument --start",
        (f"--out_dir={run}", "--start=FILE:nowhere.txt"): "nowhere.txt cannot be read",
        (f"--out_dir={run}", "--prompts=nowhere.txt"): "nowhere.txt cannot be read",
        (f"--out_dir={run}", f"--prompts={tmp_path / 'blank.txt'}"): "blank.txt has no line to continue",
    }.items():
        assert complaint in refused(lambda: call(sample, *options))  # noqa: B023
