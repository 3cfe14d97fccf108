"""Train on two hosts, which are two network namespaces of this machine with a virtual cable between them, and pull the
cable. Needs root.

    python -m tests.stress.two_hosts --timeout 10

1. When the cable is pulled, the job ends on both hosts in time, and says which ranks are missing.
2. With the cable back, the same command goes on, and ends with the weights of a run that was not disturbed.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from run.settings import ROOT
from tests.conftest import TINY, arguments, same_weights, text_dataset
from training import checkpoints

CABLE = "cable"  # the network interface of each host
ENVIRONMENT = os.environ | {"GLOO_SOCKET_IFNAME": CABLE, "OMP_NUM_THREADS": "1"}
PORT = 29500
SETTINGS = {"optimizer": "sophiag", "max_iters": 300, "eval_interval": 20}
START_SECONDS = 120  # for all that is not training: imports, on a busy machine
MARGIN = 20  # beyond the time-out, until both torchruns have ended
ERROR = re.compile(r"error: .*(?:did not answer|cannot be reached).*")


@dataclass(frozen=True)
class Host:
    number: int
    namespace: str

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number + 1}"

    def ip(self, command: str) -> None:
        subprocess.run(["ip", "-n", self.namespace, *command.split()], check=True, capture_output=True, text=True)

    def start(self, command: list[str], log: Path) -> subprocess.Popen:
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.namespace, *command]
        with open(log, "wb") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *named],
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill_all(self) -> None:
        """Kill every process of the host; torchrun's have process groups of their own."""
        while pids := subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True).stdout.split():
            for pid in map(int, pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


@contextlib.contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Two hosts that reach each other and nothing else. At the end they go, with all that runs on them."""
    hosts = [Host(number, f"two-hosts-{os.getpid()}-{number}") for number in range(2)]
    try:
        for host in hosts:
            subprocess.run(["ip", "netns", "add", host.namespace], check=True, capture_output=True, text=True)
        hosts[0].ip(f"link add {CABLE} type veth peer name {CABLE} netns {hosts[1].namespace}")
        for host in hosts:
            host.ip(f"addr add {host.address}/24 dev {CABLE}")
            host.ip("link set lo up")
            host.ip(f"link set {CABLE} up")
        yield hosts
    finally:
        for host in hosts:
            host.kill_all()
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True)


def available() -> bool:
    """Whether this machine lets us make two hosts."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "hostname"))):
        return False
    try:
        with two_hosts() as hosts:
            return hosts[0].start(["true"], Path(os.devnull)).wait() == 0
    except (OSError, subprocess.CalledProcessError):
        return False


class Job:
    """train.py on both hosts."""

    def __init__(self, hosts: list[Host], options: list[str], folder: Path):
        self.processes, self.logs = [], []
        for host in hosts:
            meeting = [f"--master_addr={hosts[0].address}", f"--master_port={PORT}", f"--node_rank={host.number}"]
            launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", *meeting]
            self.logs.append(folder / f"{host.namespace}.log")
            command = [sys.executable, *launcher, str(ROOT / "train.py"), *options]
            self.processes.append(host.start(command, self.logs[-1]))

    def wait(self, seconds: float) -> list[float | None]:
        """How long it takes from now until torchrun has ended on each host; None where it has not after `seconds`."""
        started = time.perf_counter()
        ended: list[float | None] = [None] * len(self.processes)
        while None in ended and time.perf_counter() - started < seconds:
            for number, process in enumerate(self.processes):
                if ended[number] is None and process.poll() is not None:
                    ended[number] = time.perf_counter() - started
            time.sleep(0.02)
        return ended

    def finish(self) -> None:
        """Wait for the end of a run that nothing disturbs."""
        self.wait(START_SECONDS)
        assert [process.poll() for process in self.processes] == [0, 0], self.output()

    def output(self) -> str:
        return "\n".join(f"{log.stem}:\n{log.read_text()}" for log in self.logs)


def run(folder: Path, timeout: int) -> None:
    """Train, pull the cable and go on, in `folder`. AssertionError where the result is not what it should be."""
    dataset = text_dataset(folder / "data")

    with two_hosts() as hosts:

        def start(name: str) -> Job:
            settings = {"dataset": dataset, "out_dir": folder / name, "timeout": timeout, "init_from": "auto"}
            return Job(hosts, arguments(**TINY | SETTINGS | settings), folder)

        job = start("disturbed")
        wait_for_a_checkpoint(job, folder / "disturbed")
        hosts[1].ip(f"link set {CABLE} down")
        cut_after = last_step(folder / "disturbed")
        ended = job.wait(timeout + MARGIN)
        for host, seconds, log in zip(hosts, ended, job.logs, strict=True):
            assert seconds is not None, job.output()
            assert re.search(r"exitcode *: 4 ", log.read_text()), job.output()
            error = ERROR.search(log.read_text().replace("\r", "\n"))
            assert error, job.output()
            assert f"rank 1 on {hosts[1].namespace}" in error.group() or host is hosts[1], error.group()
            print(f"cable pulled after step {cut_after}: {host.namespace} ended in {seconds:.1f} s: {error.group()}")

        hosts[1].ip(f"link set {CABLE} up")
        job = start("disturbed")
        job.finish()
        resumed_from = int(re.search(r"steps (\d+) to", job.output()).group(1))
        assert cut_after <= resumed_from < SETTINGS["max_iters"]
        start("undisturbed").finish()
        left, right = (checkpoints.folders(folder / name)[-1] for name in ("disturbed", "undisturbed"))
        assert same_weights(left, right), f"{left} differs from {right}"
        print(f"resumed from step {resumed_from}, weights and state after {checkpoints.step_of(left)} steps: identical")


def last_step(out_dir: Path) -> int:
    """Of the newest checkpoint; 0 where there is none, or that of the start."""
    return max(map(checkpoints.step_of, checkpoints.folders(out_dir)), default=0)


def wait_for_a_checkpoint(job: Job, out_dir: Path) -> None:
    end = time.perf_counter() + START_SECONDS
    while not last_step(out_dir):
        assert time.perf_counter() < end and job.processes[0].poll() is None, job.output()
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=int, default=10, help="train.py's, in seconds")
    given = parser.parse_args()
    if not available():
        print("skipped: needs root and network namespaces")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the hosts go then too
    with tempfile.TemporaryDirectory() as scratch:
        run(Path(scratch), given.timeout)


if __name__ == "__main__":
    main()
