"""Tokenize FineWeb-Edu's sample of 10 billion tokens (Penedo et al., 2024, arXiv 2406.17557) with GPT-2's vocabulary.

    python data/fineweb_edu/prepare.py                    27 GB in the Hugging Face cache, and 20 GB of tokens
    python data/fineweb_edu/prepare.py --streaming        the tokens alone, in the hub's order

Stopped at any time, the same command goes on from where it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from data.preparation.sources import prepare  # noqa: E402
from run import errors  # noqa: E402


def main() -> None:
    prepare(__doc__, "fineweb_edu", source="HuggingFaceFW/fineweb-edu", config="sample-10BT")


if __name__ == "__main__":
    errors.run(main)
