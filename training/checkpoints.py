"""Checkpoints: folders that are either whole or absent, and that hold no code.

out_dir/checkpoints/step_00001000/model.safetensors       the weights
                                 /optimizer.safetensors   the optimizer's state, as <parameter>/<name of the state>
                                 /state.json              everything else
"""

import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import GPT, GPTConfig
from training.errors import UserError
from training.settings import Settings

STEP_FOLDER = re.compile(r"step_(\d{8,})")


@dataclass
class Progress:
    """What a run has to remember besides its weights and its optimizer."""

    started_from: str = "scratch"  # or the pretrained weights, whose shape the model then has
    step: int = 0  # completed updates
    seconds: float = 0.0  # of training so far
    clipped_steps: int = 0  # updates whose gradient was clipped
    val_loss: float | None = None  # at this step
    best_val_loss: float | None = None


def save(
    out_dir: Path, model: GPT, optimizer: torch.optim.Optimizer, progress: Progress, settings: Settings, tokenizer: str
) -> Path:
    """Write the checkpoint of a step, then drop all but the newest `keep_checkpoints` and the best one."""
    folder = out_dir / "checkpoints" / f"step_{progress.step:08d}"
    scratch = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, scratch / "model.safetensors")
    state = {
        f"{names[parameter]}/{key}": value.contiguous()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    save_file(state, scratch / "optimizer.safetensors")
    description = {
        "progress": dataclasses.asdict(progress),
        "tokenizer": tokenizer,
        "model": dataclasses.asdict(model.config),
        "settings": dataclasses.asdict(settings),
    }
    write_json(scratch / "state.json", description)
    for path in (*scratch.iterdir(), scratch):
        flush(path)
    shutil.rmtree(folder, ignore_errors=True)  # the same step again, after an evaluation without an update
    scratch.rename(folder)
    flush(folder.parent)
    prune(out_dir, settings.keep_checkpoints)
    return folder


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folders(out_dir: Path) -> list[Path]:
    """The whole checkpoints under `out_dir`, oldest first."""
    found = [path for path in (out_dir / "checkpoints").glob("step_*") if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def prune(out_dir: Path, keep: int) -> None:
    found = folders(out_dir)
    losses = {folder: read_state(folder)["progress"]["val_loss"] for folder in found}
    best = min(found, key=lambda folder: losses[folder])
    for folder in found[:-keep]:
        if folder != best:
            shutil.rmtree(folder)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and its description; the tensors are read when they are asked for."""

    folder: Path
    config: GPTConfig
    progress: Progress
    settings: dict[str, Any]
    tokenizer: str

    def load_model(self, model: GPT) -> None:
        weights = self._tensors("model.safetensors")
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{self.folder} is damaged: {str(error).splitlines()[-1].strip()}") from None

    def load_optimizer(self, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        """Continue with the saved state; the hyperparameters stay those of `optimizer`."""
        names = {parameter: name for name, parameter in model.named_parameters()}
        params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbers = {names[parameter]: number for number, parameter in enumerate(params)}
        state: dict[int, dict[str, Tensor]] = {}
        for path, tensor in self._tensors("optimizer.safetensors").items():
            name, _, key = path.rpartition("/")
            if name not in numbers:
                raise UserError(f"{self.folder} is damaged: its optimizer state names an unknown parameter {name!r}")
            state.setdefault(numbers[name], {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder / name} cannot be read: {error}") from None


def newest(out_dir: Path) -> Checkpoint:
    """The newest checkpoint of a run; UserError where there is none or it is damaged."""
    found = folders(out_dir)
    if not found:
        raise UserError(f"no checkpoint in {out_dir}: train first, or name another folder with --out_dir=FOLDER")
    state = read_state(found[-1])
    try:
        return Checkpoint(
            found[-1],
            GPTConfig(**state["model"]),
            Progress(**state["progress"]),
            state["settings"],
            state["tokenizer"],
        )
    except (KeyError, TypeError):
        raise UserError(f"{found[-1] / 'state.json'} is damaged or of another version of this program") from None


def read_state(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'state.json'} cannot be read: {error}") from None


def check_same_run(checkpoint: Checkpoint, config: GPTConfig, settings: Settings) -> list[str]:
    """Refuse a checkpoint of another architecture or optimizer. Returns a line for each other setting that changed."""
    for name, here in dataclasses.asdict(config).items():
        there = getattr(checkpoint.config, name)
        if here != there and name != "dropout":
            raise UserError(f"{name} = {here}, but the checkpoint {checkpoint.folder} was trained with {there}")
    now = dataclasses.asdict(settings)
    if checkpoint.settings.get("optimizer") != settings.optimizer:
        there = checkpoint.settings.get("optimizer")
        raise UserError(f"optimizer = {settings.optimizer}, but {checkpoint.folder} was trained with {there}")
    free = {"init_from", "out_dir", "eval_only", "wandb_run_name"}
    return [
        f"{name} was {checkpoint.settings.get(name)}, is now {value}"
        for name, value in now.items()
        if name not in free and checkpoint.settings.get(name) != value
    ]
