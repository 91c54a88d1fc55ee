"""Who is slow, and who hangs: a thread that watches the progress of this rank and, when there is none, of all.

Each rank writes where it is to RUN/heartbeat/rank_00003, some bytes every few seconds. When a rank has made no progress
for `guard.hang_minutes` it reads what all have written, names those that are behind, prints where its own threads are,
and ends: a collective that waits for a dead rank would otherwise hold all the others' GPUs. What it hangs on may be the
disk: so another thread writes, and the end does not depend on the report.
"""

import faulthandler
import logging
import os
import socket
import statistics
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

from trainer.distributed import World, gather_objects
from trainer.run_files import Forgiving

log = logging.getLogger(__name__)

EXIT_HUNG = 76  # EX_PROTOCOL of sysexits.h: another rank did not do its part
# Parts in which a rank does not wait for others; sharded passes do, and there all take equally long. The backward pass
# of the last micro-batch is none of them: ranks reduce in it, and the host cannot tell its own time from the others'.
OWN_WORK = ("load", "forward", "accumulate")
# Fault-free ranks differ by so much, whatever the factor; seconds a step.
MIN_EXCESS_SECONDS = 0.05
MIN_STEPS = 5  # of which the mean is taken: a single step says little on a busy machine


class Watchdog:
    """Progress of this rank: `at` is called at every part of a step, in the same order on every rank."""

    def __init__(self, directory: Path, world: World, hang_minutes: float | None) -> None:
        self.directory, self.world = directory, world
        self.hang_seconds = None if hang_minutes is None else 60 * hang_minutes
        self._interval = min(5.0, (self.hang_seconds or 300.0) / 10)  # seconds
        self._place = (0, 0, "start")  # number of calls, step, part
        self._entered = self._last_sign = time.monotonic()
        self._seconds: dict[str, float] = defaultdict(float)
        self._num_steps = 0
        self._stopped = threading.Event()
        self._forgiving = Forgiving(str(directory))
        self._watching = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._writing = threading.Thread(target=self._keep_writing, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._watching.start()
        self._writing.start()

    def stop(self) -> None:
        self._stopped.set()
        self._watching.join()
        self._writing.join(self._interval)  # no longer: it may wait for a disk that does not answer

    def at(self, part: str, step: int) -> None:
        """This rank enters a part of a step."""
        now = time.monotonic()
        count, last_step, last_part = self._place
        self._seconds[last_part] += now - self._entered
        self._num_steps += step != last_step
        self._place, self._entered, self._last_sign = (count + 1, step, part), now, now

    def alive(self) -> None:
        """This rank waits where it is, and for good reason."""
        self._last_sign = time.monotonic()

    def name_slow_ranks(self, factor: float) -> None:
        """Rank 0 says whose own work took longer than `factor` times the median since the last call. All ranks call."""
        steps = self._num_steps
        if steps < MIN_STEPS:
            return
        own = {part: self._seconds[part] / steps for part in OWN_WORK}
        gathered = gather_objects((socket.gethostname(), own), self.world)
        self._seconds.clear()
        self._num_steps = 0
        for rank in slow_ranks([sum(parts.values()) for _, parts in gathered], factor):
            host, parts = gathered[rank]
            shown = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items())
            median = statistics.median(sum(parts.values()) for _, parts in gathered)
            log.warning("rank %d on %s is slow: %s a step; the median of all is %.2f s", rank, host, shown, median)

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            waited = time.monotonic() - self._last_sign
            if self.hang_seconds and waited > self.hang_seconds:
                self._end(waited)

    def _keep_writing(self) -> None:
        self._write()
        while not self._stopped.wait(self._interval):
            self._write()

    def _write(self) -> None:
        count, step, part = self._place
        path = self.directory / f"rank_{self.world.rank:05d}"
        temporary = path.with_name(path.name + ".tmp")
        with self._forgiving:
            self.directory.mkdir(parents=True, exist_ok=True)
            temporary.write_text(f"{count} {step} {part} {socket.gethostname()} {os.getpid()}\n")
            temporary.replace(path)

    def _end(self, waited: float) -> None:
        """Report and end the process, also if the report fails (a full disk under stderr) or does not come back."""
        at_the_latest = threading.Timer(4 * self._interval, os._exit, [EXIT_HUNG])
        at_the_latest.daemon = True
        at_the_latest.start()
        try:
            self._report(waited)
        finally:
            time.sleep(2 * self._interval)  # the others report too, before our end breaks their connections
            os._exit(EXIT_HUNG)

    def _report(self, waited: float) -> None:
        """Where this rank is, and then, from their files, who is behind."""
        _, step, part = self._place
        where = f"at step {step} in {part}"
        print(f"rank {self.world.rank}: no progress for {waited:.0f} s, {where}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        places = {}
        for rank in range(self.world.size):
            path = self.directory / f"rank_{rank:05d}"
            words = path.read_text().split() if path.exists() else []
            places[rank] = (int(words[0]), " ".join(words[1:3]), words[3]) if len(words) == 5 else (-1, "0 start", "?")
        print(f"rank {self.world.rank}: {behind(places)}", file=sys.stderr, flush=True)


def behind(places: dict[int, tuple[int, str, str]]) -> str:
    """Who is behind the others, from each rank's (number of parts entered, "step part", host)."""
    first, last = min(place[0] for place in places.values()), max(place[0] for place in places.values())
    if first == last:
        return "All ranks are at the same place: the network between them, or a GPU, does not answer"
    late = [
        f"rank {rank} on {host} (step {where.replace(' ', ' in ')})"
        for rank, (count, where, host) in places.items()
        if count == first
    ]
    return f"Behind the others: {', '.join(late)}"


def slow_ranks(seconds: list[float], factor: float) -> list[int]:
    """Ranks whose seconds are more than `factor` times the median and more than a little over it."""
    if len(seconds) < 2:
        return []
    median = statistics.median_low(seconds)
    return [rank for rank, own in enumerate(seconds) if own > factor * median and own > median + MIN_EXCESS_SECONDS]
