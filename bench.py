"""Time what Sophia adds to training, and what feeds it: in one process, in alternation, after warm-up.

    python bench.py optimizer      an update of Sophia and of Lion, against torch's fused AdamW
    python bench.py curvature      a curvature pass against a training pass on the same sequences, and what that adds to
                                   a step of 480 sequences
    python bench.py loader         reading batches of --dataset, against training on them
    python bench.py tokenize       preparing --text on every core, against one thread of tiktoken
    python bench.py checkpoint     how long the loop stands still for a checkpoint, against writing it synchronously

For example: python bench.py curvature config/gpt2_30m.py --block_size=256 --micro_batch_size=8 --json

Other arguments are config files and settings, as train.py takes them.
"""

import contextlib
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from model import GPT, GPTConfig
from training import checkpoints, errors, machine, steps
from training.batches import Batches, check_batch
from training.curvature import Curvature
from training.data import TokenData, Tokens, open_data
from training.optimizers import make_optimizer, own_state
from training.preparation import write_data_set
from training.settings import Settings, read
from training.tokenizers import GPT2

PAPER_BATCH = 480  # sequences a step
VOCAB_SIZE = 50257
WARM_UP = 3
BATCHES_AT_ONCE = 20


def main() -> None:
    parser = errors.Parser(__doc__)
    parser.add_argument("benchmark", choices=list(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds, whose median is taken (default 10)")
    parser.add_argument("--sequences", type=int, help="sequences of a pass, for batch_size (default micro_batch_size)")
    parser.add_argument(
        "--text", nargs="+", type=Path, metavar="FILE", help="what `tokenize` takes, as prepare.py does"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, arguments = parser.parse_known_args()
    if options.rounds < 1:
        raise errors.UserError(f"--rounds = {options.rounds}: must be at least 1")
    sequences = read(arguments).micro_batch_size if options.sequences is None else options.sequences
    arguments.append(f"--batch_size={sequences}")
    s = read(arguments)
    check_batch(s, ranks=1)
    here = machine.set_up(s)
    if options.benchmark == "tokenize":
        result = tokenize_benchmark(options.text or [], here, options.rounds)
    else:
        result = BENCHMARKS[options.benchmark](arguments, here, options.rounds)
    name = torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else here.device.type
    result |= {"device": name, "dtype": str(here.dtype)[6:], "compile": here.compile, "rounds": options.rounds}
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:32} {value:.4g}" if isinstance(value, float) else f"{key:32} {value}")


def optimizer_benchmark(arguments: list[str], here: machine.Machine, rounds: int) -> dict:
    """Seconds of an update of every parameter, with a learning rate that changes at every step as a schedule's does."""
    updates = {}
    for name in ("adamw", "lion", "sophiag"):
        s = read([*arguments, f"--optimizer={name}"])
        model = make_model(s, here)
        updates[name] = updater(make_optimizer(model, s, here))
    seconds = alternate(updates, here, rounds)
    return {f"seconds_{name}": seconds[name] for name in updates} | {
        "lion_over_adamw_fused": seconds["lion"] / seconds["adamw"],
        "sophia_over_adamw_fused": seconds["sophiag"] / seconds["adamw"],
    }


def updater(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        param.grad = torch.randn_like(param)

    def update() -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.999
        optimizer.step()

    return update


def curvature_benchmark(arguments: list[str], here: machine.Machine, rounds: int) -> dict:
    """Seconds of passes over the same sequences, and of updates; a step of 480 sequences is put together from them."""
    estimators = {
        "sophiah": ["--optimizer=sophiah"],
        "sophiag": ["--optimizer=sophiag"],
        "sophiag_averaged": ["--optimizer=sophiag", "--hessian_estimator=averaged"],
    }
    first = read(arguments)
    size = first.batch_size
    arguments = [*arguments, f"--hessian_batch_size={size}"]
    model = make_model(first, here)
    params = list(model.parameters())
    training = Batches(random_tokens(first), first, here)

    def train() -> None:
        steps.accumulate_gradients(model, training, 1)
        model.zero_grad()

    passes: dict[str, Callable] = {"train": train}
    for name, chosen in estimators.items():
        s = read([*arguments, *chosen])
        curvature = Curvature(model, s, here, Batches(random_tokens(s), s, here))
        passes[name] = lambda curvature=curvature: curvature.estimate(1, params)
    adamw = make_optimizer(make_model(first, here), read([*arguments, "--optimizer=adamw"]), here)
    sophia = make_optimizer(make_model(first, here), read([*arguments, "--optimizer=sophiag"]), here)
    estimate = [torch.rand_like(param) for group in sophia.param_groups for param in group["params"]]
    passes |= {
        "update_adamw": updater(adamw),
        "update_sophia": updater(sophia),
        "update_hessian": lambda: sophia.update_hessian(estimate),
    }
    peaks: dict[str, int] = {}
    seconds = alternate(passes, here, rounds, peaks)

    def overhead(name: str, sequences: int, interval: int = 10) -> float:
        curvature = (sequences / size * seconds[name] + seconds["update_hessian"]) / interval
        step = PAPER_BATCH / size * seconds["train"]
        return (step + seconds["update_sophia"] + curvature) / (step + seconds["update_adamw"]) - 1

    return {f"seconds_{name}": value for name, value in seconds.items()} | peaks | {
        "sequences": size,
        "gnb_over_train": seconds["sophiag"] / seconds["train"],
        "gnb_averaged_over_train": seconds["sophiag_averaged"] / seconds["train"],
        "hutchinson_over_train": seconds["sophiah"] / seconds["train"],
        "overhead_sophiah_32": overhead("sophiah", 32),
        "overhead_sophiag_240": overhead("sophiag", 240),
        "overhead_sophiag_averaged_32": overhead("sophiag_averaged", 32),
    }  # fmt: skip


def loader_benchmark(arguments: list[str], here: machine.Machine, rounds: int) -> dict:
    """Seconds to read a batch, and to train on one that is there already."""
    s = read(arguments)
    batches = Batches(open_data(s.dataset, s.block_size), s, here)
    model = make_model(s, here)
    constant = Batches(random_tokens(s), s, here)
    numbers = itertools.count(1)

    def train() -> None:
        steps.accumulate_gradients(model, constant, 1)
        model.zero_grad()

    def load() -> None:
        for _ in range(BATCHES_AT_ONCE):
            for _ in batches.train(next(numbers)):
                pass

    seconds = alternate({"train": train, "load": load}, here, rounds)
    seconds["load"] /= BATCHES_AT_ONCE
    return {f"seconds_{name}": value for name, value in seconds.items()} | {
        "tokens_per_second_load": s.batch_size * s.block_size / seconds["load"],
        "loader_over_train": seconds["train"] / seconds["load"],
    }


def tokenize_benchmark(files: list[Path], here: machine.Machine, rounds: int) -> dict:
    """Megabytes of text a second from a table of documents to train.bin and val.bin, and by tiktoken alone."""
    from training.documents import cores, open_documents

    if not files:
        raise errors.UserError("tokenize needs text: --text FILE, as prepare.py takes it with --data-files")
    documents = open_documents("", None, files, False, "text", 0.0005)
    encoding = GPT2().encoding

    def one_thread() -> None:
        for chunk in documents.chunks(None):
            for texts in chunk.texts.values():
                for text in texts():
                    encoding.encode_ordinary(text)

    def prepare() -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_data_set(Path(folder), documents, GPT2(), cores())

    with contextlib.redirect_stdout(sys.stderr):
        seconds = alternate({"one_thread": one_thread, "prepare": prepare}, here, rounds)
    return {f"megabytes_per_second_{name}": documents.size / 1e6 / value for name, value in seconds.items()} | {
        "workers": cores(),
        "prepare_over_one_thread": seconds["one_thread"] / seconds["prepare"],
    }


def checkpoint_benchmark(arguments: list[str], here: machine.Machine, rounds: int) -> dict:
    """Seconds that a loop of gradients and updates stands still for a checkpoint, written to the file system of
    --out_dir; a gradient alone, and one while a checkpoint is being copied and written.
    """
    s = read(arguments)
    model = make_model(s, here)
    optimizer = make_optimizer(model, s, here)
    updater(optimizer)()
    model.zero_grad()
    data = random_tokens(s)
    batches = Batches(data, s, here)
    progress = checkpoints.Progress()
    parent = Path(s.out_dir).absolute()
    while not parent.exists():
        parent = parent.parent

    def gradient() -> float:
        start = time.perf_counter()
        steps.accumulate_gradients(model, batches, 1)
        if here.device.type == "cuda":
            torch.cuda.synchronize()
        model.zero_grad()
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory(dir=parent) as folder:
        out_dir = Path(folder)
        writer = checkpoints.Writer(out_dir, model, optimizer, s, data, here)
        tensors = dict(zip(checkpoints.FILES, ({n: p.detach() for n, p in model.named_parameters()}, {}), strict=False))
        tensors["optimizer.safetensors"] = own_state(model, optimizer)

        def synchronous() -> float:
            progress.step += 1
            start = time.perf_counter()
            checkpoints.write(out_dir, progress.step, tensors, writer.description)
            return time.perf_counter() - start

        times: dict[str, list[float]] = {
            name: [] for name in ("synchronous", "gradient", "gradient_meanwhile", "pause")
        }
        for number in range(-WARM_UP, rounds):
            waited = synchronous()
            alone = gradient()
            progress.step += 1
            start = time.perf_counter()
            writer.begin(progress)
            pause = time.perf_counter() - start
            meanwhile = gradient()
            start = time.perf_counter()
            writer.wait_for_copies()
            pause += time.perf_counter() - start
            writer.finish()
            if writer.complaint:
                raise errors.UserError(writer.complaint)
            checkpoints.prune(out_dir, 1, None)
            if number >= 0:
                for name, value in zip(times, (waited, alone, meanwhile, pause), strict=True):
                    times[name].append(value)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    worst = max(times["pause"])
    return {f"seconds_{name}": value for name, value in seconds.items()} | {
        "seconds_pause_worst": worst,
        "pause_over_synchronous": seconds["pause"] / seconds["synchronous"],
        "worst_pause_over_synchronous": worst / seconds["synchronous"],
    }


BENCHMARKS: dict[str, Callable] = {
    "optimizer": optimizer_benchmark,
    "curvature": curvature_benchmark,
    "loader": loader_benchmark,
    "tokenize": tokenize_benchmark,
    "checkpoint": checkpoint_benchmark,
}


def make_model(s: Settings, here: machine.Machine) -> GPT:
    torch.manual_seed(s.seed)
    vocab_size = random_tokens(s).padded_vocab_size
    model = GPT(GPTConfig(s.block_size, vocab_size, s.n_layer, s.n_head, s.n_embd, s.dropout, s.bias))
    model.checkpoint_activations = s.checkpoint_activations
    if here.compile:
        model.compile(dynamic=False)
    return model.to(here.device)


def random_tokens(s: Settings) -> TokenData:
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, 100 * s.block_size + 1, dtype=np.uint16)
    stream = Tokens([tokens], "random tokens")
    return TokenData(Path(), "gpt2", VOCAB_SIZE, stream, stream, s.block_size, True)


def alternate(
    functions: dict[str, Callable], here: machine.Machine, rounds: int, peaks: dict[str, int] | None = None
) -> dict[str, float]:
    """Median seconds of each function, all of them called in turn, round after round. `peaks` gets the bytes in use
    when they were the most during its last call: of CUDA's allocator, or of the whole process on a CPU under Linux.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(-WARM_UP, rounds):
        for name, function in functions.items():
            reset_peak_memory(here)
            start = time.perf_counter()
            function()
            if here.device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 0:
                times[name].append(time.perf_counter() - start)
            if peaks is not None and (peak := peak_memory(here)) is not None:
                peaks[f"peak_bytes_{name}"] = peak
    return {name: statistics.median(values) for name, values in times.items()}


def reset_peak_memory(here: machine.Machine) -> None:
    if here.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM


def peak_memory(here: machine.Machine) -> int | None:
    if here.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        line = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(line[1]) * 1024
    return None


if __name__ == "__main__":
    errors.run(main)
