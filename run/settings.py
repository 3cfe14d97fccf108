"""The settings of a run: one typed dataclass, filled from config files and the command line, where later wins."""

import ast
import dataclasses
import difflib
import math
import os
import sys
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from run.errors import UserError

ROOT = Path(__file__).resolve().parent.parent

# What a setting left at None means for each optimizer. Sources: the Sophia paper (arXiv 2305.14342) and its released
# code for AdamW, Lion's betas and Sophia. Lion's weight decay is not stated there: its authors (arXiv 2302.06675)
# advise 3 to 10 times AdamW's, this is 5 times. The paper has beta1 0.96 for Sophia, the released code 0.965.
OPTIMIZER_DEFAULTS = {
    "adamw": {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1},
    "lion": {"beta1": 0.95, "beta2": 0.98, "weight_decay": 0.5},
    "sophiah": {"beta1": 0.96, "beta2": 0.99, "weight_decay": 0.2, "rho": 0.01, "hessian_batch_size": 32},
    "sophiag": {"beta1": 0.96, "beta2": 0.99, "weight_decay": 0.2, "rho": 0.05, "hessian_batch_size": 240},
    "muon": {"beta1": 0.95, "beta2": 0.95, "weight_decay": 0.1},
}
AVERAGED_HESSIAN_BATCH_SIZE = 32  # sophiag's with hessian_estimator=averaged needs fewer sequences


def setting(default: Any, help: str, **bounds: float) -> Any:
    """A field with its help text. Bounds: `least`, and `most` (inclusive) or `below` (exclusive)."""
    return dataclasses.field(default=default, metadata={"help": help} | bounds)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting of train.py. The defaults are the paper's GPT-2 small on OpenWebText."""

    # input and output
    out_dir: str = setting("out", "folder for checkpoints, settings.json and metrics.jsonl")
    init_from: str = setting("scratch", "'scratch', 'resume', 'auto' (resume if it can), a hub name, folder or ckpt.pt")
    dataset: str = setting("openwebtext", "name of a folder in data/, or a path with a slash in it")
    eval_interval: int = setting(1000, "steps between evaluations; each writes a checkpoint", least=1)
    eval_sequences: int = setting(0, "validation blocks to evaluate, evenly spread; 0 takes all of the split", least=0)
    eval_only: bool = setting(False, "evaluate once and stop; writes nothing")
    log_interval: int = setting(10, "steps between rows of metrics.jsonl", least=1)
    keep_checkpoints: int = setting(2, "newest checkpoints to keep; the best one is kept besides", least=1)
    wandb_log: bool = setting(False, "log to Weights & Biases too")
    wandb_project: str = setting("gpt2-sophia", "wandb project")
    wandb_run_name: str | None = setting(None, "wandb run name; None: the name of out_dir")
    # model
    n_layer: int = setting(12, "transformer blocks", least=1, most=1000)
    n_head: int = setting(12, "attention heads", least=1)
    n_embd: int = setting(768, "channels, a multiple of n_head", least=1, most=2**16)
    block_size: int = setting(1024, "context length in tokens", least=1)
    dropout: float = setting(0.0, "dropout probability; 0 is right for pretraining", least=0, below=1)
    bias: bool = setting(False, "biases in Linear and LayerNorm, as in OpenAI's GPT-2")
    scale_attn_by_inverse_layer_idx: bool = setting(False, "divide attention scores by the layer's number, from 1")
    exact_gelu: bool = setting(False, "GELU without GPT-2's approximation by tanh, as in nanoGPT")
    # batch
    batch_size: int = setting(480, "sequences per optimizer step, over all ranks", least=1, most=2**16)
    micro_batch_size: int = setting(12, "sequences per forward pass on one device", least=1, most=2**16)
    checkpoint_activations: bool = setting(False, "compute each block's activations twice and keep fewer in memory")
    # optimizer
    optimizer: Literal["adamw", "lion", "sophiah", "sophiag", "muon"] = setting("adamw", "the optimizer")
    learning_rate: float = setting(6e-4, "peak learning rate", least=0)
    weight_decay: float | None = setting(None, "decoupled, on matrices but not embeddings; None: by optimizer", least=0)
    beta1: float | None = setting(None, "decay of the momentum; None: by optimizer", least=0, below=1)
    beta2: float | None = setting(None, "decay of second moment, h, or Lion's m; None: by optimizer", least=0, below=1)
    grad_clip: float = setting(1.0, "largest global gradient norm; 0 turns clipping off", least=0)
    rho: float | None = setting(None, "Sophia: larger, fewer coordinates are clipped; None: by optimizer", least=0)
    hessian_interval: int = setting(10, "Sophia: steps between curvature estimates; the first step has one", least=1)
    hessian_batch_size: int | None = setting(None, "Sophia: sequences per estimate; None: 32 (H, averaged), 240 (G)")
    hessian_micro_batch_size: int | None = setting(None, "sophiah: sequences a pass; None: half a micro-batch", least=1)
    hessian_estimator: Literal["paper", "averaged"] = setting("paper", "sophiag: one squared gradient, or mean of many")
    hessian_group_size: int = setting(4, "sophiag, averaged: sequences per group, in one forward pass", least=1)
    hessian_bias_correction: bool = setting(False, "Sophia: divide h by 1 - beta2^estimates; not the paper's")
    # learning-rate schedule
    max_iters: int = setting(100_000, "optimizer steps of the whole run", least=1)
    decay_lr: bool = setting(True, "cosine decay to min_lr; otherwise constant after the warm-up")
    warmup_iters: int = setting(2000, "steps of linear warm-up", least=0)
    lr_decay_iters: int | None = setting(None, "step at which min_lr is reached; None: max_iters", least=1)
    min_lr: float | None = setting(None, "final learning rate; None: 0.05 * learning_rate, as in the paper", least=0)
    # machine
    backend: Literal["auto", "nccl", "gloo"] = setting("auto", "torch.distributed's; auto: nccl on CUDA, else gloo")
    timeout: int = setting(600, "seconds that a rank waits for the others before it ends the run", least=1, most=10**6)
    device: str = setting("auto", "'auto', 'cpu', 'cuda', 'cuda:1', 'mps', …")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "of matrix products; weights stay float32")
    float32_matmul_precision: Literal["highest", "high", "medium"] = setting("high", "float32 on CUDA; high is TF32")
    compile: bool = setting(True, "torch.compile the model and the optimizer")
    deterministic: bool = setting(False, "only kernels that give the same bits twice; on CUDA not all do")
    seed: int = setting(1337, "of the weights, the order of the data and the draws for curvature", least=0)

    @property
    def uses_curvature(self) -> bool:
        return self.optimizer in ("sophiah", "sophiag")


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
# What a setting may be: `float | None` gives (float, NoneType), Literal["auto", "gloo"] gives ("auto", "gloo").
ALLOWED = {name: typing.get_args(field.type) or (field.type,) for name, field in FIELDS.items()}
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}
USAGE = """usage: python train.py [CONFIG.py …] [--name=value …]     later wins
A config file holds lines of the form name = LITERAL, or include = 'other.py'."""


def read(arguments: Sequence[str]) -> Settings:
    """Settings from `[CONFIG.py …] [--name=value …]`, later wins, checked and complete (no None that has a default)."""
    values, remaining, where = {}, list(arguments), "the command line"
    while remaining:
        argument = remaining.pop(0)
        if argument in ("-h", "--help"):
            print(USAGE, *(f"  --{name:32} {meaning(name)}" for name in FIELDS), sep="\n")
            sys.exit(0)
        if not argument.startswith("-"):
            values |= read_config(Path(argument))
            continue
        name, equals, text = argument.removeprefix("--").partition("=")
        check_name(name, where)
        if not equals and not remaining:
            raise UserError(f"{name} in {where} has no value: --{name}=VALUE")
        values[name] = check_value(name, from_text(name, text if equals else remaining.pop(0)), where)
    return complete(Settings(**values))


def meaning(name: str) -> str:
    return f"{FIELDS[name].metadata['help']} ({type_name(name)}; default: {FIELDS[name].default})"


def type_name(name: str) -> str:
    return " or ".join(TYPE_NAMES.get(allowed, allowed) for allowed in ALLOWED[name])


def from_text(name: str, text: str) -> Any:
    """A value on the command line: a literal, as in a config file, unless the setting is text."""
    if text != "None" and (str in ALLOWED[name] or isinstance(ALLOWED[name][0], str)):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text  # check_value says what is wrong with it


def check_name(name: str, where: str) -> None:
    if name not in FIELDS:
        raise UserError(f"unknown setting {shorten(name)} in {where}; {did_you_mean(name, FIELDS)} (--help lists all)")


def check_value(name: str, value: Any, where: str) -> Any:
    """`value` as the setting's type, or a UserError. Whole numbers pass as floats, nothing else is converted."""
    if (type(value) is int and abs(value) >= 2**63) or (type(value) is float and not math.isfinite(value)):
        raise UserError(f"{name} in {where}: the number must be finite and fit into 64 bits")
    if type(value) is int and float in ALLOWED[name]:
        value = float(value)
    if type(value) not in ALLOWED[name] and value not in ALLOWED[name]:
        choices = [choice for choice in ALLOWED[name] if isinstance(choice, str)]
        hint = f"; {did_you_mean(str(value), choices)}" if choices else ""
        raise UserError(f"{name} = {shorten(value)} in {where}: must be {type_name(name)}{hint}")
    return value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    return f"did you mean {difflib.get_close_matches(name, known, n=1, cutoff=0)[0]!r}?"


def shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def read_config(path: Path, included_by: tuple[str, ...] = ()) -> dict[str, Any]:
    """The assignments of a config file. It is read as data: nothing in it is executed."""
    files, values = (*included_by, os.path.abspath(path)), {}
    try:
        tree = ast.parse(path.read_text(encoding="utf-8-sig"), path)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"config file {path}: {getattr(error, 'strerror', error)}") from None
    for node in tree.body:
        where = f"{path}, line {node.lineno}"
        match node:
            case ast.Expr(ast.Constant(str())):
                pass  # a docstring
            case ast.Assign([ast.Name("include")], ast.Constant(str(other))):
                other = os.path.expanduser(other)
                if os.path.abspath(path.parent / other) in files:
                    raise UserError(f"{where}: with {other} the file would include itself")
                values |= read_config(path.parent / other, files)
            case ast.Assign([ast.Name(name)], expression):
                try:
                    value = ast.literal_eval(expression)
                except (ValueError, TypeError):
                    raise UserError(f"{where}: {name} must be a literal, a config file is not executed") from None
                check_name(name, where)
                values[name] = check_value(name, value, where)
            case _:
                raise UserError(f"{where}: a config file holds only lines of the form name = LITERAL")
    return values


def complete(settings: Settings) -> Settings:
    """Fill in what is left at None, expand ~ in paths, and refuse impossible values."""
    defaults = OPTIMIZER_DEFAULTS[settings.optimizer] | {"wandb_run_name": Path(settings.out_dir).name}
    if settings.uses_curvature:
        defaults["hessian_batch_size"] = min(defaults["hessian_batch_size"], settings.batch_size)
    if settings.optimizer == "sophiag" and settings.hessian_estimator == "averaged":
        whole_groups = settings.batch_size // max(settings.hessian_group_size, 1) * settings.hessian_group_size
        defaults["hessian_batch_size"] = min(AVERAGED_HESSIAN_BATCH_SIZE, whole_groups)
    defaults["hessian_micro_batch_size"] = max(1, settings.micro_batch_size // 2)
    defaults |= {"lr_decay_iters": settings.max_iters, "min_lr": 0.05 * settings.learning_rate}
    missing = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    paths = {name: os.path.expanduser(getattr(settings, name)) for name in ("out_dir", "init_from", "dataset")}
    settings = dataclasses.replace(settings, **missing, **paths)
    check_ranges(settings)
    return settings


def check_ranges(settings: Settings) -> None:
    def require(name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(f"{name} = {getattr(settings, name)!r}: must be {expected}")

    for name, field in FIELDS.items():
        match field.metadata, getattr(settings, name):
            case {"least": least, "most": most}, value:
                require(name, least <= value <= most, f"from {least} to {most}")
            case {"least": least, "below": below}, value:
                require(name, least <= value < below, f"in [{least}, {below})")
            case {"least": least}, int() | float() as value:  # None where the optimizer has no such setting
                require(name, value >= least, f"at least {least}")

    require("out_dir", settings.out_dir != "" and "\0" not in settings.out_dir, "a folder")
    n_head, peak, batch_size = settings.n_head, settings.learning_rate, settings.batch_size
    near = n_head * max(1, round(settings.n_embd / n_head))
    require("n_embd", settings.n_embd % n_head == 0, f"a multiple of n_head = {n_head}, {near} for example")
    require("min_lr", settings.min_lr <= peak or not settings.decay_lr, f"at most learning_rate = {peak}")
    if settings.uses_curvature:
        fits = 1 <= settings.hessian_batch_size <= batch_size
        require("hessian_batch_size", fits, f"from 1 to batch_size = {batch_size}, whose first sequences it takes")


def require_multiple(name: str, value: int, of: int, why: str, instead: str = "") -> None:
    """`value` must be a multiple of `of`; otherwise the message names the nearest values that are, then `instead`."""
    if value % of:
        near = " or ".join(str(multiple * of) for multiple in (value // of, value // of + 1) if multiple)
        raise UserError(f"{name} = {value} is not a multiple of {of} ({why}); {near} would do{instead}")
