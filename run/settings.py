"""The settings of a run: one typed dataclass, filled from config files and the command line, where later wins."""

import ast
import dataclasses
import difflib
import math
import operator
import sys
import textwrap
import types
import typing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from run.errors import UserError
from run.files import read_small

ROOT = Path(__file__).resolve().parent.parent

# What a setting left at None means for each optimizer. Sources: the Sophia paper (arXiv 2305.14342) and its released
# code for AdamW, Lion's betas and Sophia. Lion's weight decay is not stated there: its authors (arXiv 2302.06675)
# advise 3 to 10 times AdamW's, this is 5 times. The paper has beta1 0.96 for Sophia, the released code 0.965.
OPTIMIZER_DEFAULTS = {
    "adamw": {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1},
    "lion": {"beta1": 0.95, "beta2": 0.98, "weight_decay": 0.5},
    "sophiah": {"beta1": 0.96, "beta2": 0.99, "weight_decay": 0.2, "rho": 0.01, "hessian_batch_size": 32},
    "sophiag": {"beta1": 0.96, "beta2": 0.99, "weight_decay": 0.2, "rho": 0.05, "hessian_batch_size": 240},
}
AVERAGED_HESSIAN_BATCH_SIZE = 32  # of sophiag with hessian_estimator=averaged, which needs fewer sequences


def setting(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """Every setting of train.py. The defaults are the paper's GPT-2 small on OpenWebText."""

    # input and output
    out_dir: str = setting("out", "folder for checkpoints, settings.json and metrics.jsonl")
    init_from: str = setting(
        "scratch",
        "'scratch', 'resume', 'auto' (resume where there is a checkpoint), or GPT-2 weights: 'gpt2*' or a folder",
    )
    dataset: str = setting("openwebtext", "name of a folder in data/, or a path with a slash in it")
    eval_interval: int = setting(1000, "steps between evaluations; each writes a checkpoint")
    eval_sequences: int = setting(0, "validation blocks to evaluate, evenly spread; 0 takes all of the split")
    eval_only: bool = setting(False, "evaluate once and stop; writes nothing")
    log_interval: int = setting(10, "steps between rows of metrics.jsonl")
    keep_checkpoints: int = setting(2, "newest checkpoints to keep; the best one is kept besides")
    wandb_log: bool = setting(False, "log to Weights & Biases too")
    wandb_project: str = setting("gpt2-sophia", "wandb project")
    wandb_run_name: str | None = setting(None, "wandb run name; None: the name of out_dir")
    # model
    n_layer: int = setting(12, "transformer blocks")
    n_head: int = setting(12, "attention heads")
    n_embd: int = setting(768, "channels, a multiple of n_head")
    block_size: int = setting(1024, "context length in tokens")
    dropout: float = setting(0.0, "dropout probability; 0 is right for pretraining")
    bias: bool = setting(False, "biases in Linear and LayerNorm, as in OpenAI's GPT-2")
    scale_attn_by_inverse_layer_idx: bool = setting(False, "divide attention scores by the layer's number, from 1")
    # batch
    batch_size: int = setting(480, "sequences per optimizer step, over all ranks")
    micro_batch_size: int = setting(12, "sequences per forward pass on one device")
    checkpoint_activations: bool = setting(False, "compute each block's activations twice and keep fewer in memory")
    # optimizer
    optimizer: Literal["adamw", "lion", "sophiah", "sophiag"] = setting("adamw", "the optimizer")
    learning_rate: float = setting(6e-4, "peak learning rate")
    weight_decay: float | None = setting(None, "decoupled, on matrices but not embeddings; None: by optimizer")
    beta1: float | None = setting(None, "decay of the momentum; None: by optimizer")
    beta2: float | None = setting(None, "decay of the second moment, momentum (lion) or Hessian; None: by optimizer")
    grad_clip: float = setting(1.0, "largest global gradient norm; 0 turns clipping off")
    rho: float | None = setting(None, "Sophia: the larger, the fewer coordinates are clipped; None: by optimizer")
    hessian_interval: int = setting(10, "Sophia: steps between curvature estimates; the first step has one")
    hessian_batch_size: int | None = setting(
        None, "Sophia: sequences of the batch for an estimate; None: 32 (sophiah, averaged), 240 (paper), or all"
    )
    hessian_estimator: Literal["paper", "averaged"] = setting(
        "paper", "sophiag: square the gradient of all the sequences, or average the squares of groups of them"
    )
    hessian_group_size: int = setting(4, "sophiag, averaged: sequences per group, in one forward pass")
    # learning-rate schedule
    max_iters: int = setting(100_000, "optimizer steps of the whole run")
    decay_lr: bool = setting(True, "cosine decay to min_lr; otherwise constant after the warm-up")
    warmup_iters: int = setting(2000, "steps of linear warm-up")
    lr_decay_iters: int | None = setting(None, "step at which min_lr is reached; None: max_iters")
    min_lr: float | None = setting(None, "final learning rate; None: 0.05 * learning_rate, as in the paper")
    # machine
    backend: Literal["auto", "nccl", "gloo"] = setting("auto", "torch.distributed's; auto: nccl on CUDA, else gloo")
    timeout: int = setting(600, "seconds that a rank waits for the others before it ends the run")
    shard_optimizer: bool = setting(False, "split the optimizer's state over the ranks, to save memory")
    device: str = setting("auto", "'auto', 'cpu', 'cuda', 'cuda:1', 'mps', …")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "of matrix products; weights stay float32")
    compile: bool = setting(True, "torch.compile the model and the optimizer")
    seed: int = setting(1337, "of the weights, the order of the data and the draws for curvature")


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
DEFAULTS = {name: field.default for name, field in FIELDS.items() if field.default is not None}
TYPES = typing.get_type_hints(Settings)


def read(arguments: Sequence[str]) -> Settings:
    """Settings from `[CONFIG.py …] [--name=value …]`, later wins, checked and complete (no None that has a default).
    `--help` prints every setting and exits. Raises UserError for anything that is not a setting or cannot be.
    """
    values: dict[str, Any] = {}
    arguments = list(arguments)
    while arguments:
        argument = arguments.pop(0)
        if argument in ("-h", "--help"):
            print(help_text())
            sys.exit(0)
        if not argument.startswith("-"):
            values |= read_config(Path(argument), DEFAULTS | values)
            continue
        name, equals, text = argument.lstrip("-").partition("=")
        check_name(name, "the command line")
        if not equals:
            if not arguments or arguments[0].startswith("--"):
                raise UserError(f"--{name} needs a value: --{name}=VALUE")
            text = arguments.pop(0)
        values[name] = coerce(name, text if text_is_value(name, text) else literal(name, text), "the command line")
    return complete(Settings(**values))


def text_is_value(name: str, text: str) -> bool:
    return typing.get_origin(TYPES[name]) is Literal or (str in kinds(name) and text != "None")


def kinds(name: str) -> tuple[type, ...]:
    """The types a setting may have: `float | None` gives (float, NoneType), a Literal of strings (str,)."""
    hint = TYPES[name]
    if typing.get_origin(hint) is Literal:
        return (str,)
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def type_name(name: str) -> str:
    hint = TYPES[name]
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}
    return " or ".join(names[kind] for kind in kinds(name))


def check_name(name: str, where: str) -> None:
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0)
        raise UserError(f"unknown setting {shorten(name)} in {where}; did you mean {near[0]!r}? (--help lists all)")


def literal(name: str, text: str) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # which Python prints of '\d', 1if … on lines of its own
            return ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text  # not of the setting's type, as `coerce` will say


def coerce(name: str, value: Any, where: str) -> Any:
    """`value` as the setting's type, or a UserError; whole numbers pass as floats, nothing else is converted."""
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise UserError(f"{name} in {where}: the number is too large")
    if type(value) is int and float in kinds(name):
        value = float(value)
    if type(value) not in kinds(name):
        raise UserError(f"{name} = {shorten(value)} in {where}: must be {type_name(name)}")
    if typing.get_origin(TYPES[name]) is Literal and value not in typing.get_args(TYPES[name]):
        near = difflib.get_close_matches(value, typing.get_args(TYPES[name]), n=1, cutoff=0)
        raise UserError(f"{name} = {shorten(value)} in {where}: must be {type_name(name)}; did you mean {near[0]!r}?")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} = {value} in {where}: must be finite")
    return value


def shorten(value: Any) -> str:
    try:
        text = repr(value)
        return text if len(text) <= 60 else text[:59] + "…"
    except ValueError:  # Python refuses to print very long integers
        return "a very large number"


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
MAX_BITS = 4096  # of a number on the way to a value
MAX_INCLUDES = 20  # files that a config file includes, and these include, and so on


def read_config(path: Path, known: dict[str, Any] | None = None, files: list[Path] | None = None) -> dict[str, Any]:
    """The assignments of a config file: `name = value`, a value being a literal or arithmetic on numbers and on names
    assigned before (`known` or in this file). `include = "other.py"` takes over another file's, relative to this one.
    The file is read as data: nothing in it is executed.
    """
    tree = parse(path)
    known = known or {}
    files = [] if files is None else files  # included so far
    values: dict[str, Any] = {}
    for node in tree.body:
        where = f"{path}, line {node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            continue  # a docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise UserError(f"{where}: a config file holds only lines of the form name = value")
        name = node.targets[0].id
        if name == "include":
            if not (isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)):
                raise UserError(f"{where}: include must be the name of a config file, in quotes")
            files.append(path.parent / node.value.value)
            if len(files) > MAX_INCLUDES:
                raise UserError(f"{where}: more than {MAX_INCLUDES} files are included, by each other perhaps")
            values |= read_config(files[-1], known | values, files)
            continue
        check_name(name, where)
        try:
            value = evaluate(node.value, known | values, where)
        except RecursionError:
            raise UserError(f"{where}: the expression is nested too deeply") from None
        values[name] = coerce(name, value, where)
    return values


def parse(path: Path) -> ast.Module:
    """The syntax tree of a config file."""
    try:
        text = read_small(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"config file {path}: {getattr(error, 'strerror', error)}") from None
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
        raise UserError(f"config file {path}{line}: not assignments in Python's notation") from None


def evaluate(node: ast.expr, names: dict[str, Any], where: str) -> Any:
    if isinstance(node, ast.Constant):
        if type(node.value) is int and node.value.bit_length() > MAX_BITS:
            raise UserError(f"{where}: the number is too large")
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in names:
            raise UserError(f"{where}: {node.id:.60} is used but has no value yet")
        return names[node.id]
    if isinstance(node, ast.BinOp | ast.UnaryOp) and type(node.op) in OPERATORS:
        operands = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.operand]
        numbers = [evaluate(operand, names, where) for operand in operands]
        if any(type(number) not in (int, float) for number in numbers):
            raise UserError(f"{where}: arithmetic is for numbers only")
        if isinstance(node.op, ast.Pow) and (abs(numbers[0]) > 2**63 or abs(numbers[1]) > 64):
            raise UserError(f"{where}: the power is too large")
        try:
            result = OPERATORS[type(node.op)](*numbers)
        except (ArithmeticError, ValueError) as error:
            raise UserError(f"{where}: {error.args[-1]}") from None
        if type(result) not in (int, float) or abs(result) > 2**MAX_BITS:
            raise UserError(f"{where}: the result is not a number of reasonable size")
        return result
    raise UserError(f"{where}: only literals and arithmetic are allowed, a config file is not executed")


def complete(settings: Settings) -> Settings:
    """Fill in what is left at None, and refuse impossible values."""
    s = settings
    defaults = dict(OPTIMIZER_DEFAULTS[s.optimizer])
    if s.optimizer.startswith("sophia"):
        defaults["hessian_batch_size"] = min(defaults["hessian_batch_size"], s.batch_size)
    if s.optimizer == "sophiag" and s.hessian_estimator == "averaged":
        whole_groups = s.batch_size // max(s.hessian_group_size, 1) * s.hessian_group_size
        defaults["hessian_batch_size"] = min(AVERAGED_HESSIAN_BATCH_SIZE, whole_groups)
    defaults |= {"lr_decay_iters": s.max_iters, "min_lr": 0.05 * s.learning_rate}
    defaults |= {"wandb_run_name": Path(s.out_dir).name}
    s = dataclasses.replace(s, **{name: value for name, value in defaults.items() if getattr(s, name) is None})

    for name in "eval_interval log_interval keep_checkpoints n_head n_embd block_size".split():
        require(s, name, getattr(s, name) >= 1, "at least 1")
    for name in "hessian_interval hessian_group_size max_iters lr_decay_iters".split():
        require(s, name, getattr(s, name) >= 1, "at least 1")
    for name, largest in {"n_layer": 1000, "batch_size": 2**16, "micro_batch_size": 2**16, "timeout": 10**6}.items():
        require(s, name, 1 <= getattr(s, name) <= largest, f"from 1 to {largest}")
    for name in "eval_sequences learning_rate weight_decay grad_clip warmup_iters min_lr seed".split():
        require(s, name, getattr(s, name) >= 0, "at least 0")
    for name in ("dropout", "beta1", "beta2"):
        require(s, name, 0 <= getattr(s, name) < 1, "in [0, 1)")
    require(s, "out_dir", s.out_dir != "" and "\0" not in s.out_dir, "a folder")
    near = s.n_head * max(1, round(s.n_embd / s.n_head))
    require(s, "n_embd", s.n_embd % s.n_head == 0, f"a multiple of n_head = {s.n_head}, {near} for example")
    require(s, "min_lr", s.min_lr <= s.learning_rate or not s.decay_lr, f"at most learning_rate = {s.learning_rate}")
    if s.optimizer.startswith("sophia"):
        require(s, "rho", s.rho >= 0, "at least 0")
        fits = 1 <= s.hessian_batch_size <= s.batch_size
        require(s, "hessian_batch_size", fits, f"from 1 to batch_size = {s.batch_size}, whose first sequences it takes")
    return s


def require(settings: Settings, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"{name} = {getattr(settings, name)!r}: must be {expected}")


def require_multiple(name: str, value: int, of: int, why: str, instead: str = "") -> None:
    """`value` must be a multiple of `of`; otherwise the message names the nearest values that are, then `instead`."""
    if value % of:
        below, above = value // of * of, (value // of + 1) * of
        near = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"{name} = {value} is not a multiple of {of} ({why}); {near} would do{instead}")


def help_text() -> str:
    lines = [
        "usage: python train.py [CONFIG.py …] [--name=value …]",
        "",
        "Later wins. Settings, with their defaults:",
        "",
    ]
    for name, field in FIELDS.items():
        lines.append(f"  --{name}={field.default}  ({type_name(name)})")
        lines += textwrap.wrap(field.metadata["help"], 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)
