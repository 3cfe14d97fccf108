"""How much of the gradients' exchange hides behind the backward pass: two ranks, joined by a slow link.

    python -m tests.stress.slow_link --rate 1gbit [--checkout DIR …]

The ranks live in two network namespaces of this machine, with a virtual cable between them that `tc` slows down. Needs
root. Each checkout's train.py is timed over the slow link and over the open one, in alternation; then a profile shows
when, in a backward pass of this checkout, the buckets leave.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

import torch

from run import ranks
from run.settings import ROOT
from tests.conftest import arguments, rows_of, text_dataset
from tests.stress.two_hosts import CABLE, Host, two_hosts

# Nearly all weights are in the blocks: the gradient of a tied embedding is complete last and cannot hide.
SETTINGS = {
    "n_layer": 12, "n_head": 8, "n_embd": 512, "block_size": 128, "batch_size": 24, "micro_batch_size": 12,
    "max_iters": 12, "eval_interval": 100, "eval_sequences": 8, "log_interval": 1, "warmup_iters": 2, "device": "cpu",
}  # fmt: skip
WARM_UP = 4  # steps
PROFILED_STEP = 8


def set_rate(hosts: list[Host], rate: str) -> None:
    for host in hosts:
        tc = ["ip", "netns", "exec", host.namespace, "tc", "qdisc"]
        subprocess.run([*tc, "del", "dev", CABLE, "root"], capture_output=True)
        if rate != "open":
            bucket = ["tbf", "rate", rate, "burst", "1mb", "latency", "400ms"]
            subprocess.run([*tc, "add", "dev", CABLE, "root", *bucket], check=True)


def train_on_both(hosts: list[Host], script: list[str], out_dir: Path, settings: list[str]) -> list[float]:
    """Seconds of each step after the warm-up. `script` is what torchrun starts."""
    logs = [out_dir.with_suffix(f".{host.number}.log") for host in hosts]
    command = [*script, *settings, f"--out_dir={out_dir}"]
    processes = [host.torchrun(command, log) for host, log in zip(hosts, logs, strict=True)]
    codes = [process.wait(timeout=600) for process in processes]
    output = "\n".join(log.read_text() for log in logs)
    assert codes == [0, 0], output
    print(*(line for line in output.splitlines() if line.startswith("profile: ")), sep="\n", end="", flush=True)
    tokens = SETTINGS["batch_size"] * SETTINGS["block_size"]
    return [tokens / row["tokens_per_second"] for row in rows_of(out_dir) if row["step"] > WARM_UP]


def profiled_main() -> None:
    """train.py's main; rank 0 profiles the gradient of one step and prints when its buckets left."""
    import train

    correct = train.accumulate_gradients

    def accumulate_gradients(step: int, *others: object) -> torch.Tensor:
        if step != PROFILED_STEP or os.environ["RANK"] != "0":
            return correct(step, *others)
        with torch.profiler.profile(record_shapes=True) as profile:
            loss = correct(step, *others)
        events = sorted(profile.events(), key=lambda event: event.time_range.start)
        passes = [event for event in events if event.name.startswith("autograd::engine::evaluate_function")]
        start, end = passes[0].time_range.start, max(event.time_range.end for event in passes)
        print(f"profile: the backward pass takes {(end - start) / 1000:.0f} ms")
        for event in events:
            if event.name == "gloo:all_reduce" and event.time_range.end > start:
                left, back = ((moment - start) / 1000 for moment in (event.time_range.start, event.time_range.end))
                print(f"profile: a bucket of {event.input_shapes} leaves after {left:.0f} ms, is back after {back:.0f}")
        return loss

    train.accumulate_gradients = accumulate_gradients
    train.main()
    ranks.leave(0)


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
                    script = [str(checkout.resolve() / "train.py")]
                    seconds.setdefault((checkout, rate), []).extend(train_on_both(hosts, script, out_dir, settings))
        for (checkout, rate), values in seconds.items():
            print(f"{checkout}: {statistics.median(values):.3f} s a step, link: {rate}")
        set_rate(hosts, options.rate)
        train_on_both(hosts, ["-m", "tests.stress.slow_link"], scratch / "profiled", settings)


if __name__ == "__main__":
    profiled_main() if "RANK" in os.environ else main()
