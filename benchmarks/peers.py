"""Training steps of other projects, from their checkouts: nanoGPT, and the released code of Sophia."""

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.common import VOCAB_SIZE
from run import errors, machine
from run.settings import read

NOTES = [
    "nanoGPT's optimizer is AdamW and the released Sophia's is Sophia-G, whatever ours is",
    "as_it_runs: float32 without torch.compile, as nanoGPT runs on a CPU; same: the format and the compilation of ours",
    "a peer's batch is on the device already, where ours is read and copied",
    "nanoGPT's AdamW is fused on CUDA alone, ours everywhere",
    "on a CPU ours keeps freed memory and flushes denormal numbers, peers run as Python starts them",
    "the released Sophia estimates curvature on all sequences of a step, ours on hessian_batch_size of them",
    "peak_bytes of a CPU are those of the whole process after warm-up, libraries included (and the compiler's)",
]


def is_sophia(folder: Path) -> bool:
    return (folder / "sophia.py").exists()


def check(folder: Path) -> None:
    """Refuse a folder that has not what `step` calls."""
    try:
        text = (folder / "model.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    if "def configure_optimizers" not in text:
        raise errors.UserError(f"--peer {folder} is no checkout of nanoGPT or of the released Sophia: no such model.py")


def step(
    arguments: list[str], folder: Path, dtype: torch.dtype, compile: bool
) -> tuple[Callable[[bool], None], machine.Machine]:
    """The update of the peer's train script, on one batch, for our settings."""
    s = read(arguments)
    device = machine.find_device(s.device)
    here = machine.Machine(device, dtype, compile)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as both scripts have it
    for name in ("model", "sophia"):  # ours, which theirs would be taken for
        sys.modules.pop(name, None)
    sys.path.insert(0, str(folder))
    theirs = importlib.import_module("model")
    shape = {
        "block_size": s.block_size, "vocab_size": -(-VOCAB_SIZE // 64) * 64, "n_layer": s.n_layer, "n_head": s.n_head,
        "n_embd": s.n_embd, "dropout": s.dropout, "bias": s.bias,
    }  # fmt: skip
    raw = theirs.GPT(theirs.GPTConfig(**shape)).to(device)
    options = [s.weight_decay, s.learning_rate, (s.beta1, s.beta2), device.type]
    sophia = "optimizer_name" in inspect.signature(raw.configure_optimizers).parameters
    if sophia:
        options = ["sophiag", *options[:3], 0.05, device.type]
    optimizer = raw.configure_optimizers(*options)
    model = torch.compile(raw) if compile else raw
    autocast = here.autocast if dtype != torch.float32 else contextlib.nullcontext
    passes = s.batch_size // s.micro_batch_size
    x, y = torch.randint(VOCAB_SIZE, (2, s.micro_batch_size, s.block_size), device=device)

    def gradients(loss: Callable[[], torch.Tensor]) -> None:
        for _ in range(passes):
            with autocast():
                part = loss() / passes
            part.backward()
        torch.nn.utils.clip_grad_norm_(raw.parameters(), s.grad_clip)

    def sampled_loss() -> torch.Tensor:
        logits, _ = model(x, 0)
        labels = torch.distributions.Categorical(logits=logits).sample()
        return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), ignore_index=-1)

    def update(due: bool) -> None:
        gradients(lambda: model(x, y)[1])
        optimizer.step(**({"bs": s.batch_size * s.block_size} if sophia else {}))
        optimizer.zero_grad(set_to_none=True)
        if due:
            gradients(sampled_loss)
            optimizer.update_hessian()
            optimizer.zero_grad(set_to_none=True)

    return update, here
