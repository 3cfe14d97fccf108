"""Checkpoints: folders that are either whole or absent, and that hold no code.

out_dir/checkpoints/step_00001000/model.safetensors       the weights
                                 /optimizer.safetensors   the optimizer's state, as <parameter>/<name of the state>
                                 /state.json              everything else
                                 /SHA256SUMS              checksums of the three, as `sha256sum -c` reads them
"""

import dataclasses
import hashlib
import re
import shutil
import threading
import typing
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import GPT, MAX_LAYERS, GPTConfig
from run.errors import Unwritten, UserError, is_out_of_memory, warn
from run.files import flush, parse_object, read_small, write_json
from run.machine import Machine
from run.settings import Settings, shorten
from tokens.token_files import TokenData
from tokens.tokenizers import TOKENIZERS
from training.optimizers import STATE, gather_state, own_part, own_state

STEP_FOLDER = re.compile(r"step_(\d{8,})")
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
SUMS = "SHA256SUMS"
HEADER_BYTES = 2**20  # more than a safetensors file has besides its tensors


@dataclass
class Progress:
    """What a run has to remember besides its weights and its optimizer."""

    started_from: str = "scratch"  # or the pretrained weights, whose shape the model then has
    step: int = 0  # completed updates
    seconds: float = 0.0  # of training so far
    clipped_steps: int = 0  # updates whose gradient was clipped
    val_loss: float | None = None  # of the last evaluation
    best_val_loss: float | None = None
    best_step: int | None = None  # of the best validation loss


class Writer:
    """Writes a run's checkpoints in a thread of rank 0, so that the loop waits for neither the copies nor the disk:

        writer.begin(progress)     the weights and the optimizer's state are being copied; they must not change
        …                          the next gradient needs them as they are
        writer.wait_for_copies()   before the next update
        …
        writer.finish()            before the process ends, which leaving it as a context does, too

    The copies, as large as weights and optimizer state together, stay in the host's memory from one checkpoint to the
    next. An optimizer that is shared out over the ranks is gathered, and copied, within `begin`.
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
        self._copied = threading.Event()
        self._copied.set()
        self._written: Future | None = None
        self._copies: dict[str, dict[str, Tensor]] = {name: {} for name in FILES[:2]}

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def begin(self, progress: Progress) -> None:
        """Start with the checkpoint of a step. Waits for the one before to be written."""
        self.finish()
        weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        state: dict[str, Tensor] = {}
        if own_part(self.optimizer) is self.optimizer:
            state = own_state(self.model, self.optimizer)
        else:
            for path, tensor in gather_state(self.model, self.optimizer, self.machine.ranks, self.machine.device):
                if self.machine.ranks.is_main:
                    self._copy("optimizer.safetensors", path, tensor)
        if self.machine.ranks.is_main:
            self._copied.clear()
            self._written = self._thread.submit(self._copy_and_write, dataclasses.replace(progress), weights, state)

    def wait_for_copies(self) -> None:
        self._copied.wait()

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is on the disk, or has failed with a warning and a `complaint`."""
        if self._written:
            self.complaint = self._written.result()
            self._written = None

    def finish_or_fail(self) -> None:
        """On all ranks: wait until the checkpoint that was begun is on the disk; Unwritten where it failed."""
        self.finish()
        complaint = self.machine.ranks.share(self.complaint)
        if complaint:
            raise Unwritten(f"{complaint}; {last_kept(self.out_dir)}")

    def _copy(self, file: str, name: str, tensor: Tensor) -> None:
        copies = self._copies[file]
        if name not in copies:
            copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=self.machine.device.type == "cuda")
        copies[name].copy_(tensor)

    def _copy_and_write(self, progress: Progress, weights: dict[str, Tensor], state: dict[str, Tensor]) -> str | None:
        try:
            try:
                for file, tensors in zip(FILES, (weights, state), strict=False):
                    for name, tensor in tensors.items():
                        self._copy(file, name, tensor)
            finally:
                self._copied.set()
            write(
                self.out_dir,
                progress.step,
                self._copies,
                {"progress": dataclasses.asdict(progress)} | self.description,
            )
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


def write(out_dir: Path, step: int, tensors: dict[str, dict[str, Tensor]], description: dict[str, Any]) -> None:
    """Write the files beside and rename their folder into place when the disk has them."""
    folder = out_dir / "checkpoints" / f"step_{step:08d}"
    for unfinished in folder.parent.glob("*.tmp"):
        remove(unfinished)
    scratch = folder.with_name(folder.name + ".tmp")
    try:
        scratch.mkdir(parents=True)
        for name, named in tensors.items():
            save_file(named, scratch / name)
        write_json(scratch / "state.json", description)
        sums = "".join(f"{digest(scratch / name)}  {name}\n" for name in FILES)
        (scratch / SUMS).write_text(sums, encoding="utf-8")
        for path in (*scratch.iterdir(), scratch):
            flush(path)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)  # make room; what stays is removed with the next checkpoint
        raise
    flush(folder.parent)


def folders(out_dir: Path) -> list[Path]:
    """The checkpoints under `out_dir`, oldest first."""
    found = [path for path in (out_dir / "checkpoints").glob("step_*") if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def last_kept(out_dir: Path) -> str:
    found = folders(out_dir)
    return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def prune(out_dir: Path, keep: int, best_step: int | None) -> None:
    """Drop all but the newest `keep` checkpoints and the best one. A folder loses its name before its files."""
    for folder in folders(out_dir)[:-keep]:
        if step_of(folder) != best_step:
            doomed = folder.with_name(folder.name + ".tmp")
            folder.rename(doomed)
            remove(doomed)


def set_aside(out_dir: Path, step: int) -> None:
    """Rename checkpoints of steps after `step`, which are damaged, so that the run can write these steps anew."""
    for folder in folders(out_dir):
        if step_of(folder) > step:
            aside = folder.with_name(folder.name + ".damaged")
            remove(aside)
            folder.rename(aside)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Damaged(UserError):
    """A checkpoint is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and its description; the tensors are read when they are asked for."""

    folder: Path
    config: GPTConfig
    progress: Progress
    settings: dict[str, Any]
    tokenizer: str
    data: str  # the data set's fingerprint

    def load_model(self, model: GPT) -> None:
        weights = self._tensors("model.safetensors")
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise Damaged(f"{self.folder} is damaged: {str(error).splitlines()[-1].strip()}") from None

    def optimizer_state(self, model: GPT) -> dict[str, Tensor]:
        """The optimizer's state, as <parameter>/<name of the state>."""
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        state = self._tensors("optimizer.safetensors")
        kinds: dict[str, set[str]] = {}
        for path, tensor in state.items():
            name, _, key = path.rpartition("/")
            if name not in shapes:
                raise Damaged(f"{self.folder} is damaged: its optimizer state names an unknown parameter {name[:80]!r}")
            if tensor.dim() and tensor.shape != shapes[name]:
                raise Damaged(f"{self.folder} is damaged: the optimizer state {path[:80]!r} has another shape")
            kinds.setdefault(name, set()).add(key)
        expected = STATE[self.settings["optimizer"]]
        if any(keys != expected for keys in kinds.values()) or len(kinds) != (len(shapes) if self.progress.step else 0):
            raise Damaged(f"{self.folder} is damaged: its optimizer state is incomplete")
        return state

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{self.folder / name} cannot be read: {error}") from None


def newest(out_dir: Path) -> Checkpoint:
    """The newest checkpoint of a run that is as it was written, with a warning of newer ones that are not; UserError
    where there is none.
    """
    found = folders(out_dir)
    if not found:
        raise UserError(f"no checkpoint in {out_dir}: train first, or name another folder with --out_dir=FOLDER")
    complaints = []
    for folder in reversed(found):
        try:
            checkpoint = read(folder)
        except Damaged as error:
            complaints.append(str(error))
            continue
        for complaint in complaints:
            warn(f"{complaint}: taking {folder.name}")
        return checkpoint
    raise UserError(f"{complaints[0]}; there is no other whole checkpoint in {out_dir}")


def read(folder: Path) -> Checkpoint:
    """A checkpoint that is as it was written, or Damaged. It may come from a stranger: reading it takes no more memory
    than its files are long, and they may not be longer than its description says.
    """
    path = folder / SUMS
    try:
        sums = read_small(path).decode("ascii")
        path = folder / "state.json"
        text = read_small(path)
        state = parse_object(text)
        config, progress = GPTConfig(**state["model"]), Progress(**state["progress"])
        checkpoint = Checkpoint(folder, config, progress, state["settings"], state["tokenizer"], state["data"])
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"{path} is damaged, or of another version of this program") from None
    sizes = (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
    if not (
        all(map(has_its_types, (config, progress)))
        and all(0 < size < 2**31 for size in sizes)
        and config.n_layer <= MAX_LAYERS
        and config.n_embd % config.n_head == 0
        and checkpoint.tokenizer in list(TOKENIZERS)
        and progress.step == step_of(folder)
        and type(checkpoint.settings) is dict
        and checkpoint.settings.get("optimizer") in list(STATE)
    ):
        raise Damaged(f"{path} is damaged: its values are impossible")
    expected = 4 * config.parameters
    check_size(folder / "model.safetensors", expected, expected + HEADER_BYTES)
    check_size(folder / "optimizer.safetensors", 0, 3 * expected + HEADER_BYTES)
    listed = re.findall(r"([0-9a-f]{64})  (.+)\n", sums)
    if [name for _, name in listed] != list(FILES) or "".join(f"{of}  {name}\n" for of, name in listed) != sums:
        raise Damaged(f"{folder / SUMS} is damaged")
    for of, name in listed:
        actual = hashlib.sha256(text).hexdigest() if name == "state.json" else digest(folder / name)
        if actual != of:
            raise Damaged(f"{folder / name} is damaged: its checksum is not that of {SUMS}")
    return checkpoint


def has_its_types(instance: Any) -> bool:
    return all(
        isinstance(getattr(instance, name), kind) for name, kind in typing.get_type_hints(type(instance)).items()
    )


def check_size(path: Path, least: int, most: int) -> None:
    if not path.is_file():
        raise Damaged(f"{path} is missing")
    if not least <= path.stat().st_size <= most:
        raise Damaged(f"{path} is damaged: its size is not what state.json implies")


def check_same_run(checkpoint: Checkpoint, config: GPTConfig, settings: Settings, data: TokenData) -> list[str]:
    """Refuse a checkpoint of another architecture, optimizer or data set. Returns a line for each other setting that
    changed.
    """
    for name, here in dataclasses.asdict(config).items():
        there = getattr(checkpoint.config, name)
        if here != there and name != "dropout":
            raise UserError(f"{name} = {here}, but the checkpoint {checkpoint.folder} was trained with {there}")
    now = dataclasses.asdict(settings)
    if checkpoint.settings.get("optimizer") != settings.optimizer:
        there = shorten(checkpoint.settings.get("optimizer"))
        raise UserError(f"optimizer = {settings.optimizer!r}, but {checkpoint.folder} was trained with {there}")
    if checkpoint.data != data.fingerprint():
        raise UserError(f"the data set {data.folder} is not the one that {checkpoint.folder} was trained on")
    free = {"init_from", "out_dir", "eval_only", "wandb_run_name"}
    return [
        f"{name} was {shorten(checkpoint.settings.get(name))}, is now {value!r}"
        for name, value in now.items()
        if name not in free and checkpoint.settings.get(name) != value
    ]
