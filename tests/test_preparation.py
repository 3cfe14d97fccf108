"""Text to train.bin and val.bin: nanoGPT's bytes, whatever the workers, the format and the interruptions."""

import bz2
import gzip
import hashlib
import importlib.util
import json
import lzma
import os
import shutil
import tracemalloc
import urllib.error
import urllib.request

import datasets
import numpy as np
import pytest
import tiktoken
import zstandard

from data.preparation import sources, writer
from data.preparation.writer import TextSource, write_data_set
from data.token_files import open_data
from data.tokenizers import TOKENIZERS, Bytes
from run.errors import UserError
from run.settings import ROOT
from tests.conftest import largest_file, write_dataset

DOCUMENTS = [f"Document number {i}: " + "so it goes, " * (i % 7) for i in range(3000)] + ["", "Ende – fin"]
SMALL = TextSource("a test", {"train": ["one", "two"], "val": ["three"]})
SMALL_TOKENS = {"train": [*b"one\0two\0"], "val": [*b"three\0"]}


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"{name}_prepare", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def openwebtext(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sources, "BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(writer, "TOKENS_BETWEEN_NOTES", 5000)
    return load_script("openwebtext")


def write_documents(path, texts=DOCUMENTS, column="text"):
    kind = path.name.split(".", 1)[1]
    if kind == "parquet":
        datasets.Dataset.from_dict({column: texts}).to_parquet(path)
    else:
        lines = "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts))
        packers = {"bz2": bz2.compress, "gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress}
        path.write_bytes(packers.get(kind.split(".")[-1], bytes)(lines.encode()))
    return path


def made(folder):
    return {split: np.fromfile(folder / f"{split}.bin", "<u2").tolist() for split in ("train", "val")}


def texts_of(folder):
    tokens = made(folder)
    return sorted(bytes(tokens["train"] + tokens["val"]).decode().split("\0")[:-1])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def nanogpts_tokens(encode, end_of_text, val_fraction):
    """nanoGPT's pipeline on DOCUMENTS, in plain steps."""
    parts = datasets.Dataset.from_dict({"text": DOCUMENTS}).train_test_split(val_fraction, seed=2357, shuffle=True)
    return {
        split: [token for text in parts[name]["text"] for token in [*encode(text), end_of_text]]
        for split, name in (("train", "train"), ("val", "test"))
    }


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.bz2", "json.gz", "jsonl.xz", "jsonl.zst", "parquet"])
def test_the_tokens_are_nanogpts_whatever_the_format_and_the_workers(openwebtext, vocabulary, call, tmp_path, kind):
    path = write_documents(tmp_path / f"documents.{kind}")
    expected = nanogpts_tokens(vocabulary.encode_ordinary, 50256, 0.0005)
    for workers in (1, 5):
        out = tmp_path / f"out{workers}"
        call(openwebtext, "--data-files", path, "--out-dir", out, "--workers", workers)
        assert made(out) == expected
    assert sorted(contents(out)) == ["meta.json", "train.bin", "val.bin"]
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["end_of_text"]) == ("gpt2", 50257, 50256)
    assert (meta["train_tokens"], meta["val_tokens"], meta["source"]) == (*map(len, expected.values()), path.name)


def test_column_fraction_and_tokenizer_can_be_chosen(openwebtext, call, refused, tmp_path):
    path = write_documents(tmp_path / "d.jsonl", column="body")
    options = "--text-column=body --val-fraction=0.1 --tokenizer=bytes --out-dir".split()
    call(openwebtext, "--data-files", path, *options, tmp_path / "out")
    assert made(tmp_path / "out") == nanogpts_tokens(str.encode, 0, 0.1)
    for option, complaint in {
        "--val-fraction=0.2": "holds another data set",
        "--val-fraction=1.5": "--val-fraction = 1.5",
        "--workers=0": "--workers: 0 is not from 1",
    }.items():
        other = [*options, tmp_path / "out", option]
        assert complaint in refused(lambda: call(openwebtext, "--data-files", path, *other))  # noqa: B023


def card(*configs):
    lines = (f"- config_name: {name}\n  data_files: plain_text/train-*\n" for name in configs)
    return f"---\nconfigs:\n{''.join(lines)}---\n"


@pytest.fixture
def hub(tmp_path):
    """A folder laid out as OpenWebText is on the hub: a card, and a configuration of 80 parquet files."""
    (tmp_path / "hub/plain_text").mkdir(parents=True)
    (tmp_path / "hub/README.md").write_text(card("plain_text"))
    bounds = np.linspace(0, len(DOCUMENTS), 81, dtype=int)
    for i, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        write_documents(tmp_path / f"hub/plain_text/train-{i:05}-of-00080.parquet", DOCUMENTS[start:stop])
    return tmp_path / "hub"


@pytest.mark.parametrize("options", [[], ["--config=plain_text"], ["--streaming"]])
def test_the_hubs_layout_of_openwebtext_is_read(openwebtext, call, tmp_path, hub, options):
    source = ["--source", hub, "--tokenizer=bytes", "--val-fraction=0.01", "--out-dir", tmp_path / "out"]
    call(openwebtext, *source, *options)
    expected = nanogpts_tokens(str.encode, 0, 0.01)
    if options == ["--streaming"]:  # which has another order and split
        assert texts_of(tmp_path / "out") == sorted(DOCUMENTS)
    else:
        assert made(tmp_path / "out") == expected


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_source_that_datasets_refuses_says_what_helps(openwebtext, call, refused, tmp_path, hub, streaming):
    (tmp_path / "script").mkdir()
    (tmp_path / "script/script.py").write_text("import datasets\n")
    options = ["--tokenizer=bytes", "--out-dir", tmp_path / "out", *streaming]
    line = refused(lambda: call(openwebtext, "--source", tmp_path / "script", *options))
    assert "Dataset scripts are no longer supported, but found script.py; download the text it names, and" in line
    assert "give the files to --data-files" in line
    line = refused(lambda: call(openwebtext, "--source", hub, "--config=en", *options))
    assert "'en' not found. Available: ['plain_text']" in line
    (hub / "README.md").write_text(card("one", "two"))
    line = refused(lambda: call(openwebtext, "--source", hub, *options))
    assert "available configs: ['one', 'two']; choose one with --config" in line


def test_a_text_file_is_a_document_and_its_name_no_pattern(openwebtext, call, tmp_path):
    for name in ("a*.txt", "ab.txt", "g[1].txt"):
        (tmp_path / name).write_text(f"first line of {name}\nsecond line")
    files = [tmp_path / "a*.txt", tmp_path / "g[1].txt"]
    call(openwebtext, "--tokenizer=bytes", "--data-files", *files, "--out-dir", tmp_path / "out")
    assert texts_of(tmp_path / "out") == [path.read_text() for path in files]


ROWS = {  # files of rows that have nothing in common but text
    "a": [{"text": "first", "id": 1}, {"text": "second", "id": "one", "tags": ["x"]}],
    "b": [{"text": "third", "id": "b7", "url": "x"}],
    "c": [{"tags": {"n": 1}, "id": None, "text": "fourth"}],
}


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_columns_besides_the_text_may_differ(openwebtext, call, tmp_path, kind, streaming):
    files = [tmp_path / f"{name}.{kind}" for name in ROWS]
    for path, rows in zip(files, ROWS.values(), strict=True):
        if kind == "parquet":  # in a file a column has one type
            datasets.Dataset.from_list([row | {"id": str(row["id"])} for row in 5 * rows]).to_parquet(path)
        else:
            lines = [json.dumps(row) for row in 5 * rows]
            path.write_text("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]")
    options = ["--tokenizer=bytes", "--val-fraction=0.5", "--out-dir", tmp_path / "out", *streaming]
    call(openwebtext, "--data-files", *files, *options)
    assert texts_of(tmp_path / "out") == sorted(5 * [row["text"] for rows in ROWS.values() for row in rows])


def test_what_editors_of_windows_add_is_no_text(openwebtext, call, tmp_path):
    tokens = {}
    for name, mark, end in (("windows", b"\xef\xbb\xbf", b"\r\n"), ("unix", b"", b"\n")):
        (tmp_path / name).mkdir()
        files = [tmp_path / name / f"{number:02}.txt" for number in range(20)]
        for path in files:
            path.write_bytes(mark + end.join([b"one", b"", path.stem.encode()]) + end)
        options = ["--tokenizer=bytes", "--val-fraction=0.5", "--out-dir"]
        call(openwebtext, "--data-files", *files, *options, tmp_path / name / "table")
        call(openwebtext, "--streaming", "--data-files", *files, *options, tmp_path / name / "stream")
        call(load_script("shakespeare_char"), "--file", files[0], "--out-dir", tmp_path / name / "single")
        tokens[name] = [made(tmp_path / name / way) for way in ("table", "stream", "single")]
    assert tokens["windows"] == tokens["unix"]


def test_tokens_are_tiktokens_and_give_the_text_back(vocabulary):
    text, gpt2 = "a <|endoftext|> in a text, 你好", TOKENIZERS["gpt2"]
    expected = [*vocabulary.encode_ordinary(text), 50256]
    assert gpt2.encode_documents([text, "", text]).tolist() == [*expected, 50256, *expected]
    assert gpt2.encode_documents([]).tolist() == []
    assert gpt2.decode_bytes([50300]) == b""  # of the padding
    assert Bytes().encode_documents(["é", ""]).tolist() == [0xC3, 0xA9, 0, 0]
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.decode_bytes(tokenizer.encode(text)).decode() == text
    with pytest.raises(UserError, match="tiktoken cannot encode the document that begins 'x  "):
        gpt2.encode_documents(["x" + " " * 2_000_000 + "x"])


class Watched:
    """A source that calls `watch` before one of its batches."""

    def __init__(self, source, batch, watch):
        self.source, self.batch, self.watch, self.began = source, batch, watch, None
        self.name, self.identity, self.count = source.name, source.identity, source.count

    def batches(self, done, state):
        self.began = done
        for number, batch in enumerate(self.source.batches(done, state)):
            if number == self.batch:
                self.watch()
            yield batch


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_preparation_that_was_killed_goes_on_and_ends_with_the_same_bytes(openwebtext, tmp_path, streaming, kind):
    """Each begins with what a kill of the one before would leave: a copy of its files from the midst of its work."""
    path = write_documents(tmp_path / f"documents.{kind}")
    for number, batch in enumerate((21, 66, 0, None)):  # at 66 a table is among the documents of val
        folder, left = tmp_path / str(number), tmp_path / str(number + 1)
        if number:
            with pytest.raises(UserError, match="is not finished"):  # half of it is not taken for the whole
                open_data(f"{folder}", 4)
        source = sources.open_documents("", None, [path], streaming, "text", 0.3)
        watched = Watched(source, batch, lambda: shutil.copytree(folder, left))  # noqa: B023
        write_data_set(folder, watched, Bytes(), 2)
        assert (watched.began > 0) == (number > 0)
        assert contents(folder) == contents(tmp_path / "0")


def test_a_stream_is_split_by_the_hash_of_a_documents_number(openwebtext, call, tmp_path):
    path = write_documents(tmp_path / "documents.jsonl")
    options = "--streaming --tokenizer=bytes --val-fraction=0.1 --out-dir".split()
    call(openwebtext, "--data-files", path, *options, tmp_path / "out")
    expected = {"train": b"", "val": b""}
    for number, text in enumerate(DOCUMENTS):
        share = int(hashlib.sha256(f"2357:{number}".encode()).hexdigest()[:16], 16) / 2**64
        expected["val" if share < 0.1 else "train"] += f"{text}\0".encode()
    assert made(tmp_path / "out") == {split: [*text] for split, text in expected.items()}


class Killed(Exception):
    pass


def kill_before(step, folder, source=SMALL, overwrite=False):
    """Begin to prepare `source`, and be killed before a file is put in its place."""
    correct = os.replace

    def replace(old, new):
        if os.path.basename(new) == step:
            raise Killed
        correct(old, new)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", replace)
        write_data_set(folder, source, Bytes(), 1, overwrite)


@pytest.mark.parametrize("step", ["progress.json", "meta.json", "train.bin", "val.bin"])
def test_a_kill_while_the_files_get_their_names_loses_nothing(tmp_path, renamed, step):
    kill_before(step, tmp_path)
    with pytest.raises(UserError, match="is not finished|train.bin does not exist"):
        open_data(f"{tmp_path}/", 2)
    for _ in range(2):  # the second time it is complete
        write_data_set(tmp_path, SMALL, Bytes(), 1)
        assert made(tmp_path) == SMALL_TOKENS
        assert sorted(contents(tmp_path)) == ["meta.json", "train.bin", "val.bin"]
    assert step in renamed and all(renamed.values())  # the disk had all of a file when it got its name


OTHER = TextSource("another", {"train": ["other" * 9], "val": ["text" * 9]})
OTHER_TOKENS = {"train": [*(b"other" * 9), 0], "val": [*(b"text" * 9), 0]}


@pytest.mark.parametrize("there", ["a data set", "an unfinished one", "damaged progress"])
def test_another_data_set_is_replaced_only_when_told_to(tmp_path, there):
    if there == "a data set":
        write_dataset(tmp_path, range(10), range(10))
    else:
        kill_before("meta.json", tmp_path)
    if there == "damaged progress":
        (tmp_path / "progress.json").write_text('{"job": ')
    before = contents(tmp_path)
    with pytest.raises(UserError, match="holds another data set .* add --overwrite"):
        write_data_set(tmp_path, OTHER, Bytes(), 1)
    assert contents(tmp_path) == before
    write_data_set(tmp_path, OTHER, Bytes(), 1, overwrite=True)
    assert made(tmp_path) == OTHER_TOKENS


def test_tokens_that_are_gone_or_of_another_preparation_are_never_taken_for_its_own(tmp_path):
    kill_before("meta.json", tmp_path)
    kill_before("progress.json", tmp_path, OTHER, overwrite=True)  # before its first note
    write_data_set(tmp_path, SMALL, Bytes(), 1)
    assert made(tmp_path) == SMALL_TOKENS
    kill_before("meta.json", tmp_path, OTHER, overwrite=True)
    (tmp_path / "train.bin.tmp").write_bytes(b"ab")
    with pytest.raises(UserError, match="shorter than progress.json says; delete progress.json to start over"):
        write_data_set(tmp_path, OTHER, Bytes(), 1)
    (tmp_path / "progress.json").unlink()
    write_data_set(tmp_path, OTHER, Bytes(), 1)
    assert made(tmp_path) == OTHER_TOKENS


def test_two_at_once_are_refused(tmp_path):
    class Reentrant(TextSource):
        def batches(self, done, state):
            with pytest.raises(UserError, match="another process is preparing"):
                write_data_set(tmp_path, SMALL, Bytes(), 1)
            return super().batches(done, state)

    write_data_set(tmp_path, Reentrant("a test", SMALL.texts), Bytes(), 1)


def test_memory_does_not_grow_with_the_text(tmp_path):
    """30 MB of text and 60 MB of tokens are made of it with less than 6 MB."""

    class Long:
        name, identity, count = "long", 1, None

        def batches(self, done, state):
            for number in range(300):
                yield {split: [str(number % 10) * 50_000] for split in ("train", "val")}, number

    tracemalloc.start()
    write_data_set(tmp_path, Long(), Bytes(), 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "train.bin").stat().st_size == 300 * 50_001 * 2
    assert peak < 6e6


def test_a_full_disk_keeps_what_is_done(openwebtext, call, refused, tmp_path):
    """A limit on the size of files stands in for a full disk; without it the same command finishes."""
    path = write_documents(tmp_path / "documents.jsonl")
    command = ["--data-files", path, "--tokenizer=bytes", "--out-dir", tmp_path / "out"]
    sources.open_documents("", None, [path], False, "text", 0.0005)  # fills the cache
    with largest_file(200_000):
        line = refused(lambda: call(openwebtext, *command))
    assert "the same command goes on" in line
    assert not list((tmp_path / "out").glob("*.bin"))
    assert "going on after" in call(openwebtext, *command)
    assert made(tmp_path / "out") == nanogpts_tokens(str.encode, 0, 0.0005)


GZIPPED = gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(100_000)))
BAD_FILES = {  # name: content, and the complaint about a table and about a stream
    "nothing.jsonl": (None, "Unable to find"),
    "words.docx": (b"x", "must be of one format of .json, .jsonl, .txt, .parquet"),
    "other.jsonl": (b'{"words": "x"}\n{"words": "y"}\n', "no column 'text', but words"),
    "empty.jsonl": (b"", "has no documents", "no document of empty.jsonl falls to train: more text"),
    "book.txt": (b"x" * 999, "data/shakespeare_char/prepare.py --file splits a single text", "falls to val"),
    "broken.parquet": (b"PAR1 but not really", "it must be a whole file with text in UTF-8"),
    "latin.txt": ("Füße".encode("latin-1"), "it must be a whole file with text in UTF-8"),
    "cut.jsonl.gz": (GZIPPED[: len(GZIPPED) // 2], "cannot be used: Compressed file ended"),
    "null.jsonl": (b'{"text": "x"}\n{"text": null}\n', "1 of the 2 documents have no text", "no text, but None"),
    "mixed.jsonl": (b'{"text": "x"}\n{"text": 1}\n', "the column 'text' must be text in every document"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_text_is_refused_in_one_line(openwebtext, call, refused, tmp_path, name, streaming):
    content, *complaints = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    options = ["--tokenizer=bytes", "--out-dir", tmp_path / "out", *(["--streaming"] if streaming else [])]
    line = refused(lambda: call(openwebtext, "--data-files", tmp_path / name, *options))
    assert name in line
    assert complaints[-1 if streaming else 0] in line
    assert not [*tmp_path.glob("out/*.bin"), *tmp_path.glob("out/*.json")]


SOURCES = {  # what a script asks of the network
    "openwebtext": ("Skylion007/openwebtext", None),
    "openwebtext --source=some/other --config=en": ("some/other", "en"),
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "shakespeare_char": None,
}


@pytest.mark.parametrize("command", SOURCES)
def test_a_missing_network_or_vocabulary_says_what_to_do(command, call, refused, tmp_path, monkeypatch):
    asked = []

    def offline(*_, path=None, name=None, **__):
        asked.append((path, name))
        raise urllib.error.URLError("no route to host")

    for module, name in ((datasets, "load_dataset_builder"), (urllib.request, "urlopen"), (tiktoken, "get_encoding")):
        monkeypatch.setattr(module, name, offline)
    monkeypatch.delitem(TOKENIZERS["gpt2"].__dict__, "encoding", raising=False)
    script, *options = command.split()
    command, source = [load_script(script), *options, "--out-dir", tmp_path / "out"], SOURCES[command]
    line = refused(lambda: call(*command, *(["--tokenizer=bytes"] if source else [])))
    assert "use --" in line
    assert "no route to host" in line
    assert not source or asked == [source]
    assert not source or "set TIKTOKEN_CACHE_DIR" in refused(lambda: call(*command))
    assert not (tmp_path / "out").exists()


def test_shakespeare_is_cut_at_nine_tenths(call, refused, tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "input.txt").write_text(text)
    script = load_script("shakespeare_char")
    call(script, "--file", tmp_path / "input.txt", "--out-dir", tmp_path / "out")
    tokens = made(tmp_path / "out")
    assert bytes(tokens["train"][:-1] + tokens["val"][:-1]).decode() == text
    assert len(tokens["train"]) == len(text) * 9 // 10 + 1
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    assert "not text in UTF-8" in refused(lambda: call(script, "--file", tmp_path / "bad.txt"))
    assert "No such file" in refused(lambda: call(script, "--file", tmp_path / "none.txt"))
