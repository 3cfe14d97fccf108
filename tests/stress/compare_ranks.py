"""Train with every optimizer on 1, 2, 3 and 4 ranks, and compare the losses of 20 steps with those of one rank: they
differ by less than 1e-5.

python -m tests.stress.compare_ranks
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from run.settings import ROOT
from tests.conftest import OPTIMIZERS, TINY, rows_of, text_dataset

# What each rank has to do is uneven: 6 sequences for curvature, or 3 groups of them, and 10 validation blocks.
# With such a rho some coordinates are not clipped, so that h matters.
SETTINGS = TINY | {"batch_size": 12, "hessian_batch_size": 6, "rho": 1.0}
MICRO_BATCH_SIZES = {1: 4, 2: 3, 3: 2, 4: 1}
BOUNDS = dict.fromkeys(OPTIMIZERS, 1e-5) | {"muon": 1e-4}  # Muon iterates in bfloat16, where a last bit counts for more


def torchrun(ranks: int, *runs: dict, fault: str = "none") -> subprocess.CompletedProcess:
    """tests/stress/ranks_worker.py on so many ranks, which trains once for each of the settings."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
         "-m", "tests.stress.ranks_worker", fault, *(json.dumps(run, default=str) for run in runs)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"},
        text=True, timeout=500, capture_output=True,
    )  # fmt: skip


def settings_of(folder: Path, optimizer: str, ranks: int) -> dict:
    """A run in `folder`, which has the data set besides."""
    common = {"dataset": folder / "data", "out_dir": folder / f"{optimizer}-{ranks}"}
    return SETTINGS | OPTIMIZERS[optimizer] | common | {"micro_batch_size": MICRO_BATCH_SIZES[ranks]}


def difference(left: list[dict], right: list[dict], key: str) -> float:
    """The largest difference of a value over the rows, which must be those of 20 steps."""
    assert [row["step"] for row in left] == [row["step"] for row in right] == list(range(21))
    values = [(a[key], b[key]) for a, b in zip(left, right, strict=True) if key in a]
    assert len(values) > 1
    return max(abs(a - b) for a, b in values)


def main() -> None:
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text_dataset(folder / "data")
        for ranks in MICRO_BATCH_SIZES:
            runs = [settings_of(folder, name, ranks) for name in OPTIMIZERS]
            done = torchrun(ranks, *runs)
            assert done.returncode == 0, done.stderr
            rows |= {(name, ranks): rows_of(folder / f"{name}-{ranks}") for name in OPTIMIZERS}
    beyond = []
    print(f"{'':18}{'loss at steps 1 … 20':24}largest difference of the training (validation) loss, of 20 steps")
    for name in OPTIMIZERS:
        one, cells = rows[name, 1], []
        for ranks in (2, 3, 4):
            train, val = (difference(one, rows[name, ranks], key) for key in ("train/loss", "val/loss"))
            cells.append(f"{ranks} ranks: {train:.1e} ({val:.1e})")
            if max(train, val) >= BOUNDS[name]:
                beyond.append(f"{name} on {ranks} ranks: {max(train, val):.1e} is not below {BOUNDS[name]:.0e}")
        losses = f"{one[1]['train/loss']:.4f} … {one[20]['train/loss']:.4f}"
        print(f"{name:18}{losses:24}{', '.join(cells)}")
    if beyond:
        sys.exit(f"error: {'; '.join(beyond)}")
    print(f"all below {BOUNDS['adamw']:.0e}, Muon below {BOUNDS['muon']:.0e}")


if __name__ == "__main__":
    main()
