"""Tokens on disk and the batches made of them."""

import os

import numpy as np
import pytest
import torch

from data.token_files import Tokens, open_data, pairs
from run.errors import RankError, UserError
from tests.conftest import write_dataset
from training.batches import Ahead

TOKENS = np.random.default_rng(0).integers(0, 256, 100_000)


def write_shards(folder, header=False):
    """A data set in three shards of train and two of val, of uneven lengths; returns it in two files as well."""
    write_dataset(folder / "whole", TOKENS[:20_000], TOKENS[20_000:21_000])
    for split, cuts in (("train", [10, 9_999]), ("val", [500])):
        tokens = np.fromfile(folder / f"whole/{split}.bin", "<u2")
        for number, part in enumerate(np.split(tokens, cuts)):
            head = np.zeros(256, "<i4")
            head[:3] = 20240520, 1, len(part)  # llm.c's
            data = (head.tobytes() if header else b"") + part.tobytes()
            (folder / f"some_{split}_{number:06}.bin").write_bytes(data)
    (folder / "meta.json").write_bytes((folder / "whole/meta.json").read_bytes())
    return open_data(f"{folder}/whole", 16)


@pytest.mark.parametrize("header", [False, True])
def test_shards_are_read_as_one_stream(tmp_path, header):
    whole = write_shards(tmp_path, header)
    shards = open_data(f"{tmp_path}", 16)
    assert shards.fingerprint() == whole.fingerprint()
    assert torch.equal(shards.train_rows(7, 3, 500, 0, 500), whole.train_rows(7, 3, 500, 0, 500))
    assert torch.equal(shards.val_rows(shards.val_blocks(0)), whole.val_rows(whole.val_blocks(0)))


def test_a_shard_whose_header_counts_other_tokens_is_refused(tmp_path):
    write_shards(tmp_path, header=True)
    os.truncate(tmp_path / "some_train_000001.bin", 21_000)
    with pytest.raises(UserError, match=r"some_train_000001.bin has 21000 bytes, its header tells of 9989 tokens"):
        open_data(f"{tmp_path}", 16)


def test_rows_cross_from_file_to_file():
    parts = [TOKENS[:size].astype(np.uint16) for size in (0, 5, 1, 40, 0, 3)]
    whole, tokens = np.concatenate(parts), Tokens(parts, "")
    assert len(tokens) == len(whole)
    starts = np.arange(len(whole) - 9)
    assert np.array_equal(tokens.rows(starts, 10), whole[starts[:, None] + np.arange(10)])
    assert np.array_equal(tokens.read(0, len(tokens)), whole)


def test_the_sequences_of_a_seed_and_a_step_never_change(tmp_path):
    """Runs compare with those of last year, whose checkpoints know their data set by its fingerprint."""
    for split, count in (("train", 50_000), ("val", 999)):  # each token tells its position
        np.arange(count, dtype="<u2").tofile(tmp_path / f"{split}.bin")
    data = open_data(f"{tmp_path}", 16)
    x, _ = pairs(data.train_rows(1337, 5, 8, 2, 6))
    assert x[:, 0].tolist() == [6439, 44905, 17300, 10048]
    assert data.val_blocks(4).tolist() == [0, 240, 496, 736]
    assert data.fingerprint() == "15748e0b57a438bd791eb1c5ca8ef37b67850a6fcecbf6e16e44687428d411a4"


@pytest.mark.parametrize("count", [80, 81, 82])  # of tokens: one short of five blocks and a target, as many, one more
def test_validation_takes_every_block_that_has_a_target_for_each_token(tmp_path, count):
    write_dataset(tmp_path, TOKENS, TOKENS[:count])
    assert open_data(f"{tmp_path}", 16).val_blocks(0).tolist() == list(range(0, count - 16, 16))


def test_tokens_beyond_int16_keep_their_value():
    rows = np.array([[0, 32767, 32768, 50256, 65535]], dtype=np.uint16)
    x, y = pairs(torch.from_numpy(rows.view(np.int16)))
    assert x.tolist() == [[0, 32767, 32768, 50256]]
    assert y.tolist() == [[32767, 32768, 50256, 65535]]
    assert x.dtype == y.dtype == torch.int64


def test_what_is_wrong_ahead_is_told_when_it_is_needed():
    def load(key):
        if key == 3:
            raise RankError("bad token")
        return torch.tensor(key)

    ahead = Ahead(load, torch.device("cpu"))
    assert ahead.take(1, 2) == 1
    assert ahead.take(7, 2) == 7  # of another step than was expected
    assert ahead.take(2, 3) == 2
    with pytest.raises(RankError, match="bad token"):
        ahead.take(3, 4)


@pytest.mark.parametrize("change", ["cut", "replaced"])
def test_a_data_file_that_changes_during_a_run_is_noticed(tmp_path, change):
    """Cutting the open file ends the run; another file in its place is found out by the fingerprint on resume."""
    write_dataset(tmp_path, TOKENS, TOKENS[:999])
    path, data = tmp_path / "train.bin", open_data(f"{tmp_path}", 16)
    rows, fingerprint = data.train_rows(0, 1, 8, 0, 8), data.fingerprint()
    backwards = np.fromfile(path, "<u2")[::-1].tobytes()
    if change == "cut":
        os.truncate(path, 1000)
    else:
        (tmp_path / "other").write_bytes(backwards)
        (tmp_path / "other").rename(path)
    if change == "replaced":
        assert torch.equal(data.train_rows(0, 1, 8, 0, 8), rows)
    else:
        with pytest.raises(RankError, match=r"train.bin was cut while it was being read"):
            data.train_rows(0, 1, 8, 0, 8)
    assert open_data(f"{tmp_path}", 16).fingerprint() != fingerprint


def test_the_fingerprint_tells_data_sets_apart(tmp_path):
    """A data set is itself wherever it lies; a token more, or long runs of others, make it another."""

    def fingerprint(name, train, val):
        write_dataset(tmp_path / name, train, val)
        return open_data(f"{tmp_path}/{name}", 16).fingerprint()

    blank = TOKENS.copy()
    blank[50_000:60_000] = 0
    same = [fingerprint(name, TOKENS, TOKENS[:999]) for name in ("a", "b")]
    others = [fingerprint("c", TOKENS, TOKENS[1:1000]), fingerprint("d", TOKENS, TOKENS[:1000]),
              fingerprint("e", blank, TOKENS[:999])]  # fmt: skip
    assert same[0] == same[1]
    assert len({same[0], *others}) == 4
