"""plot.py: which numbers are drawn, where a curve reaches another's final loss, and what is refused."""

import json

import numpy as np
import pytest

import plot
from plot import PANELS, X_AXES, picture, read_curves


@pytest.fixture
def write_run(tmp_path):
    """write_run(name, losses, …) makes a run with an evaluation every 10 steps, of 100 tokens and 2 seconds each."""

    def write(name, losses, seconds=2.0, rows=(), **settings):
        (tmp_path / name).mkdir()
        settings = {"seed": 1, "optimizer": name, "out_dir": name} | settings
        (tmp_path / name / "settings.json").write_text(json.dumps(settings))
        steps = [
            {"step": 10 * n, "tokens": 1000 * n, "seconds": 10 * n * seconds, "flops": 6000 * n, "val/loss": loss}
            for n, loss in enumerate(losses)
        ]
        text = "".join(json.dumps(row) + "\n" for row in (rows or steps))
        (tmp_path / name / "metrics.jsonl").write_text(text)
        return tmp_path / name

    return write


@pytest.fixture
def speedup(call, tmp_path):
    """What --speedup says of two runs."""
    return lambda *runs: call(plot, "--speedup", *runs, "-o", tmp_path / "x.png").splitlines()[0]


def lines(axes):
    """The points of the lines that have a label, by label."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines if len(line.get_xdata())}


# What is drawn


@pytest.mark.parametrize(("x", "last"), [("step", 20), ("tokens", 2000), ("seconds", 40), ("flops", 12000)])
def test_the_horizontal_axis_is_the_one_asked_for(write_run, x, last):
    axes = picture(read_curves([write_run("run", [5, 3, 2])], x), x).axes[0]
    assert lines(axes)["run"] == [[0, 5], [last / 2, 3], [last, 2]]
    assert axes.get_xlabel() == X_AXES[x]


def test_seeds_of_one_configuration_are_a_mean_in_a_band_of_their_range(write_run):
    runs = [write_run(f"lion_{n}", [6, 3 + n, 2 + n], n, seed=n, optimizer="lion") for n in (1, 2, 6)]
    runs.append(write_run("adamw", [6, 5, 4]))
    axes = picture(read_curves(runs, "seconds"), "seconds").axes[0]
    assert lines(axes)["lion (3 seeds)"] == [[0, 6], [30, 6], [60, 5]]
    assert lines(axes)["adamw"] == [[0, 6], [20, 5], [40, 4]]
    (band,) = axes.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert corners == {(0, 6), (30, 4), (60, 3), (30, 9), (60, 8)}
    runs = [write_run(f"muon_{n}", [6] * n, seed=n, optimizer="muon") for n in (2, 4)]
    (curve,) = read_curves(runs)
    assert curve.points("step", "val/loss")[0].tolist() == [0, 10]  # it ends where its first run does


def test_other_settings_or_the_same_seed_make_another_curve(write_run):
    options = [{"seed": 1}, {"seed": 2}, {"seed": 2}, {"seed": 3, "rho": 0.1}]
    runs = [write_run(f"r{n}", [5, 4], **{"optimizer": "sophiag"} | option) for n, option in enumerate(options)]
    assert [curve.label for curve in read_curves(runs)] == ["r (2 seeds)", "r2", "r3"]
    (runs[0] / "settings.json").unlink()
    assert len(read_curves(runs[:2])) == 2


def test_panels_show_what_the_runs_have(train, tmp_path):
    for optimizer in ("adamw", "sophiag"):
        rows = train(tmp_path / optimizer, optimizer=optimizer, max_iters=4)
    panels = picture(read_curves([tmp_path / "adamw", tmp_path / "sophiag"]), panels=True).axes
    assert [axes.get_ylabel() for axes in panels[1:]] == list(PANELS.values())
    assert panels[-1].lines[1].get_ydata().tolist() == [row["win_rate"] for row in rows[1:]]
    assert len({axes.get_xlim() for axes in panels}) == 1
    assert len(picture(read_curves([tmp_path / "adamw"]), panels=True).axes) == len(PANELS)  # no win_rate


def test_a_picture_has_the_format_of_its_suffix(write_run, call, tmp_path):
    for name, start in {"curves.png": b"\x89PNG", "curves.svg": b"<?xml"}.items():
        run = write_run(f"run of {name}", [5, 3, 2])
        assert call(plot, run, "-o", tmp_path / name).strip() == str(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)


def test_runs_differ_in_colour_and_marker(write_run):
    axes = picture(read_curves([write_run(f"run{n}", [5, 4]) for n in range(20)])).axes[0]
    drawn = [(line.get_color(), line.get_marker()) for line in axes.lines if line.get_label().startswith("run")]
    assert len(set(drawn)) == len(drawn) == 20


# Speedup


def test_the_speedup_is_read_off_the_line_between_two_evaluations(write_run, speedup):
    """From 4 at step 10 to 2 at step 20 the loss is 2.5 at step 17.5; the other run has it at step 40."""
    slow, fast = write_run("slow", [6, 5, 4, 3, 2.5]), write_run("fast", [6, 4, 2])
    assert speedup(slow, fast) == (
        "fast has the final validation loss of slow, 2.5000, after 17.5 steps, slow after 40: speedup 2.286"
    )
    assert "after 1,750 tokens, slow after 4,000: speedup 2.286" in speedup("--x=tokens", slow, fast)
    assert "speedup 1.143" in speedup("--x=seconds", slow, write_run("costly", [6, 4, 2], seconds=4))
    says = speedup(slow, write_run("never", [6, 5, 2.5001]))
    assert says == "never never reaches the final validation loss of slow, 2.5000"


def test_the_speedup_of_seeds_is_that_of_their_means(write_run, speedup):
    slow, seeds = write_run("slow", [6, 4, 3]), [[6, 2], [6, 3]]
    runs = [write_run(f"fast{n}", losses, seed=n, optimizer="fast") for n, losses in enumerate(seeds)]
    assert speedup(slow, *runs).endswith(f"speedup {20 / (10 * 3 / 3.5):.3f}")


@pytest.mark.parametrize(
    ("losses", "ratio"),
    [([6, 5, 4], 1), ([6, 4, 4], 2), ([6, 4, 5], 2), ([6, 5, 4.5, 4], 0.667)],
    ids=["the same", "reached early and kept", "reached and lost again", "reached later"],
)
def test_a_tie_counts_as_reached_and_the_first_time_counts(write_run, speedup, losses, ratio):
    assert speedup(write_run("a", [6, 5, 4]), write_run("b", losses)).endswith(f"speedup {ratio:.3f}")


def test_the_speedup_is_marked_in_the_picture(write_run):
    curves = read_curves([write_run("slow", [6, 5, 4]), write_run("fast", [6, 4, 2])])
    axes = picture(curves).axes[0]
    plot.mark_speedup(axes, *curves, "step")
    assert [text.get_text() for text in axes.texts] == ["10", "20"]
    assert [text.xy for text in axes.texts] == [(10, 4), (20, 4)]
    (dashed,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert np.ptp(dashed.get_ydata()) == 0 and dashed.get_ydata()[0] == 4
    assert "speedup 2.000" in axes.get_title()


# What is refused


def test_what_cannot_be_drawn_is_refused(refused, call, write_run, speedup, tmp_path):
    run, old = write_run("run", [5, 2]), write_run("old", [], rows=[{"step": 0, "tokens": 0, "val/loss": 5.0}])
    blind, empty = write_run("blind", [], rows=[{"step": 1, "train/loss": 5.0}]), write_run("empty", [])
    low = write_run("low", [2, 1])
    for arguments, complaint in (
        ([tmp_path], "metrics.jsonl does not exist"),
        ([empty], "has no rows yet"),
        ([old, "--x=flops"], "has no 'flops', only step, tokens, val/loss"),
        ([blind], "has no 'val/loss', only step, train/loss"),
        ([blind, "--x=epochs"], "--x: invalid choice: 'epochs'"),
        ([run, "--max-loss=2"], "is not above the lowest loss, 2.0000"),
        ([run, "-o", tmp_path / "nowhere/x.png"], "cannot write"),
        ([run, "-o", tmp_path / "x.docx"], "cannot write"),
        (["--speedup", run, old, low], "takes two curves, these runs make 3"),
        (["--speedup", run, low], "starts at or below"),
    ):
        assert complaint in refused(lambda: call(plot, *arguments))  # noqa: B023
    (empty / "metrics.jsonl").write_text("nonsense\n{}\n")
    assert "line 1: not a row of metrics" in refused(lambda: call(plot, empty))
    (run / "settings.json").write_text("{")
    assert "settings.json cannot be read" in refused(lambda: call(plot, run))
