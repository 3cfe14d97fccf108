"""The ranks of a torchrun job: how they meet, what they exchange, and who is missing when an exchange fails."""

import contextlib
import hashlib
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from run.errors import MachineError, is_out_of_memory

PIECE = 2**25  # elements that cross the network together
ROLL_CALL_SECONDS = 10  # or half of the time-out, of which it is the last part


def environment() -> tuple[int, int]:
    """(rank, number of ranks) as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job. Every method is called by all of them, in the same order; with one rank
    none does anything. MachineError where a rank does not answer in time.
    """

    rank: int = 0
    count: int = 1
    hosts: tuple[str, ...] = ()  # of each rank
    store: dist.Store | None = None
    roll_call_seconds: float = ROLL_CALL_SECONDS
    group: dist.ProcessGroup | None = None  # for tensors on the device; the default group is the hosts' own

    @property
    def is_main(self) -> bool:
        """Whether this rank prints, and reads and writes out_dir."""
        return self.rank == 0

    def sum(self, tensors: list[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over the ranks. All have one dtype and device. The order of the
        summation depends on their number and shapes alone, so that it is the same after a restart.
        """
        if self.count == 1:
            return
        for part in pieces(tensors):
            flat = part[0].view(-1) if len(part) == 1 else torch.cat([tensor.reshape(-1) for tensor in part])
            with self.exchanging():
                dist.all_reduce(flat, group=self.group)
            if len(part) > 1:
                sums = flat.split([tensor.numel() for tensor in part])
                torch._foreach_copy_(part, [total.view_as(tensor) for total, tensor in zip(sums, part, strict=True)])

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, (count, *shape)."""
        gathered = tensor.new_zeros(self.count, *tensor.shape)
        gathered[self.rank] = tensor
        self.sum([gathered])
        return gathered

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Replace the tensor, in place, by that of rank `source`."""
        if self.count > 1:
            with self.exchanging():
                dist.broadcast(tensor, source, group=self.group)

    def share(self, value: Any) -> Any:
        """Rank 0's value."""
        if self.count == 1:
            return value
        values = [value]
        with self.exchanging():
            dist.broadcast_object_list(values, 0)
        return values[0]

    def collect(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        values = [value] * self.count
        if self.count > 1:
            with self.exchanging():
                dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank says so. An exchange between the hosts: it does not wait for their devices."""
        if self.count == 1:
            return flag
        flags = torch.tensor(int(flag))
        with self.exchanging():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}" if self.hosts else f"rank {rank}"

    @contextlib.contextmanager
    def exchanging(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # which all errors of torch.distributed are
            if is_out_of_memory(error):
                raise
            raise MachineError(f"{self._roll_call()} ({short(error)})") from error

    def _roll_call(self) -> str:
        """Who is missing, after an exchange failed on this rank: the ranks that do not come here as well."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun, having noticed too, need not wait for the answer
        missing = set(range(self.count))

        def call() -> None:
            end = time.monotonic() + self.roll_call_seconds
            with contextlib.suppress(RuntimeError):  # which leaves this rank missing, too
                self.store.set(f"roll_call/{self.rank}", "here")
                while missing and time.monotonic() < end:
                    missing.difference_update([r for r in missing if self.store.check([f"roll_call/{r}"])])
                    time.sleep(0.1)

        # In a thread, because a store that is cut off keeps whoever asks it until TCP gives up, for 15 minutes.
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(self.roll_call_seconds)
        if self.rank in missing:
            return "the host that keeps the rendezvous cannot be reached"
        if not missing:
            return "an exchange between the ranks failed, though all of them answer"
        names = ", ".join(map(self.name, sorted(missing)))
        return f"of {self.count} ranks, {names} did not answer: hanging, dead or cut off"


def pieces(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, in lists of at most PIECE elements; a larger one has a list of its own."""
    part: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if part and size + tensor.numel() > PIECE:
            yield part
            part, size = [], 0
        part.append(tensor)
        size += tensor.numel()
    if part:
        yield part


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
        raise MachineError(f"the ranks could not meet within {timeout} s: {short(error)}") from None
    return Ranks(rank, count, tuple(hosts), store, roll_call_seconds, group)


def meet(store: dist.Store, rank: int, count: int, timeout: int) -> dist.Store:
    """A part of the store that only these processes use: torchrun keeps its store when it restarts the workers, with
    the addresses of the ones that died in it (torch 2.13). All have to see the same arrivals, their own included.
    """
    store.set(f"arrived/{rank}", uuid.uuid4().hex)
    everyone = range(count)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        missing = [other for other in everyone if not store.check([f"arrived/{other}"])]
        if not missing:
            arrivals = store.multi_get([f"arrived/{other}" for other in everyone])
            seen = hashlib.sha256(b"".join(arrivals)).hexdigest()
            store.set(f"seen/{rank}", seen)
            missing = [
                other
                for other in everyone
                if not store.check([f"seen/{other}"]) or store.get(f"seen/{other}").decode() != seen
            ]
            if not missing:
                return dist.PrefixStore(seen, store)
        time.sleep(0.05)
    raise RuntimeError(f"of {count} ranks, rank {', '.join(map(str, missing))} did not arrive")


def short(error: Exception) -> str:
    """What torch.distributed says, without the place in its sources."""
    return re.sub(r"^(.*failed with )?\[\S*\] ", "", str(error).splitlines()[0])
