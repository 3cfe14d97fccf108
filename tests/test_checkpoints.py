"""Checkpoints: that they are whole, are found out where they are not, and never hold up or end a run."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time

import filelock
import pytest

import train as script
from run import errors
from run.settings import ROOT, read
from tests.conftest import TINY, arguments, largest_file, last_checkpoint, same_weights
from training import checkpoint_writer, checkpoints
from training.metrics import Metrics, read_rows


def reseal(folder):
    """Make the checksums fit the files, as those of another version do."""
    (folder / checkpoints.SUMS).write_text("".join(f"{checkpoints.checksum(folder / x)}\n" for x in checkpoints.FILES))


def steps(rows):
    return [row["step"] for row in rows]


@pytest.fixture
def checkpoint(train, tmp_path):
    """The only checkpoint of the run in tmp_path / "run", of its first step."""
    train(tmp_path / "run", max_iters=1)
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000000")
    return last_checkpoint(tmp_path / "run")


# Which ones there are


def test_old_checkpoints_go_but_the_newest_and_the_best_stay_and_each_is_whole_when_named(train, tmp_path, renamed):
    rows = train(tmp_path, optimizer="lion", eval_interval=2, learning_rate=1.0, decay_lr=False, warmup_iters=20)
    losses = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}
    best = min(losses, key=losses.get)
    assert best < 18, losses  # a learning rate that hurts, so that the best is not among the newest
    assert [checkpoints.step_of(folder) for folder in checkpoints.folders(tmp_path)] == sorted({best, 18, 20})
    assert all(renamed[f"step_{step:08}"] for step in losses)  # the disk had all of it


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum")
def test_the_checksums_are_those_of_sha256sum(checkpoint):
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=checkpoint, capture_output=True, text=True, check=True)
    assert done.stdout.count(": OK") == 3


# Damage (tests/stress/damage_checkpoints.py does it in random ways)


def test_a_damaged_checkpoint_is_passed_over_and_set_aside(train, refuses, tmp_path, capsys):
    whole = train(tmp_path / "whole", keep_checkpoints=1)
    train(tmp_path / "run", max_iters=15, lr_decay_iters=20, keep_checkpoints=2)
    path = last_checkpoint(tmp_path / "run") / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    shutil.copytree(path.parent, path.parent.with_name("step_00000005.tmp"))  # of a deletion that was interrupted
    capsys.readouterr()
    rows = train(tmp_path / "run", init_from="resume", keep_checkpoints=1)
    warning = f"warning: {path} is damaged: its checksum is not that of SHA256SUMS: taking step_00000010"
    assert warning in capsys.readouterr().err
    assert steps(rows) == steps(whole)
    assert same_weights(last_checkpoint(tmp_path / "run"), last_checkpoint(tmp_path / "whole"))
    kept = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert kept == {"step_00000015.damaged", "step_00000020"}
    (last_checkpoint(tmp_path / "run") / "state.json").write_text("{}")
    refuses("no other whole checkpoint", out_dir=tmp_path / "run", init_from="auto", max_iters=25)


def test_refuses_a_checkpoint_of_another_version(checkpoint, refuses, tmp_path):
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    for changed in (state | {"progress": {"surprise": 1}}, {"model": state["model"]}):
        path.write_text(json.dumps(changed))
        reseal(checkpoint)
        refuses("state.json is damaged, or of another version", out_dir=tmp_path / "run", init_from="resume")


def test_a_checkpoint_of_before_a_setting_existed_is_gone_on_with(checkpoint, train, tmp_path, capsys):
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    del state["settings"]["float32_matmul_precision"]
    path.write_text(json.dumps(state))
    reseal(path.parent)
    assert train(tmp_path / "run", init_from="resume", max_iters=2)[-1]["step"] == 2
    assert "another setting: float32_matmul_precision was None, is now 'high'" in capsys.readouterr().err


# A disk that is full or slow


@pytest.fixture
def around_writing(monkeypatch):
    """around_writing(context) has the checkpoint of a step written in context(step)."""
    real = checkpoint_writer.write

    def arrange(context):
        def write(out_dir, step, *rest):
            with context(step):
                return real(out_dir, step, *rest)

        monkeypatch.setattr(checkpoint_writer, "write", write)

    return arrange


@pytest.fixture
def full_disk(around_writing):
    """full_disk(step) has no room for the checkpoint of a step, and for every other."""
    return lambda full: around_writing(lambda step: largest_file(10_000) if step == full else contextlib.nullcontext())


def test_a_checkpoint_that_does_not_fit_on_the_disk_does_not_end_the_run(train, tmp_path, full_disk, capsys):
    whole = train(tmp_path / "whole")
    full_disk(10)
    capsys.readouterr()
    rows = train(tmp_path / "run")
    warning = "warning: the checkpoint of step 10 could not be written: .*File too large.*; the run goes on"
    assert re.search(warning, capsys.readouterr().err)
    names = [folder.name for folder in sorted((tmp_path / "run/checkpoints").iterdir())]
    assert names == ["step_00000000", "step_00000020"]
    assert same_weights(last_checkpoint(tmp_path / "run"), last_checkpoint(tmp_path / "whole"))
    assert steps(rows) == steps(whole)


def test_a_first_or_last_checkpoint_that_cannot_be_written_is_an_error_until_there_is_room(train, tmp_path, full_disk):
    for step, found in ((0, "there is no checkpoint"), (20, "step_00000010")):
        full_disk(step)
        with pytest.raises(errors.Unwritten, match=f"step {step} could not be.*File too large.*{found}"):
            train(tmp_path, init_from="auto")
    full_disk(None)
    assert steps(train(tmp_path, init_from="auto")) == list(range(21))
    assert last_checkpoint(tmp_path).name == "step_00000020"


def test_rows_that_do_not_fit_wait(tmp_path, capsys):
    with Metrics(tmp_path, read([]), 0, resumed=False, active=True) as metrics:
        metrics.write({"step": 1})
        with largest_file(20):
            metrics.write({"step": 2})  # half of it fits
            metrics.write({"step": 3})
        metrics.write({"step": 4})
    assert steps(read_rows(tmp_path / "metrics.jsonl")) == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written to: File too large") == 1


def test_training_goes_on_while_a_checkpoint_is_written(train, tmp_path, around_writing, monkeypatch):
    """The checkpoint of step 10 is not finished before step 16 has begun, and holds the weights of step 10."""
    train(tmp_path / "plain", keep_checkpoints=5)
    real, begun = script.accumulate_gradients, threading.Event()

    @contextlib.contextmanager
    def slow(step):
        assert step != 10 or begun.wait(60)
        yield

    def watched(step, *rest):
        if step == 16:
            begun.set()
        return real(step, *rest)

    around_writing(slow)
    monkeypatch.setattr(script, "accumulate_gradients", watched)
    train(tmp_path / "slow", keep_checkpoints=5)
    for step in (10, 20):
        assert same_weights(*(tmp_path / name / f"checkpoints/step_{step:08d}" for name in ("plain", "slow")))


def test_a_diverged_run_tells_of_the_checkpoint_that_was_being_written(train, tmp_path, around_writing):
    @contextlib.contextmanager
    def slow(step):
        time.sleep(0.5 if step else 0)
        yield

    around_writing(slow)
    disaster = {"learning_rate": 1e38, "min_lr": 0.0, "grad_clip": 0.0, "warmup_iters": 11}
    with pytest.raises(errors.Diverged) as error:
        train(tmp_path, **disaster, eval_interval=1)
    assert str(last_checkpoint(tmp_path)) in str(error.value)


# Others


def test_two_runs_do_not_write_to_one_folder(train, tmp_path):
    train(tmp_path / "run", max_iters=1)
    with filelock.FileLock(tmp_path / "run" / ".lock"), pytest.raises(errors.UserError, match="another run is writing"):
        train(tmp_path / "run", init_from="auto", max_iters=2)
    assert train(tmp_path / "run", init_from="auto", max_iters=2)[-1]["step"] == 2


def test_a_run_goes_on_when_nobody_reads_its_output(tmp_path, dataset):
    command = [sys.executable, "train.py", *arguments(**TINY | {"dataset": dataset, "out_dir": tmp_path / "run"})]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert last_checkpoint(tmp_path / "run").name == "step_00000020"
