"""The two vocabularies: GPT-2's byte pairs, by tiktoken, and plain bytes."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from training.errors import UserError


@dataclass(frozen=True)
class Bytes:
    """Every byte of UTF-8 is a token; 0 ends a text."""

    name = "bytes"
    vocab_size = 256
    end_of_text = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode_bytes(self, tokens: list[int]) -> bytes:
        return bytes(token for token in tokens if token < self.vocab_size)


@dataclass(frozen=True)
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
            raise UserError(
                "the GPT-2 vocabulary could not be downloaded; connect to the network once, or set TIKTOKEN_CACHE_DIR"
                f" to a folder that has it ({type(error).__name__})"
            ) from None

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def decode_bytes(self, tokens: list[int]) -> bytes:
        known = [token for token in tokens if token < self.vocab_size]  # a padded vocabulary has ids without a text
        return self.encoding.decode_bytes(known)


TOKENIZERS = {tokenizer.name: tokenizer for tokenizer in (Bytes(), GPT2())}
