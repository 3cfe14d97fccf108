"""Draw the train and validation loss of one or several runs over their steps.

python plot.py out/adamw out/sophiag -o curves.png
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from records import metrics
from run import errors


def main() -> None:
    parser = errors.Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folders that train.py wrote")
    parser.add_argument("-o", "--output", type=Path, default=Path("curves.png"), help="picture to write")
    options = parser.parse_args()

    save(options.runs, options.output)
    print(options.output.resolve())


def save(runs: list[Path], output: Path) -> None:
    """Write the picture of the runs' curves. UserError where that cannot be done."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, run in enumerate(runs):
        namesakes = sum(other.name == run.name for other in runs)
        draw(axes, run, color=f"C{number}", label=run.name if namesakes == 1 else str(run))
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as error:
        raise errors.UserError(f"cannot write {output}: {error}") from None
    plt.close(figure)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, at least one, or a UserError."""
    path = run / metrics.FILE
    if not path.is_file():
        raise errors.UserError(f"{path} does not exist: name folders that train.py wrote")
    if not (rows := metrics.read_rows(path)):
        raise errors.UserError(f"{path} has no rows yet")
    return rows


def draw(axes: plt.Axes, run: Path, color: str, label: str) -> None:
    """A thin line for the training loss, a thick one with dots for the validation loss."""
    rows = rows_of(run)
    styles = {
        "train/loss": {"linewidth": 0.8, "alpha": 0.6},
        "val/loss": {"linewidth": 2, "marker": ".", "label": label},
    }
    for key, style in styles.items():
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), float)]
        axes.plot([step for step, _ in points], [loss for _, loss in points], color=color, **style)


if __name__ == "__main__":
    errors.run(main)
