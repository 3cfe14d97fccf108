"""A trained model to use: of a run, or of another program's files."""

from pathlib import Path

import torch

import pretrained
from model import GPT
from records import checkpoints
from run.errors import UserError
from tokens.tokenizers import TOKENIZERS, Tokenizer


def load_model(out_dir: str | None, init_from: str | None, device: torch.device) -> tuple[GPT, Tokenizer, str]:
    """The model on `device`, in evaluation mode, its tokenizer, and where it came from: the weights `init_from`, which
    `pretrained.load` reads, or else the newest checkpoint of the run in `out_dir`. UserError where there is none.
    """
    if init_from is not None:
        model, name = pretrained.load(init_from), init_from
        tokenizer = fitting_tokenizer(model, name)
    else:
        checkpoint = checkpoints.newest(Path(out_dir or "out"))
        model, name = GPT(checkpoint.config), str(checkpoint.folder)
        checkpoint.load_model(model)
        tokenizer = TOKENIZERS[checkpoint.tokenizer]
    return model.to(device).eval(), tokenizer, name


def fitting_tokenizer(model: GPT, name: str) -> Tokenizer:
    """The tokenizer whose vocabulary the model has, padded to a multiple of 64 or not."""
    for tokenizer in TOKENIZERS.values():
        if 0 <= model.config.vocab_size - tokenizer.vocab_size < 64:
            return tokenizer
    known = " and ".join(f"{tokenizer.name} has {tokenizer.vocab_size}" for tokenizer in TOKENIZERS.values())
    raise UserError(f"{name} has a vocabulary of {model.config.vocab_size} tokens, which is unknown here: {known}")
