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
import select
import shlex
import signal
import subprocess
import sys
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
from trainer.config import PIPE, PIPE_SLOT, Remote
from trainer.data.order import DataOrder, ShardRows

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 30.0  # between tries, doubled each time
OPEN_TRIES = 3
READ_BYTES = 1 << 20  # of a command's output at a time

Check = Callable[[Path], str | None]  # what is wrong with a fetched file, if anything


class ShardError(ValueError):
    """A shard vanished, was cut short or changed: training must stop, not train on something else."""


@dataclass(frozen=True)
class ShardCache:
    """The node's copy of one remote data set. Small: it travels to loader workers."""

    url: str  # or a command, `pipe:ssh store cat /data/sa1b/{}`
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
        url = url_of(self.url, info.name)
        raise ShardError(f"{url} was evicted before it could be opened: raise data.remote.cache_gb")

    def fetch(self, info: ShardInfo, wait_for_others: bool = True) -> Path:
        """Have the shard here, whole and checked; one process of the node fetches it, the others wait or pass on."""
        path = self.directory / info.name
        if path.exists():
            return path
        with locked(path.with_name(path.name + ".lock"), wait_for_others) as mine:
            if mine and not path.exists():
                make_room(info.num_bytes, self.settings)
                url = url_of(self.url, info.name)
                try:
                    download(url, path, self.settings, lambda part: wrong_shard(part, info))
                except FileNotFoundError:
                    raise ShardError(f"{url} is missing; the manifest beside it lists it") from None
        return path


def url_of(source: str, name: str) -> str:
    """Where a file of the data set is: below the URL, or the command that writes it to its standard output.

    A name comes from the server's manifest, so a shell must not take it for more than one word.
    """
    if source.startswith(PIPE):
        return source.replace(PIPE_SLOT, shlex.quote(name))
    return f"{source}/{name}"


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
        download(url_of(url, MANIFEST_NAME), fresh, settings, lambda part: None)
    except FileNotFoundError:
        raise ValueError(f"{url} holds no {MANIFEST_NAME}: pack it with `python -m data_tools.pack`") from None
    directory = root / hashlib.sha256(fresh.read_bytes()).hexdigest()[:16]
    (directory / INDEX_DIR).mkdir(parents=True, exist_ok=True)
    fresh.replace(directory / MANIFEST_NAME)
    try:
        num_rows = load_manifest(directory).num_positions
    except ValueError as error:
        raise ValueError(f"{url_of(url, MANIFEST_NAME)}: {error}") from error
    with locked(directory / "index.lock"):
        for column in INDEX_DTYPE.names or ():
            path = directory / INDEX_DIR / f"{column}.npy"
            if path.exists():
                continue
            column_url = url_of(url, f"{INDEX_DIR}/{path.name}")
            try:
                download(column_url, path, settings, lambda part: wrong_column(part, num_rows))
            except FileNotFoundError:
                raise ValueError(f"{column_url} is missing: copy `index/` with the shards") from None
        fetch_quarantine(url, directory, settings)
    return ShardCache(url, directory, settings)


def fetch_quarantine(url: str, directory: Path, settings: Remote) -> None:
    """The quarantine list, or none if there is none.

    A command cannot say that a file is not there, only fail. Since it has just delivered the manifest, two failures
    are taken for that, and said aloud.
    """
    path, source = directory / QUARANTINE_NAME, url_of(url, QUARANTINE_NAME)
    if url.startswith(PIPE):
        settings = settings.model_copy(update={"retries": min(1, settings.retries)})
    try:
        download(source, path, settings, lambda part: None)
    except FileNotFoundError:
        path.unlink(missing_ok=True)
    except ShardError as error:
        if not url.startswith(PIPE):
            raise
        path.unlink(missing_ok=True)
        print(f"taken for a data set without quarantine list: {error}", file=sys.stderr, flush=True)


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
        transfer = transfer_output if url.startswith(PIPE) else transfer_file
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


def transfer_file(url: str, part: Path, timeout_seconds: float) -> BaseException | None:
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


def transfer_output(url: str, part: Path, timeout_seconds: float) -> BaseException | None:
    """One try of a command, through webdataset's opener. Returns what went wrong; time runs from the last byte.

    The command gets a session of its own: a shell and all that it started can then be ended together.
    """
    from webdataset.gopen import gopen  # only here: it takes seconds to import

    command = url.removeprefix(PIPE)
    stream = gopen(f"{PIPE}exec setsid sh -c {shlex.quote(command)}", "rb")
    process, output = stream.proc, stream.stream
    num_bytes = 0
    try:
        with part.open("wb") as file:
            while select.select([output], [], [], timeout_seconds)[0]:
                data = os.read(output.fileno(), READ_BYTES)
                if not data:
                    process.wait(timeout_seconds)
                    stream.wait_for_child()  # raises for a status that says failure
                    return None
                file.write(data)
                num_bytes += len(data)
        return TimeoutError(f"no byte came for {timeout_seconds:g} s, after {num_bytes}")
    except subprocess.TimeoutExpired:
        return TimeoutError(f"the command did not end within {timeout_seconds:g} s of its last byte")
    except OSError as error:
        return error
    finally:
        if process.poll() is None:
            end_session(process)
        output.close()


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()  # so young that `setsid` has not run
    process.wait()


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
        shard_rows: list[ShardRows],
        seed: int,
        num_lanes: int,
        window: int,
        cache: ShardCache,
        shards: tuple[ShardInfo, ...],
    ) -> None:
        super().__init__(shard_rows, seed, num_lanes, window)
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
        return [int(shard) for shard in line[low : high + 1] if self.sizes[shard]]

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
