"""Measure the claims of the Sophia paper: each study is a list of runs of train.py, and makes a table and a picture.

    python -m studies losses --scale=laptop --jobs=2            on two CPU cores, one run a core
    python -m studies losses --scale=quickstart                 AdamW and Sophia-G on the quickstart's model and text
    python -m studies losses batch why --scale=gpu --dataset=openwebtext
    python -m studies losses --scale=gpu --plan                 what it would run, and how long it would take
    python -m studies report                                    results/REPORT.md, from the laptop's tables

A study that was stopped goes on where it was. Runs that ended are lines of results/runs.jsonl and are not run again:
give --results=FOLDER to begin anew. Tables are printed, and written to results/STUDY/ with their pictures. The later
studies begin with the best settings that `losses` found at the same scale.
"""

import signal
from argparse import Namespace
from pathlib import Path
from types import ModuleType

from benchmarks import parity
from run import errors
from run.files import write_json
from run.settings import ROOT
from studies import batch, losses, report, runs, scaling, sensitivity, stability, toy, why
from studies.scales import SCALES, Scale

STUDIES = {  # in the order in which they are run
    "losses": losses,
    "batch": batch,
    "why": why,
    "stability": stability,
    "sensitivity": sensitivity,
    "scaling": scaling,
    "toy": toy,
}


def main() -> None:
    parser = errors.Parser(__doc__)
    choices = [*STUDIES, "report"]
    parser.add_argument("studies", nargs="+", choices=choices, metavar="STUDY", help=", ".join(choices))
    parser.add_argument("--scale", choices=SCALES, default="laptop", help="size of the runs (default %(default)s)")
    parser.add_argument("--dataset", help="as for train.py (default: books, openwebtext at the scales for GPUs)")
    parser.add_argument("--jobs", type=errors.between(1), default=1, help="runs side by side (default %(default)s)")
    parser.add_argument("--runs", type=Path, default=ROOT / "out" / "studies", help="folder of the runs")
    parser.add_argument(
        "--results", type=Path, help="folder of tables and pictures (default results, or results/SCALE)"
    )
    parser.add_argument("--plan", action="store_true", help="only say what would be run")
    options = parser.parse_args()

    scale = SCALES[options.scale]
    if options.dataset:
        scale.base["dataset"] = options.dataset
    if options.scale == "quickstart" and options.studies != ["losses"]:
        raise errors.UserError("--scale=quickstart has two optimizers, and is for the study of losses alone")
    if options.scale != "laptop" and "report" in options.studies:
        raise errors.UserError(f"the report is about the laptop's runs, not about those of --scale={options.scale}")
    results = options.results or ROOT / "results" / ("" if options.scale == "laptop" else options.scale)
    if names := [name for name in options.studies if name != "report"]:
        run_studies(names, scale, results, options)
    if "report" in options.studies:
        path = results / "REPORT.md"
        path.write_text(text_of_report(results), encoding="utf-8")
        print(path.resolve())


def run_studies(names: list[str], scale: Scale, results: Path, options: Namespace) -> None:
    ledger = runs.Ledger(results / "runs.jsonl")
    plan = runs.Plan(ledger)
    for name in names:
        STUDIES[name].study(plan, scale)
    print(in_words(plan, options.jobs))
    if options.plan:
        return
    runner = runs.Runner(ledger, options.runs.absolute(), options.jobs, len(plan.missing))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, runner.stop)
    for name in names:
        write(results / name, STUDIES[name], runner, scale)


def in_words(plan: runs.Plan, jobs: int) -> str:
    words = f"{len(plan.missing)} of {len(plan.wanted)} runs are to be done, {plan.tokens() / 1e6:,.0f}M tokens"
    if not plan.missing:
        return words
    hours = plan.hours(jobs)
    return f"{words}, " + (f"in about {hours:.1f} hours" if hours else "the first will tell how long they take")


def text_of_report(results: Path) -> str:
    """What REPORT.md is to hold."""

    def progress(study: str) -> str:
        ledger = runs.Ledger(results / Path(study).parent / "runs.jsonl")
        plan = runs.Plan(ledger)
        if (name := Path(study).name) in STUDIES:
            STUDIES[name].study(plan, SCALES[Path(study).parent.name or "laptop"])
        return f"Not done yet: {len(plan.wanted) - len(plan.missing)} of {len(plan.wanted)} runs have ended."

    markdown = {name: study.markdown for name, study in (STUDIES | {"parity": parity}).items()}
    return report.report(results, markdown, progress)


def write(folder: Path, study: ModuleType, runner: runs.Runner, scale: Scale) -> None:
    """The study's table.json and picture, made of its runs; prints the table."""
    table = {"base": scale.base} | study.study(runner, scale)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "table.json", table)
    study.figure(table).savefig(folder / "figure.png", dpi=110)
    print(study.markdown(table), folder.resolve(), sep="\n\n", end="\n\n")


if __name__ == "__main__":
    errors.run(main)
