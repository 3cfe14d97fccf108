"""Look into a prepared data set, and check it against its meta.json.

python -m preparation.inspect_data data/openwebtext
"""

import hashlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from run import errors
from tokens.token_files import Tokens, check_range, data_folder, open_tokens, read_meta
from tokens.tokenizers import TOKENIZERS

EXCERPT_TOKENS = 100


def main() -> None:
    parser = errors.Parser(__doc__)
    parser.add_argument("dataset", help="a folder, or the name of one in data/")
    dataset = parser.parse_args().dataset
    folder = data_folder(dataset if Path(dataset).name == dataset else f"{Path(dataset)}/")
    meta = read_meta(folder)
    tokenizer = TOKENIZERS[meta["tokenizer"]]
    print(f"{folder}: {meta.get('source', 'of unknown source')}")
    print(f"tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} tokens in the vocabulary")
    for split in ("train", "val"):
        tokens = open_tokens(folder, split)
        lengths, checksum = scan(tokens, meta["vocab_size"], tokenizer.end_of_text)
        print(f"\n{tokens.name}: {len(tokens):,} tokens, {len(lengths):,} documents")
        print("  begins: " + repr(tokenizer.decode_bytes(tokens.rows(np.zeros(1, int), min(EXCERPT_TOKENS, len(tokens)))
              [0].tolist()).decode(errors="replace")))  # fmt: skip
        print_lengths(lengths)
        expected = (meta.get("checksum") or {}).get(f"{split}.bin")
        if expected not in (None, checksum) or meta.get(f"{split}_tokens", len(tokens)) != len(tokens):
            raise errors.UserError(f"{tokens.name} is not the file that meta.json describes: prepare it again")
        print("  checksum " + ("as in meta.json" if expected else f"{checksum}, not in meta.json"))


def scan(tokens: Tokens, vocab_size: int, end_of_text: int) -> tuple[np.ndarray, str]:
    """Lengths of the documents, in tokens with their end, and the checksum. Refuses a token beyond the vocabulary."""
    digest, ends, position = hashlib.sha256(), [], 0
    with tqdm(total=len(tokens), unit="token", unit_scale=True, leave=False) as bar:
        for piece in tokens.pieces():
            check_range(piece, vocab_size, tokens.name)
            digest.update(piece.tobytes())
            ends.append(np.flatnonzero(piece == end_of_text) + position + 1)
            position += len(piece)
            bar.update(len(piece))
    return np.diff(np.concatenate(ends or [[]]), prepend=0), f"sha256:{digest.hexdigest()}"


def print_lengths(lengths: np.ndarray) -> None:
    if not len(lengths):
        return
    print(f"  tokens a document: median {np.median(lengths):,.0f}, mean {lengths.mean():,.0f}, most {lengths.max():,}")
    bounds = [0, 128, 256, 512, 1024, 2048, 4096, 8192, np.inf]
    for low, high in zip(bounds, bounds[1:], strict=False):
        share = np.mean((lengths > low) & (lengths <= high))
        label = f"up to {high:,}" if high < np.inf else f"above {low:,}"
        print(f"  {label:>12}  {share:6.1%}  {'#' * round(50 * share)}")


if __name__ == "__main__":
    errors.run(main)
