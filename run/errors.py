"""Errors that are the user's to mend: one clear line and an exit code, never a traceback."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from tqdm import tqdm


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, where, and what would be right. Exit code 2."""

    exit_code = 2


class RankError(UserError):
    """A UserError that need not strike every rank of a machine, so the rank it strikes says so itself."""


class MachineError(RankError):
    """Some ranks are lost; each of the others says which. Exit code 4."""

    exit_code = 4


class Unwritten(UserError):
    """A checkpoint that the run cannot do without could not be written. Exit code 4."""

    exit_code = 4


class Diverged(UserError):
    """The loss or the gradient stopped being a finite number. Exit code 3."""

    exit_code = 3


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, as everywhere here. `text` is the script's docstring."""

    def __init__(self, text: str | None):
        super().__init__(description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


class Unbreakable(io.TextIOBase):
    """A stream that is written to for as long as somebody reads it. A terminal that is closed, or the `tee` that Ctrl-C
    ends together with the run, is no reason to lose a run.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        return self._try(self.stream.write, text) or len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable, *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def warn(text: str) -> None:
    """Print a line beside a progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


def is_out_of_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory")  # of CUDA's allocator and of the CPU's
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def one_line(message: str) -> str:
    """The message as a terminal may be shown it: control characters escaped, the middle left out if it is very long."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    return line if len(line) <= 2000 else f"{line[:1000]}…{line[-1000:]}"


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`; a UserError ends the process with its line and its exit code, Ctrl-C with 130."""
    rank = os.environ.get("RANK", "0")
    try:
        main()
    except UserError as error:
        if rank == "0":
            print(f"error: {one_line(str(error))}", file=sys.stderr, flush=True)
        elif isinstance(error, RankError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: rank {rank}: {one_line(str(error))}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        asked = " ".join(str(error).split())[:200]
        print(f"error: rank {rank} ran out of memory ({asked}): lower micro_batch_size", file=sys.stderr, flush=True)
        sys.exit(UserError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
