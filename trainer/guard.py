"""What may end a run early, or make it go back: signals, steps that are not finite, ranks that hang.

One object, asked by the loop in one verb each. What a rank knows alone (a signal, a loss that is not finite) travels
with the sum of counts that every step makes anyway, so that all ranks decide the same at the same step.

Slurm sends SIGUSR1 before the time limit and SIGTERM on preemption; a person sends SIGINT. Under `srun` every rank gets
the signal, under others perhaps one.
"""

import json
import logging
import math
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from trainer.config import GuardSettings
from trainer.distributed import World, sum_on_host
from trainer.run_files import LineFile
from trainer.watchdog import Watchdog

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_DONE = 0
EXIT_WRONG = 2  # settings or data; before training nothing was changed, later the newest checkpoint is untouched
EXIT_GAVE_UP = 70  # EX_SOFTWARE of sysexits.h: it does not learn; see the log
EXIT_OUT_OF_MEMORY = 71  # EX_OSERR
EXIT_NOT_SAVED = 74  # EX_IOERR: the last checkpoint could not be written
EXIT_STOPPED = 75  # EX_TEMPFAIL: saved, start the same command again to go on
SKIP_WINDOW = 1000  # steps over which guard.max_skipped counts
MAX_SCALE_SEARCH = 24  # skipped steps in a row that fp16's first search for a scale explains: 2^24 is over any start
# fp16 reaches from 6e-8 to 65504 and gradients are smaller than 1, so a useful scale is large. One below this was
# brought there by gradients that no scale makes finite.
MIN_LOSS_SCALE = 2.0**-10


@contextmanager
def signals_end_the_process() -> Iterator[None]:
    """Around waiting for other processes with nothing to save: a handler in Python would run after the waiting."""
    previous = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Outcome(Enum):
    """How a stretch of training ended."""

    DONE = "done"
    STOPPED = "stopped by a signal, saved"
    ROLL_BACK = "unhealthy, to be repeated from the last checkpoint"


class GaveUp(RuntimeError):
    """The run was rolled back as often as allowed and is still not healthy, or no rollback would help."""


@dataclass
class Pending:
    """A step whose results may still be on the device."""

    step: int
    values: Tensor  # (loss of this rank, gradient norm), on the host once `ready`
    ready: Any  # CUDA event, or None on a CPU
    keys: list[str]


class Guard:
    """Used as a context manager around a process's training, and attached to a run once there is one."""

    def __init__(self) -> None:
        self.stop_requested = False
        self.step = 0  # that the loop is at
        self.num_rollbacks = 0
        self.healthy_until = 0  # once a rollback was asked for: step before which none was skipped
        self._previous: dict[int, Any] = {}
        self._watchdog: Watchdog | None = None
        self._pending: deque[Pending] = deque()
        self._lag = 0  # steps between a step and its judgement

    def __enter__(self) -> "Guard":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def attach(self, settings: GuardSettings, world: World, run_dir: Path, growth_steps: int | None) -> None:
        """Start to watch a run. `growth_steps`: good steps after which the loss scale doubles; None without one."""
        self.settings, self.world, self.run_dir = settings, world, run_dir
        self.growth_steps = growth_steps
        self._unhealthy = LineFile(run_dir / f"unhealthy_rank{world.rank}.jsonl")
        self._watchdog = Watchdog(run_dir / "heartbeat", world, settings.hang_minutes)
        self._watchdog.start()

    def detach(self) -> None:
        """The run is over: what does not move any more does not hang."""
        if self._watchdog:
            self._watchdog.stop()
            self._watchdog = None

    def begin(self, restored: bool = False) -> None:
        """A new stretch of training: what was pending belongs to the one before. `restored`: from a checkpoint."""
        self._pending.clear()
        self._skipped: deque[int] = deque()
        self._num_searching = 0 if self.growth_steps else None  # skipped steps of fp16's first search; None: it is over
        self._num_good = 0  # steps in a row, as fp16 counts them
        # And no step was skipped since. A scale that was restored goes on counting from where it was, which nobody here
        # knows: it may grow before as many steps were good here.
        self._scale_grew = restored and self.growth_steps is not None
        self._spikes = SpikeDetector(self.settings.spike_deviations)
        # On a GPU a step's results are read one step later, when they are there: reading never waits.
        self._lag = 1 if self.world.device.type == "cuda" else 0

    def at(self, part: str, step: int) -> None:
        """The loop enters a part of a step. For the watchdog, and for each rank's own time."""
        self.step = step
        if self._watchdog:
            self._watchdog.at(part, step)

    def alive(self) -> None:
        """For the watchdog: the loop waits for something that is slow and goes on."""
        if self._watchdog:
            self._watchdog.alive()

    def note_step(self, step: int, loss: Tensor, grad_norm: Tensor, keys: list[str]) -> None:
        """A step was made: this rank's loss and the global gradient norm, both 0-dim on the device, and its samples."""
        values = torch.stack([loss.detach().float().reshape(()), grad_norm.detach().float().reshape(())])
        ready = None
        if values.is_cuda:
            host = torch.empty(2, pin_memory=True)
            host.copy_(values, non_blocking=True)
            ready, values = torch.cuda.Event(), host
            ready.record()
        self._pending.append(Pending(step, values, ready, keys))

    def report(self) -> list[float]:
        """This rank's part of the step's sum: stop asked for; of the step to be judged: loss, loss not finite, norm not
        finite."""
        loss, norm = 0.0, 0.0
        if len(self._pending) > self._lag:
            pending = self._pending[0]
            if pending.ready is not None:
                pending.ready.synchronize()
            loss, norm = pending.values.tolist()
        finite = math.isfinite(loss)
        return [float(self.stop_requested), loss if finite else 0.0, float(not finite), float(not math.isfinite(norm))]

    def judge(self, sums: Sequence[float]) -> Outcome | None:
        """What the sum over ranks of `report` asks for: STOPPED, ROLL_BACK or nothing. The same on every rank.

        Raises `GaveUp` past the second budget.
        """
        stop, loss, bad_losses, bad_norms = sums
        if len(self._pending) > self._lag:
            pending = self._pending.popleft()
            while self._skipped and self._skipped[0] <= pending.step - SKIP_WINDOW:
                self._skipped.popleft()
            if bad_losses or bad_norms:
                self._count_skipped(pending, int(bad_losses))
                if self._over_budget():
                    return self._roll_back(pending.step)
            else:
                self._count_good()
                if spike := self._spikes.add(loss):
                    self._note(pending, "loss spike", f"loss {loss:.4g}, {spike}")
        return Outcome.STOPPED if stop else None

    def settle(self) -> Outcome | None:
        """Judge every step made so far, so that whatever is saved next has been judged. All ranks call.

        Waits for the device, as a save does.
        """
        lag, self._lag = self._lag, 0
        verdict = None
        while self._pending and verdict is not Outcome.ROLL_BACK:
            verdict = self.judge(sum_on_host(self.report(), self.world))
        self._lag = lag
        return verdict

    def skipped_steps(self) -> tuple[int, ...]:
        """The steps skipped of late, oldest first. A rollback goes back to before the first of them; when that one is
        long past, to before the next.
        """
        return tuple(self._skipped)

    def asked_in_evaluation(self) -> bool:
        """Whether this rank was asked to stop; an evaluation asks after each image, which is also progress."""
        self.at("evaluate", self.step)
        return self.stop_requested

    def anyone_asked_to_stop(self) -> bool:
        """Whether a signal has come to any rank. All ranks call."""
        return sum_on_host([float(self.stop_requested)], self.world)[0] > 0

    def check_loss_scale(self, step: int, scale: float) -> None:
        """Raise `GaveUp`, on all ranks, where so many steps were skipped, however slowly, that no scale is left."""
        if scale < MIN_LOSS_SCALE:
            raise GaveUp(
                f"step {step}: the loss scale has fallen to {scale:.1e}: gradients are not finite whatever it is. Look "
                f"at the samples in {self.run_dir}/unhealthy_rank*.jsonl, or try engine.precision=bf16"
            )

    def _count_good(self) -> None:
        self._num_searching = None
        self._num_good += 1
        if self._num_good == self.growth_steps:
            self._num_good, self._scale_grew = 0, True

    def _explained_by_the_scale(self) -> bool:
        """Whether fp16 skips this step to find the largest scale that works: at first, and once after each growth.

        A gradient that is not finite whatever the scale would else hide behind that for ever: good steps lie between.
        """
        self._num_good = 0  # as the scale itself counts after a step that is skipped
        grew, self._scale_grew = self._scale_grew, False
        if self._num_searching is not None:
            self._num_searching += 1
            return self._num_searching <= MAX_SCALE_SEARCH
        return grew

    def _count_skipped(self, pending: Pending, bad_losses: int) -> None:
        if self._explained_by_the_scale() and not bad_losses:
            return  # no fault
        self._skipped.append(pending.step)
        what = f"loss not finite on {bad_losses} ranks" if bad_losses else "gradient not finite"
        self._note(pending, "skipped", f"{what}; {len(self._skipped)} of the last {SKIP_WINDOW} steps skipped")

    def _over_budget(self) -> bool:
        return len(self._skipped) > self.settings.max_skipped

    def _roll_back(self, step: int) -> Outcome:
        self.num_rollbacks += 1
        self.healthy_until = self._skipped[0]
        max_rollbacks = self.settings.max_rollbacks
        text = f"step {step}: more than guard.max_skipped={self.settings.max_skipped} steps skipped"
        if self.num_rollbacks > max_rollbacks:
            raise GaveUp(
                f"{text}, after guard.max_rollbacks={max_rollbacks} rollbacks. Look at the samples in "
                f"{self.run_dir}/unhealthy_rank*.jsonl, or lower optim.lr"
            )
        log.error("%s; back to the last checkpoint (%d of %d)", text, self.num_rollbacks, max_rollbacks)
        return Outcome.ROLL_BACK

    def _note(self, pending: Pending, event: str, what: str) -> None:
        """Every rank says what it trained on: the sample at fault is among them."""
        log.warning(
            "step %d: %s: %s; rank %d had %s", pending.step, event, what, self.world.rank, " ".join(pending.keys)
        )
        entry = {"step": pending.step, "event": event, "what": what, "keys": pending.keys}
        self._unhealthy.write(json.dumps(entry) + "\n")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = True
        log.warning("%s: saving at the next step boundary, then leaving", signal.Signals(number).name)

    def name_slow_ranks(self) -> None:
        """Say on rank 0 which ranks' own work takes longer than the others'. All ranks call."""
        if self._watchdog:
            self._watchdog.name_slow_ranks(self.settings.slow_factor)


class SpikeDetector:
    """A loss far above the running mean, in running standard deviations (both exponential, over some 100 steps)."""

    DECAY = 0.99
    WARM_UP = 50  # steps before anything counts as a spike

    def __init__(self, deviations: float) -> None:
        self.deviations = deviations
        self.mean, self.variance, self.num_steps = 0.0, 0.0, 0

    def add(self, loss: float) -> str | None:
        """Count a step's loss; what was usual, if this was a spike. A spike does not raise what is usual."""
        limit = self.mean + self.deviations * math.sqrt(self.variance)
        if self.num_steps >= self.WARM_UP and loss > limit:
            return f"usual {self.mean:.4g} and at most {limit:.4g}"
        self.num_steps += 1
        weight = max(1 - self.DECAY, 1 / self.num_steps)
        distance = loss - self.mean
        self.mean += weight * distance
        self.variance = (1 - weight) * (self.variance + weight * distance**2)
        return None
