"""Run independent tasks in worker processes, few of them waiting, and leave no worker behind."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_handles
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_in_pool(
    work: Callable[[Task], Result], tasks: Iterator[Task], num_workers: int
) -> Iterator[tuple[Task, Result]]:
    """Yield (task, result) as they finish; with one worker in this process, in order.

    Tasks are taken from the iterator as workers come free, so listing the next source overlaps with packing. Raises
    what the work raises, and `ValueError` if a worker is killed.
    """
    if num_workers < 1:
        raise ValueError(f"--workers should be 1 or more, is {num_workers}")
    if num_workers == 1:
        for task in tasks:
            yield task, work(task)
        return
    # Spawned, not forked: a worker starts from nothing, whatever threads this process runs (tqdm has one).
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    try:
        pending: dict[Future[Result], Task] = {}
        for task in tasks:
            pending[pool.submit(work, task)] = task
            if len(pending) >= 2 * num_workers:
                yield from _finished(pending)
        while pending:
            yield from _finished(pending)
    except BrokenProcessPool as error:
        raise ValueError("a worker process was killed (out of memory?): run the same command again") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(pending: dict[Future[Result], Task]) -> Iterator[tuple[Task, Result]]:
    """Wait for one task or more; take out those that are done."""
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        yield pending.pop(future), future.result()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever: watch the parent and go when it goes."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for_handles([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
