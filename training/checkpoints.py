"""Checkpoints: folders that are either whole or absent, and that hold no code.

out_dir/checkpoints/step_00001000/model.safetensors       the weights
                                 /optimizer.safetensors   the optimizer's state, as <parameter>/<name of the state>
                                 /state.json              progress, settings, shape, tokenizer, the data's fingerprint
                                 /SHA256SUMS              checksums of the three, as `sha256sum -c` reads them

There is no state of a random generator: run/randomness.py derives all numbers from seed and step.
"""

import dataclasses
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from data.token_files import TokenData
from model import GPT, GPTConfig
from run.errors import UserError, warn
from run.files import read_json
from run.settings import Settings

STEP_FOLDER = re.compile(r"step_(\d{8,})")
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
SUMS = "SHA256SUMS"


class Damaged(UserError):
    """A checkpoint is not what was written."""


@dataclass
class Progress:
    """What a run has to remember besides its weights and its optimizer."""

    started_from: str = "scratch"  # or the name of pretrained weights
    step: int = 0  # completed updates
    seconds: float = 0.0  # spent training so far
    clipped_steps: int = 0  # updates whose gradient was clipped
    val_loss: float | None = None  # at the last evaluation
    best_val_loss: float | None = None
    best_step: int | None = None  # the step with best_val_loss


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
        model.load_state_dict(load_file(self.folder / "model.safetensors"))

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's state, as <parameter>/<name of the state>; empty before the first update."""
        return load_file(self.folder / "optimizer.safetensors")


def folders(out_dir: Path) -> list[Path]:
    """The checkpoints under `out_dir`, oldest first."""
    parent = out_dir / "checkpoints"
    if not os.path.isdir(parent):  # False for an impossible name, where pathlib raises
        return []
    return sorted((path for path in parent.iterdir() if STEP_FOLDER.fullmatch(path.name)), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def last_good(out_dir: Path) -> str:
    found = folders(out_dir)
    return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def find(folder: Path) -> Checkpoint:
    """The checkpoint in a checkpoint's folder, or the newest one in a run's; UserError for any other folder."""
    return read(folder.resolve()) if (folder / "state.json").is_file() else newest(folder)


def newest(out_dir: Path) -> Checkpoint:
    """A run's newest whole checkpoint, with a warning of newer ones that are damaged; UserError without any."""
    found = folders(out_dir)
    if not found:
        raise UserError(f"no checkpoint in {out_dir}: train first, or name another folder with --out_dir=FOLDER")
    complaints = []
    for folder in reversed(found):
        try:
            checkpoint = read(folder)
        except Damaged as error:
            complaints.append(str(error))
        else:
            for complaint in complaints:
                warn(f"{complaint}: taking {folder.name}")
            return checkpoint
    raise UserError(f"{complaints[0]}; there is no other whole checkpoint in {out_dir}")


def read(folder: Path) -> Checkpoint:
    """A checkpoint that is as it was written, or Damaged."""
    try:
        verify(folder)
        state = read_json(folder / "state.json")
        config, progress = GPTConfig(**state["model"]), Progress(**state["progress"])
        if STEP_FOLDER.fullmatch(folder.name) and progress.step != step_of(folder):
            raise ValueError
        return Checkpoint(folder, config, progress, state["settings"], state["tokenizer"], state["data"])
    except OSError as error:
        raise Damaged(f"{error.filename} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"{folder / 'state.json'} is damaged, or of another version of this program") from None


def verify(folder: Path) -> None:
    """Damaged where a checksum does not match."""
    sums = (folder / SUMS).read_text(errors="replace").splitlines()
    for name in FILES:
        if checksum(folder / name) not in sums:
            raise Damaged(f"{folder / name} is damaged: its checksum is not that of {SUMS}")


def checksum(path: Path) -> str:
    """A file's line of SHA256SUMS."""
    with open(path, "rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}"


def refuse_other_run(checkpoint: Checkpoint, config: GPTConfig, settings: Settings, data: TokenData) -> None:
    """UserError where the checkpoint is of another architecture, optimizer or data set."""
    now = dataclasses.asdict(config) | {"optimizer": settings.optimizer}
    before = dataclasses.asdict(checkpoint.config) | {"optimizer": checkpoint.settings["optimizer"]}
    for name, value in now.items():
        if value != before[name] and name != "dropout":
            what = f"the checkpoint {checkpoint.folder} was trained with {before[name]!r}"
            raise UserError(f"{name} = {value!r}, but {what}")
    if checkpoint.data != data.fingerprint():
        raise UserError(f"the data set {data.folder} is not the one that {checkpoint.folder} was trained on")
