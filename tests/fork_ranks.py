"""Ranks as forks of this process, which has imported everything already: a start takes a moment and not ten seconds.

    ranks = Ranks(folder, arguments, num_ranks=2, patch=patch)     # each runs trainer.train.main(arguments)
    ranks.wait_for("step 3/")
    ranks.kill(1, signal.SIGTERM)
    codes = ranks.wait(60)                                          # exit codes; minus the number of a signal

`patch(rank)` runs in each rank before training and may change what it likes: that is how faults are made. The process
that forks must not have used autograd or started threads.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tests.launch_ranks import free_port, rank_environment
from trainer import train


class Ranks:
    """One run of several ranks. Use `wait` or `close` at the end."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        num_ranks: int,
        patch: Callable[[int], None] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank{rank}.log" for rank in range(num_ranks)]
        port = free_port()
        self.pids: list[int] = []
        self.codes: dict[int, int] = {}
        for rank, log in enumerate(self.logs):
            log.write_bytes(b"")
            self.pids.append(_fork(rank, num_ranks, port, log, list(arguments), patch))

    def output(self, rank: int = 0) -> str:
        return self.logs[rank].read_text(errors="replace")

    def wait_for(self, text: str, rank: int = 0, timeout_s: float = 120.0) -> None:
        """Until a rank has printed `text`. AssertionError if it ends or time runs out before."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output(rank):
            ended = self.poll()
            if text in self.output(rank):
                return
            if ended or time.monotonic() > deadline:
                self.close()
                raise AssertionError(f"no {text!r} from rank {rank}:\n{self.output(rank)[-3000:]}")
            time.sleep(0.02)

    def kill(self, rank: int, number: int) -> None:
        self.poll()
        if rank not in self.codes:
            os.kill(self.pids[rank], number)

    def poll(self) -> bool:
        """Whether all have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, timeout_s: float) -> list[int]:
        """Exit codes by rank. Ranks that are still there after the time are killed and count as 999."""
        deadline = time.monotonic() + timeout_s
        while not self.poll() and time.monotonic() < deadline:
            time.sleep(0.02)
        late = [rank for rank in range(len(self.pids)) if rank not in self.codes]
        self.close()
        return [999 if rank in late else self.codes[rank] for rank in range(len(self.pids))]

    def close(self) -> None:
        for rank in range(len(self.pids)):
            self.kill(rank, signal.SIGKILL)
        while not self.poll():
            time.sleep(0.01)


def _fork(
    rank: int,
    num_ranks: int,
    port: int,
    log: Path,
    arguments: list[str],
    patch: Callable[[int], None] | None,
) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        environment = rank_environment(rank, num_ranks, port)  # made from the one that is cleared next
        os.environ.clear()
        os.environ.update(environment)
        if num_ranks == 1:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
                del os.environ[name]
        # The pool of threads is made anew after a fork: here, before autograd's threads race for it and one finds none.
        torch.set_num_threads(1)
        if patch:
            patch(rank)
        code = train.main(arguments)
    except BaseException:  # noqa: BLE001  # whatever it is, the fork must end here and not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
