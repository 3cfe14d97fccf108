"""Writing checkpoints while training goes on."""

import dataclasses
import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model import GPT
from records.checkpoints import FILES, SUMS, Progress, checksum, folders, last_good, step_of
from run.errors import Unwritten, is_out_of_memory, warn
from run.files import flush, write_json
from run.machine import Machine
from run.settings import Settings
from tokens.token_files import TokenData
from training.optimizers import state_by_name


class CheckpointWriter:
    """Writes a run's checkpoints in a thread of rank 0, so that the loop waits for neither the copies nor the disk:

        writer.begin(progress)     the weights and the optimizer's state are being copied; they must not change
        …                          the next gradient needs them as they are
        writer.wait_for_copies()   before the next update
        …
        writer.finish()            before the process ends, which leaving it as a context does, too

    The copies, as large as weights and optimizer state together, stay in the host's memory from one checkpoint to the
    next.
    """

    def __init__(
        self,
        out_dir: Path,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        data: TokenData,
        machine: Machine,
    ):
        self.out_dir, self.model, self.optimizer, self.machine = out_dir, model, optimizer, machine
        self.keep = settings.keep_checkpoints
        self.description = {
            "tokenizer": data.tokenizer,
            "data": data.fingerprint(),
            "model": dataclasses.asdict(model.config),
            "settings": dataclasses.asdict(settings),
        }
        self.complaint: str | None = None  # why the last checkpoint could not be written
        self._thread = ThreadPoolExecutor(1)
        self._cuda = machine.device.type == "cuda"
        self._streams = torch.cuda if self._cuda else torch.cpu  # whose streams and events do nothing
        self._stream, self._ready, self._copied = self._streams.Stream(), self._streams.Event(), self._streams.Event()
        self._asked_for = threading.Event()  # the copies
        self._asked_for.set()
        self._written: Future | None = None
        self._copies: dict[str, dict[str, Tensor]] = {}

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def begin(self, progress: Progress) -> None:
        """Start with the checkpoint of a step. Waits for the one before to be written."""
        self.finish()
        if self.machine.ranks.is_main:
            weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
            state = state_by_name(self.model, self.optimizer)
            self._ready.record()
            self._asked_for.clear()
            self._written = self._thread.submit(self._copy_and_write, dataclasses.replace(progress), weights, state)

    def wait_for_copies(self) -> None:
        self._asked_for.wait()
        self._copied.wait()  # a GPU waits, not the host

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is on the disk, or has failed with a warning and a `complaint`."""
        # Even if a rank is lost: the copies wait for no exchange, as the loop had the step's losses when they began.
        if self._written:
            self.complaint = self._written.result()
            self._written = None

    def finish_or_fail(self) -> None:
        """On all ranks: wait until the checkpoint that was begun is on the disk; Unwritten where it failed."""
        self.finish()
        complaint = self.machine.ranks.broadcast_object(self.complaint)
        if complaint:
            raise Unwritten(f"{complaint}; {last_good(self.out_dir)}")

    def _copy_and_write(self, progress: Progress, weights: dict[str, Tensor], state: dict[str, Tensor]) -> str | None:
        try:
            try:
                with self._streams.stream(self._stream):
                    self._ready.wait()
                    self._copy("model.safetensors", weights)
                    self._copy("optimizer.safetensors", state)
                    self._copied.record()
            finally:
                self._asked_for.set()
            self._copied.synchronize()
            description = {"progress": dataclasses.asdict(progress)} | self.description
            write(self.out_dir, progress.step, self._copies, description)
        except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            complaint = f"the checkpoint of step {progress.step} could not be written: {error}"
            warn(f"{complaint}; the run goes on")  # a full disk, say, is no reason to lose it
            return complaint
        try:
            prune(self.out_dir, self.keep, progress.best_step)
        except OSError as error:
            warn(f"older checkpoints could not be removed: {error}")
        return None

    def _copy(self, file: str, tensors: dict[str, Tensor]) -> None:
        copies = self._copies.setdefault(file, {})
        for name, tensor in tensors.items():
            if name not in copies:
                copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=self._cuda)
            copies[name].copy_(tensor, non_blocking=self._cuda)


def write(out_dir: Path, step: int, tensors: dict[str, dict[str, Tensor]], description: dict[str, Any]) -> None:
    """Write the files beside and rename their folder into place when the disk has them."""
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
            doomed = folder.with_name(folder.name + ".tmp")
            folder.rename(doomed)
            shutil.rmtree(doomed)


def set_aside(out_dir: Path, step: int) -> None:
    """Rename checkpoints of steps after `step`, which are damaged, so that the run can write these steps anew."""
    for folder in folders(out_dir):
        if step_of(folder) > step:
            aside = folder.with_name(folder.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
