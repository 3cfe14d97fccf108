"""Small things done to files."""

import json
import os
from pathlib import Path
from typing import Any

from run.errors import UserError

MAX_BYTES = 2**20  # of a file that somebody wrote by hand, or a program in a few lines


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, which may come from a stranger. OSError where it cannot be read, else ValueError."""
    return parse_object(read_small(path))


def parse_object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def read_small(path: Path) -> bytes:
    """The bytes of a regular file, not longer than MAX_BYTES; OSError or ValueError for anything else."""
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")  # to read a pipe or a device may take forever
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    return content


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to, without making it."""
    try:
        existing = folder.absolute()
        while not (existing.exists() or existing.is_symlink()):  # a link may lead nowhere
            existing = existing.parent
        longest = os.pathconf(existing, "PC_NAME_MAX")
        too_long = any(len(os.fsencode(name)) > longest for name in folder.parts)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {getattr(error, 'strerror', error)}") from None
    if too_long:
        raise UserError(f"{folder}: a name in it is longer than {longest} bytes")
    if not existing.is_dir():
        raise UserError(f"{folder}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: {existing} cannot be written to")
