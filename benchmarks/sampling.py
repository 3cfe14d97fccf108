"""The speed of generation, beside nanoGPT's with the same weights, both in float32 and eager."""

import contextlib
import functools
import sys
from argparse import Namespace
from typing import Any

import torch

from benchmarks import peers
from benchmarks.common import alternate, measure, random_tokens
from model import GPT
from run.machine import Machine
from run.settings import Settings
from training.start import shape_of

PROMPT, TOKENS = 16, 500


def sample(options: Namespace, settings: Settings, machine: Machine) -> dict[str, Any]:
    """Seconds and tokens a second of one text."""
    ours = GPT(shape_of(settings, random_tokens(settings), None))
    models = {"ours": ours}
    for folder in options.peer:
        peers.machines(folder, machine)  # refuses what is no peer
        with contextlib.redirect_stdout(sys.stderr):  # where peers may print what they like
            theirs = models[folder.resolve().name] = peers.model(settings, folder)
        theirs.transformer.load_state_dict(ours.state_dict())
    prompt = torch.randint(ours.config.vocab_size, (1, PROMPT), device=machine.device)
    functions = {}
    for name, model in models.items():
        generate = functools.partial(model.to(machine.device).eval().generate, prompt, TOKENS, top_k=200)
        functions[name] = functools.partial(measure, generate, machine.device)
    result: dict[str, Any] = {"tokens": TOKENS, "dtype": "float32", "compile": False}
    for name, (seconds, _) in alternate(functions, options.rounds, warm_up=1).items():
        result |= {f"seconds_{name}": seconds, f"tokens_per_second_{name}": TOKENS / seconds}
        if name != "ours":
            result[f"speed_over_{name}"] = seconds / result["seconds_ours"]
    return result
