"""Checkpoints: folders that are either whole or absent, and that hold no code.

out_dir/checkpoints/step_00001000/model.safetensors       the weights
                                 /optimizer.safetensors   the optimizer's state, as <parameter>/<name of the state>
                                 /state.json              everything else
"""

import dataclasses
import json
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
from training.data import TokenData
from training.errors import UserError
from training.files import flush, write_json
from training.settings import Settings
from training.tokenizers import TOKENIZERS

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
    best_step: int | None = None  # of the best validation loss


def save(
    out_dir: Path, model: GPT, optimizer: torch.optim.Optimizer, progress: Progress, settings: Settings, data: TokenData
) -> Path:
    """Write the checkpoint of a step, then drop all but the newest `keep_checkpoints` and the best one."""
    folder = out_dir / "checkpoints" / f"step_{progress.step:08d}"
    for unfinished in folder.parent.glob("*.tmp"):
        shutil.rmtree(unfinished)
    scratch = folder.with_name(folder.name + ".tmp")
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
        "tokenizer": data.tokenizer,
        "data": data.checksum,
        "model": dataclasses.asdict(model.config),
        "settings": dataclasses.asdict(settings),
    }
    write_json(scratch / "state.json", description)
    for path in (*scratch.iterdir(), scratch):
        flush(path)
    scratch.rename(folder)
    flush(folder.parent)
    prune(out_dir, settings.keep_checkpoints, progress.best_step)
    return folder


def folders(out_dir: Path) -> list[Path]:
    """The whole checkpoints under `out_dir`, oldest first."""
    found = [path for path in (out_dir / "checkpoints").glob("step_*") if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def prune(out_dir: Path, keep: int, best_step: int | None) -> None:
    """Drop all but the newest `keep` checkpoints and the best one. A folder loses its name before its files."""
    for folder in folders(out_dir)[:-keep]:
        if step_of(folder) != best_step:
            doomed = folder.with_name(folder.name + ".tmp")
            folder.rename(doomed)
            shutil.rmtree(doomed)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and its description; the tensors are read when they are asked for."""

    folder: Path
    config: GPTConfig
    progress: Progress
    settings: dict[str, Any]
    tokenizer: str
    data: dict[str, str] | None  # checksums of the data set's files, where they are known

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
            if tensor.dim() and tensor.shape != params[numbers[name]].shape:
                raise UserError(f"{self.folder} is damaged: the optimizer state {path} has another shape")
            state.setdefault(numbers[name], {})[key] = tensor
        kinds = {frozenset(values) for values in state.values()}
        if len(kinds) > 1 or len(state) != (len(params) if self.progress.step else 0):
            raise UserError(f"{self.folder} is damaged: its optimizer state is incomplete")
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
    path = found[-1] / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        config, progress = GPTConfig(**state["model"]), Progress(**state["progress"])
        settings, tokenizer, data = state["settings"], state["tokenizer"], state["data"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged, or of another version of this program") from None
    sizes = (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
    sane = all(type(size) is int and 0 < size < 2**31 for size in sizes) and config.n_embd % config.n_head == 0
    if (
        not sane
        or tokenizer not in list(TOKENIZERS)
        or progress.step != step_of(found[-1])
        or type(settings) is not dict
    ):
        raise UserError(f"{path} is damaged: its values are impossible")
    return Checkpoint(found[-1], config, progress, settings, tokenizer, data)


def check_same_run(checkpoint: Checkpoint, config: GPTConfig, settings: Settings, data: TokenData) -> list[str]:
    """Refuse a checkpoint of another architecture or optimizer. Returns a line for each other setting that changed."""
    for name, here in dataclasses.asdict(config).items():
        there = getattr(checkpoint.config, name)
        if here != there and name != "dropout":
            raise UserError(f"{name} = {here}, but the checkpoint {checkpoint.folder} was trained with {there}")
    now = dataclasses.asdict(settings)
    if checkpoint.settings.get("optimizer") != settings.optimizer:
        there = checkpoint.settings.get("optimizer")
        raise UserError(f"optimizer = {settings.optimizer}, but {checkpoint.folder} was trained with {there}")
    if checkpoint.data != data.checksum:
        raise UserError(f"the data set {data.folder} is not the one that {checkpoint.folder} was trained on")
    free = {"init_from", "out_dir", "eval_only", "wandb_run_name"}
    return [
        f"{name} was {checkpoint.settings.get(name)}, is now {value}"
        for name, value in now.items()
        if name not in free and checkpoint.settings.get(name) != value
    ]
