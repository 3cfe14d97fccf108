"""train.py end to end on a tiny model: its invariants, its records, and what it refuses."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train as script
from records import checkpoints
from run.settings import ROOT
from tests.conftest import OPTIMIZERS, last_checkpoint, listing, same_weights, write_dataset
from tokens.token_files import pairs
from training.optimizers import parameter_groups

ALL = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@ALL
def test_a_resumed_run_ends_bit_identical(train, tmp_path, optimizer):
    options = OPTIMIZERS[optimizer] | {"max_iters": 60, "eval_interval": 30, "dropout": 0.1, "hessian_interval": 10}
    whole = train(tmp_path / "whole", **options)
    train(tmp_path / "parts", **options | {"max_iters": 30, "lr_decay_iters": 60})
    parts = train(tmp_path / "parts", **options, init_from="resume")
    assert same_weights(last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "parts"))
    timings = ("seconds", "tokens_per_second", "data_wait")
    left, right = ([{k: v for k, v in row.items() if k not in timings} for row in rows] for rows in (whole, parts))
    assert left == right
    assert [row["step"] for row in parts] == list(range(61))


@ALL
def test_the_micro_batch_changes_nothing_but_rounding(train, tmp_path, optimizer):
    losses = [
        [row["train/loss"] for row in train(tmp_path / str(size), **OPTIMIZERS[optimizer], micro_batch_size=size)[1:]]
        for size in (1, 8)
    ]
    assert np.abs(np.subtract(*losses)).max() < 1e-5


def test_evaluation_and_logging_do_not_change_the_run(train, tmp_path):
    often = train(tmp_path / "often", optimizer="sophiag", eval_interval=1, log_interval=1)
    rarely = train(tmp_path / "rarely", optimizer="sophiag", eval_interval=20, log_interval=7, eval_sequences=3)
    assert same_weights(last_checkpoint(tmp_path / "often"), last_checkpoint(tmp_path / "rarely"))
    assert [row["step"] for row in rarely] == [0, 7, 14, 20]
    assert often[14]["train/loss"] == rarely[2]["train/loss"]
    assert often[14]["clip_rate"] == rarely[2]["clip_rate"]


def test_the_seed_decides_the_run(train, tmp_path):
    a, b, c = (train(tmp_path / name, seed=seed, max_iters=3) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    losses = [[row.get("train/loss") for row in rows] for rows in (a, b, c)]
    assert losses[0] == losses[1] != losses[2]


def test_metrics_mean_what_they_say(train, tmp_path, dataset):
    rows = train(tmp_path / "run", optimizer="sophiag", grad_clip=0.5, max_iters=10)
    assert rows[0].keys() == {"step", "tokens", "seconds", "val/loss"}
    assert rows[10]["tokens"] == 10 * 8 * 16
    assert rows[1]["lr"] == pytest.approx(6e-4 / 3)
    clipped = [row["grad_norm"] > 0.5 for row in rows[1:]]
    assert rows[10]["clip_rate"] == pytest.approx(sum(clipped) / 10)
    assert 0 <= rows[10]["win_rate"] <= 1
    assert rows[10]["tokens_per_second"] > 0
    assert "mfu" not in rows[10]  # a CPU has no data-sheet peak here
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["hessian_batch_size"] == 4
    assert settings["beta1"] == 0.96
    # the training loss is that of the whole batch, before the update
    data = script.open_data(str(dataset), 16)
    torch.manual_seed(1337)
    model = script.GPT(script.GPTConfig(16, 256, 2, 2, 16))
    with torch.no_grad():
        assert model(*pairs(data.train_rows(1337, 1, 8, 0, 8))).item() == pytest.approx(rows[1]["train/loss"], abs=1e-6)


def test_validation_covers_the_whole_split_in_fixed_blocks(train, tmp_path, dataset):
    rows = train(tmp_path / "run", eval_sequences=0, max_iters=1, micro_batch_size=8)
    data = script.open_data(str(dataset), 16)
    torch.manual_seed(1337)
    model = script.GPT(script.GPTConfig(16, 256, 2, 2, 16))
    val = torch.from_numpy(data.val.files[0][:].astype(np.int64))
    blocks = (len(val) - 1) // 16
    x, y = val[: blocks * 16].view(-1, 16), val[1 : blocks * 16 + 1].view(-1, 16)
    assert blocks % 8  # so that the last batch is filled up
    with torch.no_grad():
        assert rows[0]["val/loss"] == pytest.approx(model(x, y).item(), abs=1e-6)


def test_old_checkpoints_go_but_the_newest_and_the_best_stay(train, tmp_path):
    rows = train(tmp_path, optimizer="lion", eval_interval=2, learning_rate=1.0, decay_lr=False, warmup_iters=20)
    losses = {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}
    best = min(losses, key=losses.get)
    assert best < 18, losses  # a learning rate that hurts, so that the best is not among the newest
    kept = [int(folder.name.removeprefix("step_")) for folder in checkpoints.folders(tmp_path)]
    assert kept == sorted({best, 18, 20})


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(train, tmp_path):
    train(tmp_path, max_iters=10)
    disaster = {"learning_rate": 1e38, "min_lr": 0.0, "grad_clip": 0.0, "log_interval": 4}
    with pytest.raises(script.errors.Diverged, match=r"is (nan|inf).*at step 1[1-9].*step_00000010"):
        train(tmp_path, init_from="resume", max_iters=20, **disaster)
    assert last_checkpoint(tmp_path).name == "step_00000010"
    assert all(torch.isfinite(w).all() for w in load_file(last_checkpoint(tmp_path) / "model.safetensors").values())


def test_eval_only_writes_nothing(train, tmp_path, capsys):
    train(tmp_path / "run", max_iters=10)
    before = listing(tmp_path / "run")
    capsys.readouterr()
    train(tmp_path / "run", init_from="resume", eval_only=True)
    assert "validation loss" in capsys.readouterr().err
    assert before == listing(tmp_path / "run")
    train(tmp_path / "new", eval_only=True)
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_bfloat16_and_compile_agree_with_plain_float32(train, tmp_path):
    plain = train(tmp_path / "plain", optimizer="sophiag", max_iters=10)
    fast = train(tmp_path / "fast", optimizer="sophiag", max_iters=10, dtype="bfloat16", compile=True)
    losses = [[row["train/loss"] for row in rows[1:]] for rows in (plain, fast)]
    assert np.abs(np.subtract(*losses)).max() < 0.02
    assert losses[0] != losses[1]


def test_gpt2_weights_can_be_trained_on(train, tmp_path, dataset):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_positions=16, vocab_size=257, n_layer=1, n_head=2, n_embd=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    rows = train(tmp_path / "run", init_from=tmp_path / "gpt2", max_iters=5)
    assert rows[-1]["step"] == 5
    assert train(tmp_path / "run", init_from="resume", max_iters=6)[-1]["step"] == 6
    with pytest.raises(script.errors.UserError, match="block_size = 8, but the checkpoint"):
        train(tmp_path / "run", init_from="resume", max_iters=7, block_size=8)
    with pytest.raises(script.errors.UserError, match="has 257 tokens"):
        write_dataset(tmp_path / "large", range(300), range(300), vocab_size=300)
        train(tmp_path / "other", init_from=tmp_path / "gpt2", dataset=tmp_path / "large")


def test_wandb_gets_the_rows(train, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows = train(tmp_path, wandb_log=True, max_iters=3)
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1
    end = time.monotonic() + 60
    while len(records := read_wandb(files[0])) < len(rows) and time.monotonic() < end:
        time.sleep(0.1)  # wandb's own process writes the file
    assert [record["step"] for record in records] == [row["step"] for row in rows]
    assert [record.get("train/loss") for record in records] == [row.get("train/loss") for row in rows]


def read_wandb(path):
    """The logged rows of an offline run: protocol buffers in LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    log, position, message, rows = path.read_bytes(), 7, b"", []
    while position + 7 <= len(log):
        if 32768 - position % 32768 < 7:  # the rest of a block too small for a record
            position += 32768 - position % 32768
        _, length, kind = struct.unpack_from("<IHB", log, position)
        message += log[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record.FromString(message)
            if record.HasField("history"):
                items = record.history.item
                rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
            message = b""
    return rows


def test_clipping_scales_the_gradient_to_its_largest_norm(train, tmp_path, dataset):
    """One step of a hand-made AdamW on the hand-clipped gradient gives the run's weights."""
    train(tmp_path, max_iters=1, grad_clip=0.1, warmup_iters=0, min_lr=6e-4)
    torch.manual_seed(1337)
    model = script.GPT(script.GPTConfig(16, 256, 2, 2, 16))
    model(*pairs(script.open_data(str(dataset), 16).train_rows(1337, 1, 8, 0, 8))).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert norm > 0.1
    trained = load_file(last_checkpoint(tmp_path) / "model.safetensors")
    state = load_file(last_checkpoint(tmp_path) / "optimizer.safetensors")
    for name, p in model.named_parameters():
        gradient = p.grad * 0.1 / norm
        torch.testing.assert_close(state[f"{name}/exp_avg"], 0.1 * gradient, rtol=1e-4, atol=1e-9)
        decay = 0.1 if "c_" in name else 0.0
        expected = p * (1 - 6e-4 * decay) - 6e-4 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(trained[name], expected.detach(), rtol=0, atol=2e-6)


def test_weight_decay_is_for_matrices_but_not_embeddings():
    model = script.GPT(script.GPTConfig(8, 64, 1, 2, 8, bias=True))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, others = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {names[p] for p in decayed["params"]} == {
        "h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight", "h.0.mlp.c_proj.weight",
    }  # fmt: skip
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_dropout_masks_do_not_depend_on_curvature(train, tmp_path):
    options = {"optimizer": "sophiag", "dropout": 0.2, "learning_rate": 0.0, "max_iters": 4}
    losses = [
        [row.get("train/loss") for row in train(tmp_path / str(interval), hessian_interval=interval, **options)]
        for interval in (1, 100)
    ]
    assert losses[0] == losses[1]


def test_a_run_that_died_before_its_first_checkpoint_starts_anew(train, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val/loss": 1.0}\n')
    assert [row["step"] for row in train(tmp_path, max_iters=2)] == [0, 1, 2]


def test_a_complete_run_stays_as_it_is(train, tmp_path, capsys):
    train(tmp_path, max_iters=10)
    before = listing(tmp_path)
    train(tmp_path, max_iters=5, init_from="resume")
    assert "is complete" in capsys.readouterr().err
    assert listing(tmp_path) == before


# What it refuses. Nothing may be written.


def test_refuses_an_unknown_setting(refuses):
    refuses("did you mean 'learning_rate'", learning_rat=1)


def test_refuses_a_wrong_type(refuses):
    refuses("n_layer = 'x'", n_layer="x")


def test_refuses_a_batch_that_does_not_divide(refuses):
    refuses("batch_size = 8 is not a multiple of 3 (micro_batch_size 3); 6 or 9 would do", micro_batch_size=3)


def test_refuses_a_missing_data_set(refuses):
    refuses("python data/openwebtext/prepare.py", dataset="there-is-no-such-data-set")
    if not (ROOT / "data" / "openwebtext" / "train.bin").exists():
        refuses("make it with: python data/openwebtext/prepare.py", dataset="openwebtext")


def test_refuses_data_shorter_than_a_block(refuses, tmp_path):
    write_dataset(tmp_path / "short", range(200), range(16))
    refuses("val.bin has 16 tokens, fewer than one block of block_size + 1 = 17", dataset=tmp_path / "short")
    write_dataset(tmp_path / "empty", [], range(100))
    refuses("train.bin has 0 tokens", dataset=tmp_path / "empty")


def test_refuses_an_odd_number_of_bytes(refuses, tmp_path):
    write_dataset(tmp_path / "odd", range(200), range(100))
    with open(tmp_path / "odd" / "train.bin", "ab") as file:
        file.write(b"x")
    refuses("odd number of bytes", dataset=tmp_path / "odd")


def test_refuses_tokens_beyond_the_vocabulary(refuses, tmp_path):
    write_dataset(tmp_path / "wide", [*range(200), 256], range(100))
    refuses("token id 256, beyond the vocabulary of 256", dataset=tmp_path / "wide")


@pytest.mark.parametrize(
    "meta",
    [
        "{",
        "[]",
        '{"tokenizer": "bytes"}',
        '{"tokenizer": "x", "vocab_size": 5}',
        '{"tokenizer": "bytes", "vocab_size": 1e99}',
        '{"tokenizer": [], "vocab_size": 5}',
    ],
)
def test_refuses_a_bad_meta_file(refuses, tmp_path, meta):
    write_dataset(tmp_path / "data", range(200), range(100))
    (tmp_path / "data" / "meta.json").write_text(meta)
    refuses("meta.json", dataset=tmp_path / "data")


def test_assumes_gpt2s_vocabulary_without_a_meta_file(train, tmp_path, capsys):
    write_dataset(tmp_path / "data", range(50000, 50200), range(100))
    (tmp_path / "data" / "meta.json").unlink()
    train(tmp_path / "out", dataset=tmp_path / "data", max_iters=1)
    assert "GPT-2's vocabulary of 50257 tokens is assumed" in capsys.readouterr().err
    assert load_file(last_checkpoint(tmp_path / "out") / "model.safetensors")["wte.weight"].shape[0] == 50304


def test_refuses_a_config_that_calls_a_function(refuses, tmp_path):
    config = tmp_path / "c.py"
    config.write_text(f"n_layer = open({str(tmp_path / 'proof')!r}, 'w').write('x')")
    refuses("a config file is not executed", config)
    assert not (tmp_path / "proof").exists()


def test_refuses_to_resume_without_a_checkpoint(refuses):
    refuses("no checkpoint in", init_from="resume")


def test_refuses_a_checkpoint_of_another_architecture_or_optimizer(train, refuses, tmp_path):
    train(tmp_path / "run", max_iters=1)
    refuses("n_layer = 3, but the checkpoint", out_dir=tmp_path / "run", init_from="resume", n_layer=3)
    refuses("was trained with 'adamw'", out_dir=tmp_path / "run", init_from="resume", optimizer="lion")


def test_refuses_to_overwrite_a_run(train, refuses, tmp_path):
    train(tmp_path / "run", max_iters=1)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    refuses("holds a run already", out_dir=tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_refuses_an_out_dir_that_cannot_be_written(refuses, tmp_path):
    (tmp_path / "file").write_text("x")
    refuses("is a file, not a folder", out_dir=tmp_path / "file")
    refuses("is a file, not a folder", out_dir=tmp_path / "file" / "run")


def test_refuses_another_data_set_or_broken_metrics_when_it_resumes(train, refuses, tmp_path):
    write_dataset(tmp_path / "a", range(200), range(100))
    write_dataset(tmp_path / "b", range(200), range(1, 101))
    train(tmp_path / "run", max_iters=1, dataset=tmp_path / "a")
    again = {"out_dir": tmp_path / "run", "init_from": "resume", "max_iters": 2}
    refuses("is not the one that", dataset=tmp_path / "b", **again)
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"\xff\xfe\n{}\n{}\n")
    refuses("line 1: not a row of metrics", dataset=tmp_path / "a", **again)


def test_an_error_of_one_rank_is_said_by_that_rank(capsys, monkeypatch):
    def fail(kind):
        raise kind("out of range")

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    for kind, printed in ((script.errors.UserError, ""), (script.errors.RankError, "error: rank 3: out of range\n")):
        with pytest.raises(SystemExit) as stop:
            script.errors.run(lambda kind=kind: fail(kind))
        assert stop.value.code == 2
        assert capsys.readouterr().err == printed
    monkeypatch.setenv("LOCAL_RANK", "0")  # of another machine, which may lack the data
    with pytest.raises(SystemExit):
        script.errors.run(lambda: fail(script.errors.UserError))
    assert capsys.readouterr().err == "error: rank 3: out of range\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_refuses_cuda_where_there_is_none(refuses):
    refuses("this machine has no CUDA device", device="cuda")
    refuses("must be auto, cpu, cuda, cuda:N or mps", device="gpu")


def test_refuses_weights_that_cannot_be_had(refuses, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuses("init_from = 'gpt2-none': ", init_from="gpt2-none")
    (tmp_path / "config.json").write_text("[]")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    refuses("is damaged", init_from=tmp_path)
    hostile = {"n_positions": 16, "vocab_size": 257, "n_layer": 10**9, "n_head": 1, "n_embd": 1, "model_type": "gpt2"}
    save_file({"wte.weight": torch.zeros(257, 1)}, tmp_path / "model.safetensors")
    for change in ({}, {"n_layer": 1, "n_head": 0}, {"n_embd": "1"}):
        (tmp_path / "config.json").write_text(json.dumps(hostile | change))
        refuses("is damaged", init_from=tmp_path)
    refuses("'scrach': must be 'scratch', 'resume', 'auto', a hub name 'gpt2*' or a folder", init_from="scrach")


def test_the_whole_program_ends_with_code_2_and_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--n_layr=3"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: unknown setting 'n_layr' in the command line; did you mean 'n_layer'? (--help lists all)\n"
    )  # noqa: E501
    assert not list(tmp_path.iterdir())
