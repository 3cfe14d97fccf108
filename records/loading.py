"""A trained model to use: of a run, or of another program's files."""

from pathlib import Path

import torch

import pretrained
from model import GPT
from records import checkpoints
from tokens.tokenizers import TOKENIZERS, Tokenizer


def load_model(out_dir: str | None, init_from: str | None, device: torch.device) -> tuple[GPT, Tokenizer, str]:
    """The model on `device`, in evaluation mode, its tokenizer, and where it came from: the weights `init_from`, which
    `pretrained.load` reads, or else the checkpoint that `out_dir` names. UserError where there is none.
    """
    if init_from is not None:
        model, tokenizer = pretrained.load_with_tokenizer(init_from)
        name = init_from
    else:
        checkpoint = checkpoints.find(Path(out_dir or "out"))
        model, name = GPT(checkpoint.config), str(checkpoint.folder)
        checkpoint.load_model(model)
        tokenizer = TOKENIZERS[checkpoint.tokenizer]
    return model.to(device).eval(), tokenizer, name
