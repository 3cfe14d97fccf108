"""sample.py and data/stdlib/prepare.py, as a user calls them."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest

import sample
from data.tokenizers import TOKENIZERS
from run.settings import ROOT, read


def test_a_start_that_is_no_utf8_reaches_the_model_as_it_is(train, tmp_path):
    train(tmp_path / "run", max_iters=1)
    command = [sys.executable, "sample.py", f"--out_dir={tmp_path / 'run'}", "--max_new_tokens=1", b"--start=caf\xe9 x"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    assert printed.startswith(b"caf? x")  # the terminal has no sign for it
    assert TOKENIZERS["bytes"].encode("caf\udce9 x") == [*b"caf\xe9 x"]


def test_paths_may_begin_with_the_home_folder(train, call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "run", max_iters=1)
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + b"one two three\n" * 9)
    shakespeare = importlib.import_module("data.shakespeare_char.prepare")
    call(shakespeare, "--file=~/text.txt", "--out-dir=~/data")
    assert (tmp_path / "data/train.bin").exists()
    assert call(sample, "--out_dir=~/run", "--start=FILE:~/text.txt", "--max_new_tokens=1").startswith("one two three")
    (tmp_path / "base.py").write_text("out_dir = '~/here'\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/c.py").write_text("include = '~/base.py'\n")
    settings = read(["other/c.py", "--init_from=~/weights", "--dataset=~/data"])
    expected = [f"{tmp_path}/{name}" for name in ("here", "weights", "data")]
    assert [settings.out_dir, settings.init_from, settings.dataset] == expected


@pytest.mark.parametrize("script", ["train.py", "data/stdlib/prepare.py"])
def test_windows_is_refused_in_one_line(script):
    code = "import os, runpy, signal; del os.pread, signal.SIGUSR1, signal.SIGHUP\n"
    code += f"runpy.run_path({script!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: Linux and macOS are supported, {sys.platform} is not: on Windows use WSL\n"


def test_the_standard_library_gives_the_same_data_every_time(tmp_path):
    for name in ("a", "b"):
        command = [sys.executable, "data/stdlib/prepare.py", "--out-dir", tmp_path / name]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    meta, again = (json.loads((tmp_path / name / "meta.json").read_text()) for name in ("a", "b"))
    assert meta == again
    assert meta["tokenizer"] == "bytes" and meta["checksum"]["val.bin"].startswith("sha256:")
    train, val = (np.fromfile(tmp_path / "a" / f"{split}.bin", "<u2") for split in ("train", "val"))
    assert (len(train), len(val)) == (meta["train_tokens"], meta["val_tokens"])
    assert len(train) > 3e6 and 0.01 < len(val) / len(train) < 0.2
    assert any(b"class JSONDecoder" in file for file in train.astype(np.uint8).tobytes().split(b"\0"))
