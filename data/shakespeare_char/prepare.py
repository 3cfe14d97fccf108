"""Make nanoGPT's small data set of Shakespeare, one token a character: the first nine tenths are to train on.

    python data/shakespeare_char/prepare.py                    downloads 1 MB
    python data/shakespeare_char/prepare.py --file input.txt   a local copy, or any other text

Tokens are bytes (of this text the same as characters), and a zero byte ends each split. So token ids are not nanoGPT's,
but losses compare.
"""

import http.client
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from data.preparation.writer import TextSource, write_data_set  # noqa: E402
from data.tokenizers import Bytes  # noqa: E402
from run import errors  # noqa: E402
from run.options import Parser  # noqa: E402

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--file", type=Path, help="a text file instead of the download")
    parser.add_argument("--out-dir", type=Path, default=Path(__file__).parent, help="where to write")
    parser.add_argument("--overwrite", action="store_true", help="replace another data set in --out-dir")
    options = parser.parse_args()
    try:
        data = options.file.read_bytes() if options.file else urllib.request.urlopen(URL, timeout=60).read()
        text = data.decode("utf-8-sig").replace("\r\n", "\n")  # editors of Windows write both
    except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
        if options.file:
            raise errors.UserError(f"--file: {options.file}: {error.strerror}") from None
        raise errors.UserError(f"{URL} could not be downloaded ({error}): use --file with a copy") from None
    except UnicodeDecodeError:
        raise errors.UserError(f"--file: {options.file} is not text in UTF-8") from None
    cut = len(text) * 9 // 10
    if not cut:
        raise errors.UserError(f"--file: {options.file} is empty")
    source = TextSource("tiny Shakespeare", {"train": [text[:cut]], "val": [text[cut:]]})
    write_data_set(options.out_dir, source, Bytes(), workers=1, overwrite=options.overwrite)


if __name__ == "__main__":
    errors.run(main)
