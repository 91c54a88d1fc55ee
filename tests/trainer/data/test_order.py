"""The order of the data: every sample once an epoch, the same for any layout, little locality lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order import DataOrder, ShardRows, StepSampler, holdout_hash, keyed_rng, slots_of_rank


def make_order(shard_sizes: list[int], lanes: int = 4, window: int = 8, seed: int = 0) -> DataOrder:
    starts = np.cumsum([0, *shard_sizes[:-1]]).tolist()
    none = np.empty(0, np.int64)
    rows = [ShardRows(start, size, none) for start, size in zip(starts, shard_sizes, strict=True)]
    return DataOrder(rows, seed, lanes, window)


@given(first=st.integers(0, 1000), is_left_out=st.lists(st.booleans(), max_size=30))
def test_rows_of_a_shard_are_those_not_left_out(first, is_left_out):
    rows = ShardRows(first, len(is_left_out), np.flatnonzero(is_left_out))
    kept = [first + i for i, out in enumerate(is_left_out) if not out]
    assert [rows.row(number) for number in range(len(rows))] == rows.rows().tolist() == kept


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(sum),
    lanes=st.integers(1, 9),
    window=st.integers(1, 10),
    epoch=st.integers(0, 3),
)
def test_an_epoch_holds_every_sample_once(sizes, lanes, window, epoch):
    order = make_order(sizes, lanes, window)
    total = sum(sizes)
    rows = [order.row(epoch * total + place) for place in range(total)]
    assert sorted(rows) == list(range(total))


def test_epochs_and_seeds_differ():
    first, other = make_order([50, 50]), make_order([50, 50], seed=1)
    epoch = [first.row(p) for p in range(100)]
    assert epoch != [first.row(100 + p) for p in range(100)]
    assert epoch != [other.row(p) for p in range(100)]
    assert epoch == [make_order([50, 50]).row(p) for p in range(100)]


@given(global_batch=st.integers(1, 40), lanes=st.integers(1, 16), num_ranks=st.integers(1, 7), micro=st.integers(1, 9))
def test_ranks_share_a_step_exactly(global_batch, lanes, num_ranks, micro):
    shares = [slots_of_rank(global_batch, lanes, rank, num_ranks, micro) for rank in range(num_ranks)]
    slots = [slot for share in shares for batch in share for slot in batch if slot >= 0]
    assert sorted(slots) == list(range(global_batch))
    shapes = {tuple(len(batch) for batch in share) for share in shares}
    assert len(shapes) == 1, "all ranks must run the same micro-batches"
    assert all(len(batch) <= micro for batch in shares[0])


@given(stop=st.integers(0, 12), num_ranks=st.integers(1, 7), micro=st.integers(1, 5))
def test_a_restart_anywhere_with_any_ranks_goes_on_with_the_same_steps(stop, num_ranks, micro):
    def positions(first: int, last: int, ranks: int, size: int) -> list[set[int]]:
        steps: list[set[int]] = [set() for _ in range(last - first)]
        for rank in range(ranks):
            sampler = StepSampler(10, 4, rank, ranks, size, first, last)
            batches, per_step = list(sampler), len(sampler.micro_batches)
            assert len(batches) == len(sampler)
            for number, batch in enumerate(batches):
                steps[number // per_step] |= {position for position in batch if position >= 0}
        return steps

    whole = positions(0, 12, 1, 10)
    assert whole == [set(range(10 * step, 10 * step + 10)) for step in range(12)]
    assert positions(0, stop, 2, 3) + positions(stop, 12, num_ranks, micro) == whole


def test_nodes_together_open_few_more_shards_than_there_are():
    """32 nodes, 64 lanes, 1000 shards: locality is what lanes are for."""
    num_nodes, lanes, batch = 32, 64, 256
    order = make_order([64] * 1000, lanes, window=256)
    opened = [set() for _ in range(num_nodes)]
    slots = [slots_of_rank(batch, lanes, node, num_nodes, batch)[0] for node in range(num_nodes)]
    for step in range(order.num_samples // batch):
        for node in range(num_nodes):
            opened[node].update(order.row(step * batch + slot) // 64 for slot in slots[node])
    total = sum(len(shards) for shards in opened)
    assert 1000 <= total <= 1100


def test_keyed_numbers_depend_on_every_part_of_the_key():
    draws = [keyed_rng(*key).random() for key in [(0, 1, 5), (1, 1, 5), (0, 2, 5), (0, 1, 6), (0, 1, 5, 1)]]
    assert len(set(draws)) == len(draws)
    assert keyed_rng(0, 1, 5).random() == draws[0]


def test_the_hold_out_is_a_hash_of_the_id_with_the_asked_share():
    ids = np.arange(100_000)
    share = (holdout_hash(ids) < 0.02).mean()
    # Binomial standard deviation is 0.00044: five of them.
    assert share == pytest.approx(0.02, abs=0.0022)
    assert len(np.unique(holdout_hash(ids))) == len(ids)


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="no sample"):
        DataOrder([ShardRows(0, 3, np.arange(3))], 0, 4, 8)
