"""Print text that a trained model writes, as it writes it.

python sample.py --out_dir=out --start="def main" --num_samples=3
python sample.py --init_from=gpt2 --start="Once upon a time"
python sample.py --out_dir=out --prompts=lines.txt     what follows each line
"""

import codecs
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizers import TOKENIZERS, Tokenizer
from model import GPT
from run import errors
from run.machine import find_device
from run.options import Parser, between
from training.checkpoints import find
from training.pretrained import load, tokenizer_of


def main() -> None:
    parser = Parser(__doc__)
    source, prompt = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    add = parser.add_argument
    source.add_argument("--out_dir", type=Path, default="out", help="folder of a run (newest checkpoint) or checkpoint")
    source.add_argument("--init_from", type=os.path.expanduser, help="weights: a hub name, a folder or a ckpt.pt file")
    prompt.add_argument("--start", default="\n", help="text to continue, or FILE:path to read it from a file")
    prompt.add_argument("--prompts", metavar="FILE", help="continue each line of this file; blank lines are left out")
    add("--num_samples", type=between(1), default=1, help="texts a prompt (default %(default)s)")
    add("--max_new_tokens", type=between(1), default=500, help="most tokens a text (default %(default)s)")
    add("--ignore_eos", action="store_true", help="go on after an end of text, with another document")
    add("--temperature", type=between(0, kind=float), default=0.8, help="0: always the likeliest token")
    add("--top_k", type=between(1), help="sample from the k likeliest tokens only")
    add("--top_p", type=between(0, 1, float), default=1.0, help="sample from the likeliest that reach this share only")
    add("--seed", type=between(0), default=1337, help="same seed, same text (default %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16 is less exact")
    options = parser.parse_args()

    device = find_device(options.device)
    model, tokenizer, _ = load_model(options.out_dir, options.init_from)
    model.to(device, getattr(torch, options.dtype))
    generator = torch.Generator(device).manual_seed(options.seed)

    def continued(text: str) -> Iterator[Tensor]:
        """The tokens (1, 1) that follow a text."""
        prompt = torch.tensor([tokenizer.encode(text) or [tokenizer.end_of_text]], device=device)
        limits = options.max_new_tokens, options.temperature, options.top_k, options.top_p
        tokens = model.stream(prompt, *limits, generator)
        if options.ignore_eos:
            return tokens
        return itertools.takewhile(lambda token: token.item() != tokenizer.end_of_text, tokens)

    texts = [start_text(options.start)]
    if options.prompts:
        texts = [line for line in start_text(f"FILE:{options.prompts}").split("\n") if line.strip()]
        if not texts:
            raise errors.UserError(f"--prompts: {options.prompts} has no line to continue")
    for number, (text, _) in enumerate(itertools.product(texts, range(options.num_samples))):
        if number:
            print("\n" + "-" * 40)
        write(text, continued(text), tokenizer)


def load_model(out_dir: Path | None, init_from: str | None) -> tuple[GPT, Tokenizer, str]:
    """A trained model to use, in evaluation mode, its tokenizer, and where it came from: the weights `init_from`, which
    `training.pretrained.load` reads, or else the checkpoint that `out_dir` names. UserError where there is none.
    """
    if init_from is not None:
        model, name = load(init_from), init_from
        tokenizer = tokenizer_of(init_from, model.config.vocab_size)
    else:
        checkpoint = find(out_dir)
        model, name = GPT(checkpoint.config), str(checkpoint.folder)
        checkpoint.load_model(model)
        tokenizer = TOKENIZERS[checkpoint.tokenizer]
    return model.eval(), tokenizer, name


def write(start: str, tokens: Iterator[Tensor], tokenizer: Tokenizer) -> None:
    """Print the start and, as they come, the tokens (1, 1) that follow."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span several tokens
    sys.stdout.write(start)
    for token in tokens:
        sys.stdout.write(decoder.decode(tokenizer.decode_bytes(token[0].tolist())))
        sys.stdout.flush()
    print(decoder.decode(b"", final=True))


def start_text(start: str) -> str:
    if not start.startswith("FILE:"):
        return start
    path = Path(os.path.expanduser(start.removeprefix("FILE:")))
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(f"{path} cannot be read as UTF-8 text: {error}") from None


if __name__ == "__main__":
    errors.run(main)
