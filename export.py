"""Write a run's newest checkpoint as a Hugging Face GPT-2, with its tokenizer and a model card.

python export.py --out_dir=out/gpt2_small_sophiag --to=my_gpt2
"""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from model import GPT
from pretrained import write_hugging_face
from records import checkpoints, curves
from run import errors
from run.files import write_json
from run.settings import Settings
from tokens.hugging_face import tokenizer_files
from tokens.tokenizers import TOKENIZERS

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, {optimizer}]
---
# {name}

A GPT-2 with {parameters:,} parameters, pretrained on {tokens:,} tokens of `{dataset}` with `{optimizer}`.

## Losses

| nats per token | |
| --- | --- |
{losses}

![Loss curves](curves.png)

## Training

```sh
{command}
```

| setting | |
| --- | --- |
{settings}
"""


def main() -> None:
    parser = errors.Parser(__doc__)
    parser.add_argument("--out_dir", type=Path, default=Path("out"), help="folder of the run (default %(default)s)")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="new folder to write")
    options = parser.parse_args()

    checkpoint = checkpoints.newest(options.out_dir)
    model, tokenizer = GPT(checkpoint.config), TOKENIZERS[checkpoint.tokenizer]
    checkpoint.load_model(model)
    files = tokenizer_files(tokenizer, model.config.block_size)
    (curve,) = curves.read_curves([options.out_dir])
    card = model_card(checkpoint, curve.runs[0], sum(p.numel() for p in model.parameters()))
    try:
        options.to.mkdir(parents=True)
        curves.picture([curve]).savefig(options.to / "curves.png", dpi=200)
        (options.to / "README.md").write_text(card, encoding="utf-8")
        for name, content in files.items():
            write_json(options.to / name, content)
        write_hugging_face(model, options.to, tokenizer.vocab_size, tokenizer.end_of_text)
    except (OSError, ValueError, SafetensorError) as error:
        raise errors.UserError(f"--to={options.to} cannot be written: {error}") from None
    print(options.to.resolve())


def model_card(checkpoint: checkpoints.Checkpoint, rows: dict[int, dict[str, Any]], parameters: int) -> str:
    """README.md: what the checkpoint is; `rows` are its run's metrics by step."""
    progress, defaults = checkpoint.progress, dataclasses.asdict(Settings())
    settings = checkpoint.settings | {"init_from": progress.started_from}
    losses = {}
    for key in ("train/loss", "val/loss"):
        if steps := [step for step, row in rows.items() if key in row and step <= progress.step]:
            losses[f"{key} at step {steps[-1]}"] = f"{rows[steps[-1]][key]:.4f}"
    command = [f"--{name}={value}" for name, value in settings.items() if value != defaults.get(name)]
    return CARD.format(
        name=settings["wandb_run_name"],
        optimizer=settings["optimizer"],
        dataset=settings["dataset"],
        parameters=parameters,
        tokens=progress.step * settings["batch_size"] * settings["block_size"],
        losses=table(losses),
        command=shlex.join(["python", "train.py", *command]),
        settings=table(settings),
    )


def table(values: dict[str, Any]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in values.items())


if __name__ == "__main__":
    errors.run(main)
