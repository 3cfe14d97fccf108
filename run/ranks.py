"""The ranks of a torchrun job: this process among them, and what they exchange besides DDP's gradients."""

import hashlib
import os
import sys
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from run.errors import MachineError


def environment() -> tuple[int, int]:
    """(rank, number of ranks) as torchrun says; (0, 1) without it. An empty variable counts as unset."""
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job. All call collectives in the same order. With one rank they do nothing."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank prints, and reads and writes out_dir."""
        return self.rank == 0

    def slice(self, count: int) -> tuple[int, int]:
        """The part (start, stop) of `count` things that falls to this rank; parts differ by one at most."""
        return count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size

    def all_reduce(self, tensors: list[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over the ranks."""
        if self.world_size > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def broadcast(self, tensor: Tensor) -> None:
        """Replace the tensor, in place, by rank 0's."""
        if self.world_size > 1:
            dist.broadcast(tensor, 0)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]


def join(device: torch.device, backend: str, timeout: int) -> Ranks:
    """Meet the other ranks, waiting for them for up to `timeout` seconds, here and at every exchange."""
    rank, world_size = environment()
    if world_size == 1:
        return Ranks()
    patience = timedelta(seconds=timeout)
    backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" and backend != "gloo" else "gloo"
    try:
        store = meet(next(dist.rendezvous("env://", rank, world_size, timeout=patience))[0], rank, world_size, timeout)
        dist.init_process_group(backends, store=store, rank=rank, world_size=world_size, timeout=patience)
    except (ValueError, RuntimeError) as error:
        raise MachineError(f"the ranks could not meet within {timeout} s: {str(error).splitlines()[0]}") from None
    return Ranks(rank, world_size)


def meet(store: dist.Store, rank: int, count: int, timeout: float) -> dist.Store:
    """A part of the store that only these processes use; RuntimeError with the ranks that did not come in time.

    torchrun keeps its store when it restarts the workers, with the addresses of the dead ones in it (torch 2.13). So
    every rank writes a new random name, and the ranks have met when all of them have read the same names.
    """
    ranks = range(count)
    store.set(f"arrived/{rank}", uuid.uuid4().hex)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        missing = [other for other in ranks if not store.check([f"arrived/{other}"])]
        if not missing:
            names = store.multi_get([f"arrived/{other}" for other in ranks])
            seen = hashlib.sha256(b"".join(names)).hexdigest()
            store.set(f"seen/{rank}", seen)
            missing = [r for r in ranks if not store.check([f"seen/{r}"]) or store.get(f"seen/{r}").decode() != seen]
            if not missing:
                return dist.PrefixStore(seen, store)
        time.sleep(0.05)
    raise RuntimeError(f"of {count} ranks, rank {', '.join(map(str, missing))} did not arrive")


def leave(code: int) -> NoReturn:
    """End the process at once: gloo's threads may abort an interpreter that is being taken down (torch 2.13)."""
    if dist.is_initialized() and not code:
        dist.destroy_process_group()  # not after a failure, as it could wait for a lost rank for ever
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
