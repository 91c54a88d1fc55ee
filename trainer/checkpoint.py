"""Checkpoints that survive a crash at any moment and load under any engine and number of ranks.

    RUN/checkpoints/
        LATEST                  name of the newest, for people and scripts
        BEST                    name of the one with the highest score, if scores are kept
        scores.json             step to score
        step_00001000/          published by a rename, so it is whole or not there
            run_state.json      where the run was and what it was: `RunState`
            .metadata           which tensor lies where (torch.distributed.checkpoint)
            __0_0.distcp ...    tensors, a file or more a rank
            checksums.json      size and SHA-256 of each file above
            COMPLETE            written last; names the tensors that are not finite
        step_00002000.tmp/      a save that is under way, or died; never loaded
        step_00003000.abandoned/    from before a rollback; never loaded, and gone once training is there again

The order of a save: copy to host memory, then, in a thread and while training goes on: write under a temporary name,
sync to disk, mark complete, rename, point LATEST at it, and only then delete old ones. The directory must be seen by
all ranks. The names inside are in decision 0005, the thread and what may fail in it in decision 0032.
"""

import json
import logging
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from trainer.checkpoint_files import (
    ABANDONED,
    abandoned_directories,
    best_of,
    check_files,
    not_finite,
    read_scores,
    replace_synced,
    sha256_of,
    stated_files,
    step_directories,
    step_of,
    sync_directory,
    to_delete,
    write_synced,
)
from trainer.distributed import World, barrier, broadcast_object, gather_objects, sum_on_host
from trainer.parallel.engine import Engine

log = logging.getLogger(__name__)
# Said at every save and load of a run on one process, where it is what we ask for.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

# Of the thread's agreements, and of what `wait` calls alive: a slow disk on one rank is no reason to give up.
_PATIENCE = timedelta(minutes=60)
_TICK_SECONDS = 1.0


class SaveError(OSError):
    """A checkpoint could not be written. What was there before is untouched."""


@dataclass(frozen=True)
class RunState:
    """Where a run is: all that is needed to go on, beside the tensors, because data order and randomness are keyed."""

    step: int  # optimizer steps done
    samples_seen: int  # of the global order
    phase: int  # index into the configured phases
    recipe: dict[str, Any] = field(default_factory=dict)  # dotted setting to value: what must not change unnoticed
    config: dict[str, Any] = field(default_factory=dict)  # all settings as resolved, for people
    code: str = ""  # version of the program that wrote it


class Checkpointer:
    """Writes, finds and loads the checkpoints of one run. Every method is called by all ranks together."""

    def __init__(self, directory: Path, keep_last: int, world: World, keep_every_steps: int | None = None) -> None:
        self.directory = Path(directory)
        self.keep_last, self.keep_every_steps = keep_last, keep_every_steps
        self.world = world
        self.num_failed = 0  # saves of this process that did not get through
        self.stall_seconds = 0.0  # what the last save cost training
        self.hold: tuple[int, ...] = ()  # of each of these steps the newest good checkpoint from before it stays
        self.still_saving: Callable[[], None] = lambda: None  # called now and again while training waits for a save
        self._started = 0.0  # when the last save began, monotonic seconds
        self._thread: threading.Thread | None = None
        self._problem: str | None = None  # of the last save, once its thread has ended
        self._damaged: set[Path] = set()  # known from reading, so that they are not read again
        self._tidying = threading.Lock()  # the thread deletes and writes BEST, while training may note a score
        # The thread agrees with the other ranks' threads while training agrees on its own group.
        several = world.size > 1
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if several else None

    def save(self, engine: Engine, run_state: RunState) -> Path:
        """Write, publish, prune, and return when all is done. A checkpoint of the same step is replaced.

        Raises `SaveError` on all ranks if it could not be written.
        """
        self.wait()
        self._start(engine, run_state)
        if problem := self.wait():
            raise SaveError(f"checkpoint of step {run_state.step}: {problem}")
        return self._final(run_state.step)

    def save_in_background(self, engine: Engine, run_state: RunState) -> bool:
        """Copy the state and return; a thread does the rest. False if the save before is still running: no new one.

        What goes wrong is logged and counted, and training goes on.
        """
        running = float(self._thread is not None and self._thread.is_alive())
        if sum_on_host([running], self.world)[0] > 0:
            if self.world.is_main:
                log.warning("step %d is not saved: the save before is still running", run_state.step)
            return False
        self.wait()
        self._start(engine, run_state)
        return True

    def wait(self) -> str | None:
        """Wait until no save is running. Returns what went wrong with the last one, if it did.

        While a save takes no longer than an hour, `still_saving` is called: a slow disk looks like a dead one, but what
        waits for a dead one must end at some time.
        """
        if self._thread is not None:
            while self._thread.is_alive():
                if time.monotonic() - self._started < _PATIENCE.total_seconds():
                    self.still_saving()
                self._thread.join(_TICK_SECONDS)
            self._thread = None
        return self._problem

    def newest(self, read: bool = False, at_most: int | None = None) -> Path | None:
        """The newest checkpoint that is complete and finite, none later than step `at_most`; None if there is none.

        With `read`, for a run that starts: every file's checksum is compared, the ranks sharing the work, and what a
        kill left in between is put right. What has to be passed over, and why, is logged on rank 0.
        """
        if read:
            self._recover()
        paths = broadcast_object(step_directories(self.directory) if self.world.is_main else None, self.world)
        for path in reversed(paths):
            if at_most is not None and step_of(path) > at_most:
                continue
            problems = self._problems(path, read)
            if not problems:
                return path
            if self.world.is_main and path not in self._damaged:
                log.warning("checkpoint %s is passed over: %s", path, "; ".join(problems))
            self._damaged.add(path)
        return None

    def to_go_on_from(self, at_most: int | None = None) -> Path | None:
        """As `newest(read=True)`; None only where there is no checkpoint at all.

        Raises ValueError on all ranks if there are some and none will do: a run that began anew would replace them.
        """
        path = self.newest(read=True, at_most=at_most)
        found = step_directories(self.directory) if self.world.is_main else []
        names = [there.name for there in found if at_most is None or step_of(there) <= at_most]
        names = broadcast_object(names, self.world)
        if path is None and names:
            raise ValueError(
                f"none of the checkpoints in {self.directory} can be used ({', '.join(names)}); why is said above. Put "
                "a copy of one back, or move the directory away to begin anew"
            )
        return path

    def go_back(self, at_most: int) -> Path | None:
        """For a rollback: as `to_go_on_from`, and what is newer is set aside with its scores.

        So a later start cannot take it for the newest of the run.
        """
        path = self.to_go_on_from(at_most)
        step = step_of(path) if path else -1
        if self.world.is_main:
            try:
                self._set_aside(step)
            except OSError as error:
                log.error("checkpoints after step %d could not be set aside: %s. Training goes on", step, error)
        self._damaged = {damaged for damaged in self._damaged if step_of(damaged) <= step}
        barrier(self.world)
        return path

    def load(self, path: Path, engine: Engine) -> RunState:
        """Bring `engine` to the state of a checkpoint, written under any engine and number of ranks.

        A trained parameter without optimizer entries starts afresh. Entries of parameters that are frozen now are
        not read. Raises ValueError where the weights do not fit the task.
        """
        stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        state = engine.state_dict()
        _check_fit(path, stored, state)
        state = {key: value for key, value in state.items() if key in stored}
        dcp.load(
            state,
            storage_reader=dcp.FileSystemReader(path),
            process_group=self.world.host_group,
            no_dist=self.world.size == 1,
        )
        engine.load_state_dict(state)
        barrier(self.world)
        return read_run_state(path)

    def note_score(self, step: int, score: float) -> bool:
        """Remember how good the weights of `step` are, for its checkpoint to be kept. Whether it is the best so far."""
        best = False
        if self.world.is_main:
            scores = read_scores(self.directory)
            best = score >= max(scores.values(), default=score)
            try:
                with self._tidying:
                    self.directory.mkdir(parents=True, exist_ok=True)
                    replace_synced(self.directory / "scores.json", json.dumps(scores | {step: score}, indent=1))
                    self._point_at_best()
            except OSError as error:
                log.error("the score of step %d could not be noted: %s. Training goes on", step, error)
        return broadcast_object(best, self.world)

    def _start(self, engine: Engine, run_state: RunState) -> None:
        """Copy the state to host memory and hand it to a thread."""
        started = time.perf_counter()
        staged = stage(engine.state_items(), self.world)
        self.stall_seconds = time.perf_counter() - started
        self._started = time.monotonic()
        self._problem = "it was not finished"
        self._thread = threading.Thread(
            target=self._write, args=(staged, run_state), name=f"save {run_state.step}", daemon=True
        )
        self._thread.start()

    def _write(self, staged: dict[str, Tensor], run_state: RunState) -> None:
        """The thread: write, describe, publish. Ends with `_problem` set, the same on every rank."""
        final = self._final(run_state.step)
        partial = final.with_name(final.name + ".tmp")
        problem = self._try_to_write(staged, run_state, partial)
        parts = self._gather({"problem": problem, **({} if problem else self._describe(partial, staged))})
        if self.world.is_main:
            problems = sorted({part["problem"] for part in parts if part["problem"]})
            problem = "; ".join(problems) or self._publish(partial, final, parts)
            if problem:
                shutil.rmtree(partial, ignore_errors=True)  # room for the next try
                log.error("step %d could not be saved: %s. Training goes on", run_state.step, problem)
        self._problem = self._gather_from_main(problem)
        self.num_failed += self._problem is not None

    def _try_to_write(self, staged: dict[str, Tensor], run_state: RunState, partial: Path) -> str | None:
        try:
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                write_synced(partial / "run_state.json", json.dumps(asdict(run_state), indent=2))
            problem = None
        except OSError as error:
            problem = str(error)
        if problem := self._gather_from_main(problem):
            return problem
        try:
            dcp.save(
                staged,
                storage_writer=dcp.FileSystemWriter(partial, sync_files=True),
                process_group=self._group,
                no_dist=self.world.size == 1,
            )
        except CheckpointException as error:  # on every rank, whichever failed
            return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
        return None

    def _describe(self, partial: Path, staged: dict[str, Tensor]) -> dict[str, Any]:
        """Each rank reads back what it wrote, so that hashing takes no longer on more ranks."""
        own = list(partial.glob(f"__{self.world.rank}_*"))
        if self.world.is_main:
            own += [partial / ".metadata", partial / "run_state.json"]
        try:
            files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in own}
        except OSError as error:
            return {"problem": str(error)}
        bad = [name for name, value in staged.items() if not bool(torch.isfinite(_local(value)).all())]
        return {"files": files, "not_finite": bad}

    def _publish(self, partial: Path, final: Path, parts: list[dict[str, Any]]) -> str | None:
        """On rank 0: from written to there. Returns what went wrong."""
        files = {name: entry for part in parts for name, entry in part["files"].items()}
        bad = sorted(name for part in parts for name in part["not_finite"])
        replaced = final.with_name(final.name + ".old")
        try:
            write_synced(partial / "checksums.json", json.dumps(files, indent=2, sort_keys=True))
            write_synced(partial / "COMPLETE", json.dumps({"not_finite": bad[:20]}))
            sync_directory(partial)
            if final.exists():
                final.rename(replaced)
            partial.rename(final)
            sync_directory(self.directory)
        except OSError as error:
            return str(error)
        # It is there, and what goes wrong from here on costs no checkpoint: the next save does it.
        self._damaged.discard(final)
        try:
            replace_synced(self.directory / "LATEST", final.name + "\n")
            shutil.rmtree(replaced, ignore_errors=True)
            with self._tidying:
                self._prune(step_of(final))
        except OSError as error:
            log.error(
                "step %d is saved, but LATEST or what is older could not be brought up to date: %s. Training goes on",
                step_of(final),
                error,
            )
        if bad:
            log.error("checkpoint %s holds values that are not finite (%s ...); it will not be loaded", final, bad[0])
        return None

    def _prune(self, newest: int) -> None:
        steps = {step_of(path): path for path in step_directories(self.directory)}
        good = self._good_steps()
        scores = read_scores(self.directory)
        old = to_delete(list(steps), good, newest, self.keep_last, self.keep_every_steps, scores, self.hold)
        abandoned = [path for path in abandoned_directories(self.directory) if step_of(path) <= newest]
        for path in [*(steps[step] for step in old), *abandoned]:
            try:
                shutil.rmtree(path)
            except OSError as error:  # NFS keeps what somebody reads; the others go
                log.warning("%s cannot be deleted: %s. The next save tries again", path, error)
        self._point_at_best()

    def _set_aside(self, after: int) -> None:
        """On rank 0: checkpoints and scores later than step `after`, the newest first."""
        for path in reversed(step_directories(self.directory)):
            if step_of(path) > after:
                aside = path.with_name(path.name + ABANDONED)
                shutil.rmtree(aside, ignore_errors=True)  # of an earlier rollback
                path.rename(aside)
        scores = read_scores(self.directory)
        if kept := {step: score for step, score in scores.items() if step <= after}:
            replace_synced(self.directory / "scores.json", json.dumps(kept, indent=1))
        elif scores:
            (self.directory / "scores.json").unlink()
        for pointer in ("LATEST", "BEST"):
            (self.directory / pointer).unlink(missing_ok=True)
        if after >= 0:
            replace_synced(self.directory / "LATEST", self._final(after).name + "\n")
        self._point_at_best()

    def _point_at_best(self) -> None:
        if best := best_of(self._good_steps(), read_scores(self.directory)):
            replace_synced(self.directory / "BEST", self._final(best).name + "\n")

    def _recover(self) -> None:
        """What a kill left: the older one set aside between the two renames of a replacement, which is put back, and
        what a save had written, which is deleted.
        """
        if self.world.is_main:
            for replaced in self.directory.glob("step_*.old"):
                final = replaced.with_suffix("")
                if final.exists():
                    shutil.rmtree(replaced, ignore_errors=True)
                else:
                    replaced.rename(final)
            for partial in self.directory.glob("step_*.tmp"):
                shutil.rmtree(partial, ignore_errors=True)
        barrier(self.world)

    def _good_steps(self) -> list[int]:
        """On rank 0: steps whose checkpoints are complete, finite and, as far as they were read, undamaged."""
        paths = [path for path in step_directories(self.directory) if path not in self._damaged]
        return [step_of(path) for path in paths if not self._quick_problems(path)]

    def _quick_problems(self, path: Path) -> list[str]:
        problems = check_files(path, read=False)
        if not problems and (bad := not_finite(path)):
            problems = [f"not finite: {', '.join(bad[:3])}"]
        return problems

    def _problems(self, path: Path, read: bool) -> list[str]:
        """The same on every rank."""
        problems = ["it was found damaged before"] if path in self._damaged else []
        if self.world.is_main and not problems:
            problems = self._quick_problems(path)
        problems = broadcast_object(problems, self.world)
        if problems or not read:
            return problems
        names = sorted(stated_files(path))[self.world.rank :: self.world.size]
        gathered = gather_objects(check_files(path, read=True, names=names), self.world)
        return broadcast_object([problem for part in gathered for problem in part], self.world)

    def _final(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"

    def _gather(self, obj: Any) -> list[Any]:
        """Every rank's object on rank 0, on the thread's own group."""
        if self._group is None:
            return [obj]
        box: list[Any] | None = [None] * self.world.size if self.world.is_main else None
        dist.gather_object(obj, box, dst=0, group=self._group)
        return box or []

    def _gather_from_main(self, obj: Any) -> Any:
        """Rank 0's object on every rank, on the thread's own group."""
        if self._group is None:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        return box[0]


def stage(items: Iterable[tuple[str, Tensor]], world: World) -> dict[str, Tensor]:
    """What this rank writes of a state, copied to host memory: its shards, and its part of what every rank has whole.

    Whole tensors are dealt out by size, so that replicas do not hold a copy of everything each.
    """
    staged: dict[str, Tensor] = {}
    bytes_of_rank = [0] * world.size
    for name, value in items:
        if not isinstance(value, DTensor):
            owner = bytes_of_rank.index(min(bytes_of_rank))
            bytes_of_rank[owner] += value.nbytes
            if owner != world.rank:
                continue
        staged[name] = value.detach().to("cpu", copy=True)
    return staged


def load_weights(path: Path) -> dict[str, Tensor]:
    """Weights and buffers of a checkpoint by the task's names, on the CPU. Needs no other process.

    Averaged weights (`optim.ema_decay`) take the place of the plain ones; resuming does not go through here.
    """
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    weights = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if key.startswith(("model.", "ema.")) and isinstance(entry, TensorStorageMetadata)
        if key.startswith("ema.") or "ema." + key.removeprefix("model.") not in stored
    }
    dcp.load(weights, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return {key.split(".", 1)[1]: value for key, value in weights.items()}


def read_run_state(path: Path) -> RunState:
    """`RunState` of a checkpoint."""
    return RunState(**json.loads((Path(path) / "run_state.json").read_text()))


def _check_fit(path: Path, stored: dict[str, Any], state: dict[str, Tensor]) -> None:
    """ValueError with every weight that is missing, unknown or of another shape."""
    weights = {key for key in state if key.startswith("model.")}
    stored_weights = {key for key in stored if key.startswith("model.")}
    problems = [f"{key} is not in it" for key in sorted(weights - stored_weights)]
    problems += [f"{key} is not in the task" for key in sorted(stored_weights - weights)]
    problems += [
        f"{key} has shape {tuple(stored[key].size)} in it, {tuple(state[key].shape)} in the task"
        for key in sorted(weights & stored_weights)
        if tuple(stored[key].size) != tuple(state[key].shape)
    ]
    if problems:
        raise ValueError(f"checkpoint {path} does not fit the task: " + "; ".join(problems))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
