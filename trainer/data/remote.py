"""Shards on a server: fetched whole into a directory of the node, checked, kept within a cap, fetched ahead of use.

    CACHE_DIR/
        .lock                         held while room is made
        0123456789abcdef/             one data set, named by the SHA-256 of its manifest: packed anew it is another one
            manifest.json  index/  quarantine.json
            shard-000012.tar          whole and checked, or not there; modified when it was last read
            shard-000012.tar.part     being fetched by the holder of the lock
            shard-000012.tar.lock

All processes of a node share the cache. Locks are `flock`: they go when their process does, however it ends.
"""

import asyncio
import fcntl
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import fsspec
import numpy as np

from data_tools.sample_format import (
    INDEX_DIR,
    INDEX_DTYPE,
    MANIFEST_NAME,
    QUARANTINE_NAME,
    ShardInfo,
    load_manifest,
    publish,
)
from trainer.config import Remote
from trainer.data.order import DataOrder

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 30.0  # between tries, doubled each time
OPEN_TRIES = 3

Check = Callable[[Path], str | None]  # what is wrong with a fetched file, if anything


class ShardError(ValueError):
    """A shard vanished, was cut short or changed: training must stop, not train on something else."""


@dataclass(frozen=True)
class ShardCache:
    """The node's copy of one remote data set. Small: it travels to loader workers."""

    url: str
    directory: Path  # manifest and index are here, shards come when needed
    settings: Remote

    def open(self, info: ShardInfo) -> int:
        """File descriptor of a shard, fetched first if it is not here. Raises `ShardError`."""
        for _ in range(OPEN_TRIES):
            path = self.fetch(info)
            try:
                return os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue  # another process needed the room
        raise ShardError(f"{self.url}/{info.name} was evicted before it could be opened: raise data.remote.cache_gb")

    def fetch(self, info: ShardInfo, wait_for_others: bool = True) -> Path:
        """Have the shard here, whole and checked; one process of the node fetches it, the others wait or pass on."""
        path = self.directory / info.name
        if path.exists():
            return path
        with locked(path.with_name(path.name + ".lock"), wait_for_others) as mine:
            if mine and not path.exists():
                make_room(info.num_bytes, self.settings)
                url = f"{self.url}/{info.name}"
                try:
                    download(url, path, self.settings, lambda part: wrong_shard(part, info))
                except FileNotFoundError:
                    raise ShardError(f"{url} is missing; the manifest beside it lists it") from None
        return path


def cache_dir(settings: Remote) -> Path:
    """Where the node keeps what it fetched; by default not shared between users, who could not write each other's."""
    return settings.cache_dir or Path(tempfile.gettempdir()) / f"shard_cache_{os.getuid()}"


def open_cache(url: str, settings: Remote) -> ShardCache:
    """Fetch manifest and quarantine anew, and the index if this node lacks it.

    The index is 52 bytes a sample: 0.6 GB for SA-1B. Raises `ValueError` where no packed data set is, `ShardError`
    for a server that does not answer.
    """
    url, root = url.rstrip("/"), cache_dir(settings)
    root.mkdir(parents=True, exist_ok=True)
    fresh = root / f"{MANIFEST_NAME}.{os.getpid()}"
    try:
        download(f"{url}/{MANIFEST_NAME}", fresh, settings, lambda part: None)
    except FileNotFoundError:
        raise ValueError(f"{url} holds no {MANIFEST_NAME}: pack it with `python -m data_tools.pack`") from None
    directory = root / hashlib.sha256(fresh.read_bytes()).hexdigest()[:16]
    (directory / INDEX_DIR).mkdir(parents=True, exist_ok=True)
    fresh.replace(directory / MANIFEST_NAME)
    try:
        num_rows = load_manifest(directory).num_positions
    except ValueError as error:
        raise ValueError(f"{url}/{MANIFEST_NAME}: {error}") from error
    with locked(directory / "index.lock"):
        for column in INDEX_DTYPE.names or ():
            path = directory / INDEX_DIR / f"{column}.npy"
            if path.exists():
                continue
            try:
                download(f"{url}/{INDEX_DIR}/{path.name}", path, settings, lambda part: wrong_column(part, num_rows))
            except FileNotFoundError:
                raise ValueError(f"{url}/{INDEX_DIR}/{path.name} is missing: copy `index/` with the shards") from None
        try:
            download(f"{url}/{QUARANTINE_NAME}", directory / QUARANTINE_NAME, settings, lambda part: None)
        except FileNotFoundError:
            (directory / QUARANTINE_NAME).unlink(missing_ok=True)
    return ShardCache(url, directory, settings)


def wrong_shard(path: Path, info: ShardInfo) -> str | None:
    size = path.stat().st_size
    if size != info.num_bytes:
        return f"it has {size} bytes, the manifest says {info.num_bytes}"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == info.sha256 else "its SHA-256 is not the manifest's"


def wrong_column(path: Path, num_rows: int) -> str | None:
    try:
        found = len(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, EOFError) as error:
        return f"it is no whole column of an index ({error})"
    return None if found == num_rows else f"it has {found} rows, the manifest says {num_rows}"


@contextmanager
def locked(path: Path, wait_for_others: bool = True) -> Iterator[bool]:
    """Hold a lock file; yields False at once if another process has it and it is not to be waited for."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait_for_others else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        yield mine


def make_room(num_bytes: int, settings: Remote) -> None:
    """Delete the shards least recently read until `num_bytes` more fit under the cap.

    Who has one open reads on: the file goes when the last descriptor does. What is under way elsewhere counts as far
    as it has come, so the cap may be passed by the shards that are fetched at the same moment.
    """
    root, cap = cache_dir(settings), settings.cache_gb * 1e9
    if num_bytes > cap:
        raise ShardError(f"data.remote.cache_gb={settings.cache_gb:g} is less than one shard of {num_bytes / 1e9:g} GB")
    with locked(root / ".lock"):
        found = []
        for path in [*root.glob("*/*.tar"), *root.glob("*/*.tar.part")]:
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # a part that was just finished
            found.append((stat.st_mtime, stat.st_size, path))
        used = sum(size for _, size, _ in found)
        for modified, size, path in sorted(found):
            if used + num_bytes <= cap:
                break
            if path.suffix == ".part" and time.time() - modified < 2 * settings.timeout_seconds:
                continue  # being written; an older one was left by a process that was killed
            path.unlink(missing_ok=True)
            used -= size


# ------------------------------------------------------------------------------------------------------- one download


def download(url: str, path: Path, settings: Remote, check: Check) -> None:
    """Fetch a file whole, check it, give it its name. The caller sees that nobody else writes the same file.

    Raises `FileNotFoundError` where the server says there is none, `ShardError` when the tries are used up.
    """
    started, part = time.monotonic(), path.with_name(path.name + ".part")
    problem: str | None = None
    for number in range(settings.retries + 1):
        if number:
            time.sleep(min(FIRST_WAIT_SECONDS * 2 ** (number - 1), LONGEST_WAIT_SECONDS))
        part.unlink(missing_ok=True)  # a try that was given up may still hold it and write
        error = transfer(url, part, settings.timeout_seconds)
        if isinstance(error, FileNotFoundError):
            raise error
        problem = f"{type(error).__name__}: {error}" if error else check(part)
        if problem is None:
            publish(part, path)
            return
    part.unlink(missing_ok=True)
    raise ShardError(
        f"{url} could not be fetched: gave up after {settings.retries + 1} tries in {time.monotonic() - started:.1f} s "
        f"(data.remote.retries={settings.retries}, timeout_seconds={settings.timeout_seconds:g}); the last: {problem}"
    )


def transfer(url: str, part: Path, timeout_seconds: float) -> BaseException | None:
    """One try. Returns what went wrong: every file system of fsspec has exceptions of its own.

    Time runs from the last byte that came, not over the file: a large shard may take long, a silent server may not.
    """
    system = file_system(url)
    progress = fsspec.Callback()
    coroutine = system._get_file(url, str(part), callback=progress)  # fsspec's name for the form that can be cancelled
    future = asyncio.run_coroutine_threadsafe(coroutine, system.loop)
    seen, heard = progress.value, time.monotonic()
    while not wait([future], timeout=min(1.0, timeout_seconds / 10)).done:
        if progress.value != seen:
            seen, heard = progress.value, time.monotonic()
        elif time.monotonic() - heard > timeout_seconds:
            future.cancel()
            return TimeoutError(f"no byte came for {timeout_seconds:g} s, after {seen}")
    return future.exception()


def file_system(url: str) -> Any:
    """fsspec's file system for a URL; it keeps one for each process and thread."""
    scheme = url.split("://")[0]
    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        import aiohttp  # only here: half a second that local data sets need not pay

        # aiohttp would give up any file after five minutes.
        options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None)}}
    try:
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise ValueError(f"{url} cannot be read: {error}") from error  # fsspec's text names the package to install


# ------------------------------------------------------------------------------------------------------- ahead of use


class AheadOrder(DataOrder):
    """The same order; on entering a window of a lane, its shards and the next's are fetched in the background."""

    def __init__(
        self,
        rows_per_shard: list[np.ndarray],
        seed: int,
        num_lanes: int,
        window: int,
        cache: ShardCache,
        shards: tuple[ShardInfo, ...],
    ) -> None:
        super().__init__(rows_per_shard, seed, num_lanes, window)
        self.cache, self.shards = cache, shards
        self._entered: dict[int, tuple[int, int]] = {}  # lane to epoch and window
        self._wanted: SimpleQueue[int] | None = None

    def row(self, position: int) -> int:
        epoch, place = divmod(position, self.num_samples)
        lane, window = place % self.num_lanes, place // self.num_lanes // self.window
        if self._entered.get(lane) != (epoch, window):
            self._entered[lane] = epoch, window
            for shard in (*self.shards_of(epoch, lane, window), *self.shards_of(epoch, lane, window + 1)):
                self._queue().put(shard)
        return super().row(position)

    def shards_of(self, epoch: int, lane: int, window: int) -> list[int]:
        """The shards that a window lies in, in the order of the line; past the last, of the next epoch's first."""
        lane_start, lane_length = self._lane(lane)
        start = window * self.window
        if start >= lane_length:
            epoch, start = epoch + 1, 0
        first, last = lane_start + start, lane_start + min(start + self.window, lane_length) - 1
        line, ends = self._epoch_line(epoch)
        low, high = np.searchsorted(ends, [first, last], side="right")
        return [int(shard) for shard in line[low : high + 1] if len(self.rows_per_shard[shard])]

    def _queue(self) -> SimpleQueue[int]:
        """What the background thread of this process is to fetch."""
        if self._wanted is None:
            self._wanted = SimpleQueue()
            threading.Thread(target=self._fetch_wanted, args=(self._wanted,), daemon=True).start()
        return self._wanted

    def _fetch_wanted(self, wanted: SimpleQueue[int]) -> None:
        while True:
            try:
                self.cache.fetch(self.shards[wanted.get()], wait_for_others=False)
            except ShardError:
                continue  # whoever reads the shard tries again, and says why it cannot be had

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_entered": {}, "_wanted": None}  # a thread does not travel
