"""What a run's steps were trained with, in `RUN/starts.jsonl`: checkpoints are deleted, and settings may change.

A line for each start under settings that differ from the line before: the step from which they count, the place in the
order of the data, all settings, and the recipe with the data's manifest. After a rollback or from an older checkpoint
steps are made again, so of two lines that cover a step the later one counts.
"""

import json
from pathlib import Path
from typing import Any

from trainer.checkpoint import RunState
from trainer.checkpoint_files import replace_synced

STARTS = "starts.jsonl"


def note_start(run_dir: Path, state: RunState, recipe: dict[str, Any], config: dict[str, Any]) -> None:
    """Remember that the run goes on from `state` under these settings, if those are new. On rank 0."""
    path = run_dir / STARTS
    starts = read_starts(run_dir)
    if starts and starts[-1].recipe == recipe and starts[-1].step <= state.step:
        return
    line = {"step": state.step, "samples_seen": state.samples_seen, "recipe": recipe, "config": config}
    replace_synced(path, (path.read_text() if starts else "") + json.dumps(line) + "\n")


def start_of(run_dir: Path, step: int) -> RunState:
    """Where and under what the settings began that `step`, counted from 1, was trained with. Raises `ValueError`."""
    covering = [start for start in read_starts(run_dir) if start.step < step]
    if not covering:
        raise ValueError(f"{run_dir / STARTS} does not say what step {step} was trained with: there is no telling")
    return covering[-1]


def read_starts(run_dir: Path) -> list[RunState]:
    """All lines in the order they were written; none if there is no such file."""
    path = run_dir / STARTS
    if not path.exists():
        return []
    try:
        # What is trained from is no phase's alone, so none is noted.
        return [RunState(phase=0, **json.loads(line)) for line in path.read_text().splitlines()]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged, remove it: {error}") from error
