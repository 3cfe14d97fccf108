"""The beginning of a run: the model it starts from, and what it says of itself."""

import dataclasses
import os

from safetensors import SafetensorError

from model import GPT, GPTConfig
from records.checkpoints import Checkpoint, Progress
from run.errors import RankError, UserError
from run.machine import Machine
from run.settings import Settings
from tokens.token_files import TokenData


def check_same_job(settings: Settings, data: TokenData, machine: Machine) -> None:
    """Refuse a rank that was started with other settings or other data than rank 0."""
    mine = dataclasses.asdict(settings) | {"the data set's fingerprint": data.fingerprint()}
    for name, value in machine.ranks.broadcast_object(mine).items():
        if mine[name] != value:
            raise RankError(f"{name} = {mine[name]!r}, but rank 0 was started with {value!r}")


def started_from(settings: Settings) -> str:
    return "scratch" if settings.init_from == "auto" else settings.init_from


def make_model(settings: Settings, data: TokenData, checkpoint: Checkpoint | None) -> GPT:
    """A model of the shape that the settings ask for, or of the pretrained weights that the run started from. The
    weights of a checkpoint are not in it yet.
    """
    if (checkpoint.progress.started_from if checkpoint else started_from(settings)) == "scratch":
        names = [field.name for field in dataclasses.fields(GPTConfig) if field.name != "vocab_size"]
        chosen = {name: getattr(settings, name) for name in names}
        return GPT(GPTConfig(vocab_size=data.padded_vocab_size, **chosen))
    if checkpoint:
        return GPT(dataclasses.replace(checkpoint.config, block_size=settings.block_size, dropout=settings.dropout))
    return pretrained_model(settings, data)


def pretrained_model(settings: Settings, data: TokenData) -> GPT:
    name = settings.init_from
    if not name.startswith("gpt2") and not os.path.isdir(name):
        raise UserError(f"init_from = {name!r}: must be 'scratch', 'resume', 'auto', a hub name 'gpt2*' or a folder")
    try:
        model = GPT.from_pretrained(name, settings.block_size, settings.dropout)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"init_from = {name!r} cannot be loaded: {' '.join(str(error).split())}") from None
    if model.config.vocab_size < data.vocab_size:
        raise UserError(
            f"{name} has {model.config.vocab_size} tokens, but the data set {settings.dataset} has {data.vocab_size}"
        )
    return model


def describe(
    settings: Settings, machine: Machine, model: GPT, data: TokenData, progress: Progress, changes: list[str]
) -> None:
    """Say what the run is, on rank 0."""
    if not data.has_meta:
        machine.note(f"{data.folder} has no meta.json: GPT-2's vocabulary of 50257 tokens is assumed")
    if settings.warmup_iters > settings.max_iters:
        machine.note(f"warmup_iters = {settings.warmup_iters} is longer than the run: learning_rate is never reached")
    for change in changes:
        machine.note(f"resuming with another setting: {change}")
    machine.note(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters on {machine.ranks.count} x"
        f" {machine.device.type} in {str(machine.dtype)[6:]}, {settings.optimizer}, {settings.batch_size} x"
        f" {settings.block_size} tokens a step, steps {progress.step} to {settings.max_iters}"
    )
