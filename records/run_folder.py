"""A run's folder, out_dir: what it goes on from, and that one run at a time writes to it."""

import dataclasses
from pathlib import Path

import filelock

from records import checkpoints, metrics
from run.errors import UserError
from run.files import check_writable, write_json
from run.settings import Settings

LOCK, SETTINGS = ".lock", "settings.json"


class RunFolder:
    """Rank 0's hold on the folder; to be used as a context, at the end of which it lets go."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.path = Path(settings.out_dir)
        self._lock = filelock.FileLock(self.path / LOCK, blocking=False)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def checkpoint(self) -> checkpoints.Checkpoint | None:
        """The checkpoint that the settings ask to go on from. Refuses a folder that is not fit for the run; writes
        nothing but the lock of a folder with a run in it.
        """
        s = self.settings
        if not s.eval_only:
            check_writable(self.path)
        for name in ("checkpoints", "wandb", metrics.FILE, SETTINGS, metrics.WANDB_ID, LOCK):
            path = self.path / name
            if path.is_symlink():  # what a stranger packed could lead anywhere
                raise UserError(f"{path} is a symbolic link: only out_dir itself may be one")
            if path.exists() and not (path.is_dir() if name in ("checkpoints", "wandb") else path.is_file()):
                raise UserError(f"{path} is not of the kind that a run makes: choose another --out_dir")
        found = checkpoints.folders(self.path)
        if s.init_from == "resume" or (s.init_from == "auto" and found):
            if found and not s.eval_only:
                self._hold()
            if (self.path / metrics.FILE).exists():
                metrics.read_rows(self.path / metrics.FILE)
            return checkpoints.newest(self.path)
        if found and not s.eval_only:
            raise UserError(
                f"{self.path} holds a run already: go on with --init_from=resume, or take another --out_dir"
            )
        return None

    def begin(self, resumed: checkpoints.Checkpoint | None) -> None:
        """Make the folder ready for the updates after `resumed`, or for those of a new run."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._hold()
            if resumed:
                checkpoints.set_aside(self.path, resumed.progress.step)
            elif checkpoints.folders(self.path):
                raise UserError(f"another run has written to {self.path} meanwhile: start again")
            write_json(self.path / SETTINGS, dataclasses.asdict(self.settings))
        except OSError as error:
            raise UserError(f"{self.path} cannot be written to: {error.strerror or error}") from None

    def _hold(self) -> None:
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"another run is writing to {self.path}: stop it first, or choose another --out_dir"
            ) from None
        except OSError as error:
            raise UserError(f"{self.path / LOCK} cannot be locked: {error.strerror or error}") from None
