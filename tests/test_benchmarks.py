"""tools.benchmark, tools.gpu_check, studies.parity: training and sampling beside other projects, what Sophia costs."""

import json
import subprocess
import sys

import pytest
import torch

from run.settings import ROOT
from tests.conftest import arguments
from tools import benchmark, gpu_check

# in float32, as a processor without bfloat16 products takes minutes for large ones
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "micro_batch_size": 2, "dtype": "float32"}
SMALL = ["--rounds=2", "--json", *arguments(device="cpu", compile=False, **SHAPE)]
# A checkout of nanoGPT, or with RELEASED_SOPHIA of the released Sophia, whose model is ours
PEER = f"""
import runpy
import torch

globals().update(runpy.run_path({str(ROOT / "model.py")!r}))
Ours, FACTOR = GPT, 1

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = Ours(config)
        print("a line that must not get into the JSON")

    def forward(self, idx, targets):
        logits = self.transformer(idx)
        if isinstance(targets, int):
            return logits, None
        return logits, FACTOR * torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def generate(self, idx, max_new_tokens, top_k):
        assert idx.shape == (1, 16) and max_new_tokens == 500
        return self.transformer.generate(idx, max_new_tokens, top_k=top_k)

    def configure_optimizers(self, *options):
        if options[0] != "sophiag":
            return torch.optim.AdamW(self.parameters(), options[1], options[2], weight_decay=options[0])
        from sophia import SophiaG
        groups = [dict(params=list(self.parameters()), weight_decay=options[1], lr=options[2])]
        return SophiaG(groups, betas=options[3], rho=options[4])
"""
RELEASED_SOPHIA = """
import torch

class SophiaG(torch.optim.Optimizer):
    def __init__(self, groups, betas, rho):
        super().__init__(groups, {"betas": betas, "rho": rho})

    @torch.no_grad()
    def update_hessian(self):
        for group in self.param_groups:
            for p in group["params"]:
                h = self.state[p].setdefault("hessian", torch.zeros_like(p))
                h.mul_(group["betas"][1]).add_((1 - group["betas"][1]) * p.grad**2)

    @torch.no_grad()
    def step(self, bs):
        assert bs in (2 * 8, 4 * 8)  # tokens of a step
        for group in self.param_groups:
            for p in group["params"]:
                p *= 1 - group["lr"] * group["weight_decay"]
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 1 - group["betas"][0])
                h = self.state[p].get("hessian", torch.zeros_like(p))
                p -= group["lr"] * (m / (group["rho"] * bs * h + 1e-15)).clamp(-1, 1)
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that steps run in


@pytest.fixture
def peer(tmp_path):
    """peer(name, sophia) makes a checkout."""

    def make(name, sophia, model=PEER):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.py").write_text(model)
        if sophia:
            (tmp_path / name / "sophia.py").write_text(RELEASED_SOPHIA)
        return tmp_path / name

    return make


def printed_json(module, *options):
    """What a module prints in a process of its own, as it puts a peer's modules in the place of ours."""
    command = [sys.executable, "-m", *module.split(), *options]
    return json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.parametrize("sophia", [False, True])
def test_parity_tells_how_far_losses_part(sophia, dataset, peer):
    """A peer that computes the same has the same losses; one whose loss is a little larger does not."""
    same, other = peer("same", sophia), peer("other", sophia, PEER.replace("GPT, 1", "GPT, 1.01"))
    for folder in (same, other):
        options = [f"--dataset={dataset}", "--batch_size=4", "--learning_rate=1e-3", "--peer", folder]
        result = printed_json("studies.parity", *SMALL[2:], *options)[folder.name]
        assert result["optimizer"] == ("sophiag" if sophia else "adamw")
        ours, theirs = result["losses"]["100"]
        assert ours < result["losses"]["1"][0] - 0.2
        assert abs(ours - theirs) <= result["largest_difference_until"]["100"]
        assert (result["largest_difference_until"]["10"] < 1e-5) == (folder == same)


def test_train_compares_our_step_with_a_peers(call, peer, tmp_path):
    options = ["--optimizer=sophiag", f"--out_dir={tmp_path / 'out'}", "--peer", peer("peer", sophia=True)]
    result = json.loads(call(benchmark, "train", *SMALL, *options))
    for name in ("ours", "peer_same", "peer_as_it_runs"):
        seconds = result[f"seconds_{name}"]
        assert -1 < result[f"curvature_share_{name}"] < 1
        assert result[f"tokens_per_second_{name}"] == pytest.approx(2 * 8 / seconds)
        assert result[f"seconds_to_first_step_{name}"] > seconds
        assert result[f"mfu_{name}"] is None  # a CPU has no data-sheet peak here
        assert name == "ours" or result[f"speed_over_{name}"] == seconds / result["seconds_ours"]
    assert not (tmp_path / "out").exists()


def test_sample_compares_our_generation_with_a_peers(peer):
    result = printed_json("tools.benchmark sample", *SMALL, "--peer", peer("peer", sophia=False))
    for name in ("ours", "peer"):
        assert result[f"tokens_per_second_{name}"] == 500 / result[f"seconds_{name}"]
    assert result["speed_over_peer"] == result["seconds_peer"] / result["seconds_ours"]
    assert (result["dtype"], result["rounds"]) == ("float32", 2)


def test_curvature_compares_passes_and_updates(call):
    result = json.loads(call(benchmark, "curvature", *SMALL, "--micro_batch_size=4", "--optimizer=lion"))
    seconds = {name.removeprefix("seconds_"): value for name, value in result.items() if name.startswith("seconds_")}
    assert all(value > 0 for value in seconds.values())
    for name in ("gnb", "gnb_averaged", "hutchinson"):
        assert result[f"{name}_over_train"] == seconds[name] / seconds["train"]
    for name in ("sophiag", "lion"):
        assert result[f"{name}_over_adamw_fused"] == seconds[f"update_{name}"] / seconds["update_adamw"]
    # 480 sequences are 120 passes of 4, of which an estimate by 240 takes half in one of ten steps
    adamw, sophia = (120 * seconds["train"] + seconds[f"update_{name}"] for name in ("adamw", "sophiag"))
    estimate = 60 * seconds["gnb"] + seconds["update_hessian"]
    assert result["overhead_gnb_240"] == pytest.approx((sophia + estimate / 10) / adamw - 1)


@pytest.fixture
def check(call, monkeypatch, tmp_path):
    """check(runs, tests) is gpu_check on the CPU, with a tiny model and those tests of tests/test_gpu.py alone."""
    sizes = arguments(**SHAPE, batch_size=4, hessian_batch_size=4, compile=False, device="cpu", out_dir=tmp_path)

    def run(runs, tests):
        monkeypatch.setattr(gpu_check, "RUNS", runs)
        monkeypatch.setattr(gpu_check, "STEPS", 8)  # as often a product of large matrices is timed
        monkeypatch.setenv("PYTEST_ADDOPTS", f"-k '{tests}'")
        return call(gpu_check, *sizes)

    return run


def test_gpu_check_prints_and_keeps_its_figures(check, tmp_path):
    runs = {name: gpu_check.RUNS[name] for name in ("adamw", "sophiah")}
    printed = check(runs, "adamw and (cuda_gives or resumed)")
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert "threads" in report["device"]
    assert f"--out_dir={tmp_path}" in report["command"]
    assert report["tests_passed"]
    adamw, sophiah = report["optimizers"].values()
    assert adamw["tokens_per_s"] > 0
    assert adamw["curvature"] == 0 < sophiah["curvature"] < 1
    assert json.dumps(report, indent=2) in printed


def test_gpu_check_tells_what_failed(check, capsys):
    with pytest.raises(SystemExit) as stop:
        check({"lion": [*gpu_check.RUNS["lion"], "--init_from=nowhere"]}, "no_such_test")
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert '"tests_passed": false' in printed
    assert "FAILED: the step of ours failed: BadWeights: init_from = 'nowhere': must be" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device")
def test_gpu_check_without_a_gpu_does_nothing(call, refused, tmp_path):
    assert "this machine has no CUDA device" in refused(lambda: call(gpu_check, "--out_dir", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["speed"], "invalid choice: 'speed'"),
        (["train", "--n_layr=3"], "did you mean 'n_layer'"),
        (["train", "--rounds=0"], "--rounds: 0 is not from 1"),
        (["train", *SMALL, "--peer", "nowhere"], "--peer nowhere is no checkout of nanoGPT"),
        (["train", *SMALL, "--batch_size=3"], "batch_size = 3 is not a multiple of 2"),
        (["curvature", *SMALL], "hessian_batch_size = 2 is not a multiple of 4"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, refused, command, complaint):
    assert complaint in refused(lambda: call(benchmark, *command))
