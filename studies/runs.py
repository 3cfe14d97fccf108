"""The runs of studies: ordinary runs of train.py, each in a folder of its own, some at a time, never twice.

A run is its settings. Its folder is named by them, so that studies share runs, and one that was stopped goes on.
"""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from model import GPT
from records import metrics
from run import errors
from run.files import read_json, write_json
from run.settings import ROOT, Settings, complete
from tokens.token_files import open_data
from training.start import shape_of

OUTCOME = "outcome.json"  # of a run that ended: train.py's exit code, its last words, and the seconds it took


@dataclass(frozen=True)
class Result:
    """A run that ended. `loss` is its final validation loss in nats per token, infinite where it diverged."""

    settings: dict[str, Any]  # those that the study chose
    loss: float
    rows: list[dict[str, Any]] = field(repr=False)  # of its metrics.jsonl

    def curve(self) -> list[tuple[int, float]]:
        """The validation losses, as (step, loss)."""
        return [(row["step"], row["val/loss"]) for row in self.rows if "val/loss" in row]


class Runner:
    """Calls train.py for the settings that studies ask for, at most `jobs` at a time."""

    def __init__(self, folder: Path, jobs: int):
        self.folder, self.jobs = folder, jobs
        self.bar = tqdm(unit="run", dynamic_ncols=True)
        self._pool, self._stopping = ThreadPoolExecutor(jobs), threading.Event()
        self._children: set[subprocess.Popen] = set()

    def __call__(self, wanted: Sequence[dict[str, Any]]) -> list[Result]:
        """The results of runs with these settings, in their order; waits for them."""
        return list(self._pool.map(self._result, wanted))

    def _result(self, settings: dict[str, Any]) -> Result:
        folder = folder_of(self.folder, settings)
        if not (folder / OUTCOME).exists():
            self._train(folder, settings)
        self.bar.update()
        return read_result(folder, settings)

    def _train(self, folder: Path, settings: dict[str, Any]) -> None:
        if self._stopping.is_set():
            raise errors.UserError("stopped")
        folder.mkdir(parents=True, exist_ok=True)
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        options = [f"--{name}={value}" for name, value in settings.items()]
        command = [sys.executable, ROOT / "train.py", f"--out_dir={folder}", "--init_from=auto", *options]
        started = time.perf_counter()
        with open(folder / "output.txt", "a", encoding="utf-8") as output:
            environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
            child = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
            self._children.add(child)
            code = child.wait()
            self._children.discard(child)
        words = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        if code not in (0, errors.Diverged.exit_code):
            self._stopping.set()
            raise errors.UserError(f"the run in {folder} ended with exit code {code}: {' '.join(words)}")
        write_json(folder / OUTCOME, {"exit": code, "words": words, "seconds": time.perf_counter() - started})

    def stop(self, number: int, _: Any) -> NoReturn:
        """A signal handler: the runs under way write their checkpoints, and the others do not begin."""
        self._stopping.set()
        for child in list(self._children):
            child.send_signal(signal.SIGTERM)
        self._pool.shutdown(cancel_futures=True)
        raise SystemExit(128 + number)


class Plan:
    """Takes the place of a Runner, and runs nothing: it collects what a study would ask for. Runs that have not ended
    get a made-up loss, lowest for the first of those asked for at once.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.wanted: set[Path] = set()
        self.missing: dict[Path, dict[str, Any]] = {}

    def __call__(self, wanted: Sequence[dict[str, Any]]) -> list[Result]:
        results = []
        for number, settings in enumerate(wanted):
            folder = folder_of(self.folder, settings)
            self.wanted.add(folder)
            if (folder / OUTCOME).exists():
                results.append(read_result(folder, settings))
            else:
                self.missing[folder] = settings
                steps = settings["max_iters"]
                row = {"seconds": 1.0, "clip_rate": 0.0, "win_rate": 0.0}
                results.append(
                    Result(settings, 10.0 + number, [{"step": s, "val/loss": 10.0} | row for s in (0, steps)])
                )
        return results

    def tokens(self) -> int:
        return sum(map(tokens_of, self.missing.values()))

    def flops(self) -> float:
        return sum(tokens_of(settings) * flops_per_token(settings) for settings in self.missing.values())


def together(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the tasks return, each run in a thread, so that the runs that they wait for share the runner's jobs."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


def folder_of(parent: Path, settings: dict[str, Any]) -> Path:
    text = json.dumps(settings, sort_keys=True)
    return parent / f"{settings['optimizer']}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def read_result(folder: Path, settings: dict[str, Any]) -> Result:
    rows = metrics.read_rows(folder / metrics.FILE)
    diverged = read_json(folder / OUTCOME)["exit"] != 0
    return Result(settings, math.inf if diverged else rows[-1]["val/loss"], rows)


def completed(settings: dict[str, Any]) -> Settings:
    return complete(Settings(**settings))


def tokens_of(settings: dict[str, Any]) -> int:
    return settings["max_iters"] * settings["batch_size"] * settings["block_size"]


def flops_per_token(settings: dict[str, Any]) -> float:
    return new_model(settings).flops_per_token()


def parameters(settings: dict[str, Any]) -> int:
    return sum(param.numel() for param in new_model(settings).parameters())


def new_model(settings: dict[str, Any]) -> GPT:
    """The model that a run with these settings begins with."""
    full = completed(settings)
    torch.manual_seed(full.seed)
    return GPT(shape_of(full, open_data(full.dataset, full.block_size), None))


def fingerprints(settings: dict[str, Any]) -> dict[str, str]:
    """What runs that are compared must have in common: hashes of the tokens of a run's batches in their order, of its
    initial weights, and of the validation blocks.
    """
    full = completed(settings)
    data = open_data(full.dataset, full.block_size)
    hashes = {"batches": hashlib.sha256(), "initial_weights": hashlib.sha256(), "validation": hashlib.sha256()}
    for step in range(1, full.max_iters + 1):
        hashes["batches"].update(data.train_rows(full.seed, step, full.batch_size, 0, full.batch_size).numpy())
    for weight in new_model(settings).state_dict().values():
        hashes["initial_weights"].update(weight.numpy())
    hashes["validation"].update(data.val_rows(data.val_blocks(full.eval_sequences)).numpy())
    return {name: digest.hexdigest()[:16] for name, digest in hashes.items()}


def measured_speed(folder: Path) -> float | None:
    """Floating-point operations that the ended runs in `folder` made in a second of a job; None without a run."""
    flops = seconds = 0.0
    for outcome in folder.glob(f"*/{OUTCOME}"):
        flops += metrics.read_rows(outcome.parent / metrics.FILE)[-1]["flops"]
        seconds += read_json(outcome)["seconds"]
    return flops / seconds if seconds else None
