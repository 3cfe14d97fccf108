"""Documents of the Hugging Face hub or of local files, and the command line that makes a data set of them."""

import glob
import hashlib
import logging
import lzma
import math
import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preparation.writer import Chunk, Source, write_data_set
from run.errors import Parser, UserError
from run.settings import ROOT
from tokens.tokenizers import TOKENIZERS

FORMATS = {".json": "json", ".jsonl": "json", ".txt": "text", ".parquet": "parquet"}
COMPRESSIONS = {".bz2", ".gz", ".xz", ".zst"}
SPLIT_SEED = 2357  # nanoGPT's
CHUNK_BYTES = 2**20  # of text, that one thread tokenizes at a time


def prepare(description: str | None, name: str, source: str, config: str | None = None, val_fraction=0.0005) -> None:
    """The main function of data/NAME/prepare.py: make a data set of hub documents `source`, or of what the command line
    names instead.
    """
    parser = Parser(description)
    add = parser.add_argument
    add("--source", default=source, metavar="NAME", help=f"a data set of the Hugging Face hub (default {source})")
    add("--config", help="its configuration, where it has several")
    add("--streaming", action="store_true", help="read it from the network as it is tokenized, without a copy on disk")
    add("--data-files", nargs="+", type=Path, metavar="FILE", help="local files instead: .json or .jsonl or .parquet,"
        " or .txt (a file is a document); may be compressed")  # fmt: skip
    add("--text-column", default="text", metavar="COLUMN", help="the column with the text (default text)")
    add("--val-fraction", type=float, default=val_fraction, help=f"share of val.bin (default {val_fraction})")
    add("--tokenizer", choices=list(TOKENIZERS), default="gpt2", help="default gpt2")
    add("--out-dir", type=Path, default=ROOT / "data" / name, help=f"where to write (default data/{name})")
    add("--workers", type=int, default=cores(), help="threads that tokenize (default: every core)")
    add("--overwrite", action="store_true", help="replace another data set in --out-dir")
    options = parser.parse_args()

    if options.workers < 1:
        raise UserError(f"--workers = {options.workers}: must be at least 1")
    if not 0 < options.val_fraction < 1:
        raise UserError(f"--val-fraction = {options.val_fraction}: must be between 0 and 1")
    if options.config is None and options.source == source:
        options.config = config
    tokenizer = TOKENIZERS[options.tokenizer]
    tokenizer.encode("")  # a vocabulary is missing, or downloaded, before anything else is
    for library in ("datasets", "huggingface_hub"):  # what they have to say is in their exceptions
        logging.getLogger(library).setLevel(logging.CRITICAL)
    documents = open_documents(
        options.source, options.config, options.data_files, options.streaming, options.text_column, options.val_fraction
    )
    write_data_set(options.out_dir, documents, tokenizer, options.workers, options.overwrite)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_documents(
    source: str, config: str | None, files: list[Path] | None, streaming: bool, column: str, val_fraction: float
) -> Source:
    """Documents of the hub's data set `source`, or of local `files`. Raises UserError for what cannot be read."""
    arguments: dict[str, Any] = {"path": source, "name": config}
    if files:
        kinds = {kind_of(path) for path in files}
        if len(kinds) > 1:
            raise UserError(f"--data-files are of several formats ({', '.join(sorted(kinds))}): name one kind")
        arguments = {"path": kinds.pop(), "data_files": [glob.escape(str(path.resolve())) for path in files]}
        if arguments["path"] == "text":
            arguments["sample_by"] = "document"
    name = source
    if files:
        more = [f"{len(files) - 3} more"] if len(files) > 3 else []
        name = ", ".join([path.name for path in files[:3]] + more)
    with reading(name, files):
        builder = datasets.load_dataset_builder(**arguments)
        if streaming:
            documents = builder.as_streaming_dataset(split="train")
        else:
            builder.download_and_prepare()
            documents = builder.as_dataset(split="train")
        columns = documents.column_names or list(next(iter(documents)))
    if column not in columns:
        raise UserError(f"{name} has no column {column!r}, but {', '.join(columns)}: choose with --text-column")
    identity = [name, config, builder.hash, column, val_fraction, streaming, CHUNK_BYTES]  # hash: the hub's commit
    identity += [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files or []]
    if streaming:
        return Stream(documents, column, val_fraction, name, identity, files)
    return Table(documents, column, val_fraction, name, [*identity, len(documents)], files)


READING_ERRORS = (
    *(OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError),
    *(StopIteration, datasets.exceptions.DatasetsError, pa.ArrowException),  # StopIteration: no first document
)


class reading:
    """Turns the errors of `datasets` into one line that says what was read."""

    def __init__(self, name: str, files: list[Path] | None):
        self.name, self.files = name, files

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        if not isinstance(error, READING_ERRORS):
            return
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        what = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        if isinstance(cause, UnicodeDecodeError):
            what = "its text is not UTF-8"
        elif isinstance(cause, StopIteration):
            what = "it has no documents"
        if self.files:
            raise UserError(f"{self.name} cannot be read: {what}") from None
        raise UserError(
            f"{self.name} could not be had from the hub: {what}; without a network, use --data-files"
        ) from None


class Table:
    """Documents in a table on disk, in the order and the split of nanoGPT's OpenWebText: that of datasets'
    `train_test_split(test_size=val_fraction, seed=2357, shuffle=True)`.
    """

    def __init__(
        self,
        documents: datasets.Dataset,
        column: str,
        val_fraction: float,
        name: str,
        identity: Any,
        files: list[Path] | None,
    ):
        self.name, self.identity, self.column, self.files = name, identity, column, files
        count = len(documents)
        kind = getattr(documents.features[column], "dtype", documents.features[column])
        if kind not in ("string", "large_string"):
            raise UserError(f"{name}: the column {column!r} holds {str(kind)[:60]}, not text")
        texts = documents.data.column(column)
        if texts.null_count:
            raise UserError(f"{name}: {texts.null_count} of the {count} documents have no text")
        if count < 2 or math.ceil(val_fraction * count) == count:
            raise UserError(f"{name}: {count} documents cannot be split, {val_fraction} of them for val: name more")
        numbered = datasets.Dataset.from_dict({"row": np.arange(count)}).with_format("numpy")
        parts = numbered.train_test_split(test_size=val_fraction, seed=SPLIT_SEED, shuffle=True)
        self.lengths = pc.binary_length(texts).to_numpy()  # of each document, in bytes
        self.size = int(self.lengths.sum())
        self.parts: list[tuple[str, np.ndarray]] = []  # split and documents of each chunk
        for split, part in (("train", parts["train"]), ("val", parts["test"])):
            rows = part[:]["row"]
            before = np.cumsum(self.lengths[rows]) - self.lengths[rows]
            self.parts += [(split, some) for some in np.split(rows, np.flatnonzero(np.diff(before // CHUNK_BYTES)) + 1)]
        self.opened, self.file, self.start = locate_texts(documents, column)

    def chunks(self, position: Any) -> Iterator[Chunk]:
        for number in range(position or 0, len(self.parts)):
            split, rows = self.parts[number]
            yield Chunk({split: lambda rows=rows: self.texts(rows)}, number + 1, int(self.lengths[rows].sum()))

    def texts(self, rows: np.ndarray) -> list[str]:
        places = zip(self.file[rows].tolist(), self.start[rows].tolist(), self.lengths[rows].tolist(), strict=True)
        with reading(self.name, self.files):
            return [os.pread(self.opened[file].fileno(), size, start).decode() for file, start, size in places]


def locate_texts(documents: datasets.Dataset, column: str) -> tuple[list[BinaryIO], np.ndarray, np.ndarray]:
    """The Arrow files of a table, and for each of its texts the number of its file and the byte at which it begins.
    (Texts that are read through a memory map instead, from all over a file, count as memory of the process.)
    """
    opened, numbers, starts = [], [], []
    for cached in documents.cache_files:
        file = open(cached["filename"], "rb")  # noqa: SIM115  it stays open
        whole = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        for batch in pa.ipc.open_stream(whole).read_all().column(column).chunks:
            _, offsets, texts = batch.buffers()
            wide = np.int64 if pa.types.is_large_string(batch.type) else np.int32
            inside = np.frombuffer(offsets, wide)[batch.offset : batch.offset + len(batch)]
            starts.append(inside + (texts.address - whole.address if texts else 0))
            numbers.append(np.full(len(batch), len(opened)))
        opened.append(file)
    return opened, np.concatenate(numbers), np.concatenate(starts)


class Stream:
    """Documents that are read once, in the order they come: a document belongs to val where the hash of its number,
    as a share of all hashes, is below val_fraction.
    """

    size = None

    def __init__(
        self,
        documents: datasets.IterableDataset,
        column: str,
        val_fraction: float,
        name: str,
        identity: Any,
        files: list[Path] | None,
    ):
        self.documents, self.column, self.val_fraction = documents, column, val_fraction
        self.name, self.identity, self.files = name, identity, files

    def chunks(self, position: Any) -> Iterator[Chunk]:
        number = 0
        if position is not None:
            number = position["documents"]
            self.documents.load_state_dict(position["state"])
        texts: dict[str, list[str]] = {}
        size = 0
        with reading(self.name, self.files):
            for document in self.documents:
                text = document[self.column]
                if not isinstance(text, str):
                    raise UserError(f"{self.name}: document {number} has no text, but {repr(text)[:40]}")
                texts.setdefault(self.split_of(number), []).append(text)
                number += 1
                size += len(text.encode())
                if size >= CHUNK_BYTES:
                    yield self.chunk(texts, size, number)
                    texts, size = {}, 0
        if texts:
            yield self.chunk(texts, size, number)

    def chunk(self, texts: dict[str, list[str]], size: int, number: int) -> Chunk:
        position = {"documents": number, "state": self.documents.state_dict()}
        return Chunk({split: lambda part=part: part for split, part in texts.items()}, position, size)

    def split_of(self, number: int) -> str:
        digest = hashlib.sha256(f"{SPLIT_SEED}:{number}".encode()).digest()
        return "val" if int.from_bytes(digest[:8]) < self.val_fraction * 2**64 else "train"


def kind_of(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"--data-files: {path} does not exist")
    if not path.stat().st_size:
        raise UserError(f"--data-files: {path} is empty")
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    if not suffixes or suffixes[-1] not in FORMATS:
        raise UserError(f"--data-files: {path} is none of {', '.join(FORMATS)}, compressed or not")
    return FORMATS[suffixes[-1]]
