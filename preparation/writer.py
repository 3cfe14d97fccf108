"""Text to a data set: tokenized on every core, written in the order of the documents, and continued after a kill.

While it is made, a folder holds train.bin.tmp, val.bin.tmp and progress.json, which says how much of them is good and
where the text goes on. They are given their names at the end, and meta.json is written last.
"""

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import filelock
import numpy as np
from tqdm import tqdm

from run.errors import UserError
from run.files import flush, read_json, write_json
from tokens.token_files import PROGRESS
from tokens.tokenizers import Tokenizer

SPLITS = ("train", "val")
LOCK = ".lock"
TOKENS_BETWEEN_NOTES = 2**21  # of progress: after a kill, about so many tokens are made again


@dataclass(frozen=True)
class Chunk:
    """Some documents of one or both splits, in order."""

    texts: dict[str, Callable[[], list[str]]]  # by split; called in another thread
    position: Any  # what `Source.chunks` takes to go on after this chunk; JSON
    size: int  # bytes of text


class Source(Protocol):
    """Documents to make a data set of."""

    name: str  # for meta.json and messages
    identity: Any  # JSON; two sources of one identity have the same documents
    size: int | None  # bytes of text, where known

    def chunks(self, position: Any) -> Iterator[Chunk]:
        """The documents after `position`; None begins at the first."""


class TextSource:
    """Documents that are in memory, by split."""

    def __init__(self, name: str, texts: dict[str, list[str]]):
        self.name, self.texts = name, texts
        self.identity = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        self.size = None

    def chunks(self, position: Any) -> Iterator[Chunk]:
        if position is None:
            size = sum(len(text.encode()) for texts in self.texts.values() for text in texts)
            yield Chunk({split: lambda texts=texts: texts for split, texts in self.texts.items()}, "end", size)


def write_data_set(out_dir: Path, source: Source, tokenizer: Tokenizer, workers: int, overwrite: bool = False) -> None:
    """Make train.bin, val.bin and meta.json in `out_dir`. What an earlier call with the same source and tokenizer got
    done is kept; another data set is replaced only with `overwrite`.
    """
    identity = {"source": source.identity, "tokenizer": tokenizer.name}
    job = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(out_dir / LOCK, blocking=False):
            if not is_whole(out_dir, job, overwrite):
                Writer(out_dir, source, tokenizer, job).run(workers)
    except filelock.Timeout:
        raise UserError(f"another process is preparing {out_dir}") from None
    except OSError as error:
        raise UserError(
            f"cannot write to {out_dir}: {error.strerror or error}; when that is mended, the same command goes on"
        ) from None


def is_whole(out_dir: Path, job: str, overwrite: bool) -> bool:
    """Whether the folder has this very data set already. Refuses, or with `overwrite` removes, any other."""
    meta = noted(out_dir / "meta.json")
    if meta.get("job") == job and all((out_dir / f"{split}.bin").is_file() for split in SPLITS):
        print(f"{out_dir} is complete")
        (out_dir / PROGRESS).unlink(missing_ok=True)
        return True
    if noted(out_dir / PROGRESS).get("job") == job:
        return False
    there = [name for name in ("meta.json", "train.bin", "val.bin", PROGRESS) if (out_dir / name).exists()]
    if there and not overwrite:
        what = "an unfinished data set of another kind" if there == [PROGRESS] else "another data set"
        raise UserError(f"{out_dir} holds {what} ({there[0]}): take another --out-dir, or add --overwrite")
    for name in there:
        (out_dir / name).unlink()
    return False


class Writer:
    def __init__(self, out_dir: Path, source: Source, tokenizer: Tokenizer, job: str):
        self.out_dir, self.source, self.tokenizer, self.job = out_dir, source, tokenizer, job
        self.position: Any = None
        self.text_bytes = 0
        self.tokens = dict.fromkeys(SPLITS, 0)
        self.noted = 0  # tokens when progress.json was last written
        self.all_written = False

    def run(self, workers: int) -> None:
        self._read_progress()
        if not self.all_written:
            self._write_tokens(workers)
        empty = [split for split in SPLITS if not self.tokens[split]]
        if empty:
            for name in (PROGRESS, *(f"{split}.bin.tmp" for split in SPLITS)):
                (self.out_dir / name).unlink()
            raise UserError(f"no document of {self.source.name} falls to {empty[0]}: more text, or another fraction")
        meta = {
            "tokenizer": self.tokenizer.name,
            "vocab_size": self.tokenizer.vocab_size,
            "end_of_text": self.tokenizer.end_of_text,
            "source": self.source.name,
            "checksum": {},
            "job": self.job,
        }
        for split in SPLITS:
            path, scratch = self.out_dir / f"{split}.bin", self._scratch(split)
            if scratch.exists():
                os.replace(scratch, path)
            with open(path, "rb") as file:
                meta["checksum"][path.name] = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
            meta[f"{split}_tokens"] = self.tokens[split]
            print(f"{path}: {self.tokens[split]:,} tokens")
        write_json(self.out_dir / "meta.json.tmp", meta)
        flush(self.out_dir / "meta.json.tmp")
        os.replace(self.out_dir / "meta.json.tmp", self.out_dir / "meta.json")
        (self.out_dir / PROGRESS).unlink()
        flush(self.out_dir)

    def _scratch(self, split: str) -> Path:
        return self.out_dir / f"{split}.bin.tmp"

    def _read_progress(self) -> None:
        progress = noted(self.out_dir / PROGRESS)
        if progress.get("job") != self.job or not all(
            2 * count <= self._size(split, progress["all_written"]) for split, count in progress["tokens"].items()
        ):
            # What is there now must not be taken for this job's after a kill.
            for name in (PROGRESS, "train.bin", "val.bin"):
                (self.out_dir / name).unlink(missing_ok=True)
            flush(self.out_dir)
        else:
            self.position, self.text_bytes = progress["position"], progress["text_bytes"]
            self.tokens, self.all_written = progress["tokens"], progress["all_written"]
            self.noted = sum(self.tokens.values())
            print(f"going on after {self.noted:,} tokens")

    def _size(self, split: str, all_written: bool) -> int:
        """Bytes of the tokens of a split; with `all_written` their file may have its name already."""
        paths = [self._scratch(split), *([self.out_dir / f"{split}.bin"] if all_written else [])]
        return next((path.stat().st_size for path in paths if path.exists()), 0)

    def _note_progress(self, files: dict[str, BinaryIO], all_written: bool) -> None:
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        self.noted, self.all_written = sum(self.tokens.values()), all_written
        scratch = self.out_dir / f"{PROGRESS}.tmp"
        names = ("job", "position", "text_bytes", "tokens", "all_written")
        write_json(scratch, {name: getattr(self, name) for name in names})
        flush(scratch)
        os.replace(scratch, self.out_dir / PROGRESS)
        flush(self.out_dir)

    def _write_tokens(self, workers: int) -> None:
        with contextlib.ExitStack() as stack:
            files = {split: stack.enter_context(open(self._scratch(split), "ab")) for split in SPLITS}
            for split, file in files.items():
                file.truncate(2 * self.tokens[split])
            total, done = self.source.size, self.text_bytes
            bar = stack.enter_context(tqdm(total=total, initial=done, unit="B", unit_scale=True, desc="tokenizing"))
            for chunk, arrays in self._tokenized(workers):
                for split, tokens in arrays.items():
                    files[split].write(tokens.astype("<u2", copy=False).tobytes())
                    self.tokens[split] += len(tokens)
                self.position = chunk.position
                self.text_bytes += chunk.size
                bar.update(chunk.size)
                if sum(self.tokens.values()) - self.noted >= TOKENS_BETWEEN_NOTES:
                    self._note_progress(files, all_written=False)
            self._note_progress(files, all_written=True)

    def _tokenized(self, workers: int) -> Iterator[tuple[Chunk, dict[str, np.ndarray]]]:
        """The rest of the source in its order. `workers` threads tokenize ahead, a few chunks and no more; tiktoken
        does not hold Python's lock while it works.
        """

        def tokens_of(chunk: Chunk) -> dict[str, np.ndarray]:
            return {split: self.tokenizer.encode_documents(texts()) for split, texts in chunk.texts.items()}

        pool = ThreadPoolExecutor(workers)
        ahead: deque = deque()
        try:
            for chunk in self.source.chunks(self.position):
                ahead.append((chunk, pool.submit(tokens_of, chunk)))
                if len(ahead) > 4 * workers:
                    done, future = ahead.popleft()
                    yield done, future.result()
            while ahead:
                done, future = ahead.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def noted(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is none."""
    try:
        return read_json(path)
    except (FileNotFoundError, ValueError):
        return {}
