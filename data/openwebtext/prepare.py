"""Tokenize OpenWebText, another data set of the Hugging Face hub, or local files.

    python data/openwebtext/prepare.py                                                    the hub's OpenWebText
    python data/openwebtext/prepare.py --data-files books.jsonl.bz2 --out-dir data/books  local files

An end-of-text token follows every document. The split (test_size 0.0005, seed 2357) and the order are nanoGPT's, so
that validation losses compare with published ones. OpenWebText takes 40 GB in the Hugging Face cache, besides the files
that are downloaded, and gives a train.bin of 18 GB (9 billion tokens) and a val.bin of 9 MB (4 million). Stopped at any
time, the same command goes on from where it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from data.preparation.sources import prepare  # noqa: E402
from run import errors  # noqa: E402


def main() -> None:
    prepare(__doc__, "openwebtext", source="Skylion007/openwebtext")


if __name__ == "__main__":
    errors.run(main)
