"""Checkpoints: that they are whole, are found out where they are not, and never hold up or end a run."""

import json
import shutil

import pytest
from conftest import last_checkpoint
from safetensors.torch import load_file, save_file

from training import checkpoints


def reseal(folder):
    """Make the checksums fit the files, as a stranger might."""
    sums = "".join(f"{checkpoints.digest(folder / name)}  {name}\n" for name in checkpoints.FILES)
    (folder / checkpoints.SUMS).write_text(sums)


@pytest.fixture
def checkpoint(train, tmp_path):
    """The only checkpoint of the run in tmp_path / "run", of its first step."""
    train(tmp_path / "run", max_iters=1)
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000000")
    return last_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("damage", ["missing", "reshaped", "stranger"])
def test_refuses_an_impossible_optimizer_state(checkpoint, refuses, tmp_path, damage):
    path = checkpoint / "optimizer.safetensors"
    state = load_file(path)
    if damage == "missing":
        state = {key: value for key, value in state.items() if not key.startswith("wte.weight")}
    elif damage == "reshaped":
        state["wte.weight/exp_avg"] = state["wte.weight/exp_avg"][:5].clone()
    else:
        state["wte.bias/exp_avg"] = state["wte.weight/exp_avg"][:5].clone()
    save_file(state, path)
    reseal(path.parent)
    refuses("is damaged: ", out_dir=tmp_path / "run", init_from="resume", max_iters=2)


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": "zzz"},
        {"tokenizer": []},
        {"settings": []},
        {"model": {"n_layer": "x"}},
        {"model": {"n_head": 0}},
        {"model": {"n_layer": 10**9}},
        {"model": {"n_embd": 2**30}},
        {"progress": {"step": "x"}},
        {"progress": {"seconds": "x"}},
        {"progress": {"surprise": 1}},
    ],
    ids=str,
)
def test_refuses_an_impossible_description(checkpoint, refuses, tmp_path, change):
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    for key, value in change.items():
        state[key] = state[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(state))
    reseal(path.parent)
    refuses("damaged", out_dir=tmp_path / "run", init_from="resume")


def test_refuses_a_deeply_nested_or_endless_description(checkpoint, refuses, tmp_path):
    path = checkpoint / "state.json"
    for text in (b"[" * 100_000, b"{}" + b" " * 2**21):
        path.write_bytes(text)
        reseal(path.parent)
        refuses("state.json is damaged", out_dir=tmp_path / "run", init_from="resume")


def test_a_deletion_that_was_interrupted_does_no_harm(train, tmp_path):
    train(tmp_path, max_iters=10)
    doomed = tmp_path / "checkpoints" / "step_00000005.tmp"
    doomed.mkdir()
    (doomed / "model.safetensors").write_bytes(b"half of it")
    assert train(tmp_path, init_from="resume", max_iters=20)[-1]["step"] == 20
    assert not doomed.exists()
