"""sample.py, plot.py and the data scripts, as a user calls them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import arguments, write_dataset

import bench
import plot
import sample
from training import preparation
from training.data import open_data
from training.errors import UserError
from training.settings import ROOT
from training.tokenizers import GPT2, TOKENIZERS, Bytes


@pytest.fixture
def call(monkeypatch, capsys):
    """call(script, *arguments) runs its main in this process and returns what it printed."""

    def run(script, *command):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, command)])
        capsys.readouterr()
        script.main()
        return capsys.readouterr().out

    return run


def load_script(path):
    import importlib.util

    spec = importlib.util.spec_from_file_location(path.parent.name + "_prepare", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sample_continues_a_text_as_the_seed_says(train, call, tmp_path):
    train(tmp_path / "run", max_iters=3)
    options = [sample, "--out_dir", tmp_path / "run", "--start", "Grüße ", "--max_new_tokens", 20]
    first = call(*options)
    assert first.startswith("Grüße ")
    assert first == call(*options)
    assert first != call(*options, "--seed", 5)
    assert call(*options, "--num_samples", 3).count("-" * 40) == 2
    assert call(*options, "--temperature", 1e-40) == call(*options, "--temperature", 0)
    assert call(*options, "--temperature", 0) == call(*options, "--top_k", 1)
    (tmp_path / "start.txt").write_text("12 squared")
    assert call(*options[:3], "--start", f"FILE:{tmp_path / 'start.txt'}").startswith("12 squared")


def test_sample_refuses_what_it_cannot_use(refused, call, train, tmp_path):
    assert "no checkpoint in" in refused(lambda: call(sample, "--out_dir", tmp_path))
    assert "is not from 0 to 2^63 - 1" in refused(lambda: call(sample, "--seed", 2**70))
    assert "-1 is not at least 1" in refused(lambda: call(sample, "--num_samples", -1))
    assert "unrecognized arguments: --temprature" in refused(lambda: call(sample, "--temprature", 1))
    train(tmp_path / "run", max_iters=1)
    missing = ["--out_dir", tmp_path / "run", "--start", "FILE:nowhere.txt"]
    assert "nowhere.txt cannot be read" in refused(lambda: call(sample, *missing))


def test_plot_draws_the_curves_of_several_runs(train, call, tmp_path):
    for name in ("one", "two"):
        train(tmp_path / name, max_iters=3)
    picture = tmp_path / "curves.png"
    assert call(plot, tmp_path / "one", tmp_path / "two", "-o", picture).strip() == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    pixels = plot.plt.imread(picture)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10


def test_plot_refuses_a_folder_without_metrics(refused, call, tmp_path):
    assert "metrics.jsonl does not exist" in refused(lambda: call(plot, tmp_path))
    (tmp_path / "metrics.jsonl").write_text("nonsense\n{}\n")
    assert "line 1: not a row of metrics" in refused(lambda: call(plot, tmp_path))


def test_plot_refuses_a_picture_it_cannot_write(refused, call, train, tmp_path):
    train(tmp_path / "run", max_iters=1)
    assert "cannot write" in refused(lambda: call(plot, tmp_path / "run", "-o", tmp_path / "nowhere" / "x.png"))
    assert "cannot write" in refused(lambda: call(plot, tmp_path / "run", "-o", tmp_path / "x.docx"))


@pytest.mark.parametrize(
    ("benchmark", "keys"),
    [
        ("optimizer", ["sophia_over_adamw_fused", "lion_over_adamw_fused"]),
        (
            "curvature",
            ["gnb_over_train", "hutchinson_over_train", "overhead_sophiah_32", "overhead_sophiag_240",
             "overhead_sophiag_averaged_32"],
        ),
    ],
)  # fmt: skip
def test_bench_prints_its_ratios(call, benchmark, keys):
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "micro_batch_size": 4, "compile": False}
    result = json.loads(call(bench, benchmark, "--rounds=1", "--json", "--device=cpu", *arguments(**shape)))
    assert all(result[key] == result[key] for key in keys)  # numbers, none of them NaN
    assert all(value > 0 for key, value in result.items() if key.startswith("seconds_"))
    if benchmark == "optimizer":
        assert result["sophia_over_adamw_fused"] == result["seconds_sophiag"] / result["seconds_adamw"]


def test_bench_refuses_what_it_does_not_know(call, refused):
    assert "invalid choice: 'memory'" in refused(lambda: call(bench, "memory"))
    assert "did you mean 'n_layer'" in refused(lambda: call(bench, "optimizer", "--n_layr=3"))


def test_the_standard_library_gives_the_same_data_every_time(tmp_path):
    for name in ("a", "b"):
        subprocess.run(
            [sys.executable, "data/stdlib/prepare.py", "--out-dir", tmp_path / name],
            cwd=ROOT, check=True, capture_output=True,
        )  # fmt: skip
    metas = [json.loads((tmp_path / name / "meta.json").read_text()) for name in ("a", "b")]
    assert metas[0] == metas[1]
    assert metas[0]["tokenizer"] == "bytes"
    train, val = (np.fromfile(tmp_path / "a" / f"{split}.bin", "<u2") for split in ("train", "val"))
    assert (len(train), len(val)) == (metas[0]["train_tokens"], metas[0]["val_tokens"])
    assert len(train) > 3e6
    assert 0.01 < len(val) / len(train) < 0.2
    files = [bytes(part.astype(np.uint8)) for part in np.split(train, np.flatnonzero(train == 0) + 1)]
    assert any(b"class JSONDecoder" in file for file in files)
    assert metas[0]["checksum"]["val.bin"].startswith("sha256:")


def test_half_a_data_set_is_not_taken_for_a_whole_one(tmp_path):
    write_dataset(tmp_path, range(10), range(10))

    def pieces():
        yield np.arange(5, dtype=np.uint16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preparation.write_splits(tmp_path, {"train": pieces()}, Bytes(), "a test")
    with pytest.raises(UserError, match=r"train\.bin does not exist|val\.bin does not exist"):
        open_data(f"{tmp_path}/", 4)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=lambda tokenizer: tokenizer.name)
def test_tokenizers_give_the_text_back(tokenizer, vocabulary):
    text = "Hello, wörld! 你好 <|endoftext|>"
    tokens = tokenizer.encode(text)
    assert tokenizer.decode_bytes(tokens).decode() == text
    assert all(0 <= token < tokenizer.end_of_text or tokenizer.name == "bytes" for token in tokens)
    assert tokenizer.decode_bytes([50300] if tokenizer.name == "gpt2" else []) == b""


# OpenWebText's script, on local files. The GPT-2 vocabulary needs a network or a cache.


@pytest.fixture
def vocabulary(monkeypatch):
    local = ROOT.parent / "shared" / "tiktoken"
    if local.is_dir():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(local))
    try:
        return GPT2().encoding
    except Exception as error:
        pytest.skip(f"the GPT-2 vocabulary cannot be had: {error}")


@pytest.fixture
def openwebtext():
    return load_script(ROOT / "data" / "openwebtext" / "prepare.py")


DOCUMENTS = [f"Document number {i}: " + "so it goes, " * (i % 7) for i in range(3000)] + ["", "Ende – fin"]


def reference(vocabulary):
    """nanoGPT's pipeline on DOCUMENTS, in plain steps."""
    import datasets

    parts = datasets.Dataset.from_dict({"text": DOCUMENTS}).train_test_split(0.0005, seed=2357, shuffle=True)
    return {
        split: [token for text in parts[name]["text"] for token in [*vocabulary.encode_ordinary(text), 50256]]
        for split, name in (("train", "train"), ("val", "test"))
    }


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.bz2", "json.gz", "parquet"])
def test_openwebtext_equals_nanogpts_pipeline(openwebtext, vocabulary, call, tmp_path, monkeypatch, kind):
    import bz2
    import gzip

    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / f"documents.{kind}"
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(DOCUMENTS))
    if kind == "parquet":
        datasets.Dataset.from_dict({"text": DOCUMENTS}).to_parquet(path)
    else:
        pack = {"bz2": bz2.compress, "gz": gzip.compress}.get(kind.split(".")[-1], bytes)
        path.write_bytes(pack(lines.encode()))
    call(openwebtext, "--data-files", path, "--out-dir", tmp_path / "out", "--num-proc", 1 + (kind == "jsonl"))
    for split, tokens in reference(vocabulary).items():
        assert np.fromfile(tmp_path / "out" / f"{split}.bin", "<u2").tolist() == tokens
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["tokenizer"] == "gpt2"
    assert meta["vocab_size"] == 50257


def test_openwebtext_takes_a_text_file_as_one_document(openwebtext, vocabulary, call, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"first line {i}\nsecond line\n")
    call(openwebtext, "--data-files", *sorted(tmp_path.glob("*.txt")), "--out-dir", tmp_path / "out")
    tokens = np.concatenate([np.fromfile(tmp_path / "out" / f"{split}.bin", "<u2") for split in ("train", "val")])
    assert (tokens == 50256).sum() == 3
    assert "first line 1\nsecond line" in vocabulary.decode(tokens.tolist())


def test_openwebtext_refuses_what_it_cannot_read(openwebtext, vocabulary, call, refused, tmp_path):
    def complaint(name, content=None):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        return refused(lambda: call(openwebtext, "--data-files", path, "--out-dir", tmp_path / "out"))

    assert "does not exist" in complaint("nothing.jsonl")
    assert "is none of .json, .jsonl, .txt, .parquet" in complaint("words.docx", b"x")
    assert "no column 'text', but words" in complaint("other.jsonl", b'{"words": "x"}\n{"words": "y"}\n')
    assert "cannot be read" in complaint("broken.parquet", b"PAR1 but not really")
    assert "the column 'text' holds int64, not text" in complaint("numbers.jsonl", b'{"text": 1}\n{"text": 2}\n')
    assert "1 of the 2 documents have no text" in complaint("null.jsonl", b'{"text": "x"}\n{"text": null}\n')
    assert "1 documents cannot be split" in complaint("single.jsonl", b'{"text": "x"}\n')
    assert not (tmp_path / "out").exists()


def test_a_missing_vocabulary_says_what_to_do(openwebtext, call, refused, tmp_path, monkeypatch):
    import tiktoken

    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    line = refused(lambda: call(openwebtext, "--out-dir", tmp_path / "out"))
    assert "set TIKTOKEN_CACHE_DIR" in line
    assert not Path(tmp_path / "out").exists()


def test_a_missing_network_says_what_to_do(openwebtext, vocabulary, call, refused, tmp_path, monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert "use --data-files" in refused(lambda: call(openwebtext, "--out-dir", tmp_path / "out"))
