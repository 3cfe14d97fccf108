"""The vocabularies as Hugging Face's tokenizer files, made without a network."""

from typing import Any

from data.tokenizers import Tokenizer
from run.errors import UserError

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves in GPT-2's files
LETTERS = {byte: chr(byte) for byte in PRINTABLE}
LETTERS |= {byte: chr(256 + n) for n, byte in enumerate(byte for byte in range(256) if byte not in LETTERS)}


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
        raise UserError(f"the tokenizer {tokenizer.name!r} cannot be exported; gpt2 and bytes can")
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
