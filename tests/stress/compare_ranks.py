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
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text_dataset(folder / "data")
        for ranks in MICRO_BATCH_SIZES:
            done = torchrun(ranks, *(settings_of(folder, name, ranks) for name in OPTIMIZERS))
            assert done.returncode == 0, done.stderr
            for name, bound in BOUNDS.items():
                one, several = (rows_of(folder / f"{name}-{number}") for number in (1, ranks))
                apart = max(difference(one, several, key) for key in ("train/loss", "val/loss"))
                print(f"{name}, {ranks} rank(s): losses within {apart:.1e} of one rank's in 20 steps")
                assert apart < bound, f"not below {bound}"


if __name__ == "__main__":
    main()
