"""Studies: what is searched, what is run and when, how claims are decided, and what the report makes of it."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

from run.errors import UserError
from run.settings import ROOT
from studies import losses, report, runs
from studies.__main__ import STUDIES
from studies.claims import Claim, verdicts
from studies.runs import Ledger, Plan, Result, Runner, fingerprints, name_of
from studies.scales import SCALES
from studies.search import Budget, search
from tests.conftest import TINY

AXES = {"learning_rate": (1e-3, 2e-3, 4e-3), "beta1": (0.8, 0.9, 0.96), "rho": (0.05, 0.1)}
OPTIMUM = {"learning_rate": 0.016, "beta1": 0.6, "rho": 0.025}  # past an end of each axis


def distance(settings):
    """The square of the hyperparameters' distance from the optimum, in powers of two."""
    steps = [math.log2((1 - settings[k]) / (1 - v) if k == "beta1" else settings[k] / v) for k, v in OPTIMUM.items()]
    return sum(step**2 for step in steps)


class Formula:
    """A runner whose losses are a formula of the settings."""

    def __init__(self, loss):
        self.loss, self.asked = loss, []

    def __call__(self, wanted):
        self.asked += wanted
        return [self.result(settings) for settings in wanted]

    def result(self, settings):
        end, last = self.loss(settings), settings.get("max_iters", 10)
        curve = [[step, end + 3 * (1 - step / last)] for step in (0, last // 2, last)]
        rest = {"seconds": 2.0, "flops": 1e9, "clip_rate": 0.5}
        rest |= {"win_rate": min(1.0, settings["rho"])} if "rho" in settings else {}
        return Result(settings, end, curve, rest, 1, {"batches": "0"}, None)


def test_a_search_finds_a_best_point_outside_of_its_grid_and_has_tried_all_its_neighbours():
    runner = Formula(distance)
    found = search(runner, {"optimizer": "sophiag"}, AXES, Budget())
    assert found.settings == pytest.approx(OPTIMUM)
    assert found.space.settings(found.best) in [{k: s[k] for k in AXES} for s in runner.asked]
    assert set(found.space.neighbours(found.best)) <= set(found.tried)
    settings = [json.dumps(each, sort_keys=True) for each in runner.asked]
    assert len(settings) == len(set(settings)) == len(found.tried) + 6 >= 24 + 6  # three finalists, two fresh seeds
    spread = [tuple(each[name] for name in AXES) for each in runner.asked[:12]]
    assert {values[0] for values in spread} == set(AXES["learning_rate"])


def test_fresh_seeds_decide_between_the_best_of_a_search():
    lucky = {"learning_rate": 0.008, "beta1": 0.6, "rho": 0.025}  # the best with the search's seed alone

    def loss(settings):
        luck = 2.0 * (settings["seed"] == 1 and all(settings[k] == pytest.approx(v) for k, v in lucky.items()))
        return distance(settings) - luck

    found = search(Formula(loss), {}, AXES, Budget())
    assert min(found.tried.values(), key=lambda run: run.loss).settings["learning_rate"] == 0.008
    assert found.settings == pytest.approx(OPTIMUM)
    assert set(found.space.neighbours(found.best)) <= set(found.tried)


def test_a_search_goes_on_from_diverged_runs_and_never_leaves_the_range_of_a_beta():
    found = search(Formula(lambda s: math.inf if s["beta1"] < 0.7 else s["beta1"]), {}, AXES, Budget(4, 30))
    assert all(0 <= found.space.settings(point)["beta1"] < 1 for point in found.tried)
    assert found.settings["beta1"] == 0.8


@pytest.fixture
def tiny(dataset):
    return TINY | {"dataset": str(dataset), "optimizer": "adamw", "log_interval": 10}


def new_runner(folder):
    return Runner(Ledger(folder / "results" / "runs.jsonl"), folder / "runs", 2)


@pytest.fixture
def runner(tmp_path):
    return new_runner(tmp_path)


def test_runs_end_once_and_diverged_ones_are_infinitely_bad(tiny, runner, tmp_path):
    wanted = [tiny, tiny | {"learning_rate": 1e30, "grad_clip": 0.0, "decay_lr": False}]
    one, two = runner(wanted)
    assert 2 < one.loss < 5.6
    assert two.loss == math.inf
    assert [step for step, _ in one.curve] == [0, 10, 20]
    assert one.curve[-1][1] == one.loss
    assert one.last["step"] == 20 and one.fingerprints == two.fingerprints == fingerprints(tiny)
    shutil.rmtree(runner.folder)
    assert new_runner(tmp_path)(wanted) == [one, two]  # with the ledger alone
    assert not runner.folder.exists()


def test_a_stopped_run_goes_on_where_it_was(tiny, runner, tmp_path):
    """The program is stopped by a signal; the same runs end with the loss of a run that nothing stopped."""
    settings = tiny | {"max_iters": 300, "eval_interval": 150}
    code = f"""
import signal
from pathlib import Path
from tests.test_studies import new_runner
runner = new_runner(Path({str(tmp_path)!r}))
signal.signal(signal.SIGTERM, runner.stop)
runner([{settings!r}])
"""
    program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    folder = runner.folder / name_of(settings)
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < 3:
        assert program.poll() is None
        time.sleep(0.01)
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=60) == 128 + signal.SIGTERM
    assert not runner.ledger.path.exists()
    assert "goes on" in (folder / "output.txt").read_text()

    (resumed,) = runner([settings])
    (undisturbed,) = new_runner(tmp_path / "other")([settings])
    assert resumed.curve == undisturbed.curve


def test_a_run_that_fails_ends_the_study_and_names_its_folder(tiny, runner):
    with pytest.raises(UserError, match="exit code 2.*must be at least 1"):
        runner([tiny | {"log_interval": 0}])


def test_fingerprints_tell_seeds_and_data_apart_and_are_the_same_for_every_optimizer(tiny):
    same = fingerprints(tiny)
    assert same == fingerprints(tiny | {"optimizer": "sophiah", "learning_rate": 1.0})
    other = fingerprints(tiny | {"seed": 2})
    assert same["batches"] != other["batches"] and same["initial_weights"] != other["initial_weights"]
    assert same["validation"] == other["validation"] != fingerprints(tiny | {"eval_sequences": 9})["validation"]


def claim(mean, sd, n=5, **bounds):
    """A claim about n differences with exactly this mean and standard deviation."""
    x = np.random.default_rng(0).standard_normal(n)
    return Claim("it", "", mean + sd * (x - x.mean()) / x.std(ddof=1), **bounds)


def test_a_95_percent_interval_holds_the_truth_95_times_in_100():
    random = np.random.default_rng(1)
    intervals = [Claim("it", "", random.normal(0.3, 1.0, size=4)).interval() for _ in range(2000)]
    held = [low <= 0.3 <= high for _, low, high in intervals]
    assert 0.935 < np.mean(held) < 0.965  # three standard errors


@pytest.mark.parametrize(
    "found, answer",
    [
        (claim(-0.02, 0.005), "confirmed"),
        (claim(0.02, 0.005), "refuted"),
        (claim(-0.02, 0.05), "undecided"),
        (claim(0.004, 0.0005, confirmed_below=0.007), "confirmed"),  # above 0 too, and yet within the tolerance
        (claim(-0.004, 0.0005, refuted_above=-0.01, refuted_first=True), "refuted"),  # below 0, and of no use
        (claim(-0.03, 0.0005, refuted_above=-0.01, refuted_first=True), "confirmed"),
        (claim(-0.02, 0.005, can_be_confirmed=False), "undecided"),
        (claim(math.inf, 1.0), "undecided"),
    ],
)
def test_a_claim_is_decided_by_its_rule(found, answer):
    with np.errstate(invalid="ignore"):
        assert verdicts([found]) == {"it": answer}


def test_holms_correction_is_over_all_claims():
    """The adjusted p-values of 0.005, 0.01, 0.03 and 0.04 are 0.02, 0.03, 0.06 and 0.06."""
    p_values = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    claims = [SimpleNamespace(name=name, leaning=lambda p=p: ("confirmed", p)) for name, p in p_values.items()]
    assert [name for name, answer in verdicts(claims).items() if answer == "confirmed"] == ["d", "a"]


def world(settings):
    """Losses of a world in which Sophia is 0.05 better than AdamW, and better still with a larger model; curvature is
    what makes the difference, rho hardly matters, and twice the steps are worth 0.06.
    """
    noise = zlib.crc32(json.dumps(settings, sort_keys=True).encode()) / 2**32 - 0.5
    loss = 1.6 + 0.1 * math.log2(settings["learning_rate"] / 4e-3) ** 2 - 0.06 * math.log2(settings["max_iters"] / 5000)
    if settings.get("rho"):
        loss -= 0.05 * (settings["n_embd"] / 64) - 0.001 * settings["rho"]
    return loss + 0.1 * settings["seed"] + 0.002 * noise


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of results in which all runs have ended."""
    folder = tmp_path_factory.mktemp("results")
    ledger = Ledger(folder / "runs.jsonl")

    def run(wanted):
        results = Formula(world)(wanted)
        for result in results:
            if not ledger.find(result.settings):
                ledger.add(result)
        return results

    for study in STUDIES.values():
        study.groups(run, SCALES["laptop"])
    for scale in ("short", "quickstart"):
        shutil.copytree(ROOT / "studies" / "results" / scale, folder / scale)
    return folder


def test_the_studies_find_what_is_true_of_a_made_up_world(finished):
    ledger, claims = Ledger(finished / "runs.jsonl"), []
    for name, study in STUDIES.items():
        known = report.Known(study, ledger, SCALES["laptop"])
        assert known.ended, name
        claims += known.claims
    answers = verdicts(claims)
    assert len(answers) == len(claims)
    for name in ("Sophia-G", "Sophia-H"):
        assert answers[f"better {name}"] == answers[f"curvature {name}"] == "confirmed"
    assert answers["half Sophia-G"] == answers["half Sophia-H"] == "refuted"  # 0.05 is less than 0.06
    assert answers["size"] == answers["rho"] == answers["interval"] == "confirmed"
    assert answers["batch"] == answers["better Muon"] == answers["estimator"] == "undecided"
    table = losses.speedups(report.Known(losses, ledger, SCALES["laptop"]).groups)
    (row,) = [line for line in table.splitlines() if line.startswith("| Sophia-G |")]
    ratios = [float(ratio) for ratio in re.findall(r"\d\.\d+", row)]
    assert ratios == pytest.approx([1.8] * 5, abs=0.1)  # 0.05 of the 0.06 of twice the steps


@pytest.mark.parametrize("name", [name for name, study in STUDIES.items() if hasattr(study, "figure")])
def test_a_study_has_a_picture_with_its_losses(name, finished, tmp_path):
    known = report.Known(STUDIES[name], Ledger(finished / "runs.jsonl"), SCALES["laptop"])
    drawing = STUDIES[name].figure(known.groups)
    drawing.savefig(tmp_path / "figure.png")
    drawn = np.concatenate([line.get_ydata() for axes in drawing.axes for line in axes.get_lines()])
    told = known.markdown()
    ends = [losses.losses(group).mean() for label, group in known.groups.items() if f"| {label} |" in told]
    assert sum(np.isclose(drawn, end).any() for end in ends) >= len(ends) / 2 > 0


def test_the_plan_of_all_studies_has_each_run_once_and_its_hours(dataset, tmp_path):
    scale = dataclasses.replace(SCALES["laptop"], base=SCALES["laptop"].base | {"dataset": str(dataset)})
    plan = Plan(ledger := Ledger(tmp_path / "runs.jsonl"))
    for study in STUDIES.values():
        study.groups(plan, scale)
    assert len(plan.wanted) == len(plan.missing) > len(scale.axes) * (24 + 6 + 5)
    assert plan.tokens() > len(plan.missing) * 10**6
    assert plan.hours(1) is None
    (ended,) = plan([next(iter(plan.missing.values()))])
    ledger.add(dataclasses.replace(ended, last={"flops": 1e12, "seconds": 3600.0}))
    assert 1e5 < plan.hours(1) * 1e12 / plan.tokens() < 1e7  # operations a token
    assert plan.hours(1) == pytest.approx(2 * plan.hours(2))


def test_the_report_says_how_far_a_study_is_until_all_its_runs_have_ended(finished, tmp_path):
    whole = report.text(STUDIES, finished)
    assert "Not done yet" not in whole and "{" not in whole.replace("sophia-h_{small,medium,large}", "")
    shutil.copytree(finished, tmp_path / "part")
    lines = (finished / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part" / "runs.jsonl").write_text("".join(lines[:-1]))  # without the last run of `size`
    part = report.text(STUDIES, tmp_path / "part")
    assert part.count("Not done yet") == 2  # the answer, and the section
    known = report.Known(STUDIES["size"], Ledger(tmp_path / "part" / "runs.jsonl"), SCALES["laptop"])
    assert f"Not done yet: {known.wanted - 1} of {known.wanted} runs have ended." in part


def test_the_published_report_is_that_of_the_published_runs():
    """Its numbers agree to their last digit, give or take one, as rounding may differ between processors."""
    number, folder = re.compile(r"\d+\.\d+"), ROOT / "studies" / "results"
    published, anew = (folder / "REPORT.md").read_text(), report.text(STUDIES, folder)
    assert number.sub("#", published) == number.sub("#", anew)
    for left, right in zip(number.findall(published), number.findall(anew), strict=True):
        assert abs(float(left) - float(right)) < 1.01 * 10.0 ** -len(left.partition(".")[2])
    shared = {}
    for result in Ledger(folder / "runs.jsonl").results.values():  # runs with one seed share weights and batches
        key = [result.settings[name] for name in ("seed", "n_embd", "batch_size", "max_iters")]
        assert shared.setdefault(tuple(key), result.fingerprints) == result.fingerprints


def test_a_commit_is_said_with_changes_and_nothing_is_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    assert runs.commit() is None
    git = ["git", "-C", tmp_path, "-c", "user.name=A", "-c", "user.email=a@example.com"]
    for command in (["init"], ["commit", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    assert re.fullmatch("[0-9a-f]{40}", clean := runs.commit())
    (tmp_path / "file").write_text("two")
    subprocess.run([*git, "add", "file"], check=True)
    assert runs.commit() == f"{clean}-dirty"
