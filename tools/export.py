"""Write a run's checkpoint as a Hugging Face GPT-2, with its tokenizer and a model card.

python -m tools.export --out_dir=out/gpt2_small_sophiag --to=my_gpt2                             the newest
python -m tools.export --out_dir=out/gpt2_small_sophiag/checkpoints/step_00090000 --to=my_gpt2   another one
"""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from data.tokenizers import TOKENIZERS, Tokenizer
from model import GPT
from plot import picture, read_curves
from run import errors
from run.files import write_json
from run.options import Parser
from run.settings import Settings
from tools.hugging_face import tokenizer_files, write_weights
from training import checkpoints, metrics

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, {optimizer}]
---
# {wandb_run_name}

A GPT-2 with {parameters:,} parameters, trained from `{init_from}` on {tokens:,} tokens of `{dataset}` with {optimizer}.

## Losses

| nats per token | |
| --- | --- |
{losses}

## Training

```sh
{command}
```

| setting | |
| --- | --- |
{settings}
"""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out_dir", type=Path, default=Path("out"), help="run or checkpoint (default %(default)s)")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="new folder to write")
    options = parser.parse_args()

    checkpoint = checkpoints.find(options.out_dir)
    model, tokenizer = GPT(checkpoint.config), TOKENIZERS[checkpoint.tokenizer]
    checkpoint.load_model(model)
    run = checkpoint.folder.parent.parent
    curve = read_curves([run])[0] if (run / metrics.FILE).is_file() else None
    card = model_card(checkpoint, curve.runs[0] if curve else {}, sum(p.numel() for p in model.parameters()))
    try:
        options.to.mkdir(parents=True)
        if curve:
            picture([curve]).savefig(options.to / "curves.png", dpi=200)
        (options.to / "README.md").write_text(card, encoding="utf-8")
        write_model(model, tokenizer, options.to)
    except (OSError, ValueError, SafetensorError) as error:
        raise errors.UserError(f"--to={options.to} cannot be written: {error}") from None
    print(options.to.resolve())


def write_model(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """The model and its tokenizer as files of Hugging Face."""
    for name, content in tokenizer_files(tokenizer, model.config.block_size).items():
        write_json(folder / name, content)
    write_weights(model, folder, tokenizer.vocab_size, tokenizer.end_of_text)


def model_card(checkpoint: checkpoints.Checkpoint, rows: dict[int, dict[str, Any]], parameters: int) -> str:
    """README.md: what the checkpoint is; `rows` are its run's metrics by step, or none."""
    progress, defaults = checkpoint.progress, dataclasses.asdict(Settings())
    settings = checkpoint.settings | {"init_from": progress.started_from}
    losses = {} if rows else {"val/loss of the last evaluation": f"{progress.val_loss:.4f}"}
    for key in ("train/loss", "val/loss"):
        if steps := [step for step, row in rows.items() if key in row and step <= progress.step]:
            losses[f"{key} at step {steps[-1]}"] = f"{rows[steps[-1]][key]:.4f}"
    command = [f"--{name}={value}" for name, value in settings.items() if value != defaults.get(name)]
    return CARD.format(
        **{name: settings[name] for name in ("wandb_run_name", "optimizer", "dataset", "init_from")},
        parameters=parameters,
        tokens=progress.step * settings["batch_size"] * settings["block_size"],
        losses=table(losses) + ("\n\n![Loss curves](curves.png)" if rows else ""),
        command=shlex.join(["python", "train.py", *command]),
        settings=table(settings),
    )


def table(values: dict[str, Any]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in values.items())


if __name__ == "__main__":
    errors.run(main)
