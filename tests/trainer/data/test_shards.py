"""Reading by offset from a directory, and how much bad data a run takes."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bench.data
from data_tools.sample_format import (
    INDEX_DIR,
    INDEX_DTYPE,
    Manifest,
    Quarantined,
    Record,
    ShardInfo,
    load_manifest,
    save_manifest,
    save_quarantine,
    shard_name,
)
from tests.trainer.tiny import mae_arguments, sam_arguments, samples
from trainer import train
from trainer.data import shards
from trainer.data.batches import Batch
from trainer.data.images import SampleError
from trainer.data.order import holdout_hash
from trainer.data.shards import ShardError, ShardReader
from trainer.distributed import single_process
from trainer.guard import Guard
from trainer.loop import BadSamples, agree


@pytest.fixture
def copied(scenes, tmp_path):
    """A copy of the `train` scenes that may be damaged."""
    shutil.copytree(scenes["train"], tmp_path / "shards")
    return tmp_path / "shards"


def test_a_shard_deleted_in_use_is_an_error_though_its_file_is_still_open(copied):
    reader = ShardReader(copied)
    reader.read(0)
    (copied / "shard-000000.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000000.tar was deleted while in use; .*--repair"):
        reader.read(1)


def test_every_sample_is_where_the_index_says(scenes):
    reader = ShardReader(scenes["train"])
    keys = set()
    for row in range(reader.manifest.num_positions):
        raw = reader.read(row)
        assert raw.jpeg[:2] == b"\xff\xd8"
        assert isinstance(raw.record, Record)
        assert raw.record.image_id == reader.columns["image_id"][row]
        keys.add(raw.record.key)
    assert len(keys) == 24
    assert reader.name_of(0) == "shard-000000[0]"
    assert reader.name_of(11) == "shard-000001[1]"


def test_few_descriptors_are_kept_open(scenes, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 1)
    reader = ShardReader(scenes["train"])
    for row in (0, 10, 20, 1):
        reader.read(row)
        assert len(reader._files) == 1


def test_it_travels_by_name(scenes):
    reader = ShardReader(scenes["train"])
    sent = pickle.dumps(reader)
    assert len(sent) < 500
    assert pickle.loads(sent).read(5) == reader.read(5)


def test_a_missing_or_short_shard_is_no_bad_sample(copied):
    reader = ShardReader(copied)
    reader.read(0)
    os.truncate(copied / "shard-000000.tar", 2000)
    with pytest.raises(ShardError, match=r"cut short while in use; `python -m data_tools.verify"):
        reader.read(9)
    with pytest.raises(ShardError, match="has 2000 bytes, the manifest says"):
        ShardReader(copied).read(0)
    (copied / "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000001.tar is missing; `python -m data_tools.verify"):
        reader.read(10)


def test_an_index_of_another_length_is_refused(copied):
    manifest = load_manifest(copied)
    save_manifest(copied, type(manifest)(manifest.kind, manifest.shards[:-1]))
    with pytest.raises(ShardError, match=r"index of 24 rows, manifest of 20 positions; `python -m data_tools.index"):
        ShardReader(copied)


def test_held_out_images_are_in_no_training_row(scenes):
    reader = ShardReader(scenes["train"])
    train_rows, held_out = reader.split(3)
    assert len(held_out) >= 1
    assert sorted([*np.concatenate([rows.rows() for rows in train_rows]), *held_out]) == list(range(24))
    assert [len(rows) for rows in reader.split(0)[0]] == [10, 10, 4]


@pytest.mark.parametrize("holdout_images", [0, 1, 3, 40, 1000])
def test_the_split_by_shards_is_the_split_of_the_whole(tmp_path, holdout_images):
    """Against the definition on whole columns, with gaps and a shard of nothing else."""
    rng = np.random.default_rng(holdout_images)
    sizes = [50, 1, 20, 129]
    rows = np.zeros(sum(sizes), INDEX_DTYPE)
    rows["image_id"], rows["jpg_size"] = rng.integers(0, 2**62, len(rows)), rng.random(len(rows)) < 0.9
    rows["jpg_size"][51:71] = 0
    fabricate(tmp_path, sizes, rows)
    train, held_out = ShardReader(tmp_path).split(holdout_images)

    numbers = np.where(rows["jpg_size"] > 0, holdout_hash(rows["image_id"]), 2.0)
    wanted = numbers < holdout_images / (rows["jpg_size"] > 0).sum()
    wanted[numbers.argmin()] |= holdout_images > 0
    wanted &= rows["jpg_size"] > 0
    assert held_out.tolist() == np.flatnonzero(wanted).tolist()
    assert len(held_out) >= min(1, holdout_images)
    assert (
        np.concatenate([shard.rows() for shard in train]).tolist()
        == np.flatnonzero((rows["jpg_size"] > 0) & ~wanted).tolist()
    )
    assert [len(shard) for shard in train] == [
        int((part > 0).sum()) for part in np.split(rows["jpg_size"] * ~wanted, np.cumsum(sizes)[:-1])
    ]


def fabricate(directory: Path, sizes: list[int], rows: np.ndarray) -> None:
    """A manifest and index without shards."""
    parts = np.split(rows, np.cumsum(sizes)[:-1])
    shards = tuple(
        ShardInfo(shard_name(i), len(part), int((part["jpg_size"] > 0).sum()), 0, 1, "0" * 64)
        for i, part in enumerate(parts)
    )
    save_manifest(directory, Manifest("sa1b", shards))
    (directory / INDEX_DIR).mkdir()
    for column in INDEX_DTYPE.names or ():
        np.save(directory / INDEX_DIR / f"{column}.npy", rows[column])


@pytest.mark.slow
def test_eleven_million_samples_open_in_little_memory(tmp_path):
    """1000 shards as large as SA-1B's: what a rank and its worker add to their process. `bench.data open` times it."""
    bench.data.fabricate(tmp_path)
    command = [sys.executable, "-m", "bench.data", "--open", str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=bench.data.ROOT).stdout
    rank, worker = map(json.loads, output.splitlines())
    assert rank["rss_mb"] < 200
    assert worker["rss_mb"] < 200
    assert worker["pickle_mb"] < 1, "row numbers one by one would be 90 MB"


# -------------------------------------------------------------------------------------------------------- bad samples


def damage(directory, rows: list[int]) -> None:
    """Overwrite the JSON and the JPEG's header of some rows, sizes unchanged."""
    reader = ShardReader(directory)
    for row in rows:
        with (directory / reader.manifest.shards[reader.shard_of(row)].name).open("r+b") as file:
            for part in ("json", "jpg"):
                file.seek(int(reader.columns[f"{part}_offset"][row]))
                file.write(b"XXXX")


class TwiceTheHost:
    """As `sum_on_host` over two ranks that see the same."""

    def __call__(self, values, world):
        return [2 * value for value in values]


class Broken(Batch):
    """A micro-batch with nothing but problems."""

    def __init__(self, *problems: str) -> None:
        object.__setattr__(self, "problems", list(problems))

    def local_counts(self) -> tuple[float, float]:
        return 1.0, 2.0


def test_all_ranks_count_and_what_is_quarantined_does_not(monkeypatch):
    monkeypatch.setattr("trainer.loop.sum_on_host", TwiceTheHost())
    batches = [Broken("a: torn", "b: quarantined: torn"), Broken("c: torn")]
    assert agree(batches, Guard(), single_process("cpu")) == (4.0, 8.0, 4, None)
    budget = BadSamples(8, "DIR")
    budget.count(4, 1.0, batches)
    budget.count(4, 1.0, batches)
    with pytest.raises(
        ValueError, match=r"9 samples could not .*data.max_bad_samples is 8.*rank: c: torn; a: torn; c: torn"
    ):
        budget.count(1, 1.0, [])


@pytest.mark.parametrize("arguments", [sam_arguments, mae_arguments])
def test_too_many_bad_samples_stop_the_run(scenes, copied, tmp_path, capsys, arguments):
    damage(copied, list(range(0, 24, 2)))
    assert train.main(arguments({**scenes, "train": copied}, tmp_path / "run", "data.max_bad_samples=3")) == 2
    said = capsys.readouterr().err
    for part in ("data.max_bad_samples is 3", "shard-00000", f"data_tools.verify {copied} --deep --quarantine"):
        assert part in said


def test_quarantined_samples_use_no_budget_up(scenes, copied, tmp_path):
    bad = list(range(0, 24, 2))
    damage(copied, bad)
    save_quarantine(copied, [Quarantined(row, "", "torn") for row in bad])
    with pytest.raises(SampleError, match="quarantined: torn"):
        ShardReader(copied).read(0)
    assert train.main(sam_arguments({**scenes, "train": copied}, tmp_path / "run", "data.max_bad_samples=0")) == 0
    assert len(samples(tmp_path / "run")) == 18
