"""Runs of the real entry point, so small that they take seconds."""

import json
from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "launch" / "configs"


def sam_arguments(scenes: dict[str, Path], run_dir: Path, *more: str) -> list[str]:
    """Arguments of `trainer.train`: SAM, 64 pixels, 3 images a step, fp32, two steps frozen and four joint."""
    return [
        str(CONFIGS / "sam_tiny.yaml"),
        f"run_dir={run_dir}",
        f"data.shards={scenes['train']}",
        f"data.eval_shards={scenes['eval']}",
        "data.workers=0",
        "data.max_masks=3",
        "model.image_size=64",
        "loss.resolution=16",
        "prompts.rounds=1",  # a later click depends on logits: their last bit would move it to another pixel
        "engine.precision=fp32",
        "batch.global_size=3",
        "batch.micro=3",
        "schedule.warmup_steps=2",
        "phases=[{name: freeze_encoder, steps: 2, frozen: [image_encoder]}, {name: joint, steps: 4}]",
        "log.every_steps=1",
        "log.sample_keys=true",
        "evaluate.every_steps=100",
        "evaluate.num_images=2",
        "checkpoint.every_steps=100",
        *more,
    ]


def mae_arguments(scenes: dict[str, Path], run_dir: Path, *more: str) -> list[str]:
    """Arguments of `trainer.train`: MAE, 64 pixels, 4 images a step, fp32, six steps."""
    return [
        str(CONFIGS / "mae_tiny.yaml"),
        f"run_dir={run_dir}",
        f"data.shards={scenes['train']}",
        "data.workers=0",
        "model.image_size=64",
        "engine.precision=fp32",
        "batch.global_size=4",
        "batch.micro=4",
        "schedule.warmup_steps=2",
        "phases=[{name: pretrain, steps: 6}]",
        "log.every_steps=1",
        "log.pictures_every_steps=100",
        "log.sample_keys=true",
        "checkpoint.every_steps=100",
        *more,
    ]


def losses(run_dir: Path) -> dict[int, float]:
    """Loss after each step, from `metrics.jsonl`; a step that was done twice keeps its last."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def samples(run_dir: Path, rank: int = 0) -> list[tuple[int, int, str]]:
    """(step, position, key) of everything a rank trained on, in order."""
    lines = (run_dir / f"samples_rank{rank}.jsonl").read_text().splitlines()
    return [(line["step"], line["position"], line["key"]) for line in map(json.loads, lines)]
