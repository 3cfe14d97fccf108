"""Writing checkpoints while training goes on."""

import contextlib
import dataclasses
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data.token_files import TokenData
from model import GPT
from run.errors import Unwritten, warn
from run.files import flush, write_json
from run.ranks import Ranks
from run.settings import Settings
from training.checkpoints import FILES, SUMS, Progress, checksum, folders, last_good, step_of
from training.optimizers import Optimizer, state_by_name


class CheckpointWriter(contextlib.AbstractContextManager):
    """Writes a run's checkpoints, on rank 0: `begin` copies them to the host, a thread writes them to the disk."""

    def __init__(
        self, out_dir: Path, model: GPT, optimizer: Optimizer, settings: Settings, data: TokenData, ranks: Ranks
    ):
        self.out_dir, self.model, self.optimizer, self.ranks = out_dir, model, optimizer, ranks
        self.keep = settings.keep_checkpoints
        self.description = {
            "tokenizer": data.tokenizer,
            "data": data.fingerprint(),
            "model": dataclasses.asdict(model.config),
            "settings": dataclasses.asdict(settings),
        }
        self._thread = ThreadPoolExecutor(1)
        self._written: Future | None = None  # gives why it could not be written, or None

    def __exit__(self, *_: object) -> None:
        self.finish()

    def begin(self, progress: Progress) -> None:
        """Start with the checkpoint of a step. Waits for the one before to be written."""
        self.finish()
        if self.ranks.is_main:
            state = state_by_name(self.model, self.optimizer)
            tensors = {"model.safetensors": dict(self.model.named_parameters()), "optimizer.safetensors": state}
            copies = {file: on_the_host(named) for file, named in tensors.items()}
            self._written = self._thread.submit(self._write, dataclasses.replace(progress), copies)

    def finish(self) -> str | None:
        """Wait until the checkpoint that was begun is on the disk. Returns why it failed, or None."""
        return self._written.result() if self._written else None

    def finish_or_fail(self) -> None:
        """On all ranks: wait until the checkpoint that was begun is on the disk; Unwritten where it failed."""
        if complaint := self.ranks.broadcast_object(self.finish()):
            raise Unwritten(f"{complaint}; {last_good(self.out_dir)}")

    def _write(self, progress: Progress, tensors: dict[str, dict[str, Tensor]]) -> str | None:
        try:
            write(self.out_dir, progress.step, tensors, {"progress": dataclasses.asdict(progress)} | self.description)
        except (OSError, SafetensorError, MemoryError) as error:
            complaint = f"the checkpoint of step {progress.step} could not be written: {error}"
            warn(f"{complaint}; the run goes on")  # a full disk, say
            return complaint
        prune(self.out_dir, self.keep, progress.best_step)
        return None


def on_the_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def write(out_dir: Path, step: int, tensors: dict[str, dict[str, Tensor]], description: dict[str, Any]) -> None:
    """Write a folder of another name, have the disk hold it, then rename it."""
    folder = out_dir / "checkpoints" / f"step_{step:08d}"
    for unfinished in folder.parent.glob("*.tmp"):
        shutil.rmtree(unfinished)
    scratch = folder.with_name(folder.name + ".tmp")
    try:
        scratch.mkdir(parents=True)
        for name, named in tensors.items():
            save_file(named, scratch / name)
        write_json(scratch / "state.json", description)
        sums = "".join(f"{checksum(scratch / name)}\n" for name in FILES)
        (scratch / SUMS).write_text(sums, encoding="utf-8")
        for path in (*scratch.iterdir(), scratch):
            flush(path)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)  # make room; what stays is removed with the next checkpoint
        raise
    flush(folder.parent)


def prune(out_dir: Path, keep: int, best_step: int | None) -> None:
    """Drop all but the newest `keep` checkpoints and the best one. A folder loses its name before its files."""
    for folder in folders(out_dir)[:-keep]:
        if step_of(folder) != best_step:
            with contextlib.suppress(OSError):  # no reason to lose a run: the next checkpoint tries again
                shutil.rmtree(folder.rename(folder.with_name(folder.name + ".tmp")))


def set_aside(out_dir: Path, step: int) -> None:
    """Rename checkpoints of steps after `step`, which are damaged, so that the run can write these steps anew."""
    for folder in folders(out_dir):
        if step_of(folder) > step:
            aside = folder.with_name(folder.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
