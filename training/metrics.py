"""Where a run's rows go: metrics.jsonl, wandb, and a bar on the terminal. meter.py computes them."""

import contextlib
import json
import os
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from run.errors import UserError, warn
from run.files import flush
from run.settings import Settings

FILE = "metrics.jsonl"


class Metrics(contextlib.AbstractContextManager):
    """Writes rows for rank 0, and does nothing on other ranks. A row is a dict with a `step`, unique in the file."""

    def __init__(self, out_dir: Path, settings: Settings, started_at: int, resumed: bool, active: bool):
        self.active = active
        if active:
            self.path, self.unwritten = out_dir / FILE, b""
            self.wandb = start_wandb(settings, out_dir, resumed) if settings.wandb_log else None
            self.bar = tqdm(initial=started_at, total=settings.max_iters, unit="step", dynamic_ncols=True)

    def write(self, row: dict[str, Any]) -> None:
        """Write a row; entries that are None are left out."""
        if not self.active:
            return
        row = {name: value for name, value in row.items() if value is not None}
        self._append(json.dumps(row).encode() + b"\n")
        if self.wandb:
            self.wandb.log(row, step=row["step"])
        self.bar.update(row["step"] - self.bar.n)
        shown = {"train/loss": "loss {:.4f}", "tokens_per_second": "{:,.0f} tokens/s"}
        self.bar.set_postfix_str(", ".join(form.format(row[name]) for name, form in shown.items() if name in row))
        if "val/loss" in row:
            self.bar.write(f"step {row['step']}: validation loss {row['val/loss']:.4f}")

    def _append(self, line: bytes) -> None:
        """Append a line to the file; what could not be written is tried again with the next one."""
        behind, self.unwritten = bool(self.unwritten), self.unwritten + line
        try:
            with open(self.path, "ab", buffering=0) as file:
                while self.unwritten:
                    self.unwritten = self.unwritten[file.write(self.unwritten) :]
        except OSError as error:
            if not behind:
                warn(f"{self.path} cannot be written to: {error.strerror}; the run goes on and keeps its rows")

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if self.active:
            self.bar.close()
            if self.wandb:
                self.wandb.finish(exit_code=0 if kind is None else 1)


def drop_rows_after(path: Path, step: int) -> None:
    """Keep the rows up to `step`, so that a resumed run has every step once; a half-written last row goes too."""
    rows = [row for row in read_rows(path) if row["step"] <= step] if path.exists() else []
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flush(scratch)  # or a power cut might leave an empty file
    os.replace(scratch, path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off is left out, any other bad line is a UserError."""
    rows, lines = [], path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not a row of metrics") from None
        rows.append(row)
    return rows


def start_wandb(settings: Settings, out_dir: Path, resumed: bool) -> Any:
    import wandb

    identity = out_dir / "wandb_run_id"  # a resumed run goes on with its curves
    if not resumed or not identity.exists():
        identity.write_text(secrets.token_hex(4), encoding="utf-8")
    try:
        names = {"project": settings.wandb_project, "name": settings.wandb_run_name, "id": identity.read_text("utf-8")}
        run = wandb.init(**names, resume="allow", dir=out_dir, config=asdict(settings))
    except wandb.errors.Error as error:
        raise UserError(f"wandb: {str(error).splitlines()[0]}; log in, or set WANDB_MODE=offline") from None
    run.define_metric("val/loss", summary="min,last")
    return run
