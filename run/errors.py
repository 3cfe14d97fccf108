"""How a program ends: a user's error with one line and an exit code, a machine's with a traceback besides."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, where, and what would be right."""

    exit_code = 2


class RankError(UserError):
    """A UserError that may strike one rank and not the others, so the rank says so itself."""


class MachineError(RankError):  # some ranks are lost; each of the others says which
    exit_code = 4


class Unwritten(UserError):  # a checkpoint that the run cannot do without could not be written
    exit_code = 4


class Diverged(UserError):  # the loss or the gradient is no longer a finite number
    exit_code = 3


class Unbreakable:
    """A stream that goes quiet when its reader is gone, as `tee` is after Ctrl-C: that is no reason to lose a run."""

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
            silence(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def silence(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def warn(text: str) -> None:
    """Print a line beside a progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


def machine_at_fault(error: BaseException) -> str | None:
    """What to say of an error of the device, the network or torch.compile, and what to try; None for any other."""
    # by their words and modules, as cuBLAS and Triton raise plain RuntimeErrors, and many scripts import no torch
    if any(word in str(error) for word in ("CUDA error", "CUDA driver error", "Triton Error [CUDA]")):
        return f"the device failed ({str(error):.200}): CUDA_LAUNCH_BLOCKING=1 shows at which operation"
    if any(word in str(error) for word in ("gloo", "pair closure", "by peer", "Timed out waiting", "NCCL")):
        return f"an exchange with the other ranks failed ({str(error):.200}): one hangs, died or was cut off"
    modules = [kind.__module__ for kind in type(error).__mro__]
    if any(module.startswith(("torch._dynamo", "torch._inductor", "triton")) for module in modules):
        return f"torch.compile failed ({str(error):.200}): --compile=False goes on without it"
    return None


def one_line(message: str) -> str:
    """The message with control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`. A UserError, or too little memory, ends the process with one line and an exit code."""
    rank, local_rank = os.environ.get("RANK") or "0", os.environ.get("LOCAL_RANK") or "0"
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    try:
        if not hasattr(os, "pread"):  # as on Windows, which lacks some of the signals too
            raise UserError(f"Linux and macOS are supported, {sys.platform} is not: on Windows use WSL")
        main()
    except UserError as error:
        if local_rank == "0" or isinstance(error, RankError):  # else the machine's first rank says it
            say(error if rank == "0" else f"rank {rank}: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        silence(sys.stdout)
        sys.exit(141)
    except Exception as error:
        words = "out of memory", "can't allocate memory"  # CUDA's allocator's and the CPU's
        if isinstance(error, MemoryError) or any(each in str(error) for each in words):
            what = f"rank {rank} ran out of memory ({str(error):.200})"
            say(f"{what}: lower micro_batch_size (in tools.evaluate: --batch_size)")
            sys.exit(UserError.exit_code)
        if not (fault := machine_at_fault(error)):
            raise
        say(f"rank {rank}: {fault}")
        traceback.print_exc()  # it has the details
        sys.exit(MachineError.exit_code)


def say(error: UserError | str) -> None:
    print(f"error: {one_line(str(error))}", file=sys.stderr, flush=True)
