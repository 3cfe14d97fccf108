"""Signals: a run stops after its step with a checkpoint, and goes on from there as if nothing had happened."""

import os
import signal

import pytest
import torch

import train as script
from run import signals
from tests.conftest import last_checkpoint, needs_compiler, same_weights, without_timings


@pytest.fixture
def heeded():
    """The signals do what they do in a terminal, whatever is ignored around the tests, as by `nohup make test &`."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    for number in signals.SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def signalled(monkeypatch, heeded):
    """signalled(step, *signals) has this process get the signals in the middle of a step."""
    correct = script.accumulate_gradients

    def arrange(at, *numbers):
        def with_signals(step, *rest):
            loss = correct(step, *rest)
            if step == at:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return loss

        monkeypatch.setattr(script, "accumulate_gradients", with_signals)

    return arrange


@pytest.mark.parametrize("number", signals.SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_run_after_its_step(train, tmp_path, signalled, capsys, number):
    handlers = [signal.getsignal(each) for each in signals.SIGNALS]
    signalled(7, number)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path)
    assert stop.value.code == signals.EXIT_CODE == 75
    assert f"{number.name}: stopped after step 7" in capsys.readouterr().err
    assert last_checkpoint(tmp_path).name == "step_00000007"
    assert [signal.getsignal(each) for each in signals.SIGNALS] == handlers


@pytest.mark.parametrize(
    ("compile", "checkpointed"), [(False, False), (False, True), pytest.param(True, False, marks=needs_compiler)]
)
def test_the_same_command_goes_on_to_the_weights_and_the_rows_of_a_run_that_was_not_stopped(
    train, tmp_path, signalled, compile, checkpointed
):
    options = {"optimizer": "sophiag", "dropout": 0.1, "log_interval": 4, "keep_checkpoints": 1, "init_from": "auto"}
    options |= {"compile": compile, "checkpoint_activations": checkpointed, "n_layer": 1, "eval_interval": 20}
    whole = train(tmp_path / "whole", **options)
    signalled(7, signal.SIGTERM)
    with pytest.raises(SystemExit):
        train(tmp_path / "parts", **options)
    torch.compiler.reset()  # as a process does that goes on
    parts = train(tmp_path / "parts", **options)
    assert same_weights(last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "parts"))
    assert without_timings(whole) == without_timings(parts)


@pytest.mark.parametrize("number", signals.SIGNALS, ids=lambda number: number.name)
def test_a_signal_that_is_ignored_around_a_run_stays_so(train, tmp_path, signalled, number):
    signal.signal(number, signal.SIG_IGN)
    signalled(2, number)
    assert train(tmp_path, max_iters=4)[-1]["step"] == 4


@pytest.mark.parametrize("torchrun", [False, True])
def test_a_second_interrupt_does_not_wait_but_under_torchrun_is_the_first_passed_on(
    train, tmp_path, signalled, monkeypatch, torchrun
):
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    signalled(7, signal.SIGINT, signal.SIGINT)
    with pytest.raises(SystemExit if torchrun else KeyboardInterrupt):
        train(tmp_path)
    assert last_checkpoint(tmp_path).name == ("step_00000007" if torchrun else "step_00000000")


def test_a_signal_in_the_last_step_finds_the_run_complete(train, tmp_path, signalled):
    signalled(20, signal.SIGTERM)
    assert train(tmp_path)[-1]["step"] == 20
    assert last_checkpoint(tmp_path).name == "step_00000020"
