"""Tokenized text on disk, and the sequences a run takes from it."""

import bisect
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.tokenizers import GPT2, KNOWN, TOKENIZERS, fits
from run.errors import RankError, UserError
from run.files import read_json
from run.randomness import DATA, stream
from run.settings import ROOT

CHECKED_TOKENS = 2**24  # the first ones of each split, when it is opened; every batch is checked when it is read
SAMPLES, SAMPLE_TOKENS = 64, 2**10  # from a split, for its fingerprint
PROGRESS = "progress.json"  # in a folder whose data set is being prepared
SHARD_MAGIC, SHARD_HEADER_BYTES = 20240520, 1024  # llm.c's .bin files begin with 256 int32: magic, version, tokens, …


@dataclass(frozen=True)
class TokenData:
    """A data set. Its sequences are rows, int16 tensors (sequences, block_size + 1) with the bits of the uint16 tokens;
    `pairs` makes inputs and targets of them. RankError where a row has a token beyond the vocabulary.
    """

    folder: Path
    tokenizer: str
    vocab_size: int
    train: "Tokens"
    val: "Tokens"
    block_size: int

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
        """Sequences `start` to `stop` of the `batch_size` of a step. They depend on (seed, step) and the data alone."""
        random = np.random.default_rng(stream(seed, DATA, step))
        starts = random.integers(0, len(self.train) - self.block_size, size=batch_size)
        return self._rows(self.train, starts[start:stop])

    def val_blocks(self, sequences: int) -> np.ndarray:
        """Where `sequences` evenly spread blocks of the validation split begin, or all of them (0): int64 (blocks,)."""
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


class TokenFile:
    """The tokens of a file, read when a slice asks for them. RankError where it was cut since it was opened."""

    # Not a memory map: that would end the process without a word when the file is cut.

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - held for as long as the tokens are
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        self._skipped, self._size, header = 0, os.fstat(self._file.fileno()).st_size, self._file.read(12)
        if self._size % 2:
            raise UserError(f"{path} has an odd number of bytes, but its tokens have two each: prepare it again")
        if int.from_bytes(header[:4], "little") == SHARD_MAGIC:
            self._skipped, count = SHARD_HEADER_BYTES, int.from_bytes(header[8:], "little")
            if self._size != SHARD_HEADER_BYTES + 2 * count:
                raise UserError(f"{path} has {self._size} bytes, its header tells of {count} tokens: fetch it again")

    def __len__(self) -> int:
        return (self._size - self._skipped) // 2

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        try:
            read = os.pread(self._file.fileno(), 2 * (stop - start), self._skipped + 2 * start)
        except OSError as error:
            raise RankError(f"{self.path} cannot be read: {error.strerror}") from None
        if len(read) != 2 * (stop - start):
            raise RankError(f"{self.path} was cut while it was being read: stopped; prepare the data set again")
        return np.frombuffer(read, "<u2")


class Tokens:
    """The tokens of one or more files, one after the other. `name` is for messages."""

    def __init__(self, files: Sequence[TokenFile | np.ndarray], name: str):
        self.files, self.name = files, name
        self.bounds = np.cumsum([0, *map(len, files)]).tolist()  # file i has the tokens from bounds[i] to bounds[i + 1]

    def __len__(self) -> int:
        return self.bounds[-1]

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """`length` tokens from each of `starts`, uint16 (len(starts), length)."""
        return np.stack([self.read(start, start + length) for start in starts.tolist()])

    def read(self, start: int, stop: int) -> np.ndarray:
        first, end = bisect.bisect_right(self.bounds, start) - 1, bisect.bisect_left(self.bounds, stop)
        files = zip(self.files[first:end], self.bounds[first:end], strict=True)
        parts = [file[max(start - begin, 0) : stop - begin] for file, begin in files]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def check_range(tokens: np.ndarray, vocab_size: int, name: str) -> None:
    """RankError where a token of `tokens` (uint16, any shape) is not in the vocabulary."""
    if (largest := int(tokens.max(initial=0))) >= vocab_size:
        raise RankError(f"{name} has the token id {largest}, beyond the vocabulary of {vocab_size}")


def open_tokens(folder: Path, split: str) -> Tokens:
    """The tokens of train.bin, say, or of its shards *train_*.bin by their names. UserError without any."""
    path = folder / f"{split}.bin"
    try:
        paths = [path] if path.is_file() else sorted(folder.glob(f"*{split}_*.bin"))
    except OSError as error:
        raise UserError(f"data set {folder}: {error.strerror}") from None
    if not paths and (folder / PROGRESS).exists():
        raise UserError(f"data set {folder} is not finished: start the command that was preparing it again")
    if not paths:
        recipes = [f"python {script.relative_to(ROOT)}" for script in sorted(ROOT.glob("data/*/prepare.py"))]
        commands = [recipe for recipe in recipes if f"/{folder.name}/" in recipe] or recipes
        raise UserError(f"{path} does not exist; make it with: {' or '.join(commands)}")
    return Tokens([TokenFile(path) for path in paths], str(paths[0] if len(paths) == 1 else folder / f"*{split}_*.bin"))


def open_data(dataset: str, block_size: int) -> TokenData:
    """Open a folder, or one in data/ by its name. UserError where a check that can be made before training fails."""
    folder = Path(dataset) if "/" in dataset else ROOT / "data" / dataset
    train, val = open_tokens(folder, "train"), open_tokens(folder, "val")
    meta = read_meta(folder)
    for tokens in (train, val):
        if len(tokens) <= block_size:
            raise UserError(f"{tokens.name} has {len(tokens)} tokens, fewer than one block of {block_size + 1 = }")
        check_range(tokens.read(0, min(len(tokens), CHECKED_TOKENS)), meta["vocab_size"], tokens.name)
    return TokenData(folder, meta["tokenizer"], meta["vocab_size"], train, val, block_size)


def read_meta(folder: Path) -> dict:
    """What meta.json says; without one, GPT-2's vocabulary is assumed. UserError where it cannot be used."""
    path = folder / "meta.json"
    if not path.exists():
        return {"tokenizer": GPT2.name, "vocab_size": GPT2.vocab_size}
    try:
        meta = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    tokenizer, vocab_size = meta.get("tokenizer"), meta.get("vocab_size")
    if tokenizer not in list(TOKENIZERS) or type(vocab_size) is not int or not fits(TOKENIZERS[tokenizer], vocab_size):
        raise UserError(f"{path}: tokenizer {tokenizer!r} with vocab_size {vocab_size!r}: must be {KNOWN}")
    return meta


def chunks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """The range from `start` to `stop` in parts (first, last) of `size`; the last one may be smaller."""
    return ((first, min(first + size, stop)) for first in range(start, stop, size))
