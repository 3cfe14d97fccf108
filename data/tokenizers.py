"""The two vocabularies: GPT-2's byte pairs, by tiktoken, and plain bytes."""

from functools import cached_property
from typing import Any

import numpy as np

from run.errors import UserError


class Bytes:
    """Every byte of UTF-8 is a token; 0 ends a text."""

    name = "bytes"
    vocab_size = 256
    end_of_text = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape"))  # a command line may have bytes that are no UTF-8

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """The tokens of all texts, an end of text after each, as uint16."""
        joined = b"".join(text.encode("utf-8") + b"\0" for text in texts)
        return np.frombuffer(joined, dtype=np.uint8).astype("<u2")

    def decode_bytes(self, tokens: list[int]) -> bytes:
        known = bytes(token for token in tokens if token < self.vocab_size)
        return known.replace(b"\0", b"<|endoftext|>")  # as GPT-2's is shown; terminals do odd things with a zero byte


class GPT2:
    """GPT-2's 50,257 byte pairs."""

    name = "gpt2"
    vocab_size = 50257
    end_of_text = 50256

    @cached_property
    def encoding(self) -> Any:
        import tiktoken

        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as error:  # the network's errors are OSErrors too
            why = f"the GPT-2 vocabulary could not be downloaded ({type(error).__name__})"
            raise UserError(f"{why}: set TIKTOKEN_CACHE_DIR to a folder that has it, or connect once") from None

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """The tokens of all texts, an end of text after each, as uint16. Other threads run meanwhile."""
        end = np.array([self.end_of_text], dtype=np.uint32)
        parts = [part for text in texts for part in (self._encode_to_numpy(text), end)]
        return np.concatenate([end[:0], *parts], dtype="<u2", casting="unsafe")

    def _encode_to_numpy(self, text: str) -> np.ndarray:
        try:  # without special tokens this is encode_ordinary, but for the list of Python's integers
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError as error:  # a run of a million blanks is too much for tiktoken's regular expression
            raise UserError(f"tiktoken cannot encode the document that begins {text[:40]!r}: {error}") from None

    def decode_bytes(self, tokens: list[int]) -> bytes:
        known = [token for token in tokens if token < self.vocab_size]  # a padded vocabulary has ids without a text
        return self.encoding.decode_bytes(known)


Tokenizer = Bytes | GPT2
TOKENIZERS = {tokenizer.name: tokenizer for tokenizer in (Bytes(), GPT2())}
KNOWN = " or ".join(f"{tokenizer.name} with {tokenizer.vocab_size}" for tokenizer in TOKENIZERS.values())


def fits(tokenizer: Tokenizer, vocab_size: int) -> bool:
    """Whether a vocabulary has the tokenizer's size, padded to a multiple of 64 or not."""
    return 0 <= vocab_size - tokenizer.vocab_size < 64
