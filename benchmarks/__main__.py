"""Measure speed and memory: in one run, in alternation, after warm-up.

    python -m benchmarks train        the training step, beside --peer DIR: checkouts of nanoGPT or the released Sophia
    python -m benchmarks profile      where the time of a training step goes; --trace FILE.json keeps it for a viewer
    python -m benchmarks memory       the largest micro-batch for GPUs of several sizes
    python -m benchmarks optimizer    an update of Sophia and of Lion, against torch's fused AdamW
    python -m benchmarks curvature    a curvature pass against a training pass on the same sequences
    python -m benchmarks loader       reading batches of --dataset, against training on them
    python -m benchmarks tokenize     preparing --text on every core, against one thread of tiktoken
    python -m benchmarks checkpoint   how long the loop stands still for a checkpoint

For example: python -m benchmarks curvature config/gpt2_30m.py --block_size=256 --micro_batch_size=8 --json

Other arguments are config files and settings, as train.py takes them.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import costs, memory, speed
from run import errors, machine
from run.settings import read
from tokens.batches import check_batch

BENCHMARKS: dict[str, Callable] = {
    "train": speed.train_benchmark,
    "profile": speed.profile_benchmark,
    "memory": memory.memory_benchmark,
    "optimizer": costs.optimizer_benchmark,
    "curvature": costs.curvature_benchmark,
    "loader": costs.loader_benchmark,
    "tokenize": costs.tokenize_benchmark,
    "checkpoint": costs.checkpoint_benchmark,
}


def main() -> None:
    parser = errors.Parser(__doc__)
    parser.add_argument("benchmark", choices=list(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds, whose median is taken (default 10)")
    parser.add_argument("--sequences", type=int, help="sequences of a pass, for batch_size (default micro_batch_size)")
    parser.add_argument("--peer", nargs="+", type=Path, metavar="DIR", default=[], help="what `train` compares with")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="where `profile` writes a trace")
    parser.add_argument(
        "--text", nargs="+", type=Path, metavar="FILE", default=[], help="what `tokenize` takes, as prepare.py does"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, arguments = parser.parse_known_args()
    if options.rounds < 1:
        raise errors.UserError(f"--rounds = {options.rounds}: must be at least 1")
    sequences = read(arguments).micro_batch_size if options.sequences is None else options.sequences
    arguments.append(f"--batch_size={sequences}")
    s = read(arguments)
    check_batch(s, ranks=1)
    here = machine.set_up(s)
    result = BENCHMARKS[options.benchmark](options, arguments, here)
    name = torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else here.device.type
    result |= {"device": name, "dtype": str(here.dtype)[6:], "compile": here.compile, "rounds": options.rounds}
    if options.json:
        print(json.dumps(result))
    else:
        width = max(map(len, result))
        for key, value in result.items():
            print(f"{key:{width}} {value:.4g}" if isinstance(value, float) else f"{key:{width}} {value}")


if __name__ == "__main__":
    errors.run(main)
