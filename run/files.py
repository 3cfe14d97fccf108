"""Small things done to files."""

import json
import os
from pathlib import Path
from typing import Any

MAX_BYTES = 2**20  # a file that somebody wrote by hand, or a program in a few lines, is shorter


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file; OSError where it cannot be read, else ValueError."""
    if not isinstance(value := json.loads(read_small(path)), dict):
        raise ValueError("not a JSON object")
    return value


def read_small(path: Path) -> bytes:
    """The bytes of a regular file, not longer than MAX_BYTES; OSError or ValueError for anything else."""
    size = path.stat().st_size
    if not path.is_file() or size > MAX_BYTES:  # to read a pipe or a device may take forever
        raise ValueError(f"not a regular file of at most {MAX_BYTES} bytes")
    return path.read_bytes()


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
