"""What several tests share: a small data set, a model, and running train.py inside the test process."""

import contextlib
import json
import math
import os
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.tokenizers import GPT2
from model import GPT
from run import errors
from run.machine import has_compiler
from run.settings import ROOT
from training import checkpoints

torch.set_num_threads(1)  # the models are too small for more

TINY = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 8, "micro_batch_size": 4,
    "hessian_batch_size": 4, "hessian_interval": 5, "max_iters": 20, "warmup_iters": 3, "eval_interval": 10,
    "eval_sequences": 10, "log_interval": 1, "device": "cpu", "dtype": "float32", "compile": False,
}  # fmt: skip
OPTIMIZERS = {
    "adamw": {"optimizer": "adamw"},
    "lion": {"optimizer": "lion"},
    "muon": {"optimizer": "muon"},
    "sophiah": {"optimizer": "sophiah"},
    "sophiag": {"optimizer": "sophiag"},
    "sophiag-averaged": {"optimizer": "sophiag", "hessian_estimator": "averaged", "hessian_group_size": 2},
}

needs_compiler = pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="no compiler here")
COMPILERS = [False, pytest.param(True, marks=needs_compiler)]


def write_dataset(folder, train, val, **meta):
    folder.mkdir(parents=True, exist_ok=True)
    np.asarray(train, dtype="<u2").tofile(folder / "train.bin")
    np.asarray(val, dtype="<u2").tofile(folder / "val.bin")
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "bytes", "vocab_size": 256} | meta))


def text_dataset(folder, validation=1000):
    """A folder with 20,000 tokens of text to train on, some more to validate."""
    text = " ".join(f"{i} squared is {i * i}, its root {math.sqrt(i):.3f};" for i in range(1000)).encode()
    write_dataset(folder, list(text[:20_000]), list(text[20_000 : 20_000 + validation]))
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return text_dataset(tmp_path_factory.mktemp("data"))


def random_model(config, spread=0.1):
    """A model whose biases, gains and logits are large enough to matter."""
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return model


def plain_loss(model, idx, targets):
    """From the logits of all positions at once; it can be differentiated twice, as the model's own loss cannot."""
    return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)


def listing(folder):
    """What is in a folder, and since when; without the lock, which is held and let go."""
    paths = [path for path in [folder, *folder.rglob("*")] if path.exists() and path.name != ".lock"]
    return sorted((str(path), path.stat().st_mtime_ns) for path in paths)


def last_checkpoint(out_dir):
    return checkpoints.folders(out_dir)[-1]


def arguments(**settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def rows_of(out_dir):
    """The rows of a run's metrics.jsonl."""
    metrics = out_dir / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def without_timings(rows):
    """What two runs with the same numbers have in common."""
    timings = {"seconds", "tokens_per_second", "mfu", "data_wait"}
    return [{key: value for key, value in row.items() if key not in timings} for row in rows]


@pytest.fixture
def train(dataset, monkeypatch):
    """train(out_dir, **settings) runs train.py with TINY settings and returns the rows of metrics.jsonl."""
    import train as script

    def run(out_dir, **settings):
        command = arguments(**TINY | {"dataset": dataset, "out_dir": out_dir} | settings)
        monkeypatch.setattr(sys, "argv", ["train.py", *command])
        script.main()
        return rows_of(out_dir)

    return run


@pytest.fixture
def refused(capsys):
    """refused(main) runs a script's main that must end with exit code 2 and one line, which it returns."""

    def run(main):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            errors.run(main)
        assert stop.value.code == 2
        printed = capsys.readouterr().err.splitlines()
        lines = [line for line in printed if line.strip() and "/s]" not in line]  # but progress bars
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


@pytest.fixture
def refuses(train, refused, tmp_path):
    """refuses(complaint, **settings) runs train.py, which must end with one line, and write nothing."""

    def run(complaint, **options):
        out_dir = options.pop("out_dir", tmp_path / "out")
        before = listing(out_dir)
        line = refused(lambda: train(out_dir, **options))
        assert complaint in line
        assert listing(out_dir) == before

    return run


def same_weights(left, right):
    """Whether two checkpoint folders hold bit-identical weights and optimizer state."""
    return all((left / name).read_bytes() == (right / name).read_bytes() for name in
               ("model.safetensors", "optimizer.safetensors"))  # fmt: skip


@contextlib.contextmanager
def largest_file(size):
    """No file grows beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def renamed(monkeypatch):
    """What gets its name while the test runs, and whether the disk had all of it by then."""
    flushed, found = set(), {}

    def watch(name, note):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *arguments: (note(*arguments), function(*arguments))[1])

    def note_rename(old, new):
        paths = [Path(old), *Path(old).rglob("*")]
        found[Path(new).name] = all(path.stat().st_ino in flushed for path in paths)

    watch("fsync", lambda descriptor: flushed.add(os.fstat(descriptor).st_ino))
    watch("rename", note_rename)
    watch("replace", note_rename)
    return found


@pytest.fixture
def vocabulary(monkeypatch):
    """tiktoken's encoding of GPT-2's vocabulary; the test is skipped where it cannot be had."""
    local = ROOT.parent / "shared" / "tiktoken"
    if local.is_dir():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(local))
    try:
        return GPT2().encoding
    except errors.UserError as error:
        pytest.skip(f"the GPT-2 vocabulary cannot be had: {error}")


@pytest.fixture
def call(monkeypatch, capsys):
    """call(script, *arguments) runs a script's main in the test process and returns what it printed."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        capsys.readouterr()
        script.main()
        return capsys.readouterr().out

    return run
