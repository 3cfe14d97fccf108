"""Signals: a run stops after its step with a checkpoint, and goes on from there as if nothing had been."""

import os
import signal

import pytest

from run import signals
from tests.conftest import last_checkpoint, same_weights
from training import steps

correct = steps.accumulate_gradients


@pytest.fixture
def signalled(monkeypatch):
    """signalled(step, *signals) has this process get the signals in the middle of a step."""

    def arrange(at, *signals):
        def with_signals(model, batches, step):
            part = correct(model, batches, step)
            if step == at:
                for number in signals:
                    os.kill(os.getpid(), number)
            return part

        monkeypatch.setattr(steps, "accumulate_gradients", with_signals)

    return arrange


@pytest.mark.parametrize("number", signals.SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_run_after_its_step_and_auto_goes_on(train, tmp_path, signalled, capsys, number):
    options = {"optimizer": "sophiag", "log_interval": 4, "keep_checkpoints": 1}
    handlers = [signal.getsignal(each) for each in signals.SIGNALS]
    whole = train(tmp_path / "whole", **options)
    signalled(7, number)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "parts", **options, init_from="auto")
    assert stop.value.code == signals.EXIT_CODE == 75
    assert f"{number.name}: stopped after step 7" in capsys.readouterr().err
    assert last_checkpoint(tmp_path / "parts").name == "step_00000007"
    assert [signal.getsignal(each) for each in signals.SIGNALS] == handlers
    parts = train(tmp_path / "parts", **options, init_from="auto")
    assert same_weights(last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "parts"))
    for key in ("step", "train/loss", "clip_rate", "win_rate", "val/loss"):
        assert [row.get(key) for row in whole] == [row.get(key) for row in parts]


def test_a_second_interrupt_does_not_wait(train, tmp_path, signalled):
    signalled(7, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    assert last_checkpoint(tmp_path).name == "step_00000000"


def test_under_torchrun_a_second_interrupt_is_the_first_passed_on(train, tmp_path, signalled, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    signalled(7, signal.SIGINT, signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path)
    assert stop.value.code == 75


def test_a_signal_in_the_last_step_finds_the_run_complete(train, tmp_path, signalled):
    signalled(20, signal.SIGTERM)
    assert train(tmp_path)[-1]["step"] == 20
    assert last_checkpoint(tmp_path).name == "step_00000020"


def test_auto_starts_where_there_is_no_checkpoint_and_is_refused_where_none_is_whole(train, refuses, tmp_path):
    assert train(tmp_path / "run", init_from="auto", max_iters=1)[-1]["step"] == 1
    for path in (tmp_path / "run").glob("checkpoints/*/state.json"):
        path.write_text("{}")
    refuses("no other whole checkpoint", out_dir=tmp_path / "run", init_from="auto", max_iters=2)
