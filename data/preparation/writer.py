"""Text to a data set: tokenized on every core, written in the order of the documents, and continued after a kill.

While a data set is made, its folder holds train.bin.tmp, val.bin.tmp and progress.json, which says how many of their
tokens are safe on disk. When all are, meta.json is written, and then the files get their names.
"""

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
from tqdm import tqdm

from data.token_files import PROGRESS
from data.tokenizers import Tokenizer
from run.errors import UserError
from run.files import flush, read_json, write_json

SPLITS = ("train", "val")
TOKENS_BETWEEN_NOTES = 2**21  # after a kill, about so many tokens are made again

TextBatch = tuple[dict[str, list[str]], Any]  # documents by split, and the source's state after them (JSON)


class TextSource:
    """Documents that are in memory, by split. Others are in sources.py."""

    def __init__(self, name: str, texts: dict[str, list[str]]):
        self.name, self.texts = name, texts
        self.identity: Any = texts  # JSON; two sources of one identity have the same documents in the same order
        self.count: int | None = sum(map(len, texts.values()))  # documents, where known

    def batches(self, done: int, state: Any) -> Iterator[TextBatch]:
        """The documents after the first `done`; `state` is the one after them, None at the start."""
        if not done:
            yield self.texts, None


def write_data_set(out_dir: Path, source: Any, tokenizer: Tokenizer, workers: int, overwrite: bool = False) -> None:
    """Make train.bin and val.bin (uint16 tokens) and meta.json in `out_dir`, or go on where an earlier call with the
    same source and tokenizer was ended. UserError where the folder cannot be written to, is in use, or holds another
    data set; with `overwrite` that is replaced.
    """
    job = hashlib.sha256(json.dumps([source.identity, tokenizer.name]).encode()).hexdigest()
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(out_dir / ".lock", blocking=False):
            if not all_tokens_written(out_dir, job):
                progress = begin(out_dir, job, overwrite)
                write_tokens(out_dir, source, tokenizer, workers, progress)
                write_meta(out_dir, source, tokenizer, progress)
            name_files(out_dir)
    except filelock.Timeout:
        raise UserError(f"another process is preparing {out_dir}") from None
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot write to {out_dir}: {why}; when that is mended, the same command goes on") from None


def all_tokens_written(folder: Path, job: str) -> bool:
    there = all(any(folder.glob(f"{split}.bin*")) for split in SPLITS)
    return there and read_or_empty(folder / "meta.json").get("job") == job


def begin(folder: Path, job: str, overwrite: bool) -> dict[str, Any]:
    """How far the job came: documents, tokens by split, and the source's state. A new job needs an empty folder."""
    progress = read_or_empty(folder / PROGRESS)
    if progress.get("job") == job:
        print(f"going on after {sum(progress['tokens'].values()):,} tokens")
        return progress
    # meta.json goes last: token files without one would be taken for nanoGPT's.
    there = [name for name in ("train.bin", "val.bin", PROGRESS, "meta.json") if (folder / name).exists()]
    if there and not overwrite:
        raise UserError(f"{folder} holds another data set ({there[0]}): take another --out-dir, or add --overwrite")
    for name in there:
        (folder / name).unlink()
    flush(folder)  # or after a power cut this job's tokens might be taken for those of the job before
    return {"job": job, "documents": 0, "state": None, "tokens": dict.fromkeys(SPLITS, 0)}


def write_tokens(folder: Path, source: Any, tokenizer: Tokenizer, workers: int, progress: dict[str, Any]) -> None:
    """Write the tokens that are missing, and note `progress` on disk now and then."""
    tokens, noted = progress["tokens"], sum(progress["tokens"].values())
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(open(folder / f"{split}.bin.tmp", "ab")) for split in SPLITS}
        for split, file in files.items():
            if file.tell() < 2 * tokens[split]:  # lost when somebody moved the folder, say
                raise UserError(f"{file.name} is shorter than {PROGRESS} says; delete {PROGRESS} to start over")
            file.truncate(2 * tokens[split])  # what was written after the last note is made again
        bar = stack.enter_context(tqdm(total=source.count, initial=progress["documents"], unit=" documents"))
        batches = source.batches(progress["documents"], progress["state"])
        for arrays, documents, state in tokenized(batches, tokenizer, workers):
            for split, array in arrays.items():
                files[split].write(array)
                tokens[split] += len(array)
            progress["documents"] += documents
            progress["state"] = state
            bar.update(documents)
            if sum(tokens.values()) - noted >= TOKENS_BETWEEN_NOTES:
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                replace_json(folder / PROGRESS, progress)
                noted = sum(tokens.values())
    for split in SPLITS:
        if not tokens[split]:
            raise UserError(f"no document of {source.name} falls to {split}: more text, or another fraction")
        flush(folder / f"{split}.bin.tmp")
    replace_json(folder / PROGRESS, progress)


def tokenized(batches: Iterator[TextBatch], tokenizer: Tokenizer, workers: int) -> Iterator[tuple]:
    """Tokens by split, number of documents and state of each batch, in order, made by threads a few batches ahead."""
    # Threads, because tiktoken does not hold Python's lock. A few, because memory must not grow with the text.

    def encode(texts: dict[str, list[str]], state: Any) -> tuple:
        tokens = {split: tokenizer.encode_documents(part) for split, part in texts.items()}
        return tokens, sum(map(len, texts.values())), state

    ahead: deque[Future] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for batch in batches:
            ahead.append(pool.submit(encode, *batch))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
        yield from (future.result() for future in ahead)


def write_meta(folder: Path, source: Any, tokenizer: Tokenizer, progress: dict[str, Any]) -> None:
    meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
    meta |= {"source": source.name, "checksum": {}, "job": progress["job"]}
    for split, count in progress["tokens"].items():
        with open(folder / f"{split}.bin.tmp", "rb") as file:
            meta["checksum"][f"{split}.bin"] = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        meta[f"{split}_tokens"] = count
    replace_json(folder / "meta.json", meta)


def name_files(folder: Path) -> None:
    for path in (folder / f"{split}.bin" for split in SPLITS):
        with contextlib.suppress(FileNotFoundError):  # it may have its name already
            os.replace(f"{path}.tmp", path)
        print(f"{path}: {path.stat().st_size // 2:,} tokens")
    (folder / PROGRESS).unlink(missing_ok=True)
    flush(folder)


def read_or_empty(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is none, or a damaged one."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return read_json(path)
    return {}


def replace_json(path: Path, value: Any) -> None:
    """Write a file that is the old or the new one whenever the machine stops, and never half of one."""
    scratch = path.with_suffix(".json.tmp")
    write_json(scratch, value)
    flush(scratch)
    os.replace(scratch, path)
    flush(path.parent)
