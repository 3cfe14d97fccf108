"""Tokenize OpenWebText, or local files, with GPT-2's vocabulary.

    python data/openwebtext/prepare.py                                                    the hub's OpenWebText
    python data/openwebtext/prepare.py --data-files books.jsonl.bz2 --out-dir data/books  local files

An end-of-text token follows every document. The split (test_size 0.0005, seed 2357) and the order are nanoGPT's, so
that validation losses compare with published ones. OpenWebText takes about 54 GB in the Hugging Face cache and gives
a train.bin of 17 GB (9 billion tokens) and a val.bin of 8.5 MB (4 million).
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from training import errors  # noqa: E402
from training.preparation import write_splits  # noqa: E402
from training.tokenizers import GPT2  # noqa: E402

HUB_NAME = "Skylion007/openwebtext"
FORMATS = {".json": "json", ".jsonl": "json", ".txt": "text", ".parquet": "parquet"}
DATA_FILES_HELP = "local files: .json or .jsonl or .parquet with a column text, or .txt; may be compressed"
COMPRESSIONS = {".bz2", ".gz", ".xz", ".zst"}


def main() -> None:
    parser = errors.Parser(__doc__)
    parser.add_argument("--data-files", nargs="+", type=Path, metavar="FILE", help=DATA_FILES_HELP)
    parser.add_argument("--out-dir", type=Path, default=Path(__file__).parent, help="where to write")
    parser.add_argument("--num-proc", type=int, default=os.cpu_count(), help="processes (default: every core)")
    options = parser.parse_args()

    if options.num_proc < 1:
        raise errors.UserError(f"--num-proc = {options.num_proc}: must be at least 1")

    tokenizer = GPT2()
    tokenizer.encoding  # noqa: B018  it is missing, or downloaded, before anything else is
    documents = load(options.data_files)
    if len(documents) < 2:
        raise errors.UserError(f"{len(documents)} documents cannot be split into train and val: name more text")
    parts = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        tokens = tokenizer.encoding.encode_ordinary_batch(batch["text"], num_threads=1)
        return {"tokens": [[*document, tokenizer.end_of_text] for document in tokens]}

    splits = {}
    for split, part in (("train", parts["train"]), ("val", parts["test"])):
        tokenized = part.map(
            tokenize,
            batched=True,
            remove_columns=part.column_names,
            features=datasets.Features({"tokens": datasets.List(datasets.Value("uint16"))}),
            num_proc=min(options.num_proc, len(part)),
            desc=f"tokenizing {split}",
        )
        splits[split] = token_pieces(tokenized, split)
    source = ", ".join(path.name for path in options.data_files) if options.data_files else HUB_NAME
    write_splits(options.out_dir, splits, tokenizer, source)


def load(files: list[Path] | None) -> datasets.Dataset:
    """The documents, as a data set with a column `text`."""
    try:
        if not files:
            documents = datasets.load_dataset(HUB_NAME, split="train")
        else:
            kinds = {kind_of(path) for path in files}
            if len(kinds) > 1:
                raise errors.UserError(
                    f"--data-files are of several formats ({', '.join(sorted(kinds))}): name one kind"
                )
            kind = kinds.pop()
            whole = {"sample_by": "document"} if kind == "text" else {}
            documents = datasets.load_dataset(kind, data_files=[str(path) for path in files], split="train", **whole)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        if files:
            raise errors.UserError(f"--data-files cannot be read: {cause}") from None
        raise errors.UserError(
            f"{HUB_NAME} could not be downloaded: connect to the network or use --data-files ({cause})"
        ) from None
    if "text" not in documents.column_names:
        raise errors.UserError(f"the documents have no column 'text', but {', '.join(documents.column_names)}")
    if documents.features["text"].dtype not in ("string", "large_string"):
        raise errors.UserError(f"the column 'text' holds {documents.features['text'].dtype}, not text")
    missing = documents.data.column("text").null_count
    if missing:
        raise errors.UserError(f"{missing} of the {len(documents)} documents have no text")
    return documents


def kind_of(path: Path) -> str:
    if not path.is_file():
        raise errors.UserError(f"--data-files: {path} does not exist")
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    if not suffixes or suffixes[-1] not in FORMATS:
        raise errors.UserError(f"--data-files: {path} is none of {', '.join(FORMATS)}, compressed or not")
    return FORMATS[suffixes[-1]]


def token_pieces(tokenized: datasets.Dataset, split: str) -> Iterator[np.ndarray]:
    """The tokens of all documents in order, many documents at a time."""
    table = tokenized.with_format("arrow")
    for batch in tqdm(table.iter(batch_size=10_000), total=-(-len(table) // 10_000), desc=f"writing {split}"):
        for chunk in batch["tokens"].chunks:
            yield chunk.flatten().to_numpy()


if __name__ == "__main__":
    errors.run(main)
