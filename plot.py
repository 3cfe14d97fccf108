"""Draw runs: thick lines with markers are the validation loss, thin ones the training loss.

    python plot.py out/adamw out/sophiag -o curves.png         or curves.svg, curves.pdf
    python plot.py out/adamw_* out/sophiag_* --x=tokens        over tokens instead of steps
    python plot.py --speedup out/adamw out/sophiag             how much sooner has the second the first's final loss?

Runs whose settings differ in nothing but the seed and names are one curve: their mean, in a band from the lowest to
the highest. Lines are straight from one evaluation to the next, and --speedup reads the losses off these lines.
"""

import math
from pathlib import Path

from records.curves import X_AXES, mark_speedup, picture, read_curves
from run import errors


def main() -> None:
    parser = errors.Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that train.py wrote")
    parser.add_argument("-o", "--output", type=Path, default=Path("curves.png"), help="picture to write")
    parser.add_argument("--x", choices=X_AXES, default="step", help="horizontal axis")
    parser.add_argument("--panels", action="store_true", help="learning rate, gradient norm and clipping below")
    parser.add_argument("--max-loss", type=float, metavar="LOSS", help="top of the loss axis")
    parser.add_argument("--speedup", action="store_true", help="when has the second curve the first's final loss?")
    options = parser.parse_args()

    curves = read_curves(options.runs, options.x)
    figure = picture(curves, options.x, options.panels)
    if options.max_loss is not None:
        lowest = figure.axes[0].dataLim.ymin
        if not lowest < options.max_loss < math.inf:
            raise errors.UserError(f"--max-loss: {options.max_loss} is not above the lowest loss, {lowest:.4f}")
        figure.axes[0].set_ylim(lowest - 0.05 * (options.max_loss - lowest), options.max_loss)
    if options.speedup:
        if len(curves) != 2:
            raise errors.UserError(f"--speedup takes two curves, these runs make {len(curves)} (seeds make one)")
        print(mark_speedup(figure.axes[0], *curves, options.x))
    try:
        figure.savefig(options.output, dpi=200)
    except (OSError, ValueError) as error:
        raise errors.UserError(f"cannot write {options.output}: {error}") from None
    print(options.output.resolve())


if __name__ == "__main__":
    errors.run(main)
