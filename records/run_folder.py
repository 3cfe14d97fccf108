"""A run's folder, out_dir: what it goes on from, and that one run at a time writes to it."""

import dataclasses
from pathlib import Path

import filelock

from records import checkpoints, metrics
from records.checkpoint_writer import set_aside
from run.errors import UserError
from run.files import write_json
from run.settings import Settings


class RunFolder:
    """Rank 0's hold on the folder; to be used as a context, at the end of which it lets go."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.path = Path(settings.out_dir)
        self._found = checkpoints.folders(self.path)
        self._lock = filelock.FileLock(self.path / ".lock", blocking=False)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def checkpoint_to_resume(self) -> checkpoints.Checkpoint | None:
        """What `init_from` asks for. Refuses a folder that holds another run, and writes nothing."""
        source = self.settings.init_from
        if source == "resume" or (source == "auto" and self._found):
            return checkpoints.newest(self.path)
        if not self._found or self.settings.eval_only:
            return None
        if source != "scratch" and (checkpoint := checkpoints.newest(self.path)).progress.started_from == source:
            return checkpoint  # the run that began with these weights
        raise UserError(f"{self.path} holds a run already: go on with --init_from=resume, or take another --out_dir")

    def begin(self, checkpoint: checkpoints.Checkpoint | None, settings: Settings) -> None:
        """Make the folder ready for the updates after `checkpoint`, or for those of a new run."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            if checkpoints.folders(self.path) != self._found:
                raise UserError(f"another run has written to {self.path} meanwhile: start again")
            metrics.drop_rows_after(self.path / metrics.FILE, checkpoint.progress.step if checkpoint else -1)
            if checkpoint:
                set_aside(self.path, checkpoint.progress.step)
            write_json(self.path / "settings.json", dataclasses.asdict(settings))
        except filelock.Timeout:
            raise UserError(
                f"another run is writing to {self.path}: stop it first, or choose another --out_dir"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"out_dir = {self.path} cannot be written to: {error}") from None
