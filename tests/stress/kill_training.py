"""Kill train.py with SIGKILL at random moments, half of them while a checkpoint is being written, have it go on, and
compare its last checkpoint with an undisturbed run's.

    python -m tests.stress.kill_training --kills 100               one process, started again with the same command
    python -m tests.stress.kill_training --kills 100 --ranks 3     under torchrun, which restarts all workers

Other arguments are settings of train.py.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from run.settings import ROOT
from tests.conftest import TINY, arguments, last_checkpoint, rows_of, same_weights, text_dataset

KILLS_A_RUN = 5
SETTINGS = TINY | {"n_embd": 64, "batch_size": 12, "micro_batch_size": 1, "max_iters": 60, "eval_interval": 4}


class Job:
    """One command, which goes on from its newest checkpoint whenever it is started."""

    def __init__(self, out_dir: Path, ranks: int, settings: list[str]):
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--max-restarts=1000"]
        begin = [sys.executable, "-m", *launcher] if ranks > 1 else [sys.executable]
        self.command = [*begin, "train.py", *settings, f"--out_dir={out_dir}", "--init_from=auto"]
        self.out_dir, self.ranks, self.log = out_dir, ranks, out_dir.with_suffix(".log")
        self.start()

    def start(self) -> None:
        with open(self.log, "ab") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(self.command, cwd=ROOT, stdout=log, stderr=log, env=environment)

    def workers(self) -> list[int]:
        """The processes that train; none when the job has ended."""
        if self.process.poll() is not None:
            return []
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [self.process.pid] if self.ranks == 1 else [int(pid) for pid in children.read_text().split()]

    def is_writing(self) -> bool:
        return any((self.out_dir / "checkpoints").glob("*.tmp"))

    def kill(self, moment: float, in_writing: bool, chance: random.Random) -> bool:
        """Kill a worker `moment` seconds from now, or then as soon as a checkpoint is being written. Returns whether
        there was one to kill: the job may have ended before.
        """
        end = time.monotonic() + moment
        while self.process.poll() is None and (time.monotonic() < end or (in_writing and not self.is_writing())):
            time.sleep(0.0005)
        workers = self.workers()
        if not workers:
            return False
        os.kill(chance.choice(workers), signal.SIGKILL)
        if self.ranks == 1:
            self.process.wait()
            self.start()
        return True

    def finish(self) -> list[int]:
        """Wait for its end; returns the steps of its rows."""
        assert self.process.wait(timeout=300) == 0, self.log.read_text()
        return [row["step"] for row in rows_of(self.out_dir)]


def run_with_kills(folder: Path, kills: int, ranks: int, more: list[str]) -> int:
    """Returns how many runs ended as the undisturbed one. AssertionError where one failed or ended otherwise."""
    settings = [*arguments(**SETTINGS, dataset=text_dataset(folder / "data")), *more]
    started = time.monotonic()
    undisturbed = Job(folder / "undisturbed", ranks, settings)
    steps = undisturbed.finish()
    seconds = time.monotonic() - started
    chance, left, runs = random.Random(0), kills, 0
    while left:
        job = Job(folder / f"run{runs}", ranks, settings)
        for _ in range(min(left, KILLS_A_RUN)):
            if not job.kill(chance.uniform(0, seconds), chance.random() < 0.5, chance):
                break
            left -= 1
        assert job.finish() == steps, job.out_dir
        assert same_weights(last_checkpoint(job.out_dir), last_checkpoint(undisturbed.out_dir)), job.out_dir
        runs += 1
    return runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=1)
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = run_with_kills(Path(scratch), options.kills, options.ranks, rest)
    print(
        f"{options.kills} kills, {options.ranks} rank(s): all {runs} runs ended with the bytes of the undisturbed one"
    )
