"""Train on two hosts, which are two network namespaces of this machine with a virtual cable between them, and pull the
cable. Needs root.

    python -m tests.stress.two_hosts --timeout 10

1. Some steps on the two hosts give the losses of one process.
2. When the cable is pulled, the job ends on both hosts in time, and says which ranks are missing.
3. With the cable back, the same command goes on, and ends with the weights of a run that was not disturbed.
"""

import argparse
import contextlib
import json
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
RENDEZVOUS = ("static", "c10d")  # how the two torchruns meet
SHORT = {"batch_size": 12, "micro_batch_size": 3, "optimizer": "sophiag"}
LONG = SHORT | {"max_iters": 300, "eval_interval": 20}
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

    def __init__(self, hosts: list[Host], ranks_per_host: int, rendezvous: str, options: list[str], folder: Path):
        self.processes, self.logs = [], []
        for host in hosts:
            if rendezvous == "static":
                meeting = [f"--master_addr={hosts[0].address}", f"--master_port={PORT}", f"--node_rank={host.number}"]
            else:  # neither its own address nor that the endpoint is its own does torchrun find out by itself
                meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint={hosts[0].address}:{PORT}", "--rdzv_id=two-hosts"]
                meeting += [f"--local_addr={host.address}", f"--rdzv_conf=is_host={int(host is hosts[0])}"]
            launcher = ["-m", "torch.distributed.run", "--nnodes=2", f"--nproc_per_node={ranks_per_host}", *meeting]
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

    def errors(self) -> list[str]:
        """The line of each host that says who is missing, or an empty one."""
        found = [ERROR.search(log.read_text().replace("\r", "\n")) for log in self.logs]
        return [match.group() if match else "" for match in found]


@dataclass
class Figures:
    difference: float  # the largest between a loss of two hosts and one of one process
    cut_after: int  # the last checkpoint's step when the cable was pulled
    ended: list[float | None]  # seconds from there until torchrun had ended on each host
    errors: list[str]  # what each host said
    resumed_from: int
    max_iters: int
    seconds: float  # that all of it took


def run(folder: Path, timeout: int = 10, ranks_per_host: int = 1, rendezvous: str = "static") -> Figures:
    """Train, pull the cable and go on, in `folder`. AssertionError where the result is not what it should be."""
    started = time.perf_counter()
    dataset = text_dataset(folder / "data")

    def options(name: str, **settings: object) -> list[str]:
        return arguments(**TINY | {"dataset": dataset, "out_dir": folder / name, "timeout": timeout} | settings)

    with two_hosts() as hosts:

        def start(name: str, **settings: object) -> Job:
            return Job(hosts, ranks_per_host, rendezvous, options(name, **settings), folder)

        one = [sys.executable, str(ROOT / "train.py"), *options("one", **SHORT)]
        subprocess.run(one, env=ENVIRONMENT, check=True, capture_output=True, timeout=START_SECONDS)
        start("two", **SHORT).finish()
        difference = largest_difference(folder / "one", folder / "two")
        assert difference < 1e-5

        job = start("disturbed", **LONG, init_from="auto")
        wait_for_a_checkpoint(job, folder / "disturbed")
        hosts[1].ip(f"link set {CABLE} down")
        cut_after = last_step(folder / "disturbed")
        ended = job.wait(timeout + MARGIN)
        errors = job.errors()
        # With c10d, torchrun waits for the rendezvous until TCP gives it up, 15 minutes later, and heeds no SIGTERM.
        for number in range(2 if rendezvous == "static" else 1):
            assert ended[number] is not None, job.output()
            assert re.search(r"exitcode *: 4 ", job.logs[number].read_text()), job.output()
        assert all(errors), job.output()
        others = range(ranks_per_host, 2 * ranks_per_host)
        assert all(f"rank {rank} on {hosts[1].namespace}" in errors[0] for rank in others), errors[0]
        for host in hosts:
            host.kill_all()
        job.wait(1)

        hosts[1].ip(f"link set {CABLE} up")
        job = start("disturbed", **LONG, init_from="auto")
        job.finish()
        resumed_from = int(re.search(r"steps (\d+) to", job.output()).group(1))
        assert cut_after <= resumed_from < LONG["max_iters"]
        start("undisturbed", **LONG).finish()
        left, right = (
            folder / name / "checkpoints" / f"step_{LONG['max_iters']:08d}" for name in ("disturbed", "undisturbed")
        )
        assert same_weights(left, right), f"{left} differs from {right}"
    seconds = time.perf_counter() - started
    return Figures(difference, cut_after, ended, errors, resumed_from, LONG["max_iters"], seconds)


def largest_difference(left: Path, right: Path) -> float:
    """Between the losses in the metrics.jsonl of two runs, which must have the same rows."""

    def losses(folder: Path) -> dict[tuple[int, str], float]:
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return {(row["step"], name): row[name] for row in rows for name in ("train/loss", "val/loss") if name in row}

    one, other = losses(left), losses(right)
    assert one and one.keys() == other.keys()
    return max(abs(one[key] - other[key]) for key in one)


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
    parser.add_argument("--ranks-per-host", type=int, default=1, choices=(1, 2))
    parser.add_argument("--rendezvous", default="static", choices=RENDEZVOUS)
    given = parser.parse_args()
    if not available():
        print("skipped: needs root and network namespaces")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the hosts go then too
    with tempfile.TemporaryDirectory() as scratch:
        figures = run(Path(scratch), given.timeout, given.ranks_per_host, given.rendezvous)
    print(f"largest difference of a loss from one process's: {figures.difference:.1e} (bar: 1e-5)")
    for number, (seconds, error) in enumerate(zip(figures.ended, figures.errors, strict=True)):
        end = "no end" if seconds is None else f"ended in {seconds:.1f} s"
        print(f"cable pulled after step {figures.cut_after}, time-out {given.timeout} s: host {number} {end}: {error}")
    print(f"resumed from step {figures.resumed_from}, weights and state after {figures.max_iters} steps: identical")
    print(f"all of it: {figures.seconds:.0f} s")


if __name__ == "__main__":
    main()
