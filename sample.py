"""Print text that a trained model writes, as it writes it.

python sample.py --out_dir=out --start="def main" --num_samples=3
python sample.py --init_from=gpt2 --start="Once upon a time"
"""

import argparse
import codecs
import io
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from records.loading import load_model
from run import errors
from run.machine import find_device


def main() -> None:
    parser = errors.Parser(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--out_dir", default="out", help="folder of the run, whose newest checkpoint is used")
    source.add_argument("--init_from", help="other weights: 'gpt2*', a folder that export.py wrote, a ckpt.pt file")
    parser.add_argument("--start", default="\n", help="text to continue, or FILE:path to read it from a file")
    parser.add_argument("--num_samples", type=at_least(1), default=1, help="texts to write (default %(default)s)")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=500, help="tokens a text (default %(default)s)")
    parser.add_argument("--temperature", type=at_least(0, float), default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top_k", type=at_least(1), help="sample from the k likeliest tokens only")
    parser.add_argument("--seed", type=at_least(0), default=1337, help="same seed, same text (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    options = parser.parse_args()

    device = find_device(options.device)
    model, tokenizer, _ = load_model(options.out_dir, options.init_from, device)
    start = start_text(options.start)
    tokens = tokenizer.encode(start) or [tokenizer.end_of_text]
    if max(tokens) >= model.config.vocab_size:
        raise errors.UserError(f"--start has a token beyond the model's vocabulary of {model.config.vocab_size}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    generator = torch.Generator(device).manual_seed(options.seed)
    prompt = torch.tensor([tokens], device=device)

    for number in range(options.num_samples):
        if number:
            print("\n" + "-" * 40)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span several tokens
        sys.stdout.write(start)
        for token in model.stream(prompt, options.max_new_tokens, options.temperature, options.top_k, generator):
            sys.stdout.write(decoder.decode(tokenizer.decode_bytes(token[0].tolist())))
            sys.stdout.flush()
        print(decoder.decode(b"", final=True))


def start_text(start: str) -> str:
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(f"--start: {path} cannot be read as UTF-8 text: {error}") from None


def at_least(least: int, kind: type = int) -> Callable[[str], float]:
    """Converts an option's text."""

    def convert(text: str) -> float:
        number = kind(text)
        if not least <= number < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to 2^63 - 1")
        return number

    return convert


if __name__ == "__main__":
    errors.run(main)
