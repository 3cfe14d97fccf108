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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from data.token_files import open_data
from model import GPT
from run import errors
from run.settings import ROOT, Settings, complete
from training import metrics
from training.batches import check_batch
from training.start import shape_of

KEPT = "step tokens seconds flops train/loss clip_rate win_rate".split()  # from the last row of a run's metrics.jsonl


@dataclass(frozen=True)
class Result:
    """A run that ended."""

    settings: dict[str, Any]  # those that the study chose
    loss: float  # final validation loss in nats per token, infinite where the run diverged
    curve: list[list[float]]  # validation losses, as [step, loss]
    last: dict[str, Any]  # the last row of its metrics.jsonl
    parameters: int
    fingerprints: dict[str, str]
    commit: str | None


class Ledger:
    """The runs that ended, a JSON object a line, from which tables are made; published beside them."""

    def __init__(self, path: Path):
        self.path = path
        self.results: dict[str, Result] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            result = json.loads(line)
            result["loss"] = math.inf if result["loss"] is None else result["loss"]
            self._keep(Result(**result))

    def _keep(self, result: Result) -> None:
        self.results[name_of(result.settings)] = result

    def find(self, settings: dict[str, Any]) -> Result | None:
        return self.results.get(name_of(settings))

    def add(self, result: Result) -> None:
        self._keep(result)
        line = asdict(result) | {"loss": result.loss if math.isfinite(result.loss) else None}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def speed(self) -> float | None:
        """Floating-point operations that its runs made in a second of training; None without a run."""
        flops, seconds = (sum(result.last[key] for result in self.results.values()) for key in ("flops", "seconds"))
        return flops / seconds if seconds else None


class Runner:
    """Calls train.py for the settings that studies ask for, at most `jobs` at a time."""

    def __init__(self, ledger: Ledger, folder: Path, jobs: int, total: int | None = None):
        self.ledger, self.folder, self.jobs = ledger, folder, jobs
        self.bar = tqdm(total=total, unit="run", dynamic_ncols=True, disable=total == 0)
        self._pool, self._stopping = ThreadPoolExecutor(jobs), threading.Event()
        self._children: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def __call__(self, wanted: Sequence[dict[str, Any]]) -> list[Result]:
        """The results of runs with these settings, in their order; waits for them."""
        return list(self._pool.map(self._result, wanted))

    def _result(self, settings: dict[str, Any]) -> Result:
        if not (result := self.ledger.find(settings)):
            folder = self.folder / name_of(settings)
            code = self._train(folder, settings)
            with self._lock:  # PyTorch's random numbers are shared, and the ledger's file
                result = read_result(folder, settings, diverged=code != 0)
                self.ledger.add(result)
            self.bar.update()
        return result

    def _train(self, folder: Path, settings: dict[str, Any]) -> int:
        """The exit code of train.py: 0 or that of a run that diverged."""
        if self._stopping.is_set():
            raise errors.UserError("stopped")
        folder.mkdir(parents=True, exist_ok=True)
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        options = [f"--{name}={value}" for name, value in settings.items()]
        command = [sys.executable, ROOT / "train.py", f"--out_dir={folder}", "--init_from=auto", *options]
        with open(folder / "output.txt", "a", encoding="utf-8") as output:
            environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
            child = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
            self._children.add(child)
            code = child.wait()
            self._children.discard(child)
        if code not in (0, errors.Diverged.exit_code):
            self._stopping.set()
            words = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise errors.UserError(f"the run in {folder} ended with exit code {code}: {' '.join(words)}")
        return code

    def stop(self, number: int, _: Any) -> NoReturn:
        """A signal handler: the runs under way write their checkpoints, and the others do not begin."""
        self._stopping.set()
        for child in list(self._children):
            child.send_signal(signal.SIGTERM)
        self._pool.shutdown(cancel_futures=True)
        raise SystemExit(128 + number)


class Plan:
    """In place of a Runner: collects what a study asks for, and makes up losses, the first lowest, for missing runs."""

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self.wanted: set[str] = set()
        self.missing: dict[str, dict[str, Any]] = {}

    def __call__(self, wanted: Sequence[dict[str, Any]]) -> list[Result]:
        return [self._result(settings, 10.0 + number) for number, settings in enumerate(wanted)]

    def _result(self, settings: dict[str, Any], loss: float) -> Result:
        self.wanted.add(name_of(settings))
        if result := self.ledger.find(settings):
            return result
        check_batch(completed(settings), ranks=1)  # before hours are spent on others
        self.missing[name_of(settings)] = settings
        steps = {*range(0, settings["max_iters"], settings["eval_interval"]), settings["max_iters"]}
        curve = [[step, 10.0] for step in sorted(steps)]
        last = {"seconds": 1.0, "clip_rate": 0.0, "win_rate": 0.0}
        return Result(settings, loss, curve, last, settings["n_layer"] * settings["n_embd"] ** 2, {}, None)

    def tokens(self) -> int:
        return sum(map(tokens_of, self.missing.values()))

    def hours(self, jobs: int) -> float | None:
        """As the runs that ended went; None before there are such."""
        if not (speed := self.ledger.speed()):
            return None
        flops = sum(tokens_of(settings) * new_model(settings).flops_per_token() for settings in self.missing.values())
        return flops / speed / jobs / 3600


def run_groups(runner: Runner, settings: dict[Any, dict[str, Any]], seeds: Sequence[int]) -> dict[Any, list[Result]]:
    """The results of each settings with each of the seeds, by the settings' labels."""
    results = iter(runner([each | {"seed": seed} for each in settings.values() for seed in seeds]))
    return {label: [next(results) for _ in seeds] for label in settings}


def together(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the tasks return, each run in a thread, so that the runs that they wait for share the runner's jobs."""
    with ThreadPoolExecutor(max(1, len(tasks))) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


def name_of(settings: dict[str, Any]) -> str:
    told = {name: value for name, value in settings.items() if name != "compile"}  # that is a matter of speed
    text = json.dumps(told, sort_keys=True)
    return f"{settings['optimizer']}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def read_result(folder: Path, settings: dict[str, Any], diverged: bool) -> Result:
    rows = metrics.read_rows(folder / metrics.FILE)
    curve = [[row["step"], round(row["val/loss"], 5)] for row in rows if "val/loss" in row]
    return Result(
        settings=settings,
        loss=math.inf if diverged else curve[-1][1],
        curve=curve,
        last={key: rows[-1][key] for key in KEPT if key in rows[-1]},
        parameters=sum(param.numel() for param in new_model(settings).parameters()),
        fingerprints=fingerprints(settings),
        commit=commit(),
    )


def completed(settings: dict[str, Any]) -> Settings:
    return complete(Settings(**settings))


def tokens_of(settings: dict[str, Any]) -> int:
    return settings["max_iters"] * settings["batch_size"] * settings["block_size"]


def new_model(settings: dict[str, Any]) -> GPT:
    """The model that a run with these settings begins with."""
    full = completed(settings)
    torch.manual_seed(full.seed)
    return GPT(shape_of(full, open_data(full.dataset, full.block_size), None))


def fingerprints(settings: dict[str, Any]) -> dict[str, str]:
    """What compared runs share: hashes of their batches in order, their initial weights, and the validation blocks."""
    full = completed(settings)
    data = open_data(full.dataset, full.block_size)
    hashes = {"batches": hashlib.sha256(), "initial_weights": hashlib.sha256(), "validation": hashlib.sha256()}
    for step in range(1, full.max_iters + 1):
        hashes["batches"].update(data.train_rows(full.seed, step, full.batch_size, 0, full.batch_size).numpy())
    for weight in new_model(settings).state_dict().values():
        hashes["initial_weights"].update(weight.numpy())
    hashes["validation"].update(data.val_rows(data.val_blocks(full.eval_sequences)).numpy())
    return {name: digest.hexdigest()[:16] for name, digest in hashes.items()}


def commit() -> str | None:
    """The commit of this program, with `-dirty` at its end where tracked files differ; None outside a git checkout."""
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
