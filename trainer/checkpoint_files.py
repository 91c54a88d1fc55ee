"""A checkpoint as files: marker, checksums, what to keep. No tensors and no other process; see `checkpoint.py`."""

import hashlib
import json
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

ABANDONED = ".abandoned"  # behind the name of a checkpoint that a rollback has set aside
_STEP_NAME = re.compile(r"step_\d{8,}")


def step_directories(directory: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    paths = [path for path in directory.glob("step_*") if _STEP_NAME.fullmatch(path.name)]
    return sorted(paths, key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name states."""
    return int(path.name.removesuffix(ABANDONED).removeprefix("step_"))


def abandoned_directories(directory: Path) -> list[Path]:
    """Checkpoints that a rollback has set aside."""
    return [path for path in directory.glob("step_*" + ABANDONED) if _STEP_NAME.fullmatch(path.stem)]


def check_files(path: Path, read: bool, names: Collection[str] | None = None) -> list[str]:
    """What is wrong with a checkpoint's files: marker, presence, sizes, and with `read` their checksums too.

    `names`: look at these files alone, so that several ranks can share the reading.
    """
    if not (path / "COMPLETE").exists():
        return ["it has no COMPLETE marker"]
    try:
        stated = stated_files(path)
    except FileNotFoundError:
        return ["it has no checksums.json"]
    except ValueError:
        return ["its checksums.json is damaged"]
    problems = []
    for name, entry in stated.items():
        if names is not None and name not in names:
            continue
        file = path / name
        if not file.exists():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}")
        elif read and sha256_of(file) != entry["sha256"]:
            problems.append(f"{name} has another SHA-256 than when it was written")
    return problems


def stated_files(path: Path) -> dict[str, dict[str, Any]]:
    """Name to size and SHA-256 of every file. FileNotFoundError or ValueError if it does not say."""
    try:
        stated = json.loads((path / "checksums.json").read_text())
        return {name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])} for name, entry in stated.items()}
    except (UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path / 'checksums.json'} is damaged: {error}") from error


def not_finite(path: Path) -> list[str]:
    """Tensors of a complete checkpoint that held NaN or infinity when it was written (the first few)."""
    try:
        return list(json.loads((path / "COMPLETE").read_text())["not_finite"])
    except (ValueError, KeyError, TypeError):
        return ["(its COMPLETE marker is damaged)"]


def to_delete(
    steps: Sequence[int],
    good: Collection[int],
    newest: int,
    keep_last: int,
    keep_every_steps: int | None,
    scores: dict[int, float],
    hold: Collection[int] = (),
) -> list[int]:
    """Which checkpoints go once `newest` is written. `good` are complete and finite; only those count as kept.

    Kept are the `keep_last` newest good ones (so the last good one always is), those at multiples of
    `keep_every_steps`, the one of the highest score, for each step in `hold` the newest good one that is not later, and
    `newest` itself. What is newer than `newest` is not ours.
    """
    kept = {newest, *sorted(good)[-keep_last:]}
    for skipped in hold:
        kept |= set(sorted(step for step in good if step <= skipped)[-1:])
    if keep_every_steps:
        kept |= {step for step in good if step % keep_every_steps == 0}
    if best := best_of(good, scores):
        kept.add(best)
    return [step for step in steps if step not in kept and step < newest]


def best_of(good: Collection[int], scores: dict[int, float]) -> int | None:
    """The step of the highest score among the good ones, the later of two equal ones; None if none has a score."""
    scored = [step for step in good if step in scores]
    return max(scored, key=lambda step: (scores[step], step)) if scored else None


def read_scores(directory: Path) -> dict[int, float]:
    """Step to score, as `scores.json` of the run has it."""
    try:
        return {int(step): float(score) for step, score in json.loads((directory / "scores.json").read_text()).items()}
    except (FileNotFoundError, ValueError):
        return {}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, text: str) -> None:
    """Write and wait for the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_synced(path: Path, text: str) -> None:
    """As `write_synced`, but whoever reads at any moment sees the old text or the new."""
    temporary = path.with_name(path.name + ".tmp")
    write_synced(temporary, text)
    temporary.rename(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """A rename is on disk only when its directory is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
