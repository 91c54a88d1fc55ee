"""Micro-batches of one rank, decoded in worker processes that no stop signal kills."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator
from multiprocessing import forkserver
from multiprocessing.connection import wait as wait_for_handles

from torch.utils.data import DataLoader, Dataset

from trainer.config import Config
from trainer.data.batches import Batch
from trainer.data.order import StepSampler
from trainer.distributed import World
from trainer.guard import STOP_SIGNALS

# Imported once, in the fork server: its workers share the pages (torch alone is 300 MB) and start in no time.
PRELOADED = ["trainer.data.sam_data", "trainer.data.mae_data"]


def build_batches(
    dataset: Dataset, config: Config, world: World, first_step: int, last_step: int, shift: int = 0
) -> Generator[Batch, None, None]:
    """This rank's micro-batches of the steps `first_step` to `last_step`, in order; `close()` ends the workers.

    Workers come from a fork server: forking a process with CUDA or gloo threads alive may hang.
    """
    sampler = StepSampler(
        config.batch.global_size,
        config.data.lanes,
        world.rank,
        world.size,
        config.batch.micro,
        first_step,
        last_step,
        shift,
    )
    workers = config.data.workers
    if workers:
        _start_fork_server()
    loader = DataLoader(
        dataset,
        sampler=sampler,  # of micro-batches: automatic batching is off
        batch_size=None,
        num_workers=workers,
        prefetch_factor=config.data.prefetch if workers else None,
        pin_memory=world.device.type == "cuda",
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=_live_as_long_as_the_rank,
    )
    before = set(multiprocessing.active_children())
    iterator = iter(loader)
    try:
        yield from iterator
    finally:
        if workers:
            # What the iterator's __del__ does; but the traceback of an error keeps the iterator alive until the
            # interpreter exits, which then waits for workers that nobody told to end.
            iterator._shutdown_workers()
            for worker in set(multiprocessing.active_children()) - before:
                worker.kill()


def _start_fork_server() -> None:
    """Start the server, with what workers need imported, while stop signals are ignored, which it inherits.

    Ctrl-C and Slurm signal the whole process group. A dead server or worker would end the run with an error where it
    should save and leave.
    """
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    forkserver.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
    for number, handler in previous.items():
        signal.signal(number, handler)


def _live_as_long_as_the_rank(worker: int) -> None:
    """No shorter: the fork server restores default handlers in its children, so each worker ignores signals once more.
    No longer: torch's workers watch their parent, which is the fork server and waits for them when the rank was killed.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    rank = multiprocessing.parent_process()
    assert rank is not None
    threading.Thread(target=_end_with, args=(rank.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Wait until the process behind `sentinel` is gone, and go."""
    wait_for_handles([sentinel])
    os._exit(1)
