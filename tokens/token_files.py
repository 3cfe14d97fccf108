"""Tokenized text on disk, and the batches a run takes from it."""

import bisect
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from run import randomness
from run.errors import RankError, UserError
from run.files import read_json
from run.settings import ROOT
from tokens.tokenizers import GPT2, TOKENIZERS

CHECKED_TOKENS = 2**28  # of each split when it is opened (half a gigabyte); every batch is checked when it is read
PIECE_TOKENS = 2**24
SAMPLES, SAMPLE_TOKENS = 64, 2**10  # of a split, for its fingerprint
PROGRESS = "progress.json"  # in a folder whose data set is being prepared
SHARD_MAGIC, SHARD_HEADER_BYTES = 20240520, 1024  # llm.c's .bin files begin with 256 int32: magic, version, tokens, …


@dataclass(frozen=True)
class TokenData:
    """A folder with train.bin and val.bin, raw little-endian uint16 tokens, and what its meta.json says of them.

    Its sequences are rows, int16 tensors (sequences, block_size + 1) whose bits are those of the uint16 tokens; `pairs`
    makes inputs and targets of them.
    """

    folder: Path
    tokenizer: str
    vocab_size: int
    train: "Tokens"
    val: "Tokens"
    block_size: int
    has_meta: bool

    @property
    def padded_vocab_size(self) -> int:
        """Rounded up to a multiple of 64, which matrix units like: 50257 becomes 50304."""
        return -(-self.vocab_size // 64) * 64

    def fingerprint(self) -> str:
        """Tells this data set from others: a checksum of the lengths of its splits and of samples of their tokens."""
        digest = hashlib.sha256()
        for tokens in (self.train, self.val):
            length = min(SAMPLE_TOKENS, len(tokens))
            starts = np.linspace(0, len(tokens) - length, SAMPLES, dtype=np.int64)
            digest.update(len(tokens).to_bytes(8, "little") + tokens.rows(starts, length).tobytes())
        return digest.hexdigest()

    def train_rows(self, seed: int, step: int, batch_size: int, start: int, stop: int) -> Tensor:
        """Sequences `start` to `stop` of the `batch_size` of step `step`, a function of (seed, step) alone: each begins
        anywhere in the training split with equal probability.
        """
        random = np.random.default_rng(randomness.stream(seed, randomness.DATA, step))
        starts = random.integers(0, len(self.train) - self.block_size, size=batch_size)
        return self._rows(self.train, starts[start:stop])

    def val_blocks(self, sequences: int) -> np.ndarray:
        """Where the blocks of the validation split begin that an evaluation takes: `sequences` of them evenly spread,
        or all (0).
        """
        blocks = (len(self.val) - 1) // self.block_size
        count = min(sequences, blocks) or blocks
        return np.arange(count) * blocks // count * self.block_size

    def val_rows(self, starts: np.ndarray) -> Tensor:
        return self._rows(self.val, starts)

    def _rows(self, tokens: "Tokens", starts: np.ndarray) -> Tensor:
        rows = tokens.rows(starts, self.block_size + 1)
        check_range(rows, self.vocab_size, tokens.name)
        return torch.from_numpy(rows.view(np.int16))  # torch has few operations for uint16


def pairs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 tensors (sequences, block_size), of a TokenData's rows; targets are one token later."""
    rows = rows.to(torch.int64) & 0xFFFF
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class TokenSource(Protocol):
    """What a slice of gives uint16 tokens: an array, or a TokenFile."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice) -> np.ndarray: ...


class TokenFile:
    """The tokens of a file after its first `skipped` bytes, read when they are asked for. The file is held open and
    must stay as it was: RankError where it was written to since. (A memory map would end the process without a word.)
    """

    def __init__(self, path: Path, skipped: int = 0):
        self.path, self.skipped = path, skipped
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - held for as long as the tokens are
        self._opened = os.fstat(self._file.fileno())

    def __len__(self) -> int:
        return (self._opened.st_size - self.skipped) // 2

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        try:
            read = os.pread(self._file.fileno(), 2 * (stop - start), self.skipped + 2 * start)
            now = os.fstat(self._file.fileno())
        except OSError as error:
            raise RankError(f"{self.path} cannot be read: {error.strerror}") from None
        if (now.st_size, now.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns):
            raise RankError(f"{self.path} was changed while it was being read: stopped; prepare the data set again")
        return np.frombuffer(read, "<u2")


class Tokens:
    """The tokens of a split: a file, or several read as one stream. `name` is for messages."""

    def __init__(self, files: Sequence[TokenSource], name: str):
        self.files, self.name = files, name
        self.ends = np.cumsum([len(file) for file in files]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """`length` tokens from each of `starts`, uint16 (len(starts), length)."""
        rows = np.empty((len(starts), length), np.uint16)
        for row, start in zip(rows, starts.tolist(), strict=True):
            filled = 0
            number = bisect.bisect_right(self.ends, start)
            while filled < length:
                offset = start + filled - (self.ends[number] - len(self.files[number]))
                piece = self.files[number][offset : offset + length - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
                number += 1
        return rows

    def pieces(self) -> Iterator[np.ndarray]:
        """All the tokens, up to PIECE_TOKENS at a time."""
        for file in self.files:
            for first, last in chunks(0, len(file), PIECE_TOKENS):
                yield file[first:last]


def check_range(tokens: np.ndarray, vocab_size: int, name: str) -> None:
    largest = int(tokens.max(initial=0))
    if largest >= vocab_size:
        raise RankError(
            f"{name} has the token id {largest}, beyond the vocabulary of {vocab_size} (0 to {vocab_size - 1})"
        )


def data_folder(dataset: str) -> Path:
    """The folder that a `dataset` setting names; UserError where there is no data set."""
    folder = Path(dataset) if "/" in dataset else ROOT / "data" / dataset
    try:
        unfinished = (folder / PROGRESS).exists() and not (folder / "meta.json").exists()
    except OSError as error:
        raise UserError(f"data set {dataset!r}: {error.strerror}") from None
    if unfinished:
        raise UserError(f"data set {dataset!r} is not finished: start the command that was preparing {folder} again")
    missing = [f"{split}.bin" for split in ("train", "val") if not split_files(folder, split)]
    if missing:
        known = sorted(path.parent.name for path in (ROOT / "data").glob("*/prepare.py"))
        if folder.name in known:
            hint = f"make it with: python data/{folder.name}/prepare.py"
        else:
            hint = "data sets that can be made: " + ", ".join(f"python data/{name}/prepare.py" for name in known)
        raise UserError(f"data set {dataset!r}: {folder / missing[0]} does not exist; {hint}")
    return folder


def split_files(folder: Path, split: str) -> list[Path]:
    """The file of a split, train.bin say; without it, its shards in the order of their names, *train_*.bin."""
    whole = folder / f"{split}.bin"
    shards = (path for path in folder.glob(f"*{split}_*.bin") if path.is_file())
    return [whole] if whole.is_file() else sorted(shards)


def open_tokens(folder: Path, split: str) -> Tokens:
    paths = split_files(folder, split)
    return Tokens([open_file(path) for path in paths], str(paths[0] if len(paths) == 1 else folder / f"*{split}_*.bin"))


def open_file(path: Path) -> TokenFile:
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=3)
        if size % 2:
            raise UserError(f"{path} has an odd number of bytes, but its tokens have two each: prepare it again")
        if size < SHARD_HEADER_BYTES or header[0] != SHARD_MAGIC:
            return TokenFile(path)
        if size != SHARD_HEADER_BYTES + 2 * int(header[2]):
            raise UserError(f"{path} has {size} bytes, but its header tells of {header[2]} tokens: fetch it again")
        return TokenFile(path, skipped=SHARD_HEADER_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def open_data(dataset: str, block_size: int) -> TokenData:
    """Open a data set, with every check that can be made before training on it."""
    folder = data_folder(dataset)
    meta = read_meta(folder)
    vocab_size = meta["vocab_size"]
    splits = {}
    for split in ("train", "val"):
        tokens = open_tokens(folder, split)
        if len(tokens) <= block_size:
            raise UserError(
                f"{tokens.name} has {len(tokens)} tokens, fewer than one block of block_size + 1 = {block_size + 1};"
                f" prepare more data or lower block_size"
            )
        unchecked = CHECKED_TOKENS
        for piece in tokens.pieces():
            check_range(piece[:unchecked], vocab_size, tokens.name)
            unchecked -= len(piece)
            if unchecked <= 0:
                break
        splits[split] = tokens
    has_meta = (folder / "meta.json").exists()
    return TokenData(folder, meta["tokenizer"], vocab_size, **splits, block_size=block_size, has_meta=has_meta)


def read_meta(folder: Path) -> dict[str, Any]:
    """What meta.json says; without one, GPT-2's vocabulary is assumed."""
    path = folder / "meta.json"
    if not path.exists():
        return {"tokenizer": GPT2.name, "vocab_size": GPT2.vocab_size}
    try:
        meta = read_json(path)
        tokenizer, vocab_size = meta["tokenizer"], meta["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: it must be a JSON object with tokenizer and vocab_size") from None
    if tokenizer not in list(TOKENIZERS):
        raise UserError(f"{path}: tokenizer {str(tokenizer)[:40]!r} is unknown; known are {', '.join(TOKENIZERS)}")
    if type(vocab_size) is not int or not 1 <= vocab_size <= 2**16:
        raise UserError(f"{path}: vocab_size {str(vocab_size)[:40]} must be a whole number from 1 to 65536")
    return meta


def chunks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, size):
        yield first, min(first + size, stop)
