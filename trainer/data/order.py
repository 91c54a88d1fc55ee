"""The order of the data: a pure function from a place in the run to a sample, and from a step to each rank's share.

Letters: N samples an epoch, S shards, C lanes, B images a global batch.

An epoch lays its shards end to end in a random order and cuts that line of N samples into C *lanes* of equal length.
A lane is read front to back, shuffled inside windows. The run takes one sample of every lane in turn: sample `p` of
an epoch is the `p // C`-th of lane `p % C`. So every global batch draws evenly from all lanes, an epoch holds every
sample exactly once, and nothing depends on ranks, workers, micro-batches or restarts: the position in the run,
`step * B + slot`, says it all.

What the window costs: two samples meet in a batch only if their windows are read at the same time, so a batch mixes
C windows; see docs/decisions/0001-data-order.md.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# Purposes of keyed random streams: one number each, so that no two streams are ever the same.
SHARD_ORDER, WINDOW_ORDER, SAMPLE_DRAWS, MASK_ORDER = 1, 2, 3, 4


def keyed_rng(seed: int, purpose: int, *counter: int) -> np.random.Generator:
    """Random numbers that depend on (seed, purpose, counter) alone: a counter-based generator, never carried on.

    `counter` is up to three non-negative integers. They fill the upper words of Philox's 256-bit counter; drawing
    counts in the lowest word, so streams of different keys do not overlap.
    """
    words = [0, *counter, *([0] * (3 - len(counter)))]
    assert len(words) == 4, counter
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=words))


@dataclass(frozen=True)
class ShardRows:
    """The rows of a shard (global, as in `index/`) that may be trained on: all but a few.

    Told by what is left out, they take some bytes: eleven million row numbers would be 90 MB in every worker.
    """

    first: int
    num_positions: int
    left_out: np.ndarray  # ascending, counted from `first`

    def __len__(self) -> int:
        return self.num_positions - len(self.left_out)

    def row(self, number: int) -> int:
        """The row of a number below the length, in ascending order."""
        kept_before = self.left_out - np.arange(len(self.left_out))  # rows kept before each one left out
        return self.first + number + int(np.searchsorted(kept_before, number, side="right"))

    def rows(self) -> np.ndarray:
        """All of them."""
        return self.first + np.delete(np.arange(self.num_positions), self.left_out)


class DataOrder:
    """Position in the run to row of the data set.

    shard_rows: what of each shard may be trained on. Holding images out or packing again changes it, and so the
    order; ranks and restarts do not.
    """

    def __init__(self, shard_rows: list[ShardRows], seed: int, num_lanes: int, window: int) -> None:
        self.shard_rows = shard_rows
        self.sizes = np.array([len(rows) for rows in shard_rows], np.int64)
        self.seed, self.num_lanes, self.window = seed, num_lanes, window
        self.num_samples = int(self.sizes.sum())
        if self.num_samples == 0:
            raise ValueError("the data set has no sample to train on")
        self._lines: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of the epochs last asked for

    def row(self, position: int) -> int:
        """The sample trained on at `position` of the run."""
        epoch, place = divmod(position, self.num_samples)
        lane, step = place % self.num_lanes, place // self.num_lanes
        lane_start, lane_length = self._lane(lane)
        window = step // self.window
        start = window * self.window
        length = min(self.window, lane_length - start)
        step = start + int(window_order(self.seed, epoch, lane, window, length)[step - start])
        shards, ends = self._epoch_line(epoch)
        place = lane_start + step
        number = int(np.searchsorted(ends, place, side="right"))
        rows = self.shard_rows[shards[number]]
        return rows.row(place - (int(ends[number]) - len(rows)))

    def _lane(self, lane: int) -> tuple[int, int]:
        """Start and length of a lane on the epoch's line; the first `N mod C` lanes are one longer."""
        length, longer = divmod(self.num_samples, self.num_lanes)
        return lane * length + min(lane, longer), length + (lane < longer)

    def _epoch_line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards of an epoch in order, and where each ends on the line."""
        if epoch not in self._lines:
            shards = keyed_rng(self.seed, SHARD_ORDER, epoch).permutation(len(self.shard_rows))
            ends = np.cumsum(self.sizes[shards])
            # A batch may straddle two epochs; older ones are not asked for again.
            self._lines = {old: line for old, line in self._lines.items() if old == epoch - 1} | {epoch: (shards, ends)}
        return self._lines[epoch]


@lru_cache(maxsize=128)  # the windows that a worker's lanes are in: 4 MB at the default size
def window_order(seed: int, epoch: int, lane: int, window: int, length: int) -> np.ndarray:
    """The order within one window of one lane, a permutation of 0..length-1."""
    return keyed_rng(seed, WINDOW_ORDER, epoch, lane, window).permutation(length)


def num_micro_batches(global_batch: int, num_ranks: int, micro: int) -> int:
    """Of a step, on every rank: accumulation follows from the global batch, the ranks and the micro-batch."""
    per_rank = -(-global_batch // num_ranks)
    return -(-per_rank // micro)


def slots_of_rank(global_batch: int, num_lanes: int, rank: int, num_ranks: int, micro: int) -> list[list[int]]:
    """Which of a step's slots 0..B-1 a rank computes, as micro-batches of equal size; -1 fills up.

    Slots are dealt lane by lane, so the ranks of one node read few lanes and so few shards. Every rank gets the same
    number of micro-batches of the same size: what does not divide is filled with zero-weight samples.
    """
    by_lane = sorted(range(global_batch), key=lambda slot: (slot % num_lanes, slot // num_lanes))
    per_rank = -(-global_batch // num_ranks)
    num_micro = num_micro_batches(global_batch, num_ranks, micro)
    size = -(-per_rank // num_micro)
    share, extra = divmod(global_batch, num_ranks)
    start = rank * share + min(rank, extra)
    mine = by_lane[start : start + share + (rank < extra)]
    mine += [-1] * (num_micro * size - len(mine))
    return [mine[i * size : (i + 1) * size] for i in range(num_micro)]


@dataclass(frozen=True)
class StepSampler:
    """Batch sampler of one rank: yields the micro-batches of every step from `first_step` to `last_step`.

    Each item is a list of positions in the run (-1 = filler), which a map-style dataset turns into a batch.
    A stock `DataLoader` over it resumes exactly, since there is nothing else to restore.
    """

    global_batch: int
    num_lanes: int
    rank: int
    num_ranks: int
    micro: int
    first_step: int
    last_step: int
    shift: int = 0  # of all positions: not 0 where the run had another global batch before

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.num_ranks

    @property
    def micro_batches(self) -> list[list[int]]:
        return slots_of_rank(self.global_batch, self.num_lanes, self.rank, self.num_ranks, self.micro)

    def __iter__(self):
        slots = self.micro_batches
        for step in range(self.first_step, self.last_step):
            for micro_batch in slots:
                yield [step * self.global_batch + self.shift + slot if slot >= 0 else -1 for slot in micro_batch]

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * len(self.micro_batches)


def holdout_hash(image_ids: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each image id alone, the same for every run; images of small ones are held out."""
    # splitmix64's finaliser (Steele et al. 2014): every bit of the id moves every bit of the hash.
    with np.errstate(over="ignore"):
        x = image_ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
