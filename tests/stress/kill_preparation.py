"""Kill data/openwebtext/prepare.py with SIGKILL at random moments, start it again, and compare what it makes in the end
with what an undisturbed run makes.

    python -m tests.stress.kill_preparation --kills 20 --data-files books.jsonl.bz2 --workers 2

Other arguments go to prepare.py.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent.parent / "data" / "openwebtext" / "prepare.py"


def run_with_kills(arguments: list[str], kills: int, folder: Path, seed: int = 0) -> tuple[int, int]:
    """Returns how many runs were finished, and how many of them by a start that went on from where another was killed.
    AssertionError where a run failed or made other bytes.
    """
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}
    log = folder / "log"

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, str(SCRIPT), *arguments, "--out-dir", str(folder / name)]
        with open(log, "wb") as output:
            return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    started = time.perf_counter()
    assert start("undisturbed").wait() == 0, log.read_text()
    seconds = time.perf_counter() - started
    chance = random.Random(seed)
    left, runs, resumed = kills, 0, 0
    while left:
        name = f"run{runs}"
        process = start(name)
        wait_for_a_moment(process, folder / name / "progress.json", seconds, chance)
        if process.poll() is None:
            process.kill()
            left -= 1
        process.wait()
        if left and process.returncode:
            assert process.returncode == -signal.SIGKILL, log.read_text()
            continue
        if process.returncode:
            assert start(name).wait() == 0, log.read_text()
        resumed += "going on after" in log.read_text()
        for file in ("train.bin", "val.bin", "meta.json"):
            made, expected = (folder / run / file for run in (name, "undisturbed"))
            assert made.read_bytes() == expected.read_bytes(), f"{made} differs from {expected}"
        runs += 1
    return runs, resumed


def wait_for_a_moment(process: subprocess.Popen, progress: Path, seconds: float, chance: random.Random) -> None:
    """Half of the moments are any of a run, half of them soon after the next note of its progress."""

    def noted() -> bytes:
        with contextlib.suppress(FileNotFoundError):
            return progress.read_bytes()
        return b""

    end = time.perf_counter() + chance.uniform(0, seconds)
    if chance.random() < 0.5:
        before = noted()
        while process.poll() is None and noted() == before:
            time.sleep(0.002)
        end = time.perf_counter() + chance.uniform(0, 0.05 * seconds)
    while process.poll() is None and time.perf_counter() < end:
        time.sleep(0.002)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs, resumed = run_with_kills(rest, options.kills, Path(scratch), options.seed)
    print(f"{options.kills} kills; {runs} runs finished, {resumed} by a start that went on; all bytes identical")
