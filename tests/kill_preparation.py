"""Kill data/openwebtext/prepare.py with SIGKILL at random moments, start it again, and compare what it makes in the end
with what an undisturbed run makes.

    python tests/kill_preparation.py --kills 20 --data-files books.jsonl.bz2 --workers 2

Other arguments go to prepare.py.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "openwebtext" / "prepare.py"


def run_with_kills(arguments: list[str], kills: int, folder: Path, seed: int = 0) -> str:
    """Returns a summary; AssertionError where a run failed or made other bytes."""
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, str(SCRIPT), *arguments, "--out-dir", str(folder / name)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    started = time.perf_counter()
    expect_success(start("undisturbed"))
    seconds = time.perf_counter() - started
    chance = random.Random(seed)
    left, runs, resumptions = kills, 0, 0
    while left:
        process = start(f"run{runs}")
        try:
            process.wait(chance.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            left -= 1
            if left:
                continue
            process = start(f"run{runs}")
        resumptions += "going on after" in expect_success(process)
        for name in ("train.bin", "val.bin", "meta.json"):
            made, expected = (folder / run / name for run in (f"run{runs}", "undisturbed"))
            assert made.read_bytes() == expected.read_bytes(), f"{made} differs from {expected}"
        runs += 1
    return f"{kills} kills, {runs} runs, {resumptions} of them ended by a start that went on; all bytes identical"


def expect_success(process: subprocess.Popen) -> str:
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(run_with_kills(rest, options.kills, Path(scratch), options.seed))
