"""train.py on one rank: what a step computes, what its rows say, and what is refused before anything is written."""

import itertools
import json
import sys
import time
import types
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.token_files import TokenData
from model import GPT, GPTConfig
from run import errors
from run.machine import Machine
from run.ranks import Ranks
from run.settings import read
from tests.conftest import last_checkpoint, listing, needs_compiler, same_weights, write_dataset
from training.checkpoints import Progress
from training.meter import Meter, StepResult

DISASTER = {"learning_rate": 1e38, "min_lr": 0.0, "grad_clip": 0.0}


def losses(rows):
    return [row["train/loss"] for row in rows[1:]]


# What a run computes


def test_evaluation_and_logging_do_not_change_the_run(train, tmp_path):
    options = {"optimizer": "sophiag", "grad_clip": 0.92, "dropout": 0.1}
    often = train(tmp_path / "often", **options, eval_interval=1, log_interval=1)
    rarely = train(tmp_path / "rarely", **options, eval_interval=20, log_interval=7, eval_sequences=3)
    assert same_weights(last_checkpoint(tmp_path / "often"), last_checkpoint(tmp_path / "rarely"))
    assert [row["step"] for row in rarely] == [0, 7, 14, 20]
    assert often[14]["train/loss"] == rarely[2]["train/loss"]
    assert 0 < often[14]["clip_rate"] == rarely[2]["clip_rate"] < 1


def test_dropout_masks_do_not_depend_on_curvature_and_there_are_none_in_evaluations(train, tmp_path):
    options = {"optimizer": "sophiag", "dropout": 0.2, "learning_rate": 0.0, "max_iters": 4, "eval_interval": 1}
    often, rarely = (train(tmp_path / str(n), hessian_interval=n, **options) for n in (1, 100))
    without = train(tmp_path / "without", **options | {"dropout": 0.0})
    assert losses(often) == losses(rarely)
    assert not set(losses(often)) & set(losses(without))
    assert len({row["val/loss"] for row in (*often, *without)}) == 1


@needs_compiler
def test_bfloat16_and_compile_agree_with_plain_float32(train, tmp_path):
    options = {"optimizer": "sophiag", "max_iters": 10, "n_layer": 1}
    plain = losses(train(tmp_path / "plain", **options))
    fast = losses(train(tmp_path / "fast", **options, dtype="bfloat16", compile=True))
    assert 0 < np.abs(np.subtract(plain, fast)).max() < 1e-3 < 0.03 < plain[0] - plain[-1]


# What its records say


def test_metrics_mean_what_they_say(train, tmp_path, monkeypatch):
    """Losses, norms and rates: test_replay.py."""
    correct, started = TokenData.train_rows, time.perf_counter()

    def slow(*sequences):
        time.sleep(0.02)
        return correct(*sequences)

    monkeypatch.setattr(TokenData, "train_rows", slow)
    rows = train(tmp_path, optimizer="sophiag", grad_clip=0.0, max_iters=10, log_interval=4)
    assert rows[-1]["seconds"] < time.perf_counter() - started
    assert [(row["step"], row["tokens"]) for row in rows] == [(step, step * 8 * 16) for step in (0, 4, 8, 10)]
    assert rows[0].keys() == {"step", "tokens", "seconds", "flops", "val/loss"}
    for before, row in itertools.pairwise(rows):
        seconds = row["seconds"] - before["seconds"]
        assert seconds > 0.02 * (row["step"] - before["step"])
        assert row["tokens_per_second"] == pytest.approx((row["tokens"] - before["tokens"]) / seconds)
        assert row["clip_rate"] == 0  # of no clipping
        assert "mfu" not in row  # a CPU has no data-sheet peak here
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert (settings["hessian_batch_size"], settings["beta1"]) == (4, 0.96)


def test_mfu_is_the_share_of_the_peak_of_all_ranks_and_data_wait_that_of_a_rows_time(monkeypatch):
    monkeypatch.setattr(Ranks, "all_reduce", lambda *_: None)  # as the other rank is not there
    monkeypatch.setattr(Machine, "peak_flops", lambda _: 1e12)
    machine = Machine(torch.device("cpu"), torch.float32, False, Ranks(0, 2))
    batches = types.SimpleNamespace(seconds_waited=5.0)
    meter = Meter(read([]), machine, batches, Progress(), flops_per_token=1e6)
    meter.restart()
    batches.seconds_waited += 0.25
    meter.results.append(StepResult(*torch.ones(2)))
    row = meter.finish_row(1)
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 1e6 / 2e12)
    assert row["data_wait"] == pytest.approx(0.25 / row["seconds"])


def test_floating_point_operations_count_the_estimates(train, tmp_path):
    """One of 4 sequences at steps 1 and 6, beside 8 sequences a step; Hutchinson's costs 8/3 of training on them."""
    token = GPT(GPTConfig(16, 256, 2, 2, 16)).flops_per_token()
    for optimizer, passes in {"lion": 0, "sophiag": 1, "sophiah": 8 / 3}.items():
        rows = train(tmp_path / optimizer, optimizer=optimizer, max_iters=6)
        assert rows[0]["flops"] == 0
        assert rows[5]["flops"] == pytest.approx(16 * (5 * 8 + 1 * 4 * passes) * token)
        assert rows[6]["flops"] == pytest.approx(16 * (6 * 8 + 2 * 4 * passes) * token)


def fake_wandb(monkeypatch):
    """Stands in for the module and for the run that its `init` returns."""
    wandb = MagicMock()
    wandb.init.return_value, wandb.errors.Error = wandb, ConnectionError
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


def test_wandb_gets_the_rows_of_a_run_and_of_its_resumption_under_one_id(train, tmp_path, monkeypatch):
    wandb, options = fake_wandb(monkeypatch), {"wandb_log": True, "wandb_project": "a project"}
    train(tmp_path, **options, max_iters=3)
    rows = train(tmp_path, **options, max_iters=5, init_from="resume")
    assert [call.args[0] for call in wandb.log.call_args_list] == rows
    assert [call.kwargs for call in wandb.log.call_args_list] == [{"step": row["step"]} for row in rows]
    first, second = (call.kwargs for call in wandb.init.call_args_list)
    assert (first["project"], first["name"], first["config"]["max_iters"]) == ("a project", tmp_path.name, 3)
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"
    assert "min" in wandb.define_metric.call_args.kwargs["summary"]
    with pytest.raises(errors.Diverged):
        train(tmp_path, **options, max_iters=20, init_from="resume", **DISASTER)
    assert [call.kwargs["exit_code"] for call in wandb.finish.call_args_list] == [0, 0, 1]
    wandb.init.side_effect = ConnectionError("no key\nis set")
    with pytest.raises(errors.UserError, match="^wandb: no key; log in, or set WANDB_MODE=offline$"):
        train(tmp_path / "other", **options)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(train, tmp_path):
    train(tmp_path, max_iters=10)
    with pytest.raises(errors.Diverged, match=r"is (nan|inf).*at step 1[1-9].*step_00000010"):
        train(tmp_path, init_from="resume", log_interval=4, **DISASTER)
    assert last_checkpoint(tmp_path).name == "step_00000010"
    assert all(torch.isfinite(w).all() for w in load_file(last_checkpoint(tmp_path) / "model.safetensors").values())


def test_a_complete_run_stays_as_it_is_and_eval_only_writes_nothing(train, tmp_path, capsys):
    train(tmp_path / "run", max_iters=10)
    assert f"done: {tmp_path / 'run'} has checkpoints/, metrics.jsonl and settings" in capsys.readouterr().err
    before = listing(tmp_path / "run")
    train(tmp_path / "run", max_iters=5, init_from="resume")
    assert "is complete" in capsys.readouterr().err
    train(tmp_path / "run", init_from="resume", eval_only=True)
    assert "validation loss" in capsys.readouterr().err
    assert listing(tmp_path / "run") == before
    train(tmp_path / "new", eval_only=True)
    assert not (tmp_path / "new").exists()


def test_rows_that_were_cut_off_or_are_of_before_the_first_checkpoint_are_written_anew(train, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val/loss": 1.0}\n')
    assert [row["step"] for row in train(tmp_path, max_iters=2)] == [0, 1, 2]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "tokens"')
    assert [row["step"] for row in train(tmp_path, max_iters=4, init_from="resume")] == [0, 1, 2, 3, 4]


# What is refused, before anything is written (settings: test_settings.py)


def test_refuses_data_that_cannot_be_trained_on(refuses, tmp_path):
    for train_tokens, val_tokens, complaint in (
        (range(200), range(16), "val.bin has 16 tokens, fewer than one block of block_size + 1 = 17"),
        ([], range(100), "train.bin has 0 tokens"),
        ([*range(200), 256], range(100), "token id 256, beyond the vocabulary of 256"),
    ):
        write_dataset(tmp_path / "data", train_tokens, val_tokens)
        refuses(complaint, dataset=tmp_path / "data")
    with open(tmp_path / "data" / "train.bin", "ab") as file:
        file.write(b"x")
    refuses("odd number of bytes", dataset=tmp_path / "data")
    write_dataset(tmp_path / "data", range(200), range(100))
    unusable = '{"tokenizer": "x", "vocab_size": 256}', '{"tokenizer": "bytes", "vocab_size": 50257}'
    for meta in ("{", '{"tokenizer": "bytes"}', *unusable):
        (tmp_path / "data" / "meta.json").write_text(meta)
        refuses("meta.json", dataset=tmp_path / "data")
    refuses("python data/openwebtext/prepare.py", dataset="there-is-no-such-data-set")


def test_assumes_gpt2s_vocabulary_without_a_meta_file(train, tmp_path, capsys):
    write_dataset(tmp_path / "data", range(50000, 50200), range(100))
    (tmp_path / "data" / "meta.json").unlink()
    train(tmp_path / "out", dataset=tmp_path / "data", max_iters=1)
    assert "GPT-2's vocabulary of 50257 tokens is assumed" in capsys.readouterr().err
    assert load_file(last_checkpoint(tmp_path / "out") / "model.safetensors")["wte.weight"].shape[0] == 50304


def test_refuses_to_overwrite_a_run_or_to_go_on_with_what_is_not_its_own(train, refuses, tmp_path):
    write_dataset(tmp_path / "a", range(200), range(100))
    write_dataset(tmp_path / "b", range(200), range(1, 101))
    refuses("no checkpoint in", init_from="resume")
    train(tmp_path / "run", max_iters=1, dataset=tmp_path / "a")
    refuses("holds a run already", out_dir=tmp_path / "run")
    again = {"out_dir": tmp_path / "run", "init_from": "resume", "max_iters": 2, "dataset": tmp_path / "a"}
    for name, value in {"n_layer": 3, "block_size": 8}.items():
        refuses(f"{name} = {value}, but the checkpoint", **again, **{name: value})
    refuses("was trained with 'adamw'", **again, optimizer="lion")
    refuses("is not the one that", **again | {"dataset": tmp_path / "b"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_refuses_cuda_where_there_is_none(refuses):
    refuses("this machine has no CUDA device", device="cuda")
    refuses("must be auto, cpu, cuda, cuda:N or mps", device="gpu")


def test_refuses_weights_that_cannot_be_had(refuses, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    places = "must be a folder, a ckpt.pt file or a hub name (or, to train, 'scratch', 'resume' or 'auto')"
    for name in ("gpt2-none", "somebody/none", "scrach", "not/a/name"):
        refuses(f"init_from = '{name}': {places}; the hub did not give it", init_from=name)
