"""Checkpoints: that they are whole, are found out where they are not, and never hold up or end a run."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading

import filelock
import pytest
import torch
from safetensors.torch import load_file, save_file

import train as script
from records import checkpoints
from records.metrics import Metrics, read_rows
from run.settings import ROOT
from tests.conftest import TINY, arguments, last_checkpoint, same_weights
from tests.stress import damage_checkpoints


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


@pytest.mark.parametrize("damage", ["missing", "reshaped", "renamed", "stranger"])
def test_refuses_an_impossible_optimizer_state(checkpoint, refuses, tmp_path, damage):
    path = checkpoint / "optimizer.safetensors"
    state = load_file(path)
    if damage == "missing":
        state = {key: value for key, value in state.items() if not key.startswith("wte.weight")}
    elif damage == "reshaped":
        state["wte.weight/exp_avg"] = state["wte.weight/exp_avg"][:5].clone()
    elif damage == "renamed":
        state = {key.replace("exp_avg_sq", "hessian"): value for key, value in state.items()}
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
        {"model": {"n_layer": 20_000, "n_embd": 1, "n_head": 1}},
        {"settings": {"optimizer": "sgd"}},
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


@pytest.mark.parametrize("damages", [100])
def test_damage_is_found_out(tmp_path, damages):
    outcomes = damage_checkpoints.run(tmp_path, damages)
    assert sum(outcomes.values()) == damages
    assert len(outcomes) == 3, outcomes


def test_a_damaged_checkpoint_is_passed_over_and_set_aside(train, tmp_path, capsys):
    whole = train(tmp_path / "whole", keep_checkpoints=1)
    train(tmp_path / "run", max_iters=15, lr_decay_iters=20, keep_checkpoints=2)
    path = last_checkpoint(tmp_path / "run") / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    rows = train(tmp_path / "run", init_from="resume", keep_checkpoints=1)
    warning = f"warning: {path} is damaged: its checksum is not that of SHA256SUMS: taking step_00000010"
    assert warning in capsys.readouterr().err
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    assert same_weights(last_checkpoint(tmp_path / "run"), last_checkpoint(tmp_path / "whole"))
    kept = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert kept == {"step_00000015.damaged", "step_00000020"}


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum")
def test_the_checksums_are_those_of_sha256sum(checkpoint):
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=checkpoint, capture_output=True, text=True, check=True)
    assert done.stdout.count(": OK") == 3


@contextlib.contextmanager
def largest_file(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_does_not_fit_on_the_disk_does_not_end_the_run(train, tmp_path, monkeypatch, capsys):
    whole = train(tmp_path / "whole")
    real = checkpoints.write

    def on_a_full_disk(out_dir, step, *rest):
        with largest_file(10_000) if step == 10 else contextlib.nullcontext():
            return real(out_dir, step, *rest)

    monkeypatch.setattr(checkpoints, "write", on_a_full_disk)
    capsys.readouterr()
    rows = train(tmp_path / "run")
    printed = capsys.readouterr().err
    assert "warning: the checkpoint of step 10 could not be written: " in printed
    assert "File too large" in printed
    assert "; the run goes on" in printed
    assert [folder.name for folder in sorted((tmp_path / "run/checkpoints").iterdir())] == [
        "step_00000000",
        "step_00000020",
    ]
    assert same_weights(last_checkpoint(tmp_path / "run"), last_checkpoint(tmp_path / "whole"))
    assert [row["step"] for row in rows] == [row["step"] for row in whole]


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(train, tmp_path, monkeypatch):
    real = checkpoints.write

    def on_a_full_disk(out_dir, step, *rest):
        with largest_file(10_000) if step == 20 else contextlib.nullcontext():
            return real(out_dir, step, *rest)

    monkeypatch.setattr(checkpoints, "write", on_a_full_disk)
    with pytest.raises(script.errors.Unwritten, match=r"step 20 could not be.*File too large.*step_00000010"):
        train(tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
def test_a_full_file_system(tmp_path, dataset):
    """A file system with room for two checkpoints and a half: none after the second, until there is room again."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1000k", "none", folder], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        settings = TINY | {"n_embd": 32, "dataset": dataset, "out_dir": folder / "run", "eval_interval": 5}
        command = [sys.executable, "train.py", *arguments(**settings)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 4, done.stderr
        assert "No space left on device" in done.stderr
        assert "the run goes on" in done.stderr
        assert "Traceback" not in done.stderr
        found = checkpoints.folders(folder / "run")
        assert found
        assert found[-1].name < "step_00000020"
        subprocess.run(["mount", "-o", "remount,size=10m", folder], check=True)
        done = subprocess.run([*command, "--init_from=auto"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert last_checkpoint(folder / "run").name == "step_00000020"
        rows = [json.loads(line)["step"] for line in (folder / "run/metrics.jsonl").open()]
        assert rows == list(range(21))
    finally:
        subprocess.run(["umount", folder], check=True)


def test_rows_that_do_not_fit_wait(tmp_path, capsys):
    s = script.settings.read([])
    with Metrics(tmp_path, s, -1, active=True) as metrics:
        metrics.write({"step": 1})
        with largest_file(20):
            metrics.write({"step": 2})  # half of it fits
            metrics.write({"step": 3})
        metrics.write({"step": 4})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written to: File too large") == 1


def test_the_loop_goes_on_while_a_checkpoint_is_written(train, tmp_path, monkeypatch):
    """Step 10's is held up until step 15 is done; it still holds the weights of step 10."""
    train(tmp_path / "plain", keep_checkpoints=5)
    real_write, real_gradients = checkpoints.write, script.steps.accumulate_gradients
    done = threading.Event()

    def slow(out_dir, step, *rest):
        assert step != 10 or done.wait(60)
        return real_write(out_dir, step, *rest)

    def watched(model, batches, step):
        if step == 16:
            done.set()
        return real_gradients(model, batches, step)

    monkeypatch.setattr(checkpoints, "write", slow)
    monkeypatch.setattr(script.steps, "accumulate_gradients", watched)
    train(tmp_path / "slow", keep_checkpoints=5)
    for step in (10, 20):
        assert same_weights(*(tmp_path / name / f"checkpoints/step_{step:08d}" for name in ("plain", "slow")))


@pytest.mark.parametrize("waits", [True, False], ids=["waiting", "not waiting, as a control"])
@pytest.mark.parametrize("optimizer", ["adamw", "sophiag"])
def test_the_update_waits_for_the_copies(train, tmp_path, monkeypatch, waits, optimizer):
    options = {"optimizer": optimizer, "hessian_interval": 1, "keep_checkpoints": 5}
    train(tmp_path / "plain", **options)
    real, slow = checkpoints.Writer._copy, threading.Event()

    def copy(self, *what):
        slow.wait(0.01)
        real(self, *what)

    monkeypatch.setattr(checkpoints.Writer, "_copy", copy)
    if not waits:
        monkeypatch.setattr(checkpoints.Writer, "wait_for_copies", lambda self: None)
    train(tmp_path / "slow", **options)
    folders = [tmp_path / name / "checkpoints/step_00000010" for name in ("plain", "slow")]
    assert same_weights(*folders) == waits


def test_two_runs_do_not_write_to_one_folder(train, refuses, tmp_path):
    train(tmp_path / "run", max_iters=1)
    with filelock.FileLock(tmp_path / "run" / ".lock"):
        refuses("another run is writing to", out_dir=tmp_path / "run", init_from="auto", max_iters=2)
    assert train(tmp_path / "run", init_from="auto", max_iters=2)[-1]["step"] == 2
    (tmp_path / "new").mkdir()
    folder = script.RunFolder(script.settings.read([f"--out_dir={tmp_path / 'new'}"]))
    assert folder.checkpoint() is None
    train(tmp_path / "new", max_iters=1)
    with folder, pytest.raises(script.errors.UserError, match="another run has written to"):
        folder.begin(None)
    shutil.rmtree(tmp_path / "new" / "checkpoints")
    with filelock.FileLock(tmp_path / "new" / ".lock"), pytest.raises(script.errors.UserError, match="another run is"):
        train(tmp_path / "new", max_iters=2)


@pytest.mark.parametrize("name", ["checkpoints", "wandb", "metrics.jsonl", "settings.json", "wandb_run_id", ".lock"])
def test_nothing_is_written_through_links(refuses, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    refuses(f"{name} is a symbolic link", out_dir=tmp_path / "run", init_from="auto")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "settings.json"])
def test_a_folder_with_other_things_in_it_is_refused(refuses, tmp_path, name):
    (tmp_path / "run").mkdir()
    if name == "checkpoints":
        (tmp_path / "run" / name).write_text("x")
    else:
        os.mkfifo(tmp_path / "run" / name)
    refuses(f"{name} is not of the kind", out_dir=tmp_path / "run", init_from="auto")


def test_a_scratch_file_is_not_written_through_a_link(train, tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl.tmp").symlink_to(tmp_path / "precious")
    train(tmp_path / "run", max_iters=1)
    assert (tmp_path / "precious").read_text() == "x"
    assert not (tmp_path / "run/metrics.jsonl").is_symlink()


def test_links_among_the_checkpoints_are_removed_and_not_followed(train, tmp_path):
    train(tmp_path / "run", max_iters=1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")
    for name in ("step_00000001.tmp", "step_00000000.tmp"):
        (tmp_path / "run/checkpoints" / name).symlink_to(tmp_path / "elsewhere")
    train(tmp_path / "run", init_from="auto", max_iters=2, keep_checkpoints=1)
    assert (tmp_path / "elsewhere" / "file").read_text() == "x"


def test_a_checkpoint_holds_what_the_model_is(checkpoint):
    config = checkpoints.read(checkpoint).config
    for bias in (False, True):
        config = script.dataclasses.replace(config, bias=bias)
        assert config.parameters == sum(parameter.numel() for parameter in script.GPT(config).parameters())
    assert all(torch.isfinite(tensor).all() for tensor in load_file(checkpoint / "model.safetensors").values())


def test_a_run_goes_on_when_nobody_reads_its_output(tmp_path, dataset):
    command = [sys.executable, "train.py", *arguments(**TINY | {"dataset": dataset, "out_dir": tmp_path / "run"})]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert last_checkpoint(tmp_path / "run").name == "step_00000020"


def test_a_first_checkpoint_that_cannot_be_written_ends_the_run(train, tmp_path):
    with (
        largest_file(10_000),
        pytest.raises(script.errors.Unwritten, match="step 0 could.*there is no checkpoint"),
    ):
        train(tmp_path)


def test_a_diverged_run_tells_of_the_checkpoint_that_was_being_written(train, tmp_path, monkeypatch):
    real, late = checkpoints.write, threading.Event()

    def slow(out_dir, step, *rest):
        late.wait(0.5 if step else 0)
        return real(out_dir, step, *rest)

    monkeypatch.setattr(checkpoints, "write", slow)
    disaster = {"learning_rate": 1e38, "min_lr": 0.0, "grad_clip": 0.0, "warmup_iters": 11, "max_iters": 20}
    with pytest.raises(script.errors.Diverged) as error:
        train(tmp_path, **disaster, eval_interval=1)
    assert str(last_checkpoint(tmp_path)) in str(error.value)
