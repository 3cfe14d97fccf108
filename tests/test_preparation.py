"""Text to train.bin and val.bin: nanoGPT's bytes, whatever the workers, the format and the interruptions."""

import bz2
import gzip
import importlib.util
import json
import lzma
import resource
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import zstandard

from preparation import inspect_data
from preparation import sources as documents
from preparation import writer as preparation
from preparation.writer import Chunk, TextSource, write_data_set
from run.errors import UserError
from run.settings import ROOT
from tests.conftest import write_dataset
from tests.stress.kill_preparation import run_with_kills
from tokens.token_files import open_data
from tokens.tokenizers import TOKENIZERS, Bytes

DOCUMENTS = [f"Document number {i}: " + "so it goes, " * (i % 7) for i in range(3000)] + ["", "Ende – fin"]


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"{name}_prepare", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def openwebtext(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return load_script("openwebtext")


def write_documents(path, texts=DOCUMENTS):
    kind = path.name.split(".", 1)[1]
    if kind == "parquet":
        datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    else:
        lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
        packers = {"bz2": bz2.compress, "gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress}
        pack = packers.get(kind.split(".")[-1], bytes)
        path.write_bytes(pack(lines.encode()))
    return path


def made(folder):
    return {split: np.fromfile(folder / f"{split}.bin", "<u2").tolist() for split in ("train", "val")}


def reference(encode, end_of_text, val_fraction=0.0005):
    """nanoGPT's pipeline on DOCUMENTS, in plain steps."""
    parts = datasets.Dataset.from_dict({"text": DOCUMENTS}).train_test_split(val_fraction, seed=2357, shuffle=True)
    return {
        split: [token for text in parts[name]["text"] for token in [*encode(text), end_of_text]]
        for split, name in (("train", "train"), ("val", "test"))
    }


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.bz2", "json.gz", "jsonl.xz", "jsonl.zst", "parquet"])
def test_openwebtext_equals_nanogpts_pipeline(openwebtext, vocabulary, call, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 1000)
    path = write_documents(tmp_path / f"documents.{kind}")
    expected = reference(vocabulary.encode_ordinary, 50256)
    for workers in (1, 2, 5):
        out = tmp_path / f"out{workers}"
        call(openwebtext, "--data-files", path, "--out-dir", out, "--workers", workers)
        assert made(out) == expected
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["end_of_text"]) == ("gpt2", 50257, 50256)
    assert (meta["train_tokens"], meta["val_tokens"]) == tuple(map(len, expected.values()))
    assert sorted(path.name for path in out.iterdir()) == [".lock", "meta.json", "train.bin", "val.bin"]


def test_special_tokens_in_a_text_are_text(vocabulary):
    text = "a <|endoftext|> in a text, 你好"
    expected = [*vocabulary.encode_ordinary(text), 50256]
    assert TOKENIZERS["gpt2"].encode_documents([text, "", text]).tolist() == [*expected, 50256, *expected]
    assert TOKENIZERS["gpt2"].encode_documents([]).tolist() == []
    assert Bytes().encode_documents(["é", ""]).tolist() == [0xC3, 0xA9, 0, 0]


def test_column_fraction_and_tokenizer_can_be_chosen(openwebtext, call, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in DOCUMENTS))
    options = "--text-column=body --val-fraction=0.1 --tokenizer=bytes --out-dir".split()
    call(openwebtext, "--data-files", path, *options, tmp_path / "out")
    assert made(tmp_path / "out") == reference(str.encode, 0, val_fraction=0.1)


class Interrupted(Exception):
    pass


class Interrupting:
    """A source that fails before some of its chunks, each time at another."""

    def __init__(self, source, *failures):
        self.source, self.failures = source, list(failures)
        self.name, self.identity, self.size = source.name, source.identity, source.size
        self.began = []

    def chunks(self, position):
        self.began.append(position)
        fail_at = self.failures.pop(0) if self.failures else None
        for number, chunk in enumerate(self.source.chunks(position)):
            if number == fail_at:
                raise Interrupted
            yield chunk


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_interrupted_preparation_goes_on(openwebtext, tmp_path, monkeypatch, streaming, kind):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(preparation, "TOKENS_BETWEEN_NOTES", 5000)
    path = write_documents(tmp_path / f"documents.{kind}")

    def source():
        return documents.open_documents("", None, [path], streaming, "text", 0.1)

    write_data_set(tmp_path / "whole", source(), Bytes(), 2)
    disturbed = Interrupting(source(), 20, 30, 0)
    for _ in range(3):
        with pytest.raises(Interrupted):
            write_data_set(tmp_path / "out", disturbed, Bytes(), 2)
        with pytest.raises(UserError, match="is not finished|does not exist"):  # half of it is not taken for the whole
            open_data(f"{tmp_path}/out", 4)
        disturbed.source = source()
    write_data_set(tmp_path / "out", disturbed, Bytes(), 2)
    assert disturbed.began[0] is None
    assert None not in disturbed.began[1:]
    assert made(tmp_path / "out") == made(tmp_path / "whole")
    assert (tmp_path / "out/meta.json").read_text() == (tmp_path / "whole/meta.json").read_text()
    if streaming:
        stream = documents.Stream(None, "text", 0.1, "", None, None)
        for split, tokens in made(tmp_path / "out").items():
            texts = [text for i, text in enumerate(DOCUMENTS) if stream.split_of(i) == split]
            assert bytes(tokens).decode() == "".join(text + "\0" for text in texts)
            assert len(texts) / len(DOCUMENTS) == pytest.approx({"train": 0.9, "val": 0.1}[split], abs=0.03)


SMALL = TextSource("a test", {"train": ["one", "two"], "val": ["three"]})


def interrupt(folder, source=SMALL, overwrite=False):
    """A folder whose preparation ended right before meta.json was written."""
    with pytest.MonkeyPatch.context() as patch:

        def write_json(path, value):
            if path.name.startswith("meta.json"):
                raise Interrupted
            path.write_text(json.dumps(value))

        patch.setattr(preparation, "write_json", write_json)
        with pytest.raises(Interrupted):
            write_data_set(folder, source, Bytes(), 1, overwrite)
    with pytest.raises(UserError, match="is not finished"):
        open_data(f"{folder}/", 2)


def test_what_is_wanting_after_the_tokens_is_made_up_for(tmp_path, capsys):
    interrupt(tmp_path)
    (tmp_path / "val.bin").rename(tmp_path / "val.bin.tmp")  # as if it had ended a moment before
    write_data_set(tmp_path, SMALL, Bytes(), 1)
    assert "going on after 14 tokens" in capsys.readouterr().out
    assert made(tmp_path) == {"train": [*b"one\0two\0"], "val": [*b"three\0"]}
    write_data_set(tmp_path, SMALL, Bytes(), 1)
    assert "is complete" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["file lost", "file short", "progress lost", "progress damaged", "source changed"])
def test_a_preparation_whose_files_do_not_fit_starts_over(tmp_path, damage):
    interrupt(tmp_path)
    source = SMALL
    if damage == "file lost":
        (tmp_path / "train.bin").unlink()
    elif damage == "file short":
        (tmp_path / "train.bin").write_bytes(b"ab")
    elif damage == "progress lost":
        (tmp_path / "progress.json").unlink()
    elif damage == "progress damaged":
        (tmp_path / "progress.json").write_bytes(b'{"job": ')
    else:
        source = TextSource("a test", {"train": ["other"], "val": ["text"]})
    write_data_set(tmp_path, source, Bytes(), 1, overwrite=True)
    assert made(tmp_path) == {split: [*Bytes().encode_documents(texts)] for split, texts in source.texts.items()}


def test_another_data_set_is_replaced_only_when_told_to(tmp_path):
    write_dataset(tmp_path, range(10), range(10))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="holds another data set .* add --overwrite"):
        write_data_set(tmp_path, SMALL, Bytes(), 1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"} == before
    write_data_set(tmp_path, SMALL, Bytes(), 1, overwrite=True)
    assert made(tmp_path)["val"] == [*b"three\0"]


def test_tokens_of_another_preparation_are_never_taken_for_its_own(tmp_path):
    """A is noted and killed, B is killed before its first note, A goes on: it must not keep B's bytes."""
    interrupt(tmp_path)

    class Other:
        name, identity, size = "another", 2, None

        def chunks(self, position):
            for number in range(9):
                yield Chunk({split: lambda: ["xxx", "yyy"] for split in ("train", "val")}, number, 1)
            raise Interrupted

    with pytest.raises(UserError, match="another data set"):
        write_data_set(tmp_path, Other(), Bytes(), 1)
    with pytest.raises(Interrupted):
        write_data_set(tmp_path, Other(), Bytes(), 1, overwrite=True)
    assert (tmp_path / "train.bin.tmp").stat().st_size > 2 * len(b"one0two0")
    write_data_set(tmp_path, SMALL, Bytes(), 1, overwrite=True)
    assert made(tmp_path) == {"train": [*b"one\0two\0"], "val": [*b"three\0"]}


def test_two_at_once_are_refused(tmp_path):
    class Reentrant(TextSource):
        def chunks(self, position):
            with pytest.raises(UserError, match="another process is preparing"):
                write_data_set(tmp_path, SMALL, Bytes(), 1)
            return super().chunks(position)

    write_data_set(tmp_path, Reentrant("a test", SMALL.texts), Bytes(), 1)


def test_memory_does_not_grow_with_the_text(tmp_path):
    """Only a few chunks are read ahead of the one that is written."""
    made_up, open_chunks = 200, []

    class Endless:
        name, identity, size = "numbers", 1, None

        def chunks(self, position):
            for number in range(made_up):
                open_chunks.append(number - len(written))
                yield Chunk({split: lambda: ["x"] for split in ("train", "val")}, number + 1, 1)

    written = []

    class Writer(preparation.Writer):
        def _tokenized(self, workers):
            for item in super()._tokenized(workers):
                yield item
                written.append(item)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "Writer", Writer)
        write_data_set(tmp_path, Endless(), Bytes(), 3)
    assert len(written) == made_up
    assert max(open_chunks) <= 4 * 3 + 1


def test_sigkill_at_random_moments_changes_no_byte(tmp_path):
    texts = [f"{text} {i}" * 40 for i, text in enumerate(DOCUMENTS * 4)]
    path = write_documents(tmp_path / "documents.jsonl", texts)
    runs, _ = run_with_kills(["--data-files", str(path), "--tokenizer=bytes"], 5, tmp_path)
    assert runs > 0  # and every one of them made the same bytes; whether one was resumed is chance, and tested above


def test_names_of_files_are_no_patterns(openwebtext, call, tmp_path):
    for name in ("a*.jsonl", "ab.jsonl", "g[1].jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(3)))
    for name in ("a*.jsonl", "g[1].jsonl"):
        out = tmp_path / f"out{name}"
        call(openwebtext, "--tokenizer=bytes", "--data-files", tmp_path / name, "--out-dir", out)
        tokens = made(out)
        texts = bytes(tokens["train"] + tokens["val"]).decode().split("\0")[:-1]
        assert sorted(texts) == [f"{name} {i}" for i in range(3)]


def test_a_document_that_tiktoken_cannot_encode_is_named(vocabulary):
    with pytest.raises(UserError, match="tiktoken cannot encode the document that begins 'x  "):
        TOKENIZERS["gpt2"].encode_documents(["x" + " " * 2_000_000 + "x"])


def test_text_files_are_a_document_each(openwebtext, call, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"first line {i}\nsecond line\n")
    files = sorted(tmp_path.glob("*.txt"))
    call(openwebtext, "--tokenizer=bytes", "--data-files", *files, "--out-dir", tmp_path / "out")
    tokens = made(tmp_path / "out")
    both = bytes(tokens["train"] + tokens["val"])
    assert both.count(b"\0") == 3
    assert b"first line 1\nsecond line" in both


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_text_is_refused_in_one_line(openwebtext, call, refused, tmp_path, streaming):
    def complaint(name, content=None, *options):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        options = [*options, *(["--streaming"] if streaming else []), "--tokenizer=bytes"]
        return refused(lambda: call(openwebtext, "--data-files", path, "--out-dir", tmp_path / "out", *options))

    assert "does not exist" in complaint("nothing.jsonl")
    assert "is none of .json, .jsonl, .txt, .parquet" in complaint("words.docx", b"x")
    assert "no column 'text', but words" in complaint("other.jsonl", b'{"words": "x"}\n{"words": "y"}\n')
    assert "broken.parquet cannot be read" in complaint("broken.parquet", b"PAR1 but not really")
    assert "empty.jsonl" in complaint("empty.jsonl", b"")
    assert "empty.txt is empty" in complaint("empty.txt", b"")
    assert "blank.jsonl cannot be read" in complaint("blank.jsonl", b"\n\n")
    assert "zip.jsonl.gz cannot be read" in complaint("zip.jsonl.gz", gzip.compress(b""))
    assert "latin.txt cannot be read: its text is not UTF-8" in complaint("latin.txt", "Füße".encode("latin-1"))
    latin = '{"text": "Füße"}\n{"text": "x"}\n'.encode("latin-1")
    assert "latin.jsonl cannot be read" in complaint("latin.jsonl", latin)
    packed = gzip.compress(b'{"text": "some words"}\n' * 100_000)
    assert "cut.jsonl.gz cannot be read" in complaint("cut.jsonl.gz", packed[: len(packed) // 2])
    damaged = packed[:40] + bytes(100) + packed[140:]
    assert "bad.jsonl.gz cannot be read" in complaint("bad.jsonl.gz", damaged)
    assert "not.jsonl.gz cannot be read" in complaint("not.jsonl.gz", b"not compressed")
    assert "--val-fraction = 1.5" in complaint("other.jsonl", None, "--val-fraction=1.5")
    assert "--workers = 0" in complaint("other.jsonl", None, "--workers=0")
    none = complaint("null.jsonl", b'{"text": "x"}\n{"text": null}\n')
    number = complaint("numbers.jsonl", b'{"text": 1}\n{"text": 2}\n')
    single = complaint("single.jsonl", b'{"text": "x"}\n')
    nested = complaint("nested.jsonl", b'{"text": {"a": 1}}\n{"text": {"a": 2}}\n')
    assert "nested.jsonl" in nested
    assert "bad.jsonl.xz cannot be read" in complaint("bad.jsonl.xz", lzma.compress(b"{}")[:-9] + b"123456789")
    assert "bomb.jsonl" in complaint("bomb.jsonl", b'{"text": ' + b"[" * 2_000 + b"]" * 2_000 + b"}")
    hollow = gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(100_000)))
    assert "hollow.jsonl.gz cannot be read" in complaint("hollow.jsonl.gz", hollow[:5000] + bytes(9) + hollow[5009:])
    if streaming:
        assert "document 1 has no text, but None" in none
        assert "document 0 has no text, but 1" in number
        assert "no document of single.jsonl falls to val" in single
        assert "document 0 has no text" in nested
    else:
        assert "1 of the 2 documents have no text" in none
        assert "the column 'text' holds int64, not text" in number
        assert "1 documents cannot be split" in single
        assert "not text" in nested
        most = complaint("three.jsonl", b'{"text": "x"}\n' * 3, "--val-fraction=0.9")
        assert "3 documents cannot be split, 0.9 of them for val: name more" in most
    assert not list((tmp_path / "out").glob("*.bin"))
    assert not (tmp_path / "out/meta.json").exists()


def test_a_missing_vocabulary_says_what_to_do(openwebtext, call, refused, tmp_path, monkeypatch):
    import tiktoken

    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    monkeypatch.delitem(TOKENIZERS["gpt2"].__dict__, "encoding", raising=False)
    line = refused(lambda: call(openwebtext, "--out-dir", tmp_path / "out"))
    assert "set TIKTOKEN_CACHE_DIR" in line
    assert not Path(tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["openwebtext", "fineweb_edu", "shakespeare_char"])
def test_a_missing_network_says_what_to_do(script, call, refused, tmp_path, monkeypatch):
    import urllib.error
    import urllib.request

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset_builder", offline)
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    tokenizer = [] if script == "shakespeare_char" else ["--tokenizer=bytes"]
    line = refused(lambda: call(load_script(script), "--out-dir", tmp_path / "out", *tokenizer))
    assert "use --" in line
    assert "no route to host" in line
    assert not Path(tmp_path / "out").exists()


def test_recipes_name_their_source(call, monkeypatch, tmp_path):
    asked = []

    class Builder:
        hash = "1"

        def __init__(self, **arguments):
            asked.append(arguments)

        def download_and_prepare(self): ...

        def as_dataset(self, split):
            datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(tmp_path / "table")
            return datasets.load_from_disk(tmp_path / "table")

    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    for i, (script, *options) in enumerate(
        [("fineweb_edu",), ("openwebtext",), ("openwebtext", "--source=some/other", "--config=en")]
    ):
        call(load_script(script), "--tokenizer=bytes", "--out-dir", tmp_path / str(i), *options)
    assert [(call["path"], call["name"]) for call in asked] == [
        ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
        ("Skylion007/openwebtext", None),
        ("some/other", "en"),
    ]
    assert json.loads((tmp_path / "2/meta.json").read_text())["source"] == "some/other"


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


def test_a_full_disk_keeps_what_is_done(tmp_path):
    """A limit on the size of files stands in for a full disk; without it the same command finishes."""
    texts = [f"{text} {i}" * 40 for i, text in enumerate(DOCUMENTS)]
    write_documents(tmp_path / "documents.jsonl", texts)
    command = [sys.executable, ROOT / "data/openwebtext/prepare.py", "--data-files", tmp_path / "documents.jsonl",
               "--tokenizer=bytes", "--out-dir", tmp_path / "out"]  # fmt: skip

    def run(limit=None):
        def set_limit():
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        return subprocess.run(command, preexec_fn=set_limit, capture_output=True, text=True)

    documents.open_documents("", None, [tmp_path / "documents.jsonl"], False, "text", 0.1)  # fills the cache
    full = run(limit=10_000_000)
    assert full.returncode == 2
    assert "the same command goes on" in full.stderr.splitlines()[-1]
    assert "Traceback" not in full.stderr
    assert not list((tmp_path / "out").glob("*.bin"))
    finished = run()
    assert finished.returncode == 0
    assert "going on after" in finished.stdout
    assert sum(map(len, made(tmp_path / "out").values())) == sum(len(text.encode()) + 1 for text in texts)


def test_inspection_finds_what_is_wrong(call, refused, tmp_path):
    texts = {"train": ["short", "x" * 300, "word " * 2000], "val": ["to validate"]}
    write_data_set(tmp_path / "set", TextSource("a test", texts), Bytes(), 1)
    printed = call(inspect_data, tmp_path / "set")
    assert "10,308 tokens, 3 documents" in printed
    assert "begins: 'short" in printed
    assert printed.count("checksum as in meta.json") == 2
    assert "median 301, mean 3,436, most 10,001" in printed
    assert [line.split()[-2:] for line in printed.splitlines() if "up to 512" in line][0][0] == "33.3%"

    path = tmp_path / "set/train.bin"
    good = path.read_bytes()
    path.write_bytes(b"a" + good[1:])
    assert "train.bin is not the file that meta.json describes" in refused(lambda: call(inspect_data, tmp_path / "set"))
    path.write_bytes(good[:-2])
    assert "is not the file" in refused(lambda: call(inspect_data, tmp_path / "set"))
    path.write_bytes(good[:-2] + b"\x00\x07")
    assert "has the token id 1792, beyond the vocabulary" in refused(lambda: call(inspect_data, tmp_path / "set"))
    assert "does not exist" in refused(lambda: call(inspect_data, tmp_path / "nothing"))
