"""A trained model from a run's folder, or from Hugging Face GPT-2 weights."""

from pathlib import Path

import torch

from model import GPT
from records import checkpoints
from run.errors import UserError
from tokens.tokenizers import TOKENIZERS, Tokenizer


def load_model(out_dir: str | None, init_from: str | None, device: torch.device) -> tuple[GPT, Tokenizer, str]:
    """The model in evaluation mode, its tokenizer, and what to call it: of the newest checkpoint of the run `out_dir`,
    or of GPT-2 weights, a folder or a name on the hub. UserError where there is none.
    """
    if out_dir is not None:
        checkpoint = checkpoints.newest(Path(out_dir))
        model = GPT(checkpoint.config)
        checkpoint.load_model(model)
        return model.to(device).eval(), TOKENIZERS[checkpoint.tokenizer], str(checkpoint.folder)
    try:
        model = GPT.from_pretrained(init_from)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{init_from} cannot be loaded: {error}") from None
    return model.to(device).eval(), TOKENIZERS["gpt2"], init_from
