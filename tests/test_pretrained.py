"""Weights in and out: Hugging Face's GPT-2, nanoGPT's and Sophia's ckpt.pt, export.py and what reads its folders."""

import json
import os
import pickle
import pydoc_data.topics
from dataclasses import replace

import pytest
import torch

import export
import pretrained
import sample
from model import GPT, GPTConfig
from records.loading import load_model
from tests.conftest import write_dataset
from tokens.hugging_face import tokenizer_files
from tokens.tokenizers import TOKENIZERS

SHAPES = {"30m": (6, 6), "small": (12, 12), "medium": (24, 16), "540m": (30, 18), "large": (36, 20)}  # layers, heads
TINY = GPTConfig(block_size=16, vocab_size=320, n_layer=2, n_head=2, n_embd=16)


def random_model(config):
    """A model whose biases, gains and logits are large enough to matter."""
    torch.manual_seed(0)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def hugging_face(folder, kind="AutoModelForCausalLM"):
    return getattr(pytest.importorskip("transformers"), kind).from_pretrained(folder, local_files_only=True)


def write(model, folder):
    folder.mkdir()
    pretrained.write_hugging_face(model, folder, vocab_size=257, end_of_text=0)
    return folder


# Hugging Face


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", SHAPES)
def test_an_exported_model_has_the_same_logits(size, scaled, bias, tmp_path):
    n_layer, n_head = SHAPES[size]  # with a sixteenth of the channels
    model = random_model(GPTConfig(64, 320, n_layer, n_head, 4 * n_head, 0.0, bias, scaled, exact_gelu=scaled))
    theirs = hugging_face(write(model, tmp_path / "exported"))
    idx = torch.randint(257, (2, 64))
    with torch.no_grad():
        ours, exported = model(idx)[..., :257], theirs(idx).logits
    assert exported.shape == ours.shape
    assert (ours - exported).abs().max() < 1e-4
    assert ours.abs().max() > 1  # or the comparison would mean nothing


@pytest.mark.parametrize("bias", [False, True])
def test_export_import_and_export_give_the_same_bytes(bias, tmp_path):
    config = replace(TINY, bias=bias, scale_attn_by_inverse_layer_idx=bias, exact_gelu=bias)
    write(random_model(config), tmp_path / "a")
    model = GPT.from_pretrained(str(tmp_path / "a"))
    assert model.config == replace(config, vocab_size=257, bias=True)
    write(model, tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


@pytest.mark.parametrize("change", [
    {"model_type": "llama"}, {"n_head": 3}, {"n_head": "2"}, {"n_layer": 3}, {"n_layer": 10**9}, {"n_embd": 8},
    {"vocab_size": None}, {"layer_norm_epsilon": 1e-6}, {"activation_function": "relu"}, {"n_positions": [16]},
])  # fmt: skip
def test_a_config_of_another_model_is_refused_in_one_line(change, refused, call, tmp_path):
    folder = write(random_model(TINY), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert f"'{folder}' cannot be loaded: " in refused(lambda: call(sample, "--init_from", folder))


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-9], lambda b: b[:500], lambda b: b"\xff" * 99])
def test_damaged_weights_are_refused_in_one_line(damage, refused, call, tmp_path):
    folder = write(random_model(TINY), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    line = refused(lambda: call(sample, "--init_from", folder))
    assert "model.safetensors is damaged" in line


# nanoGPT


def nanogpt_checkpoint(path, gpt, prefix="", **changes):
    """A ckpt.pt as nanoGPT's train.py writes it, or with model_args' scale_attn… and masks as Sophia's."""
    weights = {f"{prefix}transformer.{name}": tensor for name, tensor in gpt.state_dict().items()}
    weights[f"{prefix}lm_head.weight"] = gpt.wte.weight.detach()
    names = ["n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"]
    checkpoint = {
        "model": weights,
        "optimizer": torch.optim.AdamW(gpt.parameters()).state_dict(),
        "model_args": {name: getattr(gpt.config, name) for name in names},
        "iter_num": 6,
        "best_val_loss": torch.tensor(10.8),
        "config": {"out_dir": "out", "learning_rate": 6e-4},
    }
    for name, value in changes.items():
        checkpoint[name] = checkpoint[name] | value if isinstance(value, dict) else value
    torch.save(checkpoint, path)
    return str(path)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [False, True])
def test_a_checkpoint_of_nanogpt_gives_the_loss_it_had(bias, prefix, tmp_path):
    model = random_model(replace(TINY, bias=bias, exact_gelu=True))
    path = nanogpt_checkpoint(tmp_path / "ckpt.pt", model, prefix)
    loaded = GPT.from_pretrained(path)
    assert loaded.config == model.config
    idx, targets = torch.randint(320, (2, 4, 16))
    assert loaded(idx, targets).item() == pytest.approx(model(idx, targets).item(), abs=1e-5)
    assert torch.equal(GPT.from_pretrained(path, block_size=8)(idx[:, :8]), loaded(idx[:, :8]))


def test_a_checkpoint_of_sophias_code_has_scaled_attention_and_masks(tmp_path):
    model = random_model(replace(TINY, scale_attn_by_inverse_layer_idx=True))
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(16, 16).tril().view(1, 1, 16, 16) for i in range(2)}
    path = nanogpt_checkpoint(
        tmp_path / "ckpt.pt", model, model=masks, model_args={"scale_attn_by_inverse_layer_idx": True}
    )
    loaded, idx = GPT.from_pretrained(path), torch.randint(320, (2, 16))
    assert loaded.config == model.config
    assert torch.equal(loaded(idx), model(idx))


def test_training_starts_from_a_checkpoint_of_nanogpt(train, refuses, tmp_path):
    model = GPT(replace(TINY, bias=True))
    path = nanogpt_checkpoint(tmp_path / "ckpt.pt", model)
    assert train(tmp_path / "run", init_from=path, max_iters=2)[-1]["step"] == 2
    assert train(tmp_path / "run", init_from="resume", max_iters=3)[-1]["step"] == 3
    write_dataset(tmp_path / "large", range(400), range(400), vocab_size=400)
    refuses("has 320 tokens", init_from=path, dataset=tmp_path / "large")
    refuses("it has 16 positions, fewer than block_size 32", init_from=path, block_size=32)


class Malicious:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_malicious_checkpoint_is_refused_and_does_nothing(save, refused, call, refuses, tmp_path):
    path, proof = tmp_path / "ckpt.pt", tmp_path / "proof"
    save({"model": Malicious(proof), "model_args": {}}, path)
    assert f"'{path}' cannot be loaded: " in refused(lambda: call(sample, "--init_from", path))
    refuses(f"'{path}' cannot be loaded: ", init_from=path)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Malicious(proof)))
    assert proof.exists()  # it does work


@pytest.mark.parametrize("changes", [
    {"model": {"transformer.wte.weight": torch.zeros(3, 16)}}, {"model": {"transformer.ln_f.bias": torch.zeros(16)}},
    {"model": {"lm_head.weight": torch.zeros(320, 16)}}, {"model": {"transformer.wpe.weight": 3}}, {"model": 3},
    {"model": {"transformer.h.0.ln_1.weight": torch.zeros(0)}}, {"model": {3: torch.zeros(3)}},
    {"model_args": {"n_layer": 1}}, {"model_args": {"n_head": 0}}, {"model_args": {"n_embd": torch.zeros(2)}},
    {"model_args": {"bias": True}}, {"model_args": None},
])  # fmt: skip
def test_a_checkpoint_that_contradicts_itself_is_refused_in_one_line(changes, refused, call, tmp_path):
    path = nanogpt_checkpoint(tmp_path / "ckpt.pt", GPT(TINY), **changes)
    assert f"'{path}' cannot be loaded: " in refused(lambda: call(sample, "--init_from", path))


def test_a_damaged_file_is_refused_in_one_line(refused, call, tmp_path):
    path = tmp_path / "ckpt.pt"
    whole = nanogpt_checkpoint(path, GPT(TINY)) and path.read_bytes()
    for content in (b"", b"text", whole[:-100], whole[: len(whole) // 2], whole[:64] + b"\xff" * 300 + whole[364:]):
        path.write_bytes(content)
        assert f"'{path}' cannot be loaded: " in refused(lambda: call(sample, "--init_from", path))


# Vocabularies


@pytest.fixture
def exported_tokenizer(tmp_path, vocabulary):
    def make(name):
        folder = write(GPT(TINY), tmp_path / name)
        for file, content in tokenizer_files(TOKENIZERS[name], 16).items():
            (folder / file).write_text(json.dumps(content))
        return hugging_face(folder, "AutoTokenizer")

    return make


TEXTS = ["Hello, wörld! 你好\n\n  x = 3\t", "\x00\x7f\xad Ā ġ 😀 don't  \r\n", ""]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_exported_tokenizer_encodes_as_the_project_does(name, exported_tokenizer):
    theirs, ours = exported_tokenizer(name), TOKENIZERS[name]
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert len(theirs) == ours.vocab_size
    assert theirs.encode(theirs.eos_token) == [theirs.eos_token_id] == [theirs.bos_token_id] == [ours.end_of_text]


def test_the_exported_gpt2_tokenizer_encodes_pythons_reference_as_tiktoken_does(exported_tokenizer):
    theirs = exported_tokenizer("gpt2")
    for text in pydoc_data.topics.topics.values():
        assert theirs.encode(text, verbose=False) == TOKENIZERS["gpt2"].encode(text)


# The scripts


def test_a_run_is_exported_and_sampled_from(train, call, refused, tmp_path):
    rows = train(tmp_path / "run", max_iters=3, optimizer="sophiag")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "val/loss": 9.0}\n')  # after the checkpoint
    folder = tmp_path / "deep" / "exported"
    assert call(export, "--out_dir", tmp_path / "run", "--to", folder).strip() == str(folder)
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "curves.png", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    card = (folder / "README.md").read_text()
    assert f"| val/loss at step 3 | {rows[-1]['val/loss']:.4f} |" in card
    assert "--optimizer=sophiag" in card
    parameters = 256 * 16 + 16 * 16 + 2 * (12 * 16**2 + 2 * 16) + 16
    assert f"A GPT-2 with {parameters:,} parameters, pretrained on {3 * 8 * 16} tokens of" in card

    model, tokenizer = hugging_face(folder), hugging_face(folder, "AutoTokenizer")
    ours, byte, name = load_model(str(tmp_path / "run"), None, torch.device("cpu"))
    assert (byte.name, name) == ("bytes", str(tmp_path / "run" / "checkpoints" / "step_00000003"))
    tokens = torch.tensor([tokenizer.encode("12 squared")])
    with torch.no_grad():
        assert (model(tokens).logits - ours(tokens)).abs().max() < 1e-4
    start = ["--start", "12 squared", "--max_new_tokens", 20, "--temperature", 0]
    text = call(sample, "--init_from", folder, *start)
    assert text == call(sample, "--out_dir", tmp_path / "run", *start)
    assert "File exists" in refused(lambda: call(export, "--out_dir", tmp_path / "run", "--to", folder))


def test_an_unknown_vocabulary_is_refused_in_one_line(refused, call, tmp_path):
    folder = write(GPT(replace(TINY, vocab_size=65)), tmp_path / "model")
    assert "vocabulary of 65 tokens" in refused(lambda: call(sample, "--init_from", folder))
    assert "must be a hub name" in refused(lambda: call(sample, "--init_from", tmp_path / "nowhere"))
    both = ["--init_from", folder, "--out_dir", tmp_path]
    assert "not allowed with" in refused(lambda: call(sample, *both))
    assert "no checkpoint in" in refused(lambda: call(export, "--out_dir", tmp_path, "--to", tmp_path / "to"))
