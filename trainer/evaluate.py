"""How good are the masks? During training on the hold-out, and as a command on any packed data set.

    python -m trainer.evaluate runs/sam_tiny                             # newest checkpoint, the run's own hold-out
    python -m trainer.evaluate runs/sam_tiny/checkpoints/BEST            # another checkpoint
    python -m trainer.evaluate runs/sam_tiny --shards DIR --out scores.json --picture masks.png
    python -m trainer.evaluate runs/sam_tiny --untrained                 # the same network before its first step
    python -m trainer.evaluate sam_vit_h_4b8939.pth --shards DIR         # released weights
    torchrun --nproc-per-node 8 -m trainer.evaluate runs/sam_vith        # the same numbers, sooner

mIoU is the mean over masks of the IoU at the original resolution, for a box and for 1, 2, 3, ... clicks; the protocol
is in `trainer/interactive.py`, every measure in `trainer/scores.py`, what the names mean in docs/evaluation.md.
"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_tools import rle
from model.weights import sam_to_sam
from trainer.checkpoint import load_weights
from trainer.config import ConfigError, SamConfig, load_config
from trainer.data.eval_data import (
    diagnostic_batch,
    evaluation_batch,
    evaluation_batches,
    evaluation_rows,
    original_image,
)
from trainer.data.shards import ShardReader
from trainer.diagnostics import NAMES, means
from trainer.distributed import (
    World,
    broadcast_object,
    gather_objects,
    start_world,
    stop_world,
    sum_on_host,
)
from trainer.interactive import MATCHED, EvalBatch, MaskScore
from trainer.metrics import Logger, finite_or_none
from trainer.outputs import check_file
from trainer.parallel.engine import Engine
from trainer.pictures import answer_row, grid, round_rows
from trainer.sam_task import SamTask
from trainer.scores import SIZES, average_precision, calibration, match_image, size_of
from trainer.stages import build_sam_task, checkpoint_of, pointed_at, read_weights, sam_size

log = logging.getLogger(__name__)

PICTURE_IMAGES = 4


@dataclass(frozen=True)
class ScoredImage:
    """What is gathered of one image: numbers, and COCOeval's matching instead of the masks themselves."""

    index: int  # in the rows that are evaluated
    scores: list[MaskScore]  # without masks
    matches: dict[str, list[Any]]  # by the protocols of MATCHED


def never() -> bool:
    return False


@torch.no_grad()
def evaluate(
    engine: Engine,
    reader: ShardReader,
    rows: np.ndarray,
    config: SamConfig,
    world: World,
    stop: Callable[[], bool] = never,
) -> dict[str, float] | None:
    """Every measure over all masks of `rows`, each counted once: the same numbers on every rank and any number of them.

    All ranks call. `stop` is asked after each image; if any rank says yes all leave, with None.
    """
    engine.task.eval()
    mine: list[ScoredImage] = []
    for index, batch in evaluation_batches(reader, rows, config, world.rank, world.size):
        scores: list[MaskScore] = engine(batch.to(world.device))
        if scores:
            mine.append(score_image(index, batch, scores))
        if sum_on_host([float(stop())], world)[0]:
            return None
    gathered = gather_objects(mine, world)
    # In the order of the images, so that not even the last digit depends on the layout.
    images = sorted((image for part in gathered for image in part), key=lambda image: image.index)
    return broadcast_object(summarize(images) if world.is_main else None, world)


def score_image(index: int, batch: EvalBatch, scores: list[MaskScore]) -> ScoredImage:
    """Match an image's answers with its truths, and leave the masks behind."""
    matches = {
        name: match_image(batch.truths[0], [s.found[name] for s in scores], [s.predicted_iou[name] for s in scores])
        for name in MATCHED
        if name in scores[0].found
    }
    return ScoredImage(index, [without_masks(score) for score in scores], matches)


def without_masks(score: MaskScore) -> MaskScore:
    return replace(score, found={}, views={})


def summarize(images: Sequence[ScoredImage]) -> dict[str, float]:
    """All measures by name, means over masks. docs/evaluation.md explains the names; `miou` is the headline."""
    scores = [score for image in images for score in image.scores]
    if not scores:
        raise ValueError("no mask to evaluate: the evaluation images have none")
    prompts = list(scores[0].predicted_iou)
    if wrong := sum(not all(map(math.isfinite, score.predicted_iou.values())) for score in scores):
        log.warning(
            "the answers for %d of %d masks are not finite (NaN or infinite): the network is broken, so these scores "
            "say nothing; lower optim.lr, or go back to an earlier checkpoint",
            wrong,
            len(scores),
        )
    summary = {name: mean(score.iou[name] for score in scores) for name in scores[0].iou}
    summary["miou"] = float(np.mean([summary[name] for name in prompts]))
    summary["num_masks"] = float(len(scores))
    for size in SIZES:
        some = [score for score in scores if size_of(score.area) == size]
        if some:
            summary |= {f"{size}/{name}": mean(score.iou[name] for score in some) for name in prompts}
            summary[f"{size}/num_masks"] = float(len(some))
    for name in scores[0].boundary_iou:
        summary[f"boundary_iou/{name}"] = mean(score.boundary_iou[name] for score in scores)
        summary[f"boundary_f/{name}"] = mean(score.boundary_f[name] for score in scores)
    for name in prompts:
        found = calibration([s.predicted_iou[name] for s in scores], [s.iou[name] for s in scores])
        summary |= {f"calibration/{name}_{key}": value for key, value in found.items()}
    for name in images[0].matches:
        found = average_precision([image.matches[name] for image in images])
        summary |= {f"{name}/{key}": value for key, value in found.items()}
    return summary


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


@torch.no_grad()
def evaluation_pictures(
    engine: Engine, reader: ShardReader, rows: np.ndarray, config: SamConfig, world: World
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The largest mask of the first images: one sheet of all, and one for each image. All ranks call.

    The first has a row an image: truth, answer to a box, to one click, to most clicks. An image's own has a row a
    round: the prompts, the three hypotheses with their predicted IoU, the answer, its error.
    """
    engine.task.eval()
    shown = rows[:PICTURE_IMAGES]
    batch = largest_masks(evaluation_batch(reader, shown, config, keep_masks=True))
    scores: list[MaskScore] = engine(batch.to(world.device))
    answers, rounds = [], []
    for i, row in enumerate(shown):
        for score in (score for score in scores if score.key == batch.keys[i]):
            image = original_image(reader, int(row))
            truth = rle.to_bitmap(batch.truths[i][0]).astype(bool)
            box = rle.box(batch.truths[i][0])
            answers.append(answer_row(image, truth, box, score, max(config.evaluate.clicks)))
            rounds.append(grid(round_rows(image, truth, box, score)))
    return grid(answers), rounds


def largest_masks(batch: EvalBatch) -> EvalBatch:
    """The same images with one truth each, the one of most pixels."""
    return replace(batch, truths=[[max(masks, key=rle.area)] if masks else [] for masks in batch.truths])


def evaluate_and_log(
    engine: Engine,
    reader: ShardReader,
    rows: np.ndarray,
    config: SamConfig,
    world: World,
    logger: Logger,
    step: int,
    stop: Callable[[], bool],
) -> float | None:
    """Evaluation during training: scalars, pictures of the same few images every time, one console line.

    Returns the headline mIoU, the mean over the prompts that are scored; None if it was told to stop.
    """
    summary = evaluate(engine, reader, rows, config, world, stop)
    if summary is None:
        logger.say(f"step {step}: the evaluation was left, since the run was asked to stop")
        return None
    logger.scalars(step, {scalar_name(name): value for name, value in summary.items() if "num_masks" not in name})
    answers, rounds = evaluation_pictures(engine, reader, rows, config, world)
    logger.picture(step, "eval/masks", answers)
    for number, sheet in enumerate(rounds, 1):
        logger.picture(step, f"eval/rounds_{number}", sheet)
    shown = "  ".join(f"{name} {value:.3f}" for name, value in summary.items() if is_miou(name))
    logger.say(f"step {step}: mIoU over {summary['num_masks']:.0f} masks: {shown}")
    return summary["miou"]


@torch.no_grad()
def diagnose_and_log(
    engine: Engine, reader: ShardReader, rows: np.ndarray, config: SamConfig, world: World, logger: Logger, step: int
) -> None:
    """The diagnostics of `trainer/diagnostics.py` as scalars, over the objects of `rows`. All ranks call."""
    started = time.perf_counter()
    engine.task.eval()
    sums = torch.zeros(len(NAMES) + 2, dtype=torch.float64)
    for index in range(world.rank, math.ceil(len(rows) / world.size) * world.size, world.size):  # as many on each rank
        batch = diagnostic_batch(reader, rows[index : index + 1], config)
        sums += engine(batch.to(world.device)).cpu()
    values = means(sum_on_host(sums.tolist(), world))
    values["seconds"] = time.perf_counter() - started
    logger.scalars(step, {f"diagnostics/{name}": value for name, value in values.items()})


def is_miou(name: str) -> bool:
    """Whether an entry of a summary is an mIoU over all masks."""
    return "/" not in name and name != "num_masks"


def scalar_name(name: str) -> str:
    """`box` to `eval/miou_box`, `boundary_iou/box` to `eval_boundary_iou/box`."""
    if name == "miou":
        return "eval/miou"
    return f"eval/miou_{name}" if is_miou(name) else f"eval_{name}"


class _PlainEngine:
    """The task alone, in fp32, where no training engine is needed."""

    def __init__(self, task: torch.nn.Module) -> None:
        self.task = task

    def __call__(self, batch):
        return self.task(batch)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of stage 2, one of its checkpoints, or a file (.pth)")
    parser.add_argument("--shards", help="packed data set, directory or URL; default: the run's own evaluation data")
    parser.add_argument("--num-images", type=int, help="first images only; default: all")
    parser.add_argument("--untrained", action="store_true", help="score random weights in its place")
    parser.add_argument("--random-clicks", action="store_true", help="score clicks drawn at random too")
    parser.add_argument("--out", type=Path, help="write the scores as JSON")
    parser.add_argument("--picture", type=Path, help="write a picture of some masks (PNG)")
    options = parser.parse_args(arguments)
    world = None
    try:
        world = start_world(timeout_minutes=30)
        return run(options, world)
    except ConfigError as error:
        print(error, file=sys.stderr)
    except ValueError as error:
        print(f"evaluate: {error}", file=sys.stderr)
    finally:
        if world is not None:
            stop_world(world)
    return 2


def run(options: argparse.Namespace, world: World) -> int:
    """The command on one of its processes. Raises `ValueError` for what a user can mend."""
    for name, path in (("--out", options.out), ("--picture", options.picture)):
        if path is not None:
            check_file(name, path)
    if options.num_images is not None and options.num_images < 1:
        raise ValueError(f"--num-images counts from 1, is {options.num_images}; without it all are scored")
    overrides = [f"data.eval_shards={options.shards}"] if options.shards else []
    overrides += ["evaluate.random_clicks=true"] if options.random_clicks else []
    config, task = load_network(options.run, overrides, options.untrained)
    engine = _PlainEngine(task.to(world.device))
    reader, rows = evaluation_rows(config)
    rows = rows[: options.num_images]
    summary = evaluate(engine, reader, rows, config, world)  # type: ignore[arg-type]
    assert summary is not None, "nobody asked to stop"
    if not world.is_main:
        return 0
    if options.out:
        options.out.write_text(json.dumps(finite_or_none(summary), indent=1) + "\n")
    if options.picture:
        answers, _ = evaluation_pictures(engine, reader, rows, config, world)  # type: ignore[arg-type]
        Image.fromarray(answers).save(options.picture, format="PNG")
    for name, value in summary.items():  # last, as whoever reads may have left: `| head`
        print(f"{name:28} {value:.4f}")
    return 0


def load_network(path: Path, overrides: list[str], untrained: bool) -> tuple[SamConfig, SamTask]:
    """Settings and network of a run directory or one of its checkpoints, or of a file of weights with the settings of
    an evaluation alone.
    """
    path = pointed_at(path)
    if path.is_file():
        if untrained:
            raise ValueError(f"--untrained scores random weights in a run's place; {path} is a file of weights")
        weights = read_weights(path)
        config = config_for_weights(weights, overrides)
        task = build_sam_task(config, frozen=(), initial_weights=False)
        sam_to_sam(weights, task.sam, str(path))
        return config, task
    run, folder = path, path.absolute().parent
    if (
        folder.name == "checkpoints" and not (path / "config.yaml").is_file()
    ):  # a checkpoint, not a run in such a folder
        run = folder.parent
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{path} is no run directory, no checkpoint of one and no file of weights")
    loaded = load_config(run / "config.yaml", overrides, check_paths=False)
    if not isinstance(loaded, SamConfig):
        raise ValueError(f"{run} is a run of stage {loaded.stage}; evaluation needs stage sam")
    task = build_sam_task(loaded, frozen=(), initial_weights=False)
    if not untrained:
        task.load_state_dict(load_weights(checkpoint_of(path)), strict=True)
    return loaded, task


def config_for_weights(weights: Mapping[str, torch.Tensor], overrides: list[str]) -> SamConfig:
    """The settings that evaluating bare weights needs; what only training reads is filled in and not read."""
    size, image_size = sam_size(weights)
    tree: dict[str, Any] = {
        "stage": "sam",
        "run_dir": ".",
        "model": {"size": size, "image_size": image_size},
        "data": {"shards": ""},
        "optim": {"lr": 1.0},
        "schedule": {"warmup_steps": 0},
        "phases": [{"name": "none", "steps": 1}],
        "batch": {"global_size": 1, "micro": 1},
        "checkpoint": {"every_steps": 1},
        "evaluate": {},
    }
    if not overrides or not overrides[0].startswith("data.eval_shards="):
        raise ValueError("a file of weights has no data of its own: give --shards")
    for override in overrides:
        key, value = override.split("=", 1)
        section, name = key.split(".")
        tree[section][name] = value if section == "data" else value == "true"
    return SamConfig.model_validate(tree)


if __name__ == "__main__":
    sys.exit(main())
