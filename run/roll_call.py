"""How the ranks of a torchrun job meet, and who is missing when an exchange between them fails."""

import hashlib
import threading
import time
import uuid

import torch.distributed as dist


def meet(store: dist.Store, rank: int, count: int, timeout: float) -> dist.Store:
    """A part of the store that only these processes use; RuntimeError with the ranks that did not come in time.

    torchrun keeps its store when it restarts the workers, with the addresses of the dead ones in it (torch 2.13). So
    every rank signs in under a new name, and the ranks have met when all of them have seen the same names.
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


def missing_ranks(store: dist.Store, rank: int, count: int, seconds: float) -> set[int]:
    """After an exchange failed on this rank: the ranks that do not call this too within `seconds`. This rank is among
    them where the store itself cannot be reached.
    """
    missing = set(range(count))

    def call() -> None:
        end = time.monotonic() + seconds
        try:
            store.set(f"roll_call/{rank}", "here")
            while missing and time.monotonic() < end:
                missing.difference_update([r for r in missing if store.check([f"roll_call/{r}"])])
                time.sleep(0.1)
        except RuntimeError:
            missing.add(rank)

    # In a thread, because a store that is cut off keeps whoever asks it until TCP gives up, for 15 minutes.
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return set(missing)
