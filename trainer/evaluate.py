"""How good are the masks? During training on the hold-out, and as a command on any packed data set.

    python -m trainer.evaluate runs/sam_tiny                             # newest checkpoint, the run's own hold-out
    python -m trainer.evaluate runs/sam_tiny --shards DIR --out scores.json --picture masks.png
    python -m trainer.evaluate runs/sam_tiny --untrained                 # the same network before its first step

mIoU is the mean over masks of the IoU at the original resolution, for a box and for 1, 2, 3, ... clicks; the protocol
is in `trainer/interactive.py`. `filled_box` is the box itself taken as the mask: what the prompt alone is worth.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from data_tools import rle
from trainer.checkpoint import Checkpointer, load_weights
from trainer.config import ConfigError, SamConfig, load_config
from trainer.data.eval_data import evaluation_batch, evaluation_batches, evaluation_rows, original_image
from trainer.data.shards import ShardReader
from trainer.distributed import World, broadcast_object, gather_objects, single_process
from trainer.interactive import MaskScore
from trainer.metrics import Logger
from trainer.parallel.engine import Engine
from trainer.pictures import PREDICTED, TRUTH, draw_prompts, grid, overlay
from trainer.stages import build_sam_task

PICTURE_IMAGES, PICTURE_SIDE = 4, 192


@torch.no_grad()
def evaluate(
    engine: Engine, reader: ShardReader, rows: np.ndarray, config: SamConfig, world: World
) -> dict[str, float]:
    """mIoU by protocol over all masks of `rows`, each counted once; the same on every rank. All ranks call."""
    engine.task.eval()
    scores: list[MaskScore] = []
    for batch in evaluation_batches(reader, rows, config, world.rank, world.size):
        scores += engine(batch.to(world.device))
    gathered = gather_objects([score.iou for score in scores], world)
    return broadcast_object(summarize([iou for part in gathered for iou in part]) if world.is_main else None, world)


def summarize(ious: list[dict[str, float]]) -> dict[str, float]:
    """Mean over masks of each protocol, and how many masks there were."""
    if not ious:
        raise ValueError("no mask to evaluate: the evaluation images have none")
    means = {name: float(np.mean([iou[name] for iou in ious])) for name in ious[0]}
    return {**means, "num_masks": float(len(ious))}


@torch.no_grad()
def mask_picture(engine: Engine, reader: ShardReader, rows: np.ndarray, config: SamConfig, world: World) -> np.ndarray:
    """One row an image: truth, answer to a box, to one click and to most clicks, prompts drawn. All ranks call."""
    engine.task.eval()
    shown = rows[:PICTURE_IMAGES]
    batch = evaluation_batch(reader, shown, config, keep_masks=True)
    scores: list[MaskScore] = engine(batch.to(world.device))
    most = max(config.evaluate.clicks)
    panels = []
    for i, row in enumerate(shown):
        image = original_image(reader, int(row))
        mine = [score for score in scores if score.key == batch.keys[i]]
        if not mine:
            continue
        score = max(mine, key=lambda s: rle.area(batch.truths[i][s.number]))
        truth = batch.truths[i][score.number]
        x, y, width, height = rle.box(truth)
        box = (float(x), float(y), float(x + width), float(y + height))
        cells = [(overlay(image, rle.to_bitmap(truth).astype(bool), TRUTH), [], None, "truth")]
        for name, clicks, drawn in (("box", 0, box), ("click_1", 1, None), (f"click_{most}", most, None)):
            if name in score.predicted:
                caption = f"{name} IoU {score.iou[name]:.2f}"
                cells.append((overlay(image, score.predicted[name], PREDICTED), score.clicks[:clicks], drawn, caption))
        panels.append([draw_prompts(picture, PICTURE_SIDE, c, b, caption) for picture, c, b, caption in cells])
    return grid(panels)


def evaluate_and_log(
    engine: Engine, reader: ShardReader, rows: np.ndarray, config: SamConfig, world: World, logger: Logger, step: int
) -> dict[str, float]:
    """Evaluation during training: scalars, pictures of the same few images every time, one console line.

    Returns what `evaluate` does.
    """
    summary = evaluate(engine, reader, rows, config, world)
    logger.scalars(step, {f"eval/miou_{name}": value for name, value in summary.items() if name != "num_masks"})
    logger.picture(step, "eval/masks", mask_picture(engine, reader, rows, config, world))
    shown = "  ".join(f"{name} {value:.3f}" for name, value in summary.items() if name != "num_masks")
    logger.say(f"step {step}: mIoU over {summary['num_masks']:.0f} masks: {shown}")
    return summary


class _PlainEngine:
    """The task alone, in fp32, where no training engine is needed."""

    def __init__(self, task: torch.nn.Module) -> None:
        self.task = task

    def __call__(self, batch):
        return self.task(batch)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of stage 2")
    parser.add_argument("--shards", help="packed data set, directory or URL; default: the run's own evaluation data")
    parser.add_argument("--num-images", type=int, help="first images only; default: all")
    parser.add_argument("--untrained", action="store_true", help="score the network before its first step")
    parser.add_argument("--out", type=Path, help="write the scores as JSON")
    parser.add_argument("--picture", type=Path, help="write a picture of some masks (PNG)")
    options = parser.parse_args(arguments)
    try:
        overrides = [f"data.eval_shards={options.shards}"] if options.shards else []
        config = load_config(options.run / "config.yaml", overrides, check_paths=False)
        if not isinstance(config, SamConfig):
            raise ValueError(f"{options.run} is a run of stage {config.stage}; evaluation needs stage sam")
        world = single_process()
        task = build_sam_task(config, frozen=(), initial_weights=False)
        if not options.untrained:
            checkpoint = Checkpointer(options.run / "checkpoints", config.checkpoint.keep_last, world).newest()
            if checkpoint is None:
                raise ValueError(f"{options.run}/checkpoints holds no complete checkpoint")
            task.load_state_dict(load_weights(checkpoint), strict=True)
        engine = _PlainEngine(task.to(world.device))
        reader, rows = evaluation_rows(config)
        rows = rows[: options.num_images] if options.num_images else rows
        summary = evaluate(engine, reader, rows, config, world)  # type: ignore[arg-type]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    for name, value in summary.items():
        print(f"{name:12} {value:.4f}")
    if options.out:
        options.out.write_text(json.dumps(summary, indent=1) + "\n")
    if options.picture:
        from PIL import Image

        Image.fromarray(mask_picture(engine, reader, rows, config, world)).save(options.picture)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main())
