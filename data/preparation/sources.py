"""Documents of the Hugging Face hub or of local files, and the command line that makes a data set of them."""

import contextlib
import glob
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from data.preparation.writer import TextBatch, write_data_set
from data.tokenizers import TOKENIZERS
from run.errors import UserError
from run.machine import cores
from run.options import Parser, between
from run.settings import ROOT

FORMATS = {".json": "json", ".jsonl": "json", ".txt": "text", ".parquet": "parquet"}
SPLIT_SEED = 2357  # nanoGPT's
ADVICE = {  # for what datasets says
    "Dataset scripts are no longer supported": "download the text it names, and give the files to --data-files",
    "Config name is missing": "choose one with --config",
}
BATCH_CHARACTERS = 2**20  # one thread tokenizes so much text at a time


def prepare(description: str | None, name: str, source: str, config: str | None = None, val_fraction=0.0005) -> None:
    """The main function of data/NAME/prepare.py: make a data set of what the command line names."""
    parser = Parser(description)
    add = parser.add_argument
    add("--source", type=os.path.expanduser, default=source, help=f"a data set of the hub (default {source})")
    add("--config", help="its configuration, where it has several")
    add("--streaming", action="store_true", help="read it from the network as it is tokenized, without a copy on disk")
    local = "local .json, .jsonl, .parquet or .txt, compressed or not"
    add("--data-files", nargs="+", type=Path, metavar="FILE", help=local)
    add("--text-column", default="text", metavar="COLUMN", help="the column with the text (default text)")
    add("--val-fraction", type=float, default=val_fraction, help=f"share of val.bin (default {val_fraction})")
    add("--tokenizer", choices=list(TOKENIZERS), default="gpt2", help="default gpt2")
    add("--out-dir", type=Path, default=ROOT / "data" / name, help=f"where to write (default data/{name})")
    add("--workers", type=between(1), default=cores(), help="threads that tokenize (default: every core)")
    add("--overwrite", action="store_true", help="replace another data set in --out-dir")
    options = parser.parse_args()

    if not 0 < options.val_fraction < 1:
        raise UserError(f"--val-fraction = {options.val_fraction}: must be between 0 and 1")
    config = options.config or (config if options.source == source else None)
    tokenizer = TOKENIZERS[options.tokenizer]
    tokenizer.encode("")  # a vocabulary is missing, or downloaded, before anything else is
    for library in ("datasets", "huggingface_hub"):  # what they have to say is in their exceptions
        logging.getLogger(library).setLevel(logging.CRITICAL)
    documents = open_documents(
        options.source, config, options.data_files, options.streaming, options.text_column, options.val_fraction
    )
    write_data_set(options.out_dir, documents, tokenizer, options.workers, options.overwrite)


def open_documents(
    source: str, config: str | None, files: list[Path] | None, streaming: bool, column: str, val_fraction: float
) -> "Corpus":
    """Documents of the hub's data set `source`, or of local `files`. UserError for what cannot be used."""
    name, arguments, advice = source, {"path": source, "name": config}, "; without a network, use --data-files"
    if files:
        name = files[0].name + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        advice = "; it must be a whole file with text in UTF-8"
        formats = {next((FORMATS[end] for end in reversed(path.suffixes) if end in FORMATS), None) for path in files}
        if len(formats) > 1 or None in formats:
            raise UserError(f"{name}: --data-files must be of one format of {', '.join(FORMATS)}, compressed or not")
        arguments = {"path": formats.pop(), "data_files": [glob.escape(str(path.resolve())) for path in files]}
        arguments["features"] = datasets.Features({column: datasets.Value("string")})
        if arguments["path"] == "text":
            arguments |= {"sample_by": "document", "encoding": "utf-8-sig"}
    with reading(name, advice):
        builder = datasets.load_dataset_builder(**arguments)
        if files:  # in place of a function that wants the columns of the first file in all (datasets 5.2)
            builder._cast_table = lambda *table, **more: text_alone(name, column, *table, **more)
        if not streaming:
            builder.download_and_prepare()
        documents = (builder.as_streaming_dataset if streaming else builder.as_dataset)(split="train")
        check_column(name, column, documents.column_names or list(next(iter(documents), {})))
        # The builder's hash tells the commit of the hub.
        identity = [name, config, builder.hash, column, val_fraction, streaming]
        identity += [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files or []]
        kind = Stream if streaming else Table
        return kind(name, advice, identity, documents.select_columns([column]), column, val_fraction)


def text_alone(name: str, column: str, table: pa.Table, json_field_paths: list | tuple = ()) -> pa.Table:
    """The column with the text, of a table that was read from a file. The others may differ from file to file."""
    check_column(name, column, table.column_names)
    # the paths are those of JSON values of several types, which datasets has turned to text
    if [column] in json_field_paths or table[column].type not in (pa.string(), pa.large_string(), pa.null()):
        raise UserError(f"{name}: the column {column!r} must be text in every document")
    return table.select([column]).cast(pa.schema({column: pa.string()}))


def check_column(name: str, column: str, columns: list[str]) -> None:
    if column not in columns:
        raise UserError(f"{name} has no column {column!r}, but {', '.join(columns) or 'none'}: use --text-column")


@contextlib.contextmanager
def reading(name: str, advice: str) -> Iterator[None]:
    """Turns errors into one line that says what was read."""
    try:
        yield
    except Exception as error:  # datasets passes on what its readers raise: zlib.error, LZMAError, ArrowInvalid, …
        while error.__cause__ is not None:
            error = error.__cause__
        if isinstance(error, UserError):
            raise error from None
        if "corresponds to no data" in str(error):
            raise UserError(f"{name} has no documents") from None
        what, *more = str(error).splitlines() or [type(error).__name__]
        for said, helps in ADVICE.items():
            if said in what:
                what, advice = " ".join([what, *more[:1]]), f"; {helps}"
        raise UserError(f"{name} cannot be used: {what}{advice}") from None


class Corpus:
    """Documents in a column, by the megabyte; `read` gives split and text of those after the first `done`."""

    def __init__(self, name: str, advice: str, identity: Any, documents: Any, column: str, val_fraction: float):
        self.name, self.advice, self.identity, self.count = name, advice, identity, None
        self.documents, self.column, self.val_fraction = documents, column, val_fraction

    def batches(self, done: int, state: Any) -> Iterator[TextBatch]:
        texts, size = {}, 0
        with reading(self.name, self.advice):
            for split, text in self.read(done, state):
                if not isinstance(text, str):
                    raise UserError(f"{self.name}: document {done} has no text, but {text!r:.40}")
                texts.setdefault(split, []).append(text)
                done, size = done + 1, size + len(text)
                if size >= BATCH_CHARACTERS:
                    yield texts, self.state()
                    texts, size = {}, 0
            if texts:
                yield texts, self.state()

    def state(self) -> Any:
        """What `read` needs to go on, besides the number of documents that it has given."""


class Table(Corpus):
    """Documents on disk, in the order and the split of nanoGPT's OpenWebText."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.count = len(self.documents)
        empty = self.documents.data.column(self.column).null_count
        if empty:  # found now rather than after hours
            raise UserError(f"{self.name}: {empty} of the {self.count} documents have no text")
        if self.count * self.val_fraction > self.count - 1:
            hint = "data/shakespeare_char/prepare.py --file splits a single text"
            raise UserError(f"{self.name}: too few documents ({self.count}) to split into train and val; {hint}")
        self.parts = self.documents.train_test_split(test_size=self.val_fraction, seed=SPLIT_SEED, shuffle=True)

    def read(self, done: int, state: Any) -> Iterator[tuple[str, str]]:
        for split, part in (("train", self.parts["train"]), ("val", self.parts["test"])):
            for rows in part.skip(done).iter(16):  # a few at once, because a document may be a book
                yield from ((split, text) for text in rows[self.column])
            done = max(done - len(part), 0)


class Stream(Corpus):
    """Documents in the order they come. To val go those whose number has a hash in the lowest `val_fraction` of all."""

    def read(self, done: int, state: Any) -> Iterator[tuple[str, str]]:
        if state is not None:
            self.documents.load_state_dict(state)
        for number, document in enumerate(self.documents, done):
            digest = hashlib.sha256(f"{SPLIT_SEED}:{number}".encode()).digest()
            split = "val" if int.from_bytes(digest[:8]) < self.val_fraction * 2**64 else "train"
            yield split, document[self.column]

    def state(self) -> Any:
        return self.documents.state_dict()
