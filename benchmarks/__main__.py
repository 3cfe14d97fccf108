"""Measure training and sampling: medians over rounds in alternation, after a warm-up, on random tokens.

    python -m benchmarks train       the training step, beside --peer DIR: checkouts of nanoGPT or the released Sophia
    python -m benchmarks profile     where the time of a training step goes; --trace FILE.json keeps it for a viewer
    python -m benchmarks curvature   what Sophia costs: curvature passes and updates, against training and AdamW
    python -m benchmarks sample      500 tokens after 16, in float32; the --peer is nanoGPT with the same weights
    python -m benchmarks parity      losses of 100 steps on a data set beside the --peer's, same weights and batches

Other arguments are config files and settings, as train.py takes them; batch_size is one micro-batch if not given.
"""

import json
from pathlib import Path

from benchmarks import curvature, parity, sampling, step
from benchmarks.common import describe
from run import errors
from run.machine import set_up
from run.settings import read
from tokens.batches import check_batch

BENCHMARKS = {
    "train": step.train,
    "profile": step.profile,
    "curvature": curvature.curvature,
    "sample": sampling.sample,
    "parity": parity.parity,
}


def main() -> None:
    parser = errors.Parser(__doc__)
    parser.add_argument("benchmark", choices=list(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=10, help="rounds that are timed (default 10)")
    parser.add_argument(
        "--peer",
        nargs="+",
        type=Path,
        metavar="DIR",
        default=[],
        help="what `train`, `sample` and `parity` compare with",
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="where `profile` writes a trace")
    parser.add_argument("--json", action="store_true", help="print the result on one line")
    options, arguments = parser.parse_known_args()
    if options.rounds < 1:
        raise errors.UserError(f"--rounds = {options.rounds}: must be at least 1")
    settings = read([f"--batch_size={read(arguments).micro_batch_size}", *arguments])
    check_batch(settings, ranks=1)
    machine = set_up(settings)
    conditions = describe(machine) | {"rounds": options.rounds}
    result = conditions | BENCHMARKS[options.benchmark](options, settings, machine)
    print(json.dumps(result, indent=None if options.json else 4))


if __name__ == "__main__":
    errors.run(main)
