"""sample.py, plot.py and the data scripts, as a user calls them."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import plot
import sample
from benchmarks import __main__ as bench
from benchmarks import memory
from run.machine import Machine
from run.settings import ROOT, read
from tests.conftest import arguments
from tokens.tokenizers import TOKENIZERS


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
        ("checkpoint", ["pause_over_synchronous", "worst_pause_over_synchronous"]),
    ],
)  # fmt: skip
def test_bench_prints_its_ratios(call, tmp_path, benchmark, keys):
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "micro_batch_size": 4, "compile": False}
    options = ["--rounds=1", "--json", "--device=cpu", f"--out_dir={tmp_path}"]
    result = json.loads(call(bench, benchmark, *options, *arguments(**shape)))
    assert all(result[key] == result[key] for key in keys)  # numbers, none of them NaN
    assert all(value > 0 for key, value in result.items() if key.startswith("seconds_"))
    if benchmark == "optimizer":
        assert result["sophia_over_adamw_fused"] == result["seconds_sophiag"] / result["seconds_adamw"]


def test_bench_of_the_loader_and_of_the_preparation(call, dataset, vocabulary, refused, tmp_path):
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "micro_batch_size": 4, "compile": False}
    common = ["--rounds=1", "--json", "--device=cpu"]
    result = json.loads(call(bench, "loader", *common, *arguments(dataset=dataset, **shape)))
    assert result["loader_over_train"] == result["seconds_train"] / result["seconds_load"]
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    result = json.loads(call(bench, "tokenize", *common, "--text", tmp_path / "text.jsonl"))
    assert result["prepare_over_one_thread"] > 0
    assert "--text FILE" in refused(lambda: call(bench, "tokenize"))


SMALL = arguments(n_layer=1, n_head=2, n_embd=8, block_size=8, micro_batch_size=2, compile=False, device="cpu")
PEER = """
import torch
from dataclasses import dataclass
from sophia import SophiaG

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, idx, targets):
        logits = self.wte(idx) @ self.wte.weight.t()
        if isinstance(targets, int):
            return logits, None
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, optimizer_name, weight_decay, learning_rate, betas, rho, device_type):
        print("a line that must not get into the JSON")
        return SophiaG(self.parameters(), learning_rate)
"""
PEERS_SOPHIA = """
import torch

class SophiaG(torch.optim.SGD):
    def step(self, bs):
        assert bs == 2 * 8
        super().step()

    def update_hessian(self):
        assert all(p.grad is not None for group in self.param_groups for p in group["params"])
"""


def test_bench_train_compares_a_peer_with_the_step_of_training(call, refused, tmp_path):
    (tmp_path / "model.py").write_text(PEER)
    assert "is no checkout" in refused(lambda: call(bench, "train", *SMALL, "--peer", tmp_path / "nowhere"))
    (tmp_path / "sophia.py").write_text(PEERS_SOPHIA)
    options = ["--rounds=2", "--json", "--optimizer=sophiag", "--peer", tmp_path]
    result = json.loads(call(bench, "train", *SMALL, *options))
    same = f"{tmp_path.name}_same"
    for name in ("ours", same, f"{tmp_path.name}_as_it_runs"):
        assert result[f"tokens_per_second_{name}"] == pytest.approx(16 / result[f"seconds_{name}"])
        mean = 0.9 * result[f"seconds_plain_{name}"] + 0.1 * result[f"seconds_with_estimate_{name}"]
        assert result[f"seconds_{name}"] == pytest.approx(mean)
        assert result[f"seconds_to_first_step_{name}"] > result[f"seconds_{name}"]
    assert result[f"speed_over_{same}"] == result[f"seconds_{same}"] / result["seconds_ours"]
    assert 0 < result["mfu_of_matmul_rate_ours"] < 1


def test_bench_profile_tells_where_the_time_goes(call, refused, tmp_path):
    options = ["--rounds=2", "--json", *SMALL]
    result = json.loads(call(bench, "profile", *options, "--trace", tmp_path / "trace.json"))
    shares = [share for name, share in result.items() if name.startswith("share ")]
    assert 0 < result["idle_share"] < 1
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 1 - result["idle_share"] + 1e-6
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    unwritable = tmp_path / "nowhere" / "trace.json"
    assert "cannot be written" in refused(lambda: call(bench, "profile", *options, "--trace", unwritable))


def test_bench_memory_is_linear_in_layers_and_sequences(call):
    result = json.loads(call(bench, "memory", "--json", *SMALL))
    assert result["micro_batch_size_80_GB_computed"] > result["micro_batch_size_24_GB_computed"] > 0
    s = read([*SMALL, "--n_layer=4"])
    here = Machine(torch.device("cpu"), torch.float32, compile=False)
    fixed, sequence = memory.computed(s, here)
    weights = memory.make_model(s, here).config.parameters
    kept = memory.kept_for_backward(dataclasses.replace(s, micro_batch_size=5), here)
    head = 4 * 8 * (50304 + 5 * 8)  # its gradients
    assert kept + head == pytest.approx(fixed - 4 * 4 * weights + 5 * sequence, rel=1e-3)
    checkpointed = memory.computed(dataclasses.replace(s, checkpoint_activations=True), here)
    assert checkpointed[1] < 0.6 * sequence


def test_bench_refuses_what_it_does_not_know(call, refused):
    assert "invalid choice: 'speed'" in refused(lambda: call(bench, "speed"))
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


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=lambda tokenizer: tokenizer.name)
def test_tokenizers_give_the_text_back(tokenizer, vocabulary):
    text = "Hello, wörld! 你好 <|endoftext|>"
    tokens = tokenizer.encode(text)
    assert tokenizer.decode_bytes(tokens).decode() == text
    assert all(0 <= token < tokenizer.end_of_text or tokenizer.name == "bytes" for token in tokens)
    assert tokenizer.decode_bytes([50300] if tokenizer.name == "gpt2" else []) == b""
