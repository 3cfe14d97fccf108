"""Measure the claims of the Sophia paper. A study is a list of runs of train.py, a rule of decision, and a picture.

    python -m studies losses horizon --jobs=2      on two CPU cores, one run a core
    python -m studies losses --scale=gpu --plan    what it would run, and how long it would take
    python -m studies report                       studies/results/REPORT.md, from the runs that have ended

A study that was stopped goes on where it was. Runs that ended are lines of studies/results/runs.jsonl, not run again:
give --results=FOLDER to begin anew. Every study begins with the searches of `losses`.
"""

import signal
from pathlib import Path

from run import errors
from run.options import Parser, between
from run.settings import ROOT
from studies import curvature, horizon, losses, parts, report, runs, toy
from studies.claims import verdicts
from studies.elsewhere import BATCH, SIZE
from studies.scales import SCALES

STUDIES = {"losses": losses, "curvature": curvature, "horizon": horizon, "parts": parts, "batch": BATCH, "size": SIZE}


def main() -> None:
    parser = Parser(__doc__)
    choices = [*STUDIES, "searches", "toy", "report"]
    parser.add_argument("studies", nargs="+", choices=choices, metavar="STUDY", help=", ".join(choices))
    parser.add_argument("--scale", choices=SCALES, default="laptop", help="size of the runs (default %(default)s)")
    parser.add_argument("--dataset", help="as for train.py (default: the scale's)")
    parser.add_argument("--jobs", type=between(1), default=1, help="runs side by side (default %(default)s)")
    parser.add_argument("--runs", type=Path, default=ROOT / "out" / "studies", help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of the results (default studies/results[/SCALE])")
    parser.add_argument("--plan", action="store_true", help="only say what would be run")
    options = parser.parse_args()

    scale = SCALES[options.scale]
    if not scale.axes and set(options.studies) != {"losses"}:
        raise errors.UserError(f"--scale={options.scale} has no searches: it is for the study of losses alone")
    if options.dataset:
        scale.base["dataset"] = options.dataset
    results = options.results or ROOT / "studies" / "results" / ("" if options.scale == "laptop" else options.scale)
    ledger = runs.Ledger(results / "runs.jsonl")
    names = [name for name in STUDIES if name in options.studies]
    calls = [STUDIES[name].groups for name in names] + [losses.searches] * ("searches" in options.studies)
    plan = runs.Plan(ledger)
    for call in calls:
        call(plan, scale)
    print(in_words(plan, options.jobs))
    if options.plan:
        return
    runner = runs.Runner(ledger, options.runs.absolute(), options.jobs, len(plan.missing))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, runner.stop)
    for call in calls:
        call(runner, scale)
    results.mkdir(parents=True, exist_ok=True)
    for name in names:
        known = report.Known(STUDIES[name], ledger, scale)
        print(known.markdown(), report.claims_table(known.claims, verdicts(known.claims)), sep="\n\n", end="\n\n")
        if hasattr(STUDIES[name], "figure"):
            STUDIES[name].figure(known.groups).savefig(results / f"{name}.png", dpi=110)
    if "toy" in options.studies:
        toy.figure().savefig(results / "toy.png", dpi=110)
    if options.scale == "laptop":
        (results / "REPORT.md").write_text(report.text(STUDIES, results), encoding="utf-8")
        print(results.resolve() / "REPORT.md")


def in_words(plan: runs.Plan, jobs: int) -> str:
    words = f"{len(plan.missing)} of {len(plan.wanted)} runs are to be done, {plan.tokens() / 1e6:,.0f}M tokens"
    if not plan.missing:
        return words
    hours = plan.hours(jobs)
    return f"{words}, " + (f"in about {hours:.1f} hours" if hours else "the first will tell how long they take")


if __name__ == "__main__":
    errors.run(main)
