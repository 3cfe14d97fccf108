"""Train with every optimizer on 1, 2, 3 and 4 ranks, and compare the losses of 20 steps with those of one rank.

python -m tests.stress.compare_ranks
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from run.settings import ROOT
from tests.conftest import OPTIMIZERS, TINY, text_dataset

# What each rank has to do is uneven: 6 sequences for curvature, or 3 groups of them, and 10 validation blocks.
SETTINGS = TINY | {"batch_size": 12, "hessian_batch_size": 6}
MICRO_BATCH_SIZES = {1: 4, 2: 3, 3: 2, 4: 1}


def torchrun(ranks: int, fault: str, *runs: dict, **more) -> subprocess.CompletedProcess:
    """tests/ranks_worker.py on so many ranks."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--shutdown-timeout=2", 
         f"--nproc_per_node={ranks}",
         "-m", "tests.stress.ranks_worker", fault, *(json.dumps(run, default=str) for run in runs)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, timeout=500, **more,
    )  # fmt: skip


def rows_of(folder: Path, ranks: int, **more) -> dict[str, list[dict]]:
    """The rows of metrics.jsonl for each optimizer on so many ranks."""
    common = SETTINGS | {"dataset": folder / "data", "micro_batch_size": MICRO_BATCH_SIZES[ranks]} | more
    outs = {name: folder / f"{name}-{ranks}" for name in OPTIMIZERS}
    done = torchrun(
        ranks,
        "none",
        *(common | options | {"out_dir": outs[name]} for name, options in OPTIMIZERS.items()),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return {name: [json.loads(line) for line in (out / "metrics.jsonl").open()] for name, out in outs.items()}


def difference(left: list[dict], right: list[dict], key: str) -> float:
    """The largest difference of a value over the rows that have it."""
    pairs = [(a[key], b[key]) for a, b in zip(left, right, strict=True) if key in a]
    assert len(pairs) > 1
    return max(abs(a - b) for a, b in pairs)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        text_dataset(Path(scratch) / "data")
        one, *others = (rows_of(Path(scratch), ranks) for ranks in MICRO_BATCH_SIZES)
    print(f"{'':18}{'loss at steps 1 … 20':24}largest difference of the training (validation) loss, of 20 steps")
    for name, rows in one.items():
        differences = [
            f"{difference(rows, other[name], 'train/loss'):.1e} ({difference(rows, other[name], 'val/loss'):.1e})"
            for other in others
        ]
        losses = f"{rows[1]['train/loss']:.4f} … {rows[20]['train/loss']:.4f}"
        cells = [f"{ranks} ranks: {cell}" for ranks, cell in zip((2, 3, 4), differences, strict=True)]
        print(f"{name:18}{losses:24}{', '.join(cells)}")
