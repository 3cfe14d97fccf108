"""What the optimizers, the curvature passes, the data and the checkpoints cost, each against what it is added to."""

import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import WARM_UP, alternate, make_model, random_tokens, synchronize
from preparation.writer import write_data_set
from records import checkpoints
from run import errors, machine
from run.settings import read
from tokens.batches import Batches
from tokens.token_files import open_data
from tokens.tokenizers import GPT2
from training import steps
from training.curvature import Curvature
from training.optimizers import make_optimizer, own_state

PAPER_BATCH = 480  # sequences a step
BATCHES_AT_ONCE = 20


def optimizer_benchmark(options: Namespace, arguments: list[str], here: machine.Machine) -> dict:
    """Seconds of an update of every parameter, with a learning rate that changes at every step as a schedule's does."""
    updates = {}
    for name in ("adamw", "lion", "sophiag"):
        s = read([*arguments, f"--optimizer={name}"])
        model = make_model(s, here)
        updates[name] = updater(make_optimizer(model, s, here))
    seconds = alternate(updates, here, options.rounds)
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


def curvature_benchmark(options: Namespace, arguments: list[str], here: machine.Machine) -> dict:
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
    seconds = alternate(passes, here, options.rounds, peaks)

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


def loader_benchmark(options: Namespace, arguments: list[str], here: machine.Machine) -> dict:
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

    seconds = alternate({"train": train, "load": load}, here, options.rounds)
    seconds["load"] /= BATCHES_AT_ONCE
    return {f"seconds_{name}": value for name, value in seconds.items()} | {
        "tokens_per_second_load": s.batch_size * s.block_size / seconds["load"],
        "loader_over_train": seconds["train"] / seconds["load"],
    }


def tokenize_benchmark(options: Namespace, arguments: list[str], here: machine.Machine) -> dict:
    """Megabytes of text a second from a table of documents to train.bin and val.bin, and by tiktoken alone."""
    from preparation.sources import cores, open_documents

    if not options.text:
        raise errors.UserError("tokenize needs text: --text FILE, as prepare.py takes it with --data-files")
    documents = open_documents("", None, options.text, False, "text", 0.0005)
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
        seconds = alternate({"one_thread": one_thread, "prepare": prepare}, here, options.rounds)
    return {f"megabytes_per_second_{name}": documents.size / 1e6 / value for name, value in seconds.items()} | {
        "workers": cores(),
        "prepare_over_one_thread": seconds["one_thread"] / seconds["prepare"],
    }


def checkpoint_benchmark(options: Namespace, arguments: list[str], here: machine.Machine) -> dict:
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
        synchronize(here)
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
        for number in range(-WARM_UP, options.rounds):
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
