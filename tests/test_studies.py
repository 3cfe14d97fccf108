"""Studies: what is searched, what is run and when, and what is made of the runs."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from run.files import write_json
from run.settings import ROOT
from studies.__main__ import STUDIES, text_of_report
from studies.losses import LONGER
from studies.runs import Ledger, Plan, Result, Runner, fingerprints, name_of
from studies.scales import LABELS, SCALES
from studies.search import Space, search
from tests.conftest import TINY

CENTRE = {"learning_rate": 1e-3, "rho": 0.05, "beta1": 0.9}
OPTIMUM = {"learning_rate": 8e-3, "rho": 0.025, "beta1": 0.8}


def distance(settings):
    """Of hyperparameters from the optimum, in steps of the lattice."""
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
        rest = {"seconds": 2.0, "clip_rate": 0.5} | ({"win_rate": 0.25} if "rho" in settings else {})
        return Result(settings, end, curve, rest, settings.get("n_embd", 1) ** 2, {"batches": "0"}, None)


def test_a_search_finds_the_best_point_far_from_its_centre_and_says_that_it_lies_inside():
    runner = Formula(distance)
    found = search(runner, {"optimizer": "sophiag"}, Space(CENTRE), first=8, count=24)
    assert found.space.values(found.best) == pytest.approx(OPTIMUM)
    assert found.table()["untried_neighbours_of_the_best"] == found.table()["past_the_edge"] == []
    settings = [json.dumps(each, sort_keys=True) for each in runner.asked]
    assert len(settings) == len(set(settings)) == 24
    assert runner.asked[0] == {"optimizer": "sophiag"} | CENTRE


def test_a_search_that_ends_early_says_which_neighbours_of_the_best_it_did_not_try():
    found = search(Formula(distance), {}, Space(CENTRE), first=2, count=3)
    assert len(found.tried) == 3
    assert found.table()["untried_neighbours_of_the_best"]


def test_where_the_best_lies_on_the_edge_of_what_was_tried_one_run_goes_a_step_further():
    found = search(Formula(lambda s: s["rho"] + distance(s | {"rho": OPTIMUM["rho"]})), {}, Space(CENTRE), 8, 30)
    assert len(found.tried) == 30
    best = found.space.values(found.best)
    assert best["rho"] == min(found.space.values(point)["rho"] for point in found.tried)
    half = pytest.approx(best["rho"] / 2, rel=1e-3)  # values have four digits
    assert found.table()["past_the_edge"] == [best | {"rho": half, "loss": half}]


def test_a_search_goes_on_from_diverged_runs_and_never_leaves_the_range_of_a_beta():
    found = search(Formula(lambda s: math.inf if s["beta1"] < 0.8 else 1 - s["beta1"]), {}, Space(CENTRE), 8, 30)
    assert all(0 <= found.space.values(point)["beta1"] < 1 for point in found.tried)
    assert math.isfinite(found.tried[found.best].loss)


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
    (planned,) = Plan(Ledger(tmp_path / "none"))([settings])  # stands beside such runs when a part of them has ended
    assert [step for step, _ in planned.curve] == [step for step, _ in resumed.curve]


def test_a_run_that_fails_ends_the_study_and_names_its_folder(tiny, runner):
    from run.errors import UserError

    with pytest.raises(UserError, match="exit code 2.*must be at least 1"):
        runner([tiny | {"log_interval": 0}])


def test_fingerprints_tell_seeds_and_data_apart_and_are_the_same_for_every_optimizer(tiny):
    same = fingerprints(tiny)
    assert same == fingerprints(tiny | {"optimizer": "sophiah", "learning_rate": 1.0})
    other = fingerprints(tiny | {"seed": 2})
    assert same["batches"] != other["batches"] and same["initial_weights"] != other["initial_weights"]
    assert same["validation"] == other["validation"] != fingerprints(tiny | {"eval_sequences": 9})["validation"]


def formula_of(settings):
    """Losses with a best point, to which Sophia comes nearer."""
    loss = 2 + 0.1 * math.log2(settings["learning_rate"] / 3e-3) ** 2 - 0.05 * ("rho" in settings)
    return loss + 0.01 * settings.get("seed", 0) - 1e-4 * settings["n_embd"]


@pytest.fixture
def scale(dataset):
    laptop = SCALES["laptop"]
    return dataclasses.replace(laptop, base=laptop.base | {"dataset": str(dataset)})


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_makes_a_table_and_a_picture(name, scale, tmp_path):
    study = STUDIES[name]
    table = json.loads(json.dumps(study.study(Formula(formula_of), scale)))
    study.figure(table).savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_plan_of_every_study_has_each_run_once(scale, tmp_path):
    ledger = Ledger(tmp_path / "runs.jsonl")
    plan = Plan(ledger)
    for study in STUDIES.values():
        study.study(plan, scale)
    assert len(plan.wanted) == len(plan.missing) > len(LABELS) * scale.tuning
    assert plan.tokens() > len(plan.missing) * 10**6
    assert plan.hours(1) is None
    name = next(iter(plan.missing))
    ledger.add(dataclasses.replace(plan([plan.missing[name]])[0], last={"flops": 1e12, "seconds": 3600.0}))
    assert plan.hours(1) == pytest.approx(2 * plan.hours(2))
    assert 1e5 < plan.hours(1) * 1e12 / plan.tokens() < 1e7  # operations a token


def test_the_report_is_filled_in_from_the_tables(scale, tmp_path):
    for folder, name in [*((name, name) for name in STUDIES), ("quickstart/losses", "losses")]:
        (tmp_path / folder).mkdir(parents=True)
        size = SCALES["quickstart"] if folder != name else scale
        write_json(tmp_path / folder / "table.json", STUDIES[name].study(Formula(formula_of), size))
    text = text_of_report(tmp_path)
    assert text.count("Not done yet") == text.count("Not done yet: 0 of 0") == 1  # parity, which is no study
    rates = [
        run["learning_rate"] for run in STUDIES["losses"].study(Formula(formula_of), scale)["search"]["lion"]["runs"]
    ]
    assert f"| Lion | {len(rates)} | learning_rate 0.004" in text
    (tmp_path / "losses" / "table.json").unlink()
    plan = Plan(Ledger(tmp_path / "none"))
    STUDIES["losses"].study(plan, SCALES["laptop"])
    runs = len(plan.wanted)
    assert runs >= len(LABELS) * (scale.tuning + len(scale.seeds)) + len(scale.seeds)
    assert f"Not done yet: 0 of {runs} runs have ended." in text_of_report(tmp_path)


PUBLISHED = [path.parent.relative_to(ROOT / "results") for path in sorted((ROOT / "results").rglob("table.json"))]


@pytest.mark.parametrize("folder", [folder for folder in PUBLISHED if folder.name in STUDIES], ids=str)
def test_a_published_table_is_that_of_the_published_runs(folder):
    scale = SCALES[folder.parent.name or "laptop"]
    runs = Plan(Ledger(ROOT / "results" / folder.parent / "runs.jsonl"))
    table = {"base": scale.base} | STUDIES[folder.name].study(runs, scale)
    assert not runs.missing
    published = json.loads((ROOT / "results" / folder / "table.json").read_text())
    assert same(json.loads(json.dumps(table)), published)


def same(computed, published):
    """Whether two tables say the same; numbers agree to 1e-6, as another processor may round them otherwise."""
    if isinstance(published, dict):
        return computed.keys() == published.keys() and all(same(computed[key], published[key]) for key in published)
    if isinstance(published, list):
        return len(computed) == len(published) and all(map(same, computed, published))
    return computed == (pytest.approx(published, rel=1e-6) if isinstance(published, float) else published)


def test_the_published_report_has_the_numbers_of_the_tables():
    assert (ROOT / "results" / "REPORT.md").read_text() == text_of_report(ROOT / "results")


def test_losses_of_seeds_and_the_steps_to_adamws_loss(scale):
    table = STUDIES["losses"].study(Formula(formula_of), scale)
    assert len({json.dumps(each) for each in table["fingerprints"].values()}) == 1
    final, seeds = table["final"], scale.seeds
    assert final["adamw"]["losses"] == pytest.approx([final["adamw"]["mean"] + 0.01 * (seed - 2) for seed in seeds])
    assert final["adamw"]["sd"] == pytest.approx(0.01)
    # a loss falls by 3 over the run, in a line: 0.05 lower is a 60th of the steps sooner
    gap = final["adamw"]["mean"] - final["sophiag"]["losses"][0]
    steps = LONGER * scale.base["max_iters"]
    assert final["sophiag"]["steps_to_adamws_loss"][0] == pytest.approx(steps * (1 - gap / 3))
    assert [len(found["runs"]) for found in table["search"].values()] == [scale.tuning] * len(LABELS)


def test_an_optimizer_whose_seeds_all_diverge_has_its_row(scale):
    table = STUDIES["losses"].study(Formula(lambda s: math.inf if "rho" in s else formula_of(s)), scale)
    assert table["final"]["sophiag"]["diverged"] == len(scale.seeds)
    assert "| inf, inf, inf | inf |" in STUDIES["losses"].markdown(json.loads(json.dumps(table)))
    STUDIES["losses"].figure(table)
