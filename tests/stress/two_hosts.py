"""Train on two hosts, which are two network namespaces of this machine with a virtual cable between them, and pull the
cable. Needs root.

    python -m tests.stress.two_hosts --timeout 10

1. When the cable is pulled, the job ends on both hosts in time, and says that an exchange failed.
2. With the cable back, the same command goes on, and ends with the weights of a run that was not disturbed.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from run.settings import ROOT
from tests.conftest import TINY, arguments, last_checkpoint, same_weights, text_dataset
from training import checkpoints

CABLE = "cable"  # the network interface of each host
PORT = 29500
SETTINGS = TINY | {"optimizer": "sophiag", "max_iters": 300, "eval_interval": 20, "init_from": "auto"}
START_SECONDS = 120  # for all that is not training: imports, on a busy machine
MARGIN = 30  # beyond the time-out, until both torchruns have ended
ERROR = re.compile(r"error: .*an exchange with the other ranks failed.*")


class Host:
    def __init__(self, number: int):
        self.number, self.namespace = number, f"two-hosts-{os.getpid()}-{number}"

    def ip(self, command: str) -> None:
        subprocess.run(["ip", "-n", self.namespace, *command.split()], check=True, capture_output=True, text=True)

    def torchrun(self, command: list[str], log: Path) -> subprocess.Popen:
        """Start a script, or `-m` and a module, as this host's rank of two."""
        meeting = [f"--node_rank={self.number}", "--master_addr=10.77.0.1", f"--master_port={PORT}"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", *meeting]
        with open(log, "wb") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *torchrun, *command], stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, env=os.environ | {"GLOO_SOCKET_IFNAME": CABLE, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

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
    hosts = [Host(number) for number in range(2)]
    try:
        for host in hosts:
            subprocess.run(["ip", "netns", "add", host.namespace], check=True, capture_output=True, text=True)
        hosts[0].ip(f"link add {CABLE} type veth peer name {CABLE} netns {hosts[1].namespace}")
        for host in hosts:
            host.ip(f"addr add 10.77.0.{host.number + 1}/24 dev {CABLE}")
            host.ip("link set lo up")
            host.ip(f"link set {CABLE} up")
        yield hosts
    finally:
        for host in hosts:
            host.kill_all()
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True)


def available() -> bool:
    """Whether this machine lets us make two hosts."""
    try:
        with two_hosts():
            return os.geteuid() == 0
    except (OSError, subprocess.CalledProcessError):
        return False


def run(folder: Path, timeout: int, hosts: list[Host]) -> None:
    """Train, pull the cable and go on, in `folder`. AssertionError where the result is not what it should be."""
    dataset, logs = text_dataset(folder / "data"), [folder / f"{host.namespace}.log" for host in hosts]

    def start(name: str) -> list[subprocess.Popen]:
        settings = SETTINGS | {"dataset": dataset, "out_dir": folder / name, "timeout": timeout}
        command = [str(ROOT / "train.py"), *arguments(**settings)]
        return [host.torchrun(command, log) for host, log in zip(hosts, logs, strict=True)]

    def end(job: list[subprocess.Popen], seconds: float, exit_code: int) -> list[str]:
        """Wait until torchrun has ended on both hosts; returns what they printed."""
        end = time.monotonic() + seconds
        codes = [process.wait(max(0, end - time.monotonic())) for process in job]
        printed = [log.read_text().replace("\r", "\n") for log in logs]
        assert codes == [min(exit_code, 1)] * 2, printed  # torchrun's own is 1, and its table has the rank's
        assert not exit_code or all(re.search(rf"exitcode *: {exit_code} ", text) for text in printed), printed
        return printed

    def last_step() -> int:
        return max(map(checkpoints.step_of, checkpoints.folders(folder / "disturbed")), default=0)

    job, until = start("disturbed"), time.monotonic() + START_SECONDS
    while not last_step():
        assert time.monotonic() < until and job[0].poll() is None, logs[0].read_text()
        time.sleep(0.02)
    hosts[1].ip(f"link set {CABLE} down")
    cut_after, cut = last_step(), time.monotonic()
    for host, printed in zip(hosts, end(job, timeout + MARGIN, exit_code=4), strict=True):
        assert (error := ERROR.search(printed)), printed
        print(f"cable pulled after step {cut_after}: {host.namespace} says {error.group()}")
    print(f"both hosts ended within {time.monotonic() - cut:.1f} s")

    hosts[1].ip(f"link set {CABLE} up")
    printed = end(start("disturbed"), START_SECONDS, exit_code=0)
    resumed_from = int(re.search(r"steps (\d+) to", "".join(printed)).group(1))
    assert cut_after <= resumed_from < SETTINGS["max_iters"]
    end(start("undisturbed"), START_SECONDS, exit_code=0)
    left, right = (last_checkpoint(folder / name) for name in ("disturbed", "undisturbed"))
    assert same_weights(left, right), f"{left} differs from {right}"
    print(f"resumed from step {resumed_from}, weights and state after {checkpoints.step_of(left)} steps: identical")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=int, default=10, help="train.py's, in seconds")
    given = parser.parse_args()
    if not available():
        print("skipped: needs root and network namespaces")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the hosts go then too
    with tempfile.TemporaryDirectory() as scratch, two_hosts() as hosts:
        run(Path(scratch), given.timeout, hosts)


if __name__ == "__main__":
    main()
