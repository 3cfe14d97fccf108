"""Weights in and out: Hugging Face's GPT-2, nanoGPT's and Sophia's ckpt.pt, tools.export and what reads it."""

import json
import os
import pickle
import pydoc_data.topics
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sample
import train as train_script
from data.tokenizers import TOKENIZERS
from model import GPT, GPTConfig
from plot import read_curves
from run.files import write_json
from sample import load_model
from tests import conftest
from tests.conftest import arguments, last_checkpoint, random_model, same_weights, without_timings, write_dataset
from tests.test_train import fake_wandb
from tools import evaluate, export
from tools.export import tokenizer_files, write_weights
from training import pretrained

TINY = GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=16)


def hugging_face(folder, kind="AutoModelForCausalLM"):
    return getattr(pytest.importorskip("transformers"), kind).from_pretrained(folder, local_files_only=True)


def write(model, folder, vocab_size=257):
    folder.mkdir()
    write_weights(model, folder, vocab_size, end_of_text=0)
    return folder


# Hugging Face


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_an_exported_model_has_the_same_logits(scaled, bias, tmp_path):
    model = random_model(GPTConfig(64, 320, 12, 12, 48, 0.0, bias, scaled, exact_gelu=scaled))
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
    model = pretrained.load(str(tmp_path / "a"))
    assert model.config == replace(config, vocab_size=257, bias=True)
    write(model, tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]
    shape = json.loads((tmp_path / "a" / "config.json").read_text())
    assert shape["n_ctx"] == shape["n_positions"] == 16  # llama.cpp reads the one, transformers the other
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_weights_in_several_files_and_in_a_file_that_is_named_are_read(refused, call, tmp_path):
    theirs = hugging_face(write(random_model(TINY), tmp_path / "one"))
    theirs.save_pretrained(tmp_path / "several", max_shard_size="10KB")
    files = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(files) > 1
    whole = pretrained.load(str(tmp_path / "one")).state_dict()
    for source in (tmp_path / "several", tmp_path / "one" / "model.safetensors"):
        read = pretrained.load(str(source)).state_dict()
        assert all(torch.equal(read[name], tensor) for name, tensor in whole.items())
    files[1].unlink()
    assert f"{files[1].name} is missing" in refused(lambda: call(sample, "--init_from", tmp_path / "several"))
    (tmp_path / "several" / "model.safetensors.index.json").write_text('{"weight_map": []}')
    assert "index.json is damaged" in refused(lambda: call(sample, "--init_from", tmp_path / "several"))


def test_a_bin_file_is_refused_with_how_to_convert_it(refused, call, tmp_path):
    folder = write(random_model(TINY), tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    line = refused(lambda: call(sample, "--init_from", folder))
    assert "model.safetensors is missing" in line
    (how,) = re.findall(r"AutoModelForCausalLM\S+", line)
    exec(f"import transformers; transformers.{how}")
    call(sample, "--init_from", folder, "--max_new_tokens", 1)
    assert "for a pytorch_model.bin give its folder" in refused(
        lambda: call(sample, "--init_from", folder / "pytorch_model.bin")
    )


@pytest.mark.parametrize("name", ["distilgpt2", "openai-community/gpt2"])
def test_any_name_is_asked_of_the_hub(name, tmp_path, monkeypatch):
    folder = write(random_model(TINY), tmp_path / "snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda asked, **_: {name: str(folder)}[asked])
    assert pretrained.load(name).config == replace(TINY, bias=True)


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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("by", ["nanoGPT", "nanoGPT, compiled", "Sophia's code"])
def test_a_checkpoint_of_nanogpt_has_the_logits_it_had(by, bias, tmp_path):
    """Sophia's code keeps masks and scales attention."""
    scaled, changes = by == "Sophia's code", {}
    model = random_model(replace(TINY, bias=bias, scale_attn_by_inverse_layer_idx=scaled, exact_gelu=not scaled))
    if scaled:
        masks = {f"transformer.h.{i}.attn.bias": torch.ones(16, 16).tril().view(1, 1, 16, 16) for i in range(2)}
        changes = {"model": masks, "model_args": {"scale_attn_by_inverse_layer_idx": True}}
    path = nanogpt_checkpoint(tmp_path / "ckpt.pt", model, "_orig_mod." * ("compiled" in by), **changes)
    loaded, idx = pretrained.load(path), torch.randint(257, (4, 16))
    assert loaded.config == model.config
    assert torch.equal(loaded(idx), model(idx))
    assert torch.equal(pretrained.load(path, block_size=8)(idx[:, :8]), loaded(idx[:, :8]))


@pytest.mark.parametrize("by", ["nanoGPT", "Hugging Face"])
def test_training_starts_from_weights(by, train, refuses, tmp_path):
    model = GPT(replace(TINY, bias=True))
    path = nanogpt_checkpoint(tmp_path / "w", model) if by == "nanoGPT" else write(model, tmp_path / "w")
    assert train(tmp_path / "run", init_from=path, max_iters=2)[-1]["step"] == 2
    assert train(tmp_path / "run", init_from="resume", max_iters=3)[-1]["step"] == 3
    write_dataset(tmp_path / "large", range(300), range(300), vocab_size=300)
    refuses("has 257 tokens", init_from=path, dataset=tmp_path / "large")
    refuses("it has 16 positions, fewer than block_size 32", init_from=path, block_size=32)


@pytest.fixture
def weights(tmp_path):
    """Weights of a shape that neither TINY nor the defaults have."""
    return nanogpt_checkpoint(tmp_path / "ckpt.pt", GPT(replace(TINY, n_layer=3, n_embd=8, bias=True, exact_gelu=True)))


@pytest.fixture
def configured(call, dataset, tmp_path):
    """configured(**settings) trains as `train` does, in tmp_path / "run", but with TINY settings from a config file."""

    def run(**settings):
        (tmp_path / "config.py").write_text("".join(f"{name} = {value!r}\n" for name, value in conftest.TINY.items()))
        command = arguments(**{"dataset": dataset, "out_dir": tmp_path / "run"} | settings)
        call(train_script, tmp_path / "config.py", *command)

    return run


def test_what_is_recorded_of_a_run_from_weights_is_what_was_used(configured, weights, refused, tmp_path, monkeypatch):
    wandb = fake_wandb(monkeypatch)
    shape = {"n_layer": 3, "n_head": 2, "n_embd": 8, "bias": True, "exact_gelu": True}
    for steps, source in enumerate((weights, "resume", "auto", weights), start=1):
        configured(init_from=source, max_iters=steps, wandb_log=True)
        recorded = json.loads((tmp_path / "run" / "settings.json").read_text())
        state = json.loads((last_checkpoint(tmp_path / "run") / "state.json").read_text())
        assert recorded.items() >= (shape | {"init_from": weights}).items()
        assert state["settings"] == recorded
        assert state["model"].items() >= shape.items()
        assert wandb.init.call_args.kwargs["config"].items() >= recorded.items()
    for source in (weights, "resume"):
        for options in ({"n_layer": 2}, {"bias": False}, {"n_layer": 12}):
            line = refused(lambda: configured(init_from=source, max_iters=9, **options))  # noqa: B023
            assert re.search(r"(n_layer|bias) = (2|12|False), but the weights .*ckpt.pt have (3|True)", line)
    configured(init_from=weights, max_iters=5, n_layer=3, bias=True)
    assert last_checkpoint(tmp_path / "run").name == "step_00000005"


def test_one_command_starts_from_weights_and_goes_on_with_its_own_run_alone(train, refuses, tmp_path):
    for name in ("a.pt", "b.pt"):
        nanogpt_checkpoint(tmp_path / name, random_model(TINY))
    command = {"init_from": tmp_path / "a.pt", "optimizer": "sophiag", "eval_interval": 1, "lr_decay_iters": 6}
    whole = train(tmp_path / "whole", **command, max_iters=6)
    train(tmp_path / "run", **command, max_iters=3)
    assert without_timings(train(tmp_path / "run", **command, max_iters=6)) == without_timings(whole)
    assert same_weights(last_checkpoint(tmp_path / "run"), last_checkpoint(tmp_path / "whole"))
    for source in (tmp_path / "b.pt", "scratch"):
        refuses("holds a run already", out_dir=tmp_path / "run", init_from=source, max_iters=9)
    train(tmp_path / "other", max_iters=1)
    refuses("holds a run already", out_dir=tmp_path / "other", init_from=tmp_path / "a.pt", max_iters=2)


def test_a_run_from_weights_is_no_seed_of_one_from_scratch(train, tmp_path):
    path = nanogpt_checkpoint(tmp_path / "ckpt.pt", GPT(TINY))
    for seed, source in enumerate(("scratch", "auto", path)):
        train(tmp_path / str(seed), init_from=source, seed=seed, exact_gelu=True, max_iters=1)
    train(tmp_path / "1", init_from="resume", seed=1, exact_gelu=True, max_iters=1)
    assert [len(curve.runs) for curve in read_curves([tmp_path / str(seed) for seed in range(3)])] == [2, 1]


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


CONFIGS = [
    {"model_type": "llama"}, {"n_head": 3}, {"n_head": "2"}, {"n_layer": 3}, {"layer_norm_epsilon": 1e-6},
    {"activation_function": "relu"},
]  # fmt: skip
CHECKPOINTS = [
    {"model": {"lm_head.weight": torch.zeros(257, 16)}}, {"model": {"transformer.h.0.ln_1.weight": torch.zeros(0)}},
    {"model": 3}, {"model_args": {"n_layer": 1}}, {"model_args": {"n_head": 0}},
]  # fmt: skip


def test_weights_that_are_damaged_or_contradict_themselves_are_refused_in_one_line(refused, call, tmp_path):
    folder, file = write(random_model(TINY), tmp_path / "model"), nanogpt_checkpoint(tmp_path / "ckpt.pt", GPT(TINY))

    def refuses(source):
        assert f"'{source}' cannot be loaded: " in refused(lambda: call(sample, "--init_from", source))

    for source, path in ((folder, folder / "model.safetensors"), (file, Path(file))):
        whole = path.read_bytes()
        for content in (b"", b"text", whole[:-9], whole[:500], whole[:64] + b"\xff" * 300 + whole[364:]):
            path.write_bytes(content)
            refuses(source)
        path.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    for change in CONFIGS:
        (folder / "config.json").write_text(json.dumps(config | change))
        refuses(folder)
    for changes in CHECKPOINTS:
        refuses(nanogpt_checkpoint(tmp_path / "ckpt.pt", GPT(TINY), **changes))


# Vocabularies


TEXTS = ["Hello, wörld! 你好\n\n  x = 3\t", "\x00\x7f\xad Ā ġ 😀 don't  \r\n", "", *pydoc_data.topics.topics.values()]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_exported_tokenizer_encodes_as_the_project_does_and_is_known_by_it(name, vocabulary, tmp_path):
    ours = TOKENIZERS[name]
    folder = write(GPT(replace(TINY, vocab_size=ours.vocab_size)), tmp_path / name, ours.vocab_size)
    for file, content in tokenizer_files(ours, 16).items():
        write_json(folder / file, content)
    assert load_model(None, str(folder))[1] is ours
    theirs = hugging_face(folder, "AutoTokenizer")
    for text in TEXTS:
        assert theirs.encode(text, verbose=False) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert len(theirs) == ours.vocab_size
    assert theirs.encode(theirs.eos_token) == [theirs.eos_token_id] == [theirs.bos_token_id] == [ours.end_of_text]


# The scripts


@pytest.mark.parametrize(("vocab_size", "token"), [(50257, None), (50304, None), (50257, "the"), (257, "b")])
def test_weights_of_another_vocabulary_than_the_data_sets_are_refused(vocab_size, token, refuses, tmp_path):
    """GPT-2's by its size, padded or not; another one of GPT-2's size or of the bytes' by its entries."""
    model = GPT(replace(TINY, vocab_size=vocab_size))
    source = write(model, tmp_path / "model", vocab_size)
    complaint = f"has {vocab_size} tokens of gpt2, but the data set"
    if token:
        (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {token: 97, "a": 262}}}))
        complaint = f"has a vocabulary of {vocab_size} tokens that is unknown here: must be bytes with 256 or gpt2 with"
    refuses(complaint, init_from=source)
    if not token:
        refuses(complaint, init_from=nanogpt_checkpoint(tmp_path / "ckpt.pt", model))
    (source / "tokenizer.json").write_text('{"model": []}')
    refuses("tokenizer.json is damaged", init_from=source)


def test_a_run_and_each_of_its_checkpoints_are_exported_sampled_from_and_evaluated(
    train, call, refused, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    train(run, optimizer="sophiag", max_iters=3, eval_interval=1, keep_checkpoints=9, learning_rate=0.1)
    start, texts = ["--start", "12 squared", "--max_new_tokens", 20], []
    for step, source in ((3, run), (1, run / "checkpoints/step_00000001")):
        folder, weights = tmp_path / "exported" / str(step), run / f"checkpoints/step_{step:08}" / "model.safetensors"
        assert call(export, "--out_dir", source, "--to", folder).strip() == str(folder)
        assert {path.name for path in folder.iterdir()} == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        exported = pretrained.load(str(folder)).state_dict()
        assert all(torch.equal(exported[name], tensor) for name, tensor in load_file(weights).items())
        texts.append(call(sample, "--init_from", folder, *start))
        assert texts[-1] == call(sample, "--out_dir", source, *start)
        assert "File exists" in refused(lambda: call(export, "--out_dir", source, "--to", folder))  # noqa: B023
    assert texts[0] != texts[1]

    monkeypatch.chdir(source)
    for path in (".", shutil.copytree(source, tmp_path / "best")):
        model, byte, name = load_model(Path(path), None)
        assert (byte.name, Path(name)) == ("bytes", Path(path).resolve())
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in load_file(weights).items())
    shutil.copytree(source, tmp_path / "step_00000002")
    assert "state.json is damaged" in refused(lambda: call(sample, "--out_dir", tmp_path / "step_00000002"))
    pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is not installed")
    assert evaluate.export(str(source), tmp_path / "for the harness") == str(source)


def test_an_unknown_vocabulary_is_refused_in_one_line(refused, call, tmp_path):
    folder = write(GPT(replace(TINY, vocab_size=65)), tmp_path / "model")
    assert "vocabulary of 65 tokens" in refused(lambda: call(sample, "--init_from", folder))
    assert "must be a folder, a ckpt.pt file or a hub name" in refused(
        lambda: call(sample, "--init_from", tmp_path / "nowhere")
    )
    both = ["--init_from", folder, "--out_dir", tmp_path]
    assert "not allowed with" in refused(lambda: call(sample, *both))
    assert "no checkpoint in" in refused(lambda: call(export, "--out_dir", tmp_path, "--to", tmp_path / "to"))
