"""The signals that ask a run to stop."""

import os
import signal
from collections.abc import Callable
from types import FrameType

import torch

from run.ranks import Ranks

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: start the same command again
SIGNALS = [each for each in signal.Signals if each.name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")]


class StopSignals:
    """Within this context signals are noted, `asked` names the first; a second Ctrl-C interrupts at once."""

    def __init__(self, ranks: Ranks, note: Callable[[str], None]) -> None:
        self.asked: str | None = None
        self.ranks, self.note = ranks, note  # note(text) prints a line

    def stop_requested(self) -> bool:
        """Whether a signal reached any rank: the hosts ask each other after each step, and wait for no device."""
        flag = torch.tensor([int(self.asked is not None)])
        self.ranks.all_reduce([flag])
        return bool(flag)

    def __enter__(self) -> "StopSignals":
        # one that is ignored stays so, as SIGHUP under nohup
        heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.asked:
            self.asked = signal.Signals(number).name
            self.note(f"{self.asked}: finishing the step, then writing a checkpoint")
        elif number == signal.SIGINT and not os.environ.get("TORCHELASTIC_RUN_ID"):  # which sends Ctrl-C a second time
            raise KeyboardInterrupt
