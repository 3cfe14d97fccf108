"""Write a run's checkpoint as a Hugging Face GPT-2, with its tokenizer.

python -m tools.export --out_dir=out/gpt2_small_sophiag --to=my_gpt2                             the newest
python -m tools.export --out_dir=out/gpt2_small_sophiag/checkpoints/step_00090000 --to=my_gpt2   another one
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from data.tokenizers import Tokenizer
from model import GPT
from run import errors
from run.files import write_json
from run.options import Parser
from sample import load_model
from training.pretrained import STANDARD, other_way_round

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves in GPT-2's files
LETTERS = {byte: chr(byte) for byte in PRINTABLE}
LETTERS |= {byte: chr(256 + n) for n, byte in enumerate(byte for byte in range(256) if byte not in LETTERS)}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out_dir", type=Path, default=Path("out"), help="run or checkpoint (default %(default)s)")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="new folder to write")
    options = parser.parse_args()

    model, tokenizer, _ = load_model(options.out_dir, None)
    try:
        options.to.mkdir(parents=True)
        write_model(model, tokenizer, options.to)
    except (OSError, ValueError, SafetensorError) as error:
        raise errors.UserError(f"--to={options.to} cannot be written: {error}") from None
    print(options.to.resolve())


def write_model(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """The model and its tokenizer as files of Hugging Face."""
    for name, content in tokenizer_files(tokenizer, model.config.block_size).items():
        write_json(folder / name, content)
    write_weights(model, folder, tokenizer.vocab_size, tokenizer.end_of_text)


def tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json, as JSON objects, of the tokenizer and a context of `block_size`."""
    if tokenizer.name == "bytes":
        end = "\0"  # a token of its own, in place of its letter: only so is it both special and what the byte gives
        vocabulary, merges = {LETTERS[byte] if byte else end: byte for byte in range(256)}, []
    elif tokenizer.name == "gpt2":
        ranks = tokenizer.encoding._mergeable_ranks
        vocabulary = {letters(token): rank for token, rank in ranks.items()}
        merges = [[letters(part) for part in parts(token, ranks)] for token in sorted(ranks, key=ranks.get)[256:]]
        end = "<|endoftext|>"
    else:
        raise errors.UserError(f"the tokenizer {tokenizer.name!r} cannot be exported; gpt2 and bytes can")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": tokenizer.end_of_text, "content": end} | flags]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": bool(merges)}
    return {
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size, "eos_token": end,
            "bos_token": end, "clean_up_tokenization_spaces": False,
        },
    }  # fmt: skip


def letters(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)


def parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that were merged to this one: what byte-pair encoding makes of it without itself."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in zip(pieces, pieces[1:], strict=False)]
        i = pairs.index(min(pairs))
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def write_weights(model: GPT, folder: Path, vocab_size: int, end_of_text: int) -> None:
    """Write the model's three files, without the vocabulary's padding, and zeros for biases that it lacks."""
    weights = {name: tensor.detach().cpu() for name, tensor in model.named_parameters()}
    weights["wte.weight"] = weights["wte.weight"][:vocab_size]
    for name, tensor in list(weights.items()):
        if name not in ("wte.weight", "wpe.weight") and name.endswith(".weight"):
            weights.setdefault(f"{name.removesuffix('weight')}bias", torch.zeros(len(tensor)))
    weights = {f"transformer.{name}": other_way_round(name, tensor).contiguous() for name, tensor in weights.items()}
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    shape = dataclasses.asdict(model.config)
    config = {name: shape[name] for name in ("n_layer", "n_head", "n_embd", "scale_attn_by_inverse_layer_idx")}
    config |= {
        "activation_function": "gelu" if model.config.exact_gelu else "gelu_new",
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "torch_dtype": "float32",
        "vocab_size": len(weights["transformer.wte.weight"]),
        "n_positions": shape["block_size"], "n_ctx": shape["block_size"],  # an old name, which llama.cpp reads
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
    }  # fmt: skip
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config | STANDARD | ends)
    write_json(folder / "generation_config.json", ends)


if __name__ == "__main__":
    errors.run(main)
