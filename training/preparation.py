"""Writing a data set: train.bin, val.bin, and last meta.json, so that half of one is never taken for the whole."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from training.errors import UserError
from training.files import write_json
from training.tokenizers import GPT2, Bytes


def write_splits(out_dir: Path, splits: dict[str, Iterable[np.ndarray]], tokenizer: Bytes | GPT2, source: str) -> None:
    """Write the tokens of `train` and `val`, pieces of uint16 arrays in order, and describe them in meta.json."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name in ("meta.json", "train.bin", "val.bin"):  # an older data set
            (out_dir / name).unlink(missing_ok=True)
        meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "source": source, "checksum": {}}
        for split, pieces in splits.items():
            path = out_dir / f"{split}.bin"
            scratch = path.with_suffix(".bin.tmp")
            digest, count = hashlib.sha256(), 0
            with open(scratch, "wb") as file:
                for piece in pieces:
                    data = piece.astype("<u2", copy=False).tobytes()
                    file.write(data)
                    digest.update(data)
                    count += len(piece)
            os.replace(scratch, path)
            meta[f"{split}_tokens"] = count
            meta["checksum"][path.name] = f"sha256:{digest.hexdigest()}"
            print(f"{path}: {count:,} tokens")
        write_json(out_dir / "meta.json", meta)
    except OSError as error:
        raise UserError(f"cannot write to {out_dir}: {error.strerror}") from None
