"""Look into a prepared data set, and check it against its meta.json.

python data/inspect_data.py data/openwebtext
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.token_files import Tokens, check_range, data_folder, open_tokens, read_meta  # noqa: E402
from data.tokenizers import TOKENIZERS  # noqa: E402
from run import errors  # noqa: E402

EXCERPT_TOKENS = 100


def main() -> None:
    parser = errors.Parser(__doc__)
    parser.add_argument("dataset", help="a folder, or the name of one in data/")
    dataset = parser.parse_args().dataset
    folder = data_folder(dataset if Path(dataset).name == dataset else f"{Path(dataset)}/")
    splits = {split: open_tokens(folder, split) for split in ("train", "val")}
    meta = read_meta(folder)
    tokenizer = TOKENIZERS[meta["tokenizer"]]
    print(f"{folder}: {meta.get('source', 'of unknown source')}")
    print(f"tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} tokens in the vocabulary")
    for split, tokens in splits.items():
        lengths, checksum = scan(tokens, meta["vocab_size"], tokenizer.end_of_text)
        print(f"\n{tokens.name}: {len(tokens):,} tokens, {len(lengths):,} documents")
        for excerpt in tokens.pieces(EXCERPT_TOKENS):
            print(f"  begins: {tokenizer.decode_bytes(excerpt.tolist()).decode(errors='replace')!r}")
        if len(lengths):
            shares = [f"{share} % up to {np.percentile(lengths, share):,.0f}" for share in (5, 25, 50, 75, 95, 100)]
            print(f"  tokens a document: mean {lengths.mean():,.0f}; {', '.join(shares)}")
        expected = (meta.get("checksum") or {}).get(f"{split}.bin")
        if expected not in (None, checksum):
            raise errors.UserError(f"{tokens.name} is not the file that meta.json describes: prepare it again")
        print("  checksum " + ("as in meta.json" if expected else f"{checksum}, not in meta.json"))


def scan(tokens: Tokens, vocab_size: int, end_of_text: int) -> tuple[np.ndarray, str]:
    """Lengths of the documents, in tokens with their end, and the checksum. Refuses a token beyond the vocabulary."""
    digest, ends, position = hashlib.sha256(), [np.empty(0, int)], 0
    for piece in tqdm(tokens.pieces(), unit=" pieces", leave=False):
        check_range(piece, vocab_size, tokens.name)
        digest.update(piece.tobytes())
        ends.append(np.flatnonzero(piece == end_of_text) + position + 1)
        position += len(piece)
    return np.diff(np.concatenate(ends), prepend=0), f"sha256:{digest.hexdigest()}"


if __name__ == "__main__":
    errors.run(main)
