"""The method, written out: ten steps of train.py with each optimizer, against the same ten in float64 by hand.

Nothing of the program is used below: sequences are read from train.bin, the model is a function of its weights, and
formulas stand as in their papers. `replay` comes first, then what it calls. The run computes in float64 as well, so
that both agree to rounding. Weights, gradients, estimates and state are dictionaries by the names of the parameters.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.func import grad, grad_and_value, jvp

from tests.conftest import OPTIMIZERS

LAYERS, HEADS, TOKENS = 2, 2, 16
SEED, STEPS = 7, 10
BATCH, HESSIAN_BATCH, GROUP = 8, 6, 2  # sequences of a step, of an estimate, and of a group of the averaged estimate
PEAK, LEAST, WARM_UP, DECAYED = 0.02, 0.002, 3, 8  # learning rates, and steps by which they are reached
BETA1, BETA2, WEIGHT_DECAY, CLIP, INTERVAL = 0.8, 0.9, 3.0, 0.9, 4
SETTINGS = {
    "n_layer": LAYERS, "n_head": HEADS, "n_embd": 16, "block_size": TOKENS, "seed": SEED,
    "batch_size": BATCH, "micro_batch_size": 4, "hessian_batch_size": HESSIAN_BATCH, "max_iters": STEPS,
    "learning_rate": PEAK, "min_lr": LEAST, "warmup_iters": WARM_UP, "lr_decay_iters": DECAYED, "beta1": BETA1,
    "beta2": BETA2, "weight_decay": WEIGHT_DECAY, "grad_clip": CLIP, "hessian_interval": INTERVAL, "eval_sequences": 0,
}  # fmt: skip
RHO = {"sophiah": 0.3, "sophiag": 2.0, "sophiag-averaged": 0.5}  # with which some coordinates are clipped, some not


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "muon"])  # PyTorch's: test_muon.py
def test_ten_steps_are_those_written_out_by_hand(train, tmp_path, dataset, name):
    options = {"rho": RHO.get(name), "hessian_bias_correction": name == "sophiag-averaged", "bias": name == "adamw"}
    rows = train(tmp_path, **SETTINGS | OPTIMIZERS[name] | options)
    start, end = (load_file(tmp_path / f"checkpoints/step_{step:08}/model.safetensors") for step in (0, STEPS))
    text, held_out = (np.fromfile(dataset / f"{split}.bin", "<u2").astype(np.int64) for split in ("train", "val"))
    expected_rows, expected_end = replay(name, start, text, held_out)
    for row, expected in zip(rows, expected_rows, strict=True):
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-8)
    torch.testing.assert_close(end, expected_end, rtol=0, atol=1e-9)
    assert 0 < rows[-1]["clip_rate"] < 1
    assert name not in RHO or all(0.05 < row["win_rate"] < 0.95 for row in rows[1:])


def replay(name, weights, text, held_out):
    """The rows of metrics.jsonl, and the weights after STEPS steps from `weights`. Tokens: int64 (N,)."""
    m, h = ({key: torch.zeros_like(weight) for key, weight in weights.items()} for _ in range(2))
    rows, clipped = [{"step": 0, "tokens": 0, "val/loss": validation_loss(weights, held_out)}], 0
    for step in range(1, STEPS + 1):
        x, y = batch(text, step)
        if name in RHO and step % INTERVAL == 1:
            estimate = ESTIMATES[name](weights, step, x[:HESSIAN_BATCH], y[:HESSIAN_BATCH])
            h = {key: BETA2 * h[key] + (1 - BETA2) * estimate[key] for key in h}
        gradient, loss = grad_and_value(mean_loss)(weights, x, y)
        norm = torch.cat([g.flatten() for g in gradient.values()]).norm().item()
        gradient = {key: g * min(1, CLIP / (norm + 1e-6)) for key, g in gradient.items()}  # torch adds this 1e-6
        lr, unclipped = learning_rate(step), []
        for key in weights:
            weights[key] = weights[key] - lr * WEIGHT_DECAY * weights[key] if decays(key) else weights[key]
            move, m[key], h[key] = UPDATES[name](m[key], h[key], gradient[key], step)
            weights[key] = weights[key] - lr * move
            unclipped.append(move.abs().flatten() < 1)
        clipped += norm > CLIP
        row = {"step": step, "tokens": step * BATCH * TOKENS, "lr": lr, "train/loss": loss.item(), "grad_norm": norm}
        row |= {"win_rate": torch.cat(unclipped).double().mean().item()} if name in RHO else {}
        rows.append(row | {"clip_rate": clipped / step})
    rows[-1]["val/loss"] = validation_loss(weights, held_out)
    return rows, weights


# The data


def random_numbers(purpose, step):
    """A stream of random numbers for a purpose (0 data, 1 labels, 2 directions) in a step."""
    return np.random.SeedSequence((SEED, purpose, step))


def torch_generator(purpose, step):
    return torch.Generator().manual_seed(int(random_numbers(purpose, step).generate_state(1, np.uint64)[0]))


def batch(text, step):
    """The sequences of a step and their targets, one token later: (BATCH, TOKENS) each."""
    starts = np.random.default_rng(random_numbers(0, step)).integers(0, len(text) - TOKENS, size=BATCH)
    rows = torch.from_numpy(text[starts[:, None] + np.arange(TOKENS + 1)])
    return rows[:, :-1], rows[:, 1:]


def validation_loss(weights, held_out):
    """Of all blocks that do not overlap and have a target for each token."""
    blocks = (len(held_out) - 1) // TOKENS
    x, y = (torch.from_numpy(held_out[i : i + blocks * TOKENS]).view(blocks, TOKENS) for i in (0, 1))
    return mean_loss(weights, x, y).item()


# The model: GPT-2


def mean_loss(weights, x, y):
    """Cross-entropy in nats."""
    return -logits(weights, x).log_softmax(dim=-1).gather(-1, y.unsqueeze(-1)).mean()


def logits(weights, x):
    """(B, T, V) for tokens (B, T)."""

    def linear(x, name):
        return x @ weights[f"{name}.weight"].mT + weights.get(f"{name}.bias", 0)

    def norm(x, name):
        x = x - x.mean(dim=-1, keepdim=True)
        x = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0)

    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    x = weights["wte.weight"][x] + weights["wpe.weight"][: x.shape[1]]
    for layer in range(LAYERS):
        name = f"h.{layer}"
        qkv = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, HEADS, T, D)
        attention = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(later, -math.inf).softmax(dim=-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), f"{name}.attn.c_proj")
        hidden = F.gelu(linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc"), approximate="tanh")
        x = x + linear(hidden, f"{name}.mlp.c_proj")
    return norm(x, "ln_f") @ weights["wte.weight"].mT


def decays(key):
    """Weight decay is for the matrices of linear layers: not for embeddings, biases and the gains of LayerNorm."""
    return key.startswith("h.") and ".c_" in key and key.endswith(".weight")


# The curvature: estimates of the Hessian's diagonal


def hutchinson(weights, step, x, y):
    """u * (H u), u ~ N(0, 1) drawn in the order of the optimizer, which has the matrices with weight decay first."""
    generator = torch_generator(2, step)
    u = {key: torch.randn(weights[key].shape, generator=generator) for key in in_order()}
    u = {key: u[key] for key in weights}
    _, product = jvp(lambda weights: grad(mean_loss)(weights, x, y), (weights,), (u,))
    return {key: u[key] * product[key] for key in u}


def in_order():
    layout = ["wte.weight", "wpe.weight"]
    for layer in range(LAYERS):
        parts = "ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"
        layout += [f"h.{layer}.{part}.weight" for part in parts]
    return sorted([*layout, "ln_f.weight"], key=lambda key: not decays(key))


def gauss_newton_bartlett(weights, step, x, y, group=HESSIAN_BATCH):
    """B * g * g, g the gradient for labels that the model draws itself at the B tokens of a group; mean over groups."""
    uniforms = torch.rand(2, *x.shape, generator=torch_generator(1, step))[1]  # the first picks among 256 tokens each
    cumulative = logits(weights, x).softmax(dim=-1).cumsum(dim=-1)
    labels = (cumulative <= uniforms.unsqueeze(-1)).sum(dim=-1)
    total = {key: torch.zeros_like(weight) for key, weight in weights.items()}
    for some, their_labels in zip(x.split(group), labels.split(group), strict=True):
        for key, g in grad(mean_loss)(weights, some, their_labels).items():
            total[key] += some.numel() * g * g / (len(x) // group)
    return total


def averaged(weights, step, x, y):
    return gauss_newton_bartlett(weights, step, x, y, GROUP)


ESTIMATES = {"sophiah": hutchinson, "sophiag": gauss_newton_bartlett, "sophiag-averaged": averaged}

# The updates: from m, h (the second moment or the curvature) and the gradient to the move, to be scaled by lr, m and h


def learning_rate(step):
    if step <= WARM_UP:
        return PEAK * step / WARM_UP
    progress = min(1, (step - WARM_UP) / (DECAYED - WARM_UP))
    return LEAST + (PEAK - LEAST) * (1 + math.cos(math.pi * progress)) / 2


def adamw(m, h, g, step):
    m, h = BETA1 * m + (1 - BETA1) * g, BETA2 * h + (1 - BETA2) * g * g
    return m / (1 - BETA1**step) / ((h / (1 - BETA2**step)).sqrt() + 1e-8), m, h


def lion(m, h, g, step):
    return (BETA1 * m + (1 - BETA1) * g).sign(), BETA2 * m + (1 - BETA2) * g, h


def sophia(rho, corrected=False):
    def update(m, h, g, step):
        m, estimates = BETA1 * m + (1 - BETA1) * g, (step - 1) // INTERVAL + 1
        curvature = h / (1 - BETA2**estimates) if corrected else h
        return (m / (rho * curvature).clamp(min=1e-12)).clamp(-1, 1), m, h

    return update


UPDATES = {
    "adamw": adamw,
    "lion": lion,
    "sophiah": sophia(RHO["sophiah"]),
    "sophiag": sophia(RHO["sophiag"]),
    "sophiag-averaged": sophia(RHO["sophiag-averaged"], corrected=True),
}
