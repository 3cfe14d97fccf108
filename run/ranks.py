"""The ranks of a torchrun job: this process among them, and what they exchange besides DDP's gradients."""

import contextlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from run.errors import MachineError, say
from run.roll_call import meet, missing_ranks

ROLL_CALL_SECONDS = 10  # the last part of the time-out, of which it is half at most
LAST_SECONDS = 60  # for the main thread, and a checkpoint that is being written, when a rank is lost


def environment() -> tuple[int, int]:
    """(rank, number of ranks) as torchrun says; (0, 1) without it. An empty variable counts as unset."""
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job. All of them call its collectives, in the same order; with one rank these do
    nothing.
    """

    rank: int = 0
    count: int = 1
    hosts: tuple[str, ...] = ()  # of each rank
    store: dist.Store | None = None
    roll_call_seconds: float = ROLL_CALL_SECONDS
    group: dist.ProcessGroup | None = None  # for tensors on the device; the default group is gloo, for the host's own

    @property
    def is_main(self) -> bool:
        """Whether this rank prints, and reads and writes out_dir."""
        return self.rank == 0

    def slice(self, count: int) -> tuple[int, int]:
        """The part (start, stop) of `count` things that falls to this rank; parts differ by one at most."""
        return count * self.rank // self.count, count * (self.rank + 1) // self.count

    def all_reduce(self, tensors: list[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over the ranks."""
        if self.count > 1:
            for work in [dist.all_reduce(tensor, group=self.group, async_op=True) for tensor in tensors]:
                work.wait()

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, (ranks, *shape)."""
        gathered = tensor.new_zeros(self.count, *tensor.shape)
        gathered[self.rank] = tensor
        self.all_reduce([gathered])
        return gathered

    def broadcast(self, tensor: Tensor) -> None:
        """Replace the tensor, in place, by rank 0's."""
        if self.count > 1:
            dist.broadcast(tensor, 0, group=self.group)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def begin_any(self, flag: bool) -> Callable[[], bool]:
        """Begin to ask all hosts, not their devices, whether any says so; what is returned waits for the answer."""
        flags = torch.tensor(int(flag))
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, async_op=True)
        work.get_future().add_done_callback(self._end_if_stuck)
        return lambda: work.wait() and bool(flags)

    def _end_if_stuck(self, exchange: torch.futures.Future) -> None:
        # In a thread of gloo's, after an exchange. If it failed, the main thread may not learn of it, as it waits for a
        # device, which waits for the lost rank. Then the process ends here.
        try:
            exchange.wait()
        except RuntimeError as error:
            message = f"rank {self.rank}: {self._who_is_missing()} ({one_cause(error)})"
            time.sleep(LAST_SECONDS)
            say(message)
            os._exit(MachineError.exit_code)

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}" if self.hosts else f"rank {rank}"

    @contextlib.contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Where an exchange fails, in DDP or here: MachineError with the names of the ranks that are missing."""
        try:
            yield
        except RuntimeError as error:
            if not is_of_an_exchange(error):
                raise  # an error of this rank's own device or compiler keeps its message
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun, having noticed too, need not wait for the answer
            raise MachineError(f"{self._who_is_missing()} ({one_cause(error)})") from error

    def _who_is_missing(self) -> str:
        missing = missing_ranks(self.store, self.rank, self.count, self.roll_call_seconds)
        if self.rank in missing:
            return "the host that keeps the rendezvous cannot be reached"
        if not missing:
            return "an exchange between the ranks failed, though all of them answer"
        names = ", ".join(map(self.name, sorted(missing)))
        return f"of {self.count} ranks, {names} did not answer: hanging, dead or cut off"


def join(device: torch.device, backend: str, timeout: int) -> Ranks:
    """Meet the other ranks, waiting for them for up to `timeout` seconds, here and at every exchange."""
    rank, count = environment()
    if count == 1:
        return Ranks()
    roll_call_seconds = min(ROLL_CALL_SECONDS, timeout / 2)
    whole, patience = timedelta(seconds=timeout), timedelta(seconds=timeout - roll_call_seconds)
    try:
        store = meet(next(dist.rendezvous("env://", rank, count, timeout=whole))[0], rank, count, timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=patience)
        group = None
        if device.type == "cuda" and backend != "gloo":
            # the exchange between the hosts is to fail first, as it can tell whom it waited for
            group = dist.new_group(backend="nccl", timeout=2 * whole)
        hosts: list[str] = [""] * count
        dist.all_gather_object(hosts, socket.gethostname())
    except (ValueError, RuntimeError) as error:
        raise MachineError(f"the ranks could not meet within {timeout} s: {one_cause(error)}") from None
    return Ranks(rank, count, tuple(hosts), store, roll_call_seconds, group)


def leave(code: int) -> NoReturn:
    """End the process at once: gloo's threads may abort an interpreter that is being taken down (torch 2.13)."""
    if dist.is_initialized() and not code:
        dist.destroy_process_group()  # not after a failure, as it could wait for a lost rank for ever
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_of_an_exchange(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError | torch.AcceleratorError):
        return isinstance(error, dist.DistError)
    # gloo raises plain RuntimeErrors, most of them with the path of its source
    return any(words in str(error) for words in ("gloo", "pair closure", "by peer", "Timed out waiting"))


def one_cause(error: Exception) -> str:
    """What torch.distributed says, without the place in its sources."""
    return re.sub(r"^.*\[\S*\] ", "", str(error).splitlines()[0])
