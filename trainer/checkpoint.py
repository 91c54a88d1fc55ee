"""Checkpoints that survive a crash at any moment and load under any engine and number of ranks.

    RUN/checkpoints/
        LATEST                  name of the newest, for people and scripts
        step_00001000/          published by a rename, so it is whole or not there
            run_state.json      where the run was: `RunState`
            .metadata           which tensor lies where (torch.distributed.checkpoint)
            __0_0.distcp ...    tensors, a file or more a rank
            checksums.json      size and SHA-256 of each file above
            COMPLETE            written last
        step_00002000.tmp/      a save that is under way, or died; never loaded

The order of a save: write under a temporary name, sync to disk, mark complete, rename, point LATEST at it, and only
then delete old ones. The directory must be seen by all ranks. The names inside are in decision 0005.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trainer.distributed import World, barrier, broadcast_object, gather_objects
from trainer.parallel.engine import Engine

log = logging.getLogger(__name__)
# Said at every save and load of a run on one process, where it is what we ask for.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_STEP_NAME = re.compile(r"step_\d{8,}")


@dataclass(frozen=True)
class RunState:
    """Where a run is: all that is needed to go on, beside the tensors, because data order and randomness are keyed."""

    step: int  # optimizer steps done
    samples_seen: int  # of the global order
    phase: int  # index into the configured phases
    fingerprint: dict[str, Any] = field(default_factory=dict)  # what must not change: seed, global batch, data, ...


class Checkpointer:
    """Writes, finds and loads the checkpoints of one run. Every method is called by all ranks together."""

    def __init__(self, directory: Path, keep_last: int, world: World) -> None:
        self.directory = Path(directory)
        self.keep_last = keep_last
        self.world = world

    def save(self, engine: Engine, run_state: RunState) -> Path:
        """Write, publish, prune. Returns the published directory; a checkpoint of the same step is replaced."""
        final = self.directory / f"step_{run_state.step:08d}"
        partial = final.with_name(final.name + ".tmp")
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write_synced(partial / "run_state.json", json.dumps(asdict(run_state), indent=2))
        barrier(self.world)
        dcp.save(
            engine.state_dict(),
            storage_writer=dcp.FileSystemWriter(partial, sync_files=True),
            process_group=self.world.host_group,
            no_dist=self.world.size == 1,
        )
        checksums = gather_objects(self._checksums_of_own_files(partial), self.world)
        if self.world.is_main:
            self._publish(partial, final, {name: entry for part in checksums for name, entry in part.items()})
        barrier(self.world)
        return final

    def newest(self) -> Path | None:
        """The newest checkpoint that is complete, as rank 0 sees it; None if there is none.

        What has to be passed over, and why, is logged on rank 0.
        """
        found = None
        if self.world.is_main:
            for path in reversed(_step_directories(self.directory)):
                problems = check_files(path, read=False)
                if not problems:
                    found = path
                    break
                log.warning("checkpoint %s is passed over: %s", path, "; ".join(problems))
        return broadcast_object(found, self.world)

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

    def _checksums_of_own_files(self, directory: Path) -> dict[str, dict[str, Any]]:
        """Each rank reads back what it wrote, so that hashing takes no longer on more ranks."""
        own = list(directory.glob(f"__{self.world.rank}_*"))
        if self.world.is_main:
            own += [directory / ".metadata", directory / "run_state.json"]
        return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in own}

    def _publish(self, partial: Path, final: Path, checksums: dict[str, dict[str, Any]]) -> None:
        _write_synced(partial / "checksums.json", json.dumps(checksums, indent=2, sort_keys=True))
        _write_synced(partial / "COMPLETE", "")
        _sync_directory(partial)
        replaced = final.with_name(final.name + ".old")
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        _sync_directory(self.directory)
        pointer = self.directory / "LATEST.tmp"
        _write_synced(pointer, final.name + "\n")
        pointer.rename(self.directory / "LATEST")
        _sync_directory(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune(final)

    def _prune(self, newest: Path) -> None:
        """Delete what is older than the `keep_last` newest whole checkpoints; never the one just written."""
        directories = _step_directories(self.directory)
        whole = [path for path in directories if not check_files(path, read=False)]
        kept = {newest, *whole[-self.keep_last :]}
        for path in directories[: min(directories.index(path) for path in kept)]:
            shutil.rmtree(path)


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


def check_files(path: Path, read: bool) -> list[str]:
    """What is wrong with a checkpoint's files: marker, presence, sizes, and with `read` their checksums too."""
    if not (path / "COMPLETE").exists():
        return ["it has no COMPLETE marker"]
    if not (path / "checksums.json").exists():
        return ["it has no checksums.json"]
    try:
        stated = json.loads((path / "checksums.json").read_text())
    except json.JSONDecodeError:
        return ["its checksums.json is damaged"]
    problems = []
    for name, entry in stated.items():
        file = path / name
        if not file.exists():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}")
        elif read and _sha256(file) != entry["sha256"]:
            problems.append(f"{name} has another SHA-256 than when it was written")
    return problems


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


def _step_directories(directory: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    paths = [path for path in directory.glob("step_*") if _STEP_NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step_")))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """A rename is on disk only when its directory is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
