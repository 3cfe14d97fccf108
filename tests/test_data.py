"""Tokens on disk and the batches made of them."""

import os

import numpy as np
import pytest
import torch

from run import settings
from run.errors import RankError, UserError
from run.machine import Machine
from tests.conftest import TINY, arguments, last_checkpoint, same_weights, write_dataset
from tokens.batches import Ahead, Batches
from tokens.token_files import Tokens, open_data, pairs
from training import steps

HERE = Machine(torch.device("cpu"), torch.float32, compile=False)


def write_shards(folder, dataset, header=False):
    """The data set in three shards of train and two of val, of uneven lengths."""
    folder.mkdir()
    for split, cuts in (("train", [10, 9_999]), ("val", [500])):
        tokens = np.fromfile(dataset / f"{split}.bin", "<u2")
        for number, part in enumerate(np.split(tokens, cuts)):
            head = np.zeros(256, "<i4")
            head[:3] = 20240520, 1, len(part)
            data = (head.tobytes() if header else b"") + part.tobytes()
            (folder / f"some_{split}_{number:06}.bin").write_bytes(data)
    (folder / "meta.json").write_bytes((dataset / "meta.json").read_bytes())


@pytest.mark.parametrize("header", [False, True])
def test_shards_are_read_as_one_stream(train, dataset, tmp_path, header):
    write_shards(tmp_path / "shards", dataset, header)
    whole = train(tmp_path / "whole", max_iters=4, eval_sequences=0)
    shards = train(tmp_path / "run", max_iters=4, eval_sequences=0, dataset=tmp_path / "shards")
    assert [row["val/loss"] for row in whole if "val/loss" in row] == [
        row["val/loss"] for row in shards if "val/loss" in row
    ]
    assert same_weights(*(next((tmp_path / run / "checkpoints").glob("*4")) for run in ("whole", "run")))


def test_a_shard_whose_header_counts_other_tokens_is_refused(dataset, tmp_path):
    write_shards(tmp_path / "shards", dataset, header=True)
    path = tmp_path / "shards/some_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"some_train_000001.bin has 21000 bytes, but its header tells of 9989 tokens"):
        open_data(f"{tmp_path}/shards", 16)


def test_a_file_too_short_for_a_header_is_a_short_file(dataset, tmp_path):
    write_shards(tmp_path / "shards", dataset)
    (tmp_path / "shards/some_train_000001.bin").write_bytes(b"\x01\x00")
    assert len(open_data(f"{tmp_path}/shards", 16).train) == 20_000 - 9_989 + 1


def test_rows_cross_from_file_to_file():
    random = np.random.default_rng(0)
    parts = [random.integers(0, 2**16, size, dtype=np.uint16) for size in (5, 1, 40, 0, 3)]
    whole, tokens = np.concatenate(parts), Tokens(parts, "")
    assert len(tokens) == len(whole)
    starts = np.arange(len(whole) - 9)
    assert np.array_equal(tokens.rows(starts, 10), whole[starts[:, None] + np.arange(10)])
    assert np.array_equal(np.concatenate(list(tokens.pieces())), whole)


def test_tokens_beyond_int16_keep_their_value():
    rows = np.array([[0, 32767, 32768, 50256, 65535]], dtype=np.uint16)
    x, y = pairs(torch.from_numpy(rows.view(np.int16)))
    assert x.tolist() == [[0, 32767, 32768, 50256]]
    assert y.tolist() == [[32767, 32768, 50256, 65535]]
    assert x.dtype == y.dtype == torch.int64


def test_reading_ahead_changes_no_batch(dataset):
    s = settings.read(arguments(**TINY | {"dataset": dataset, "micro_batch_size": 2}))
    data = open_data(s.dataset, s.block_size)
    batches = Batches(data, s, HERE)
    for step in (1, 2, 3, 9, 4, 4):  # in turn, and as a resumed run might jump
        x = torch.cat([x for x, _ in batches.train(step)])
        assert torch.equal(x, pairs(data.train_rows(s.seed, step, 8, 0, 8))[0])
        next(batches.train(step))  # a batch that is not read to its end
    assert batches.seconds_waited > 0


def test_what_is_wrong_ahead_is_told_when_it_is_needed():
    def load(key):
        if key == 3:
            raise RankError("bad token")
        return torch.tensor(key)

    ahead = Ahead(load, torch.device("cpu"))
    assert ahead.take(1, 2) == 1
    assert ahead.take(2, 3) == 2
    with pytest.raises(RankError, match="bad token"):
        ahead.take(3, 4)


@pytest.mark.parametrize("change", ["cut", "overwritten", "replaced"])
def test_a_data_file_that_changes_during_a_run(train, refuses, tmp_path, monkeypatch, change):
    """Writing to the open file ends the run; another file in its place is found out when the run is resumed."""
    write_dataset(tmp_path / "data", range(200), range(100))
    path = tmp_path / "data" / "train.bin"
    correct = steps.accumulate_gradients

    def changing(model, batches, step):
        if step == 12:
            backwards = np.fromfile(path, "<u2")[::-1].tobytes()
            if change == "cut":
                os.truncate(path, 100)
            elif change == "overwritten":
                path.write_bytes(backwards)
            else:
                (tmp_path / "other").write_bytes(backwards)
                (tmp_path / "other").rename(path)
        return correct(model, batches, step)

    whole = train(tmp_path / "whole", dataset=tmp_path / "data")
    monkeypatch.setattr(steps, "accumulate_gradients", changing)
    if change == "replaced":
        rows = train(tmp_path / "run", dataset=tmp_path / "data")
        assert [row.get("train/loss") for row in rows] == [row.get("train/loss") for row in whole]
    else:
        with pytest.raises(RankError, match=r"train.bin was changed while it was being read"):
            train(tmp_path / "run", dataset=tmp_path / "data")
        assert last_checkpoint(tmp_path / "run").name == "step_00000010"
    again = {"out_dir": tmp_path / "run", "init_from": "auto", "dataset": tmp_path / "data", "max_iters": 30}
    refuses("is not the one that", **again)


def test_the_fingerprint_tells_data_sets_apart(tmp_path):
    """A data set is itself wherever it lies; a token more, or long runs of others, make it another."""
    tokens = np.random.default_rng(0).integers(0, 256, 100_000)

    def fingerprint(name, train, val):
        write_dataset(tmp_path / name, train, val)
        return open_data(f"{tmp_path}/{name}", 16).fingerprint()

    same = [fingerprint(name, tokens, tokens[:999]) for name in ("a", "b")]
    blank = tokens.copy()
    blank[50_000:60_000] = 0
    others = [
        fingerprint("c", tokens, tokens[1:1000]),
        fingerprint("d", tokens, tokens[:1000]),
        fingerprint("e", blank, tokens[:999]),
    ]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 4
