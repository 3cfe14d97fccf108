"""How much of the gradients' exchange hides behind the backward pass: two ranks, joined by a slow link.

    python -m tests.stress.slow_link --rate 1gbit [--checkout DIR …]

The ranks live in two network namespaces of this machine, with a virtual cable between them that `tc` slows down. Needs
root. Each checkout's train.py is timed over the slow link and over the open one, in alternation: what is hidden of the
exchange is missing in the difference.
"""

import argparse
import statistics
import subprocess
import tempfile
from pathlib import Path

from run.settings import ROOT
from tests.conftest import arguments, rows_of, text_dataset
from tests.stress.two_hosts import CABLE, Host, two_hosts

# Nearly all weights are in the blocks: the gradient of a tied embedding is complete last and cannot hide.
SETTINGS = {
    "n_layer": 12, "n_head": 8, "n_embd": 512, "block_size": 128, "batch_size": 24, "micro_batch_size": 12,
    "max_iters": 12, "eval_interval": 100, "eval_sequences": 8, "log_interval": 1, "warmup_iters": 2, "device": "cpu",
}  # fmt: skip
WARM_UP = 4  # steps


def set_rate(hosts: list[Host], rate: str) -> None:
    for host in hosts:
        tc = ["ip", "netns", "exec", host.namespace, "tc", "qdisc"]
        subprocess.run([*tc, "del", "dev", CABLE, "root"], capture_output=True)
        if rate != "open":
            bucket = ["tbf", "rate", rate, "burst", "1mb", "latency", "400ms"]
            subprocess.run([*tc, "add", "dev", CABLE, "root", *bucket], check=True)


def train_on_both(hosts: list[Host], checkout: Path, out_dir: Path, settings: list[str]) -> list[float]:
    """Seconds of each step after the warm-up."""
    logs = [out_dir.with_suffix(f".{host.number}.log") for host in hosts]
    command = [str(checkout / "train.py"), *settings, f"--out_dir={out_dir}"]
    processes = [host.torchrun(command, log) for host, log in zip(hosts, logs, strict=True)]
    codes = [process.wait(timeout=600) for process in processes]
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
    tokens = SETTINGS["batch_size"] * SETTINGS["block_size"]
    return [tokens / row["tokens_per_second"] for row in rows_of(out_dir) if row["step"] > WARM_UP]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="1gbit", help="of the slow link, as tc writes it (default %(default)s)")
    parser.add_argument("--checkout", type=Path, nargs="+", default=[ROOT], metavar="DIR", help="default: this one")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each (default %(default)s)")
    options = parser.parse_args()
    seconds: dict[tuple[Path, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, two_hosts() as hosts:
        scratch = Path(folder)
        settings = arguments(**SETTINGS, dataset=text_dataset(scratch / "data"))
        for number in range(options.rounds):
            for checkout in options.checkout:
                for rate in ("open", options.rate):
                    set_rate(hosts, rate)
                    out_dir = scratch / f"{checkout.resolve().name}-{rate}-{number}"
                    taken = train_on_both(hosts, checkout.resolve(), out_dir, settings)
                    seconds.setdefault((checkout, rate), []).extend(taken)
        for (checkout, rate), values in seconds.items():
            print(f"{checkout}: {statistics.median(values):.3f} s a step, link: {rate}")


if __name__ == "__main__":
    main()
