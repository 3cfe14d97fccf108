"""The beginning of a run: its folder, the model it starts from, its data parallelism, and what it says of itself."""

import contextlib
import dataclasses
import sys
from pathlib import Path

import filelock
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data.token_files import TokenData
from model import GPT, GPTConfig
from run.errors import RankError, UserError
from run.files import write_json
from run.machine import Machine
from run.settings import Settings, shorten
from training.checkpoint_writer import set_aside
from training.checkpoints import Checkpoint, folders, newest, refuse_other_run
from training.metrics import FILE, drop_rows_after
from training.pretrained import load, tokenizer_of


class RunFolder(contextlib.AbstractContextManager):
    """The run's folder, which rank 0 alone uses. As a context manager it gives up its lock at the end."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.path = Path(settings.out_dir)
        self._found = folders(self.path)
        self._lock = filelock.FileLock(self.path / ".lock", blocking=False)

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def checkpoint_to_resume(self) -> Checkpoint | None:
        """What `init_from` asks for. Refuses a folder that holds another run, and writes nothing."""
        source = self.settings.init_from
        if source == "resume" or (source == "auto" and self._found):
            return newest(self.path)
        if not self._found or self.settings.eval_only:
            return None
        if source != "scratch" and (checkpoint := newest(self.path)).progress.started_from == source:
            return checkpoint  # the run that began with these weights
        raise UserError(f"{self.path} holds a run already: go on with --init_from=resume, or take another --out_dir")

    def begin(self, checkpoint: Checkpoint | None, settings: Settings) -> None:
        """Make the folder ready for the updates after `checkpoint`, or for those of a new run."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            drop_rows_after(self.path / FILE, checkpoint.progress.step if checkpoint else -1)
            if checkpoint:
                set_aside(self.path, checkpoint.progress.step)
            write_json(self.path / "settings.json", dataclasses.asdict(settings))
        except filelock.Timeout:
            raise UserError(f"another run is writing to {self.path}: stop it, or take another --out_dir") from None
        except (OSError, ValueError) as error:
            raise UserError(f"out_dir = {self.path} cannot be written to: {error}") from None


def check_same_job(settings: Settings, data: TokenData, machine: Machine) -> None:
    """Refuse a rank that was started with other settings or other data than rank 0."""
    mine = dataclasses.asdict(settings) | {"the data set's fingerprint": data.fingerprint()}
    for name, value in machine.ranks.broadcast_object(mine).items():
        if mine[name] != value:
            raise RankError(f"{name} = {mine[name]!r}, but rank 0 was started with {value!r}")


def make_model(settings: Settings, data: TokenData, machine: Machine, checkpoint: Checkpoint | None) -> GPT:
    """The model on this rank's device: rank 0 gives it the checkpoint's weights, and DDP sends them to the others."""
    if checkpoint:
        model = GPT(shape_of(settings, data, checkpoint))
        refuse_other_run(checkpoint, model.config, settings, data)
        if machine.ranks.is_main:
            checkpoint.load_model(model)
    elif settings.init_from in ("scratch", "auto"):
        model = GPT(shape_of(settings, data, checkpoint))
    else:
        source = settings.init_from
        model = load(source, settings.block_size, settings.dropout)
        tokenizer = tokenizer_of(source, model.config.vocab_size)
        if tokenizer.name != data.tokenizer or model.config.vocab_size < data.vocab_size:
            theirs = f"the data set {settings.dataset} has {data.vocab_size} of {data.tokenizer}"
            raise UserError(f"{source} has {model.config.vocab_size} tokens of {tokenizer.name}, but {theirs}")
    model.h.checkpoint_activations = settings.checkpoint_activations
    if machine.compile:
        model.compile()
    return model.to(machine.device)


def shape_of(settings: Settings, data: TokenData, checkpoint: Checkpoint | None) -> GPTConfig:
    """The model's shape: the settings', or the checkpoint's where its run began with pretrained weights."""
    if checkpoint and checkpoint.progress.started_from != "scratch":
        return dataclasses.replace(checkpoint.config, block_size=settings.block_size, dropout=settings.dropout)
    names = [field.name for field in dataclasses.fields(GPTConfig) if field.name != "vocab_size"]
    return GPTConfig(vocab_size=data.padded_vocab_size, **{name: getattr(settings, name) for name in names})


def as_used(settings: Settings, model: GPT, checkpoint: Checkpoint | None) -> Settings:
    """The settings with the model's shape and origin. UserError where the command line asks for another shape."""
    begun = checkpoint.progress.started_from if checkpoint else settings.init_from
    shape = {name: value for name, value in dataclasses.asdict(model.config).items() if name != "vocab_size"}
    asked = {argument.removeprefix("--").partition("=")[0] for argument in sys.argv[1:]}
    for name in asked & shape.keys():
        if getattr(settings, name) != shape[name]:
            raise UserError(f"{name} = {getattr(settings, name)!r}, but the weights {begun} have {shape[name]!r}")
    return dataclasses.replace(settings, init_from="scratch" if begun == "auto" else begun, **shape)


def wrap(model: nn.Module, machine: Machine) -> nn.Module:
    """The model as a training step calls it: in DDP, with rank 0's weights on every rank; as it is on one rank."""
    if machine.ranks.world_size == 1:
        return model
    # torch.compile cuts its graphs where buckets end: buckets no smaller than a block leave the blocks whole
    block = sum(param.nbytes for param in model.h[0].parameters()) // 2**20
    return DistributedDataParallel(model, bucket_cap_mb=max(25, block), gradient_as_bucket_view=True)


def form_buckets(model: nn.Module, machine: Machine, shape: tuple[int, int]) -> None:
    """Drop a first pass, on tokens of this shape: after it DDP forms its buckets, and with them the order of sums."""
    if isinstance(model, DistributedDataParallel):
        tokens = torch.zeros(shape, dtype=torch.int64, device=machine.device)
        with machine.forward_context():
            loss = model(tokens, tokens)
        loss.backward()
        model.zero_grad(set_to_none=False)  # as in a step, so that all steps take the same sums


def describe(settings: Settings, data: TokenData, machine: Machine, model: GPT, checkpoint: Checkpoint | None) -> None:
    """Say what the run is, on rank 0."""
    if not (data.folder / "meta.json").exists():
        machine.note(f"{data.folder} has no meta.json: GPT-2's vocabulary of 50257 tokens is assumed")
    if settings.warmup_iters > settings.max_iters:
        machine.note(f"warmup_iters = {settings.warmup_iters} is longer than the run: its rate stays below the peak")
    free, before = {"init_from", "out_dir", "eval_only", "wandb_run_name"}, checkpoint.settings if checkpoint else {}
    for name, value in dataclasses.asdict(settings).items():
        if checkpoint and name not in free and before.get(name) != value:
            was = shorten(before.get(name))
            machine.note(f"resuming with another setting: {name} was {was}, is now {value!r}")
    machine.note(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters on {machine.ranks.world_size} x"
        f" {machine.device.type} in {str(machine.dtype)[6:]}, {settings.optimizer}, {settings.batch_size} x"
        f" {settings.block_size} tokens a step,"
        f" steps {checkpoint.progress.step if checkpoint else 0} to {settings.max_iters}"
    )
