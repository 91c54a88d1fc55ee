"""A checkpoint is whole or not there, and what is there loads."""

import json
import logging
import os
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.parallel.drive import different_keys, make_engine, run_steps, whole_state
from tests.trainer.parallel.toy import ToyTask, toy_config, toy_groups
from trainer import checkpoint
from trainer.checkpoint import Checkpointer, RunState, SaveError, load_weights, read_run_state, stage
from trainer.checkpoint_files import check_files, read_scores, to_delete
from trainer.distributed import single_process
from trainer.parallel.engine import Engine, build_engine

WORLD = single_process("cpu")


def state_at(step: int) -> RunState:
    return RunState(step=step, samples_seen=8 * step, phase=0, recipe={"seed": 3, "batch.global_size": 8}, code="1a2b")


@pytest.fixture
def engine() -> Engine:
    engine = make_engine(WORLD, "ddp", "fp16", initial_loss_scale=1024.0)
    run_steps(engine, WORLD, range(2))
    return engine


@pytest.fixture
def checkpointer(tmp_path: Path) -> Checkpointer:
    return Checkpointer(tmp_path / "checkpoints", keep_last=2, world=WORLD)


def names(checkpointer: Checkpointer) -> list[str]:
    return sorted(path.name for path in checkpointer.directory.iterdir())


def data_file(path: Path) -> Path:
    return next(path.glob("*.distcp"))


def test_there_and_back(engine: Engine, checkpointer: Checkpointer) -> None:
    assert checkpointer.newest() is None
    saved = whole_state(engine)
    path = checkpointer.save(engine, state_at(2))
    assert names(checkpointer) == ["LATEST", "step_00000002"]
    assert (checkpointer.directory / "LATEST").read_text() == "step_00000002\n"
    assert check_files(path, read=True) == []
    assert checkpointer.newest() == path

    going_on = run_steps(engine, WORLD, range(2, 4))
    fresh = make_engine(WORLD, "ddp", "fp16", initial_loss_scale=4.0)
    assert checkpointer.load(path, fresh) == state_at(2) == read_run_state(path)
    assert different_keys(saved, whole_state(fresh)) == []
    assert fresh.loss_scale == 1024.0
    again = run_steps(fresh, WORLD, range(2, 4))
    assert (again.losses, again.norms) == (going_on.losses, going_on.norms)  # to the bit


def test_the_schema(engine: Engine) -> None:
    state = engine.state_dict()
    task = ToyTask()
    parameters = [name for name, _ in task.named_parameters()]
    kinds = ("model", "optim.exp_avg", "optim.exp_avg_sq", "optim.step")
    wanted = {f"{kind}.{name}" for kind in kinds for name in parameters}
    assert set(state) == wanted | {"model.fourier", "scaler.scale", "scaler.growth_tracker"}
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert state["optim.step.decoder.head.weight"].ndim == 0


def test_weights_alone(engine: Engine, checkpointer: Checkpointer) -> None:
    path = checkpointer.save(engine, state_at(2))
    weights, wanted = load_weights(path), engine.full_weights()
    assert different_keys(weights, wanted) == []
    ToyTask().load_state_dict(weights)


def test_older_ones_are_pruned_after_the_new_one_is_there(engine: Engine, checkpointer: Checkpointer) -> None:
    for step in (2, 3, 10, 100):
        checkpointer.save(engine, state_at(step))
    assert names(checkpointer) == ["LATEST", "step_00000010", "step_00000100"]


def test_damaged_ones_do_not_count_as_kept(engine: Engine, checkpointer: Checkpointer) -> None:
    paths = [checkpointer.save(engine, state_at(step)) for step in (2, 3)]
    (paths[1] / "COMPLETE").unlink()
    checkpointer.save(engine, state_at(4))
    assert paths[0].exists()  # two whole ones are kept: 2 and 4


def test_saving_a_step_again_replaces_it(engine: Engine, checkpointer: Checkpointer) -> None:
    checkpointer.save(engine, state_at(2))
    run_steps(engine, WORLD, range(2, 3))
    saved = whole_state(engine)
    path = checkpointer.save(engine, RunState(2, 24, 0))
    assert names(checkpointer) == ["LATEST", "step_00000002"]
    assert read_run_state(path).samples_seen == 24
    assert different_keys(load_weights(path), engine.full_weights()) == []
    assert "optim.step.decoder.head.weight" in saved


@pytest.mark.parametrize("damage", ["truncated", "missing file", "no marker", "no checksums", "torn checksums"])
def test_newest_walks_back_over_damage(
    engine: Engine, checkpointer: Checkpointer, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = (checkpointer.save(engine, state_at(step)) for step in (2, 3))
    if damage == "truncated":
        os.truncate(data_file(bad), data_file(bad).stat().st_size - 1)
    elif damage == "missing file":
        data_file(bad).unlink()
    elif damage == "no marker":
        (bad / "COMPLETE").unlink()
    elif damage == "no checksums":
        (bad / "checksums.json").unlink()
    else:
        os.truncate(bad / "checksums.json", 20)
    with caplog.at_level(logging.WARNING):
        assert checkpointer.newest() == good
    assert "step_00000003 is passed over" in caplog.text


def test_a_flipped_bit_is_found_by_reading(engine: Engine, checkpointer: Checkpointer) -> None:
    path = checkpointer.save(engine, state_at(2))
    content = bytearray(data_file(path).read_bytes())
    content[len(content) // 2] ^= 1
    data_file(path).write_bytes(content)
    assert check_files(path, read=False) == []
    assert ["SHA-256" in problem for problem in check_files(path, read=True)] == [True]


@pytest.mark.parametrize("dies_in", ["sha256_of", "sync_directory"])
def test_a_save_that_dies_leaves_the_older_one(
    engine: Engine, checkpointer: Checkpointer, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    """Before the files are described, and after everything but the rename."""
    good = checkpointer.save(engine, state_at(2))

    def die(path: Path) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, dies_in, die)
        with pytest.raises(SaveError, match="step 3: disk full"):
            checkpointer.save(engine, state_at(3))
    assert checkpointer.newest() == good
    assert names(checkpointer) == ["LATEST", "step_00000002"]  # the rest was cleared away: the disk may be full of it
    checkpointer.load(good, make_engine(WORLD, "ddp"))
    assert checkpointer.save(engine, state_at(3)) == checkpointer.newest()


def test_training_goes_on_while_a_save_is_written(
    engine: Engine, checkpointer: Checkpointer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is written is the state at the call, not what training makes of it; and no second save starts beside it."""
    may_go_on = threading.Event()
    write = checkpoint.dcp.save
    monkeypatch.setattr(checkpoint.dcp, "save", lambda *a, **k: may_go_on.wait(60) and write(*a, **k))
    saved = whole_state(engine)
    assert checkpointer.save_in_background(engine, state_at(2))
    run_steps(engine, WORLD, range(2, 4))
    assert different_keys(saved, whole_state(engine))
    assert not checkpointer.save_in_background(engine, state_at(4))
    assert "step 4 is not saved: the save before is still running" in caplog.text
    assert checkpointer.newest() is None
    may_go_on.set()
    assert checkpointer.wait() is None
    fresh = make_engine(WORLD, "ddp", "fp16", initial_loss_scale=4.0)
    assert checkpointer.load(checkpointer.newest(), fresh) == state_at(2)
    assert different_keys(saved, whole_state(fresh)) == []
    assert checkpointer.save_in_background(engine, state_at(4))
    checkpointer.save(engine, state_at(5))  # waits for the one under way
    assert names(checkpointer) == ["LATEST", "step_00000004", "step_00000005"]


def test_a_slow_save_shows_that_it_is_alive_but_not_for_ever(
    engine: Engine, checkpointer: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog must neither end a run for a slow disk nor wait for a dead one for good."""
    may_go_on, ticks = threading.Event(), []
    write = checkpoint.dcp.save
    monkeypatch.setattr(checkpoint.dcp, "save", lambda *a, **k: may_go_on.wait(60) and write(*a, **k))
    monkeypatch.setattr(checkpoint, "_TICK_SECONDS", 0.01)
    monkeypatch.setattr(checkpoint, "_PATIENCE", timedelta(seconds=0.5))

    def still_saving() -> None:
        ticks.append(time.monotonic())
        threading.Timer(1.0, may_go_on.set).start() if len(ticks) == 1 else None

    checkpointer.still_saving = still_saving
    started = time.monotonic()
    checkpointer.save(engine, state_at(2))
    assert len(ticks) > 3
    assert time.monotonic() - started >= 1.0
    assert ticks[-1] - started < 0.9  # silent for the rest


def test_a_failed_save_is_said_and_training_goes_on(
    engine: Engine, checkpointer: Checkpointer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    good = checkpointer.save(engine, state_at(2))
    checkpointer.directory.chmod(0o700)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_synced", lambda path, text: (_ for _ in ()).throw(OSError(28, "No space")))
        assert checkpointer.save_in_background(engine, state_at(3))
        assert "No space" in str(checkpointer.wait())
    assert "step 3 could not be saved: [Errno 28] No space. Training goes on" in caplog.text
    assert checkpointer.num_failed == 1
    assert checkpointer.newest() == good
    assert checkpointer.save_in_background(engine, state_at(4))
    assert checkpointer.wait() is None
    assert checkpointer.newest().name == "step_00000004"


def test_what_cannot_be_deleted_is_no_failed_save(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On NFS a directory stays while somebody reads in it. The other old ones go, and the next save tries again."""
    checkpointer = Checkpointer(tmp_path, keep_last=1, world=WORLD)
    checkpointer.save(engine, state_at(2))
    rmtree = checkpoint.shutil.rmtree

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if path.name == "step_00000002" and not ignore_errors:
            raise OSError(39, "Directory not empty")
        rmtree(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.shutil, "rmtree", busy)
        for step in (3, 4):
            assert checkpointer.save(engine, state_at(step)) == checkpointer.newest()
    assert names(checkpointer) == ["LATEST", "step_00000002", "step_00000004"]
    assert (tmp_path / "LATEST").read_text() == "step_00000004\n"
    assert checkpointer.num_failed == 0
    assert "step_00000002 cannot be deleted: [Errno 39] Directory not empty" in caplog.text
    checkpointer.save(engine, state_at(5))
    assert names(checkpointer) == ["LATEST", "step_00000005"]


def test_a_checkpoint_that_latest_cannot_name_is_there(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the one that it names is not deleted."""
    checkpointer = Checkpointer(tmp_path, keep_last=1, world=WORLD)
    checkpointer.save(engine, state_at(2))
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "replace_synced", lambda path, text: (_ for _ in ()).throw(OSError(28, "No space")))
        assert checkpointer.save(engine, state_at(3)) == checkpointer.newest()
    assert checkpointer.num_failed == 0
    assert names(checkpointer) == ["LATEST", "step_00000002", "step_00000003"]
    assert "step 3 is saved, but LATEST or what is older could not be brought up to date: [Errno 28]" in caplog.text


def test_what_is_not_finite_is_never_loaded_nor_kept_for_its_sake(
    engine: Engine, checkpointer: Checkpointer, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever comes after it, the last finite one stays."""
    good = checkpointer.save(engine, state_at(2))
    with torch.no_grad():
        engine.task.decoder.head.bias[1] = torch.nan
    for step in range(3, 8):
        checkpointer.save(engine, state_at(step))
    assert good.exists()
    assert names(checkpointer) == ["LATEST", "step_00000002", "step_00000007"]
    assert checkpointer.newest() == good
    assert "not finite: model.decoder.head.bias" in caplog.text


@pytest.mark.parametrize("file", ["*.distcp", ".metadata", "run_state.json", "checksums.json", "COMPLETE"])
def test_a_flipped_bit_anywhere_is_walked_back_over(engine: Engine, checkpointer: Checkpointer, file: str) -> None:
    good, bad = (checkpointer.save(engine, state_at(step)) for step in (2, 3))
    path = next(bad.glob(file))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)
    assert checkpointer.newest(read=True) == good
    assert checkpointer.newest() == good  # what was found by reading is remembered


def test_a_kill_between_the_renames_of_a_replacement(engine: Engine, checkpointer: Checkpointer) -> None:
    path = checkpointer.save(engine, state_at(2))
    path.rename(path.with_name(path.name + ".old"))
    assert checkpointer.newest() is None  # a reader leaves things alone: the run may be in the middle of it
    assert checkpointer.newest(read=True) == path


def test_what_a_killed_save_left_is_cleared_away(engine: Engine, checkpointer: Checkpointer) -> None:
    """The next save may be of another step, and a save of a large network is large."""
    path = checkpointer.save(engine, state_at(2))
    partial = path.with_name("step_00000003.tmp")
    partial.mkdir()
    (partial / "__0_0.distcp").write_text("half of it")
    assert checkpointer.newest() == path
    assert partial.exists()  # a reader leaves things alone: the save may be under way
    assert checkpointer.newest(read=True) == path
    assert names(checkpointer) == ["LATEST", "step_00000002"]


def test_what_was_found_damaged_does_not_count_as_kept(engine: Engine, tmp_path: Path) -> None:
    """A flipped bit shows only when all is read, at the start: pruning must remember it."""
    before = Checkpointer(tmp_path, keep_last=2, world=WORLD)
    good, bad = (before.save(engine, state_at(step)) for step in (4, 6))
    content = bytearray(data_file(bad).read_bytes())
    content[len(content) // 2] ^= 1
    data_file(bad).write_bytes(content)
    checkpointer = Checkpointer(tmp_path, keep_last=1, world=WORLD)
    assert checkpointer.newest(read=True) == good
    checkpointer.note_score(6, 0.9)
    with torch.no_grad():
        engine.task.decoder.head.bias[1] = torch.nan
    checkpointer.save(engine, state_at(5))
    assert Checkpointer(tmp_path, 1, WORLD).newest(read=True) == good
    assert not (tmp_path / "BEST").exists()


def test_the_best_is_kept(engine: Engine, tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep_last=1, world=WORLD, keep_every_steps=5)
    for step, score in ((2, 0.1), (3, 0.7), (4, 0.3), (5, 0.2), (6, 0.4), (7, None)):
        checkpointer.save(engine, state_at(step))
        if score is not None:
            checkpointer.note_score(step, score)
    assert names(checkpointer) == ["BEST", "LATEST", "scores.json", *(f"step_0000000{n}" for n in (3, 5, 7))]
    assert (tmp_path / "BEST").read_text() == "step_00000003\n"
    assert read_scores(tmp_path)[6] == 0.4


def test_a_score_and_a_save_do_not_write_best_at_once(
    engine: Engine, checkpointer: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both go through BEST.tmp: one would rename the other's away."""
    checkpointer.save(engine, state_at(2))
    checkpointer.note_score(2, 0.5)
    replace_synced, inside, both = checkpoint.replace_synced, threading.Event(), threading.Event()

    def watched(path: Path, text: str) -> None:
        if path.name == "BEST":
            both.set() if inside.is_set() else inside.set()
            both.wait(0.5)  # time for the other to come, if it may
            inside.clear()
        replace_synced(path, text)

    monkeypatch.setattr(checkpoint, "replace_synced", watched)
    checkpointer.save_in_background(engine, state_at(3))
    assert inside.wait(60)
    checkpointer.note_score(3, 0.7)
    assert checkpointer.wait() is None
    assert not both.is_set()
    assert (checkpointer.directory / "BEST").read_text() == "step_00000003\n"


def test_going_back_sets_aside_what_is_newer(engine: Engine, tmp_path: Path) -> None:
    """Else the next start would take the newest of what was given up for the newest of the run."""
    checkpointer = Checkpointer(tmp_path, keep_last=3, world=WORLD)
    for step, score in ((1, 0.2), (3, 0.9), (5, 0.5)):
        checkpointer.save(engine, state_at(step))
        checkpointer.note_score(step, score)
    assert checkpointer.go_back(2) == tmp_path / "step_00000001"
    aside = ["step_00000003.abandoned", "step_00000005.abandoned"]
    assert names(checkpointer) == ["BEST", "LATEST", "scores.json", "step_00000001", *aside]
    assert [(tmp_path / name).read_text() for name in ("BEST", "LATEST")] == ["step_00000001\n"] * 2
    assert read_scores(tmp_path) == {1: 0.2}
    assert Checkpointer(tmp_path, 3, WORLD).newest(read=True) == tmp_path / "step_00000001"
    checkpointer.save(engine, state_at(4))  # what it passes is not needed any more
    assert names(checkpointer) == ["BEST", "LATEST", "scores.json", "step_00000001", "step_00000004", aside[1]]
    assert checkpointer.go_back(0) is None
    assert checkpointer.newest() is None
    assert names(checkpointer) == [f"step_0000000{step}.abandoned" for step in (1, 4, 5)]


def test_where_a_rollback_would_go_is_kept(engine: Engine, tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep_last=1, world=WORLD)
    for step in (1, 2, 3, 4):
        checkpointer.hold = (2,) if step > 2 else ()
        checkpointer.save(engine, state_at(step))
    assert names(checkpointer) == ["LATEST", "step_00000002", "step_00000004"]


@given(
    steps=st.sets(st.integers(1, 60), min_size=1),
    data=st.data(),
    keep_last=st.integers(1, 4),
    every=st.none() | st.integers(1, 20),
    hold=st.sets(st.integers(0, 60), max_size=5),
)
def test_laws_of_retention(
    steps: set[int], data: st.DataObject, keep_last: int, every: int | None, hold: set[int]
) -> None:
    newest = data.draw(st.sampled_from(sorted(steps)))
    good = data.draw(st.sets(st.sampled_from(sorted(steps))))
    scores = data.draw(st.dictionaries(st.sampled_from(sorted(steps)), st.floats(0, 1)))
    gone = set(to_delete(sorted(steps), good, newest, keep_last, every, scores, hold))
    left = good - gone
    assert newest not in gone
    assert len(left) >= min(keep_last, len(good))  # so the last finite one is never deleted
    assert not good or max(good) in left
    for skipped in hold:
        before = {step for step in good if step <= skipped}
        assert not before or max(before) in left
    assert not any(every and step % every == 0 for step in gone & good)
    assert not scores.keys() & good or max(scores.get(step, -1) for step in left) == max(
        scores[step] for step in scores.keys() & good
    )


@given(
    skips=st.sets(st.integers(0, 119)),
    every=st.integers(1, 15),
    keep_last=st.integers(1, 3),
    window=st.integers(1, 60),
)
def test_where_a_rollback_would_go_is_there_at_any_step(
    skips: set[int], every: int, keep_last: int, window: int
) -> None:
    """Over many saves, while skipped steps come into the guard's window and leave it again."""
    ever: list[int] = []
    there: list[int] = []
    in_window: list[int] = []
    for step in range(120):
        in_window = [skipped for skipped in in_window if skipped > step - window] + [step] * (step in skips)
        if in_window:
            wanted = max((saved for saved in ever if saved <= in_window[0]), default=None)
            assert wanted is None or wanted in there
        done = step + 1
        if done % every == 0:
            ever.append(done)
            there.append(done)
            gone = to_delete(there, there, done, keep_last, None, {}, in_window)
            there = [saved for saved in there if saved not in gone]


def test_replicas_share_the_copy_of_what_all_have() -> None:
    items = [(f"t{size}", torch.zeros(size)) for size in (100, 60, 50, 7, 1)]
    worlds = [replace(WORLD, rank=rank, size=3) for rank in range(3)]
    parts = [stage(iter(items), world) for world in worlds]
    assert sorted(name for part in parts for name in part) == sorted(name for name, _ in items)
    assert [sum(value.numel() for value in part.values()) for part in parts] == [100, 60, 58]


def test_precision_may_change(checkpointer: Checkpointer, engine: Engine) -> None:
    """fp16 to bf16 drops the loss scale, and back it starts anew."""
    path = checkpointer.save(engine, state_at(2))
    bf16 = make_engine(WORLD, "ddp", "bf16")
    checkpointer.load(path, bf16)
    path = checkpointer.save(bf16, state_at(3))
    fp16 = make_engine(WORLD, "ddp", "fp16", initial_loss_scale=64.0)
    checkpointer.load(path, fp16)
    assert fp16.loss_scale == 64.0


def test_parts_that_get_frozen_keep_their_weights(checkpointer: Checkpointer, engine: Engine) -> None:
    path = checkpointer.save(engine, state_at(2))
    frozen = make_engine(WORLD, "ddp", frozen=True)
    checkpointer.load(path, frozen)
    assert different_keys(frozen.full_weights(), engine.full_weights()) == []


def test_what_does_not_fit_is_named(checkpointer: Checkpointer, engine: Engine) -> None:
    path = checkpointer.save(engine, state_at(2))
    task = ToyTask()
    task.decoder.head = torch.nn.Linear(10, 4)
    task.extra = torch.nn.Parameter(torch.zeros(1))
    del task.counts_nothing
    other = build_engine(task, toy_config(), toy_groups(task), WORLD)
    with pytest.raises(ValueError, match="does not fit") as error:
        checkpointer.load(path, other)
    for part in (
        "model.extra is not in it",
        "model.counts_nothing is not in the task",
        "model.decoder.head.weight has shape (3, 10) in it, (4, 10) in the task",
    ):
        assert part in str(error.value)


def test_the_run_state_is_readable_by_people(checkpointer: Checkpointer, engine: Engine) -> None:
    path = checkpointer.save(engine, state_at(2))
    assert json.loads((path / "run_state.json").read_text()) == {
        "step": 2,
        "samples_seen": 16,
        "phase": 0,
        "recipe": {"seed": 3, "batch.global_size": 8},
        "config": {},
        "code": "1a2b",
    }
