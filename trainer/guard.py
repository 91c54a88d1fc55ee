"""What may end a run early: signals that ask it to stop. The loop asks, all ranks agree, and it saves and leaves.

Slurm sends SIGUSR1 before the time limit and SIGTERM on preemption; a person sends SIGINT. Under `srun` every rank
gets the signal, under others perhaps one: so the flag is summed over ranks with the step's counts, and all leave at
the same step boundary.
"""

import logging
import signal
from types import FrameType

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved, start the same command again to go on


class Guard:
    """Remembers that a stop was asked for. Used as a context manager around training."""

    def __init__(self) -> None:
        self.stop_requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Guard":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = True
        log.warning("%s: saving at the next step boundary, then leaving", signal.Signals(number).name)
