"""Read samples of a packed data set by byte offset, and say clearly when a shard is not what the manifest promises."""

import hashlib
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.sample_format import (
    MANIFEST_NAME,
    Record,
    load_manifest,
    load_quarantine,
    open_index,
    parse_record,
)
from trainer.config import Remote, is_remote
from trainer.data.images import SampleError
from trainer.data.order import ShardRows, holdout_hash
from trainer.data.remote import ShardCache, ShardError, open_cache

MAX_OPEN_SHARDS = 256  # file descriptors a worker keeps; far below the usual limit of 1024


@dataclass(frozen=True)
class RawSample:
    """Undecoded: JPEG bytes and the parsed JSON."""

    jpeg: bytes
    record: Record


def open_shards(source: str | Path, remote: Remote) -> "ShardReader":
    """A reader of a directory, or of a URL through the node's cache."""
    if not is_remote(str(source)):
        return ShardReader(Path(source))
    cache = open_cache(str(source), remote)
    return ShardReader(cache.directory, cache)


class ShardReader:
    """Random access to a packed data set. Cheap to create; opens shards when first read, also after a fork.

    cache: fetches shards into `directory` when they are first read; without it they are there.
    """

    def __init__(self, directory: Path, cache: ShardCache | None = None) -> None:
        self.directory, self.cache = Path(directory), cache
        self.manifest = load_manifest(self.directory)
        self.columns = open_index(self.directory)
        self.ends = np.cumsum([shard.num_positions for shard in self.manifest.shards])
        num_rows = len(self.columns["jpg_size"])
        if num_rows != self.manifest.num_positions:
            raise ShardError(
                f"{self.directory}: index of {num_rows} rows, manifest of {self.manifest.num_positions} positions; "
                f"`python -m data_tools.index {self.directory}` writes the index anew"
            )
        self.quarantined = {entry.position: entry.reason for entry in load_quarantine(self.directory)}
        self._files: OrderedDict[int, int] = OrderedDict()

    def read(self, row: int) -> RawSample:
        """The sample at a global row.

        Raises `SampleError` for one to pass over: a gap, a quarantined position, JSON that does not parse; and
        `ShardError`, which must stop the run, for a shard that is not whole.
        """
        jpg_size, json_size = int(self.columns["jpg_size"][row]), int(self.columns["json_size"][row])
        if jpg_size == 0:
            raise SampleError("left out when the data set was packed")
        if row in self.quarantined:
            raise SampleError(f"quarantined: {self.quarantined[row]}")
        shard = self.shard_of(row)
        jpeg = self._read_range(shard, int(self.columns["jpg_offset"][row]), jpg_size)
        if json_size == 0:
            record = Record(int(self.columns["image_id"][row]), 0, 0, f"{self.name_of(row)}.jpg", [])
        else:
            data = self._read_range(shard, int(self.columns["json_offset"][row]), json_size)
            try:
                record = parse_record(data)
            except ValueError as error:
                raise SampleError(str(error)) from error
        return RawSample(jpeg, record)

    def shard_of(self, row: int) -> int:
        return int(np.searchsorted(self.ends, row, side="right"))

    def name_of(self, row: int) -> str:
        """A name for a sample whose own key cannot be read: `shard-000012[34]`."""
        shard = self.shard_of(row)
        info = self.manifest.shards[shard]
        return f"{info.name.removesuffix('.tar')}[{row - int(self.ends[shard]) + info.num_positions}]"

    def _read_range(self, shard: int, offset: int, size: int) -> bytes:
        descriptor = self._file(shard)
        if self.cache:
            os.utime(descriptor)  # says to all processes of the node that it is in use
        data = os.pread(descriptor, size, offset)
        if len(data) < size:
            raise ShardError(f"{self._path(shard)} was cut short while in use; {self._repair_hint()}")
        return data

    def _file(self, shard: int) -> int:
        """File descriptor of a shard, its size checked on opening."""
        info, path = self.manifest.shards[shard], self._path(shard)
        if shard in self._files:
            self._files.move_to_end(shard)
            if not self.cache and os.fstat(self._files[shard]).st_nlink == 0:
                raise ShardError(f"{path} was deleted while in use; {self._repair_hint()}")
            return self._files[shard]
        if self.cache:
            self._close_evicted()
        try:
            descriptor = self.cache.open(info) if self.cache else os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise ShardError(f"{path} is missing; {self._repair_hint()}") from None
        size = os.fstat(descriptor).st_size
        if size != info.num_bytes:
            os.close(descriptor)
            raise ShardError(f"{path} has {size} bytes, the manifest says {info.num_bytes}; {self._repair_hint()}")
        self._files[shard] = descriptor
        if len(self._files) > MAX_OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def _close_evicted(self) -> None:
        """Let go of shards that the cache has deleted: their space is free only when nobody holds them open."""
        for shard, descriptor in list(self._files.items()):
            if os.fstat(descriptor).st_nlink == 0:
                os.close(self._files.pop(shard))

    def _path(self, shard: int) -> Path:
        return self.directory / self.manifest.shards[shard].name

    def _repair_hint(self) -> str:
        if self.cache:
            return f"delete {self.directory}, the copy of {self.cache.url}, and start again"
        return f"`python -m data_tools.verify {self.directory} --repair SOURCE...` rebuilds it from the source"

    def __reduce__(self) -> tuple:
        # A worker maps the index itself: neither columns nor files travel.
        return ShardReader, (self.directory, self.cache)

    def split(self, holdout_images: int) -> tuple[list[ShardRows], np.ndarray]:
        """Rows to train on, for each shard, and rows held out: about `holdout_images` of them, by hash of the id.

        Gaps are in neither. Small data sets may hold out a few more or less than asked, at least one. Shard by shard,
        so that no array is as long as the data set.
        """
        share = holdout_images / max(1, self.manifest.num_samples)
        sizes, image_ids = self.columns["jpg_size"], self.columns["image_id"]
        left_out, held_out = [], []  # for each shard, counted from its first row
        least, least_row = np.inf, -1  # the row with the smallest hash
        starts = [0, *self.ends[:-1].tolist()]
        for start, end in zip(starts, self.ends.tolist(), strict=True):
            is_gap = sizes[start:end] == 0
            held = np.empty(0, np.int64)
            if holdout_images and not is_gap.all():
                numbers = np.where(is_gap, np.inf, holdout_hash(image_ids[start:end]))
                held = np.flatnonzero(numbers < share)
                if numbers.min() < least:
                    least, least_row = numbers.min(), start + int(numbers.argmin())
                is_gap[held] = True
            left_out.append(np.flatnonzero(is_gap))
            held_out.append(start + held)
        if least_row >= 0 and not any(len(held) for held in held_out):
            shard = self.shard_of(least_row)
            left_out[shard] = np.union1d(left_out[shard], least_row - starts[shard])
            held_out[shard] = np.array([least_row])
        train = [
            ShardRows(start, shard.num_positions, out)
            for start, shard, out in zip(starts, self.manifest.shards, left_out, strict=True)
        ]
        return train, np.concatenate(held_out)

    def fingerprint(self) -> str:
        """Identifies the data and its order: a run resumes only on the same."""
        return hashlib.sha256((self.directory / MANIFEST_NAME).read_bytes()).hexdigest()[:16]
