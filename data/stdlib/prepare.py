"""Make a data set of text that every Python has: the sources of its standard library and its language reference.

    python data/stdlib/prepare.py [--out-dir DIR]

Tokens are bytes; a zero byte ends every file. One file in twenty goes to the validation split, chosen by its name, so
that one Python always gives the same split.
"""

import hashlib
import platform
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from data.preparation.writer import TextSource, write_data_set  # noqa: E402
from data.tokenizers import Bytes  # noqa: E402
from run import errors  # noqa: E402
from run.options import Parser  # noqa: E402

LEFT_OUT = {"__pycache__", "idlelib", "lib2to3", "site-packages", "dist-packages", "test", "tests", "turtledemo"}


def documents() -> dict[str, str]:
    """Text by name, in the order of the names."""
    from pydoc_data.topics import topics  # the language reference

    texts = {f"reference/{name}": text for name, text in topics.items()}
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if LEFT_OUT.isdisjoint(name.parts) and "pydoc_data" not in name.parts:
            texts[name.as_posix()] = path.read_text(encoding="utf-8-sig", errors="replace")
    return dict(sorted(texts.items()))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out-dir", type=Path, default=Path(__file__).parent, help="where to write")
    parser.add_argument("--overwrite", action="store_true", help="replace another data set in --out-dir")
    options = parser.parse_args()

    texts: dict[str, list[str]] = {"train": [], "val": []}
    for name, text in documents().items():
        split = "val" if hashlib.sha256(name.encode()).digest()[0] % 20 == 0 else "train"
        texts[split].append(text)
    source = TextSource(f"standard library of Python {platform.python_version()}", texts)
    write_data_set(options.out_dir, source, Bytes(), workers=1, overwrite=options.overwrite)


if __name__ == "__main__":
    errors.run(main)
