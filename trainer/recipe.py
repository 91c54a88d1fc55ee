"""What a run learns, as settings, which a restart may change only if told so; where and how it runs is not of them."""

import logging
from collections.abc import Sequence
from pathlib import Path

from trainer.config import Config
from trainer.stages import Pipeline

log = logging.getLogger(__name__)

# Settings that may differ between two starts of one run: where and how it runs, not what it learns.
NOT_RECIPE = (
    "run_dir", "checkpoint", "resume", "guard", "log", "profile", "evaluate", "diagnostics", "batch.micro",
    "model.init_from", "model.patch_resize", "data.shards", "data.eval_shards", "data.embeddings", "data.workers",
    "data.prefetch", "data.max_bad_samples", "data.remote",
)  # fmt: skip


def recipe(config: Config, pipeline: Pipeline) -> dict[str, object]:
    """Dotted setting to value of all that decides what a run learns, with the data's manifest."""
    settings = flatten(config.model_dump(mode="json"))
    found = {
        key: value
        for key, value in settings.items()
        if not named(key, NOT_RECIPE) and (key == "engine.precision" or not key.startswith("engine."))
    }
    return {**found, "manifest": pipeline.fingerprint, "num_samples": pipeline.order.num_samples}


def flatten(tree: object, prefix: str = "") -> dict[str, object]:
    """A tree of sections and lists as dotted keys."""
    if isinstance(tree, list):
        tree = {str(number): value for number, value in enumerate(tree)}
    if not isinstance(tree, dict) or (not tree and prefix):
        return {prefix.rstrip("."): tree}
    return {key: value for name, part in tree.items() for key, value in flatten(part, f"{prefix}{name}.").items()}


def named(key: str, names: Sequence[str]) -> bool:
    """Whether a setting, or a section it is in, is among `names`."""
    return any(f"{key}.".startswith(f"{name}.") for name in names)


def check_recipe(before: dict[str, object], now: dict[str, object], allowed: Sequence[str], checkpoint: Path) -> None:
    """Raise `ValueError` with every difference to what the checkpoint was trained with that nobody allowed."""
    keys = sorted(before.keys() | now.keys())
    if strange := [name for name in allowed if not any(named(key, [name]) for key in keys)]:
        raise ValueError(f"resume.allow_change: {', '.join(strange)} is no part of the recipe")
    differences = {
        key: f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in keys
        if before.get(key) != now.get(key)
    }
    if refused := [text for key, text in differences.items() if not named(key, allowed)]:
        raise ValueError(
            f"{checkpoint} was trained with another recipe; use a new run_dir, or name in resume.allow_change what "
            f"should change. {'; '.join(refused)}"
        )
    for text in differences.values():
        log.warning("resume.allow_change: %s", text)
