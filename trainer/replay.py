"""What a step trained on: its samples, crops and prompts once more, as pictures and keys.

    python -m trainer.replay runs/sam_vith --step 1234 --out step_1234

Everything of a sample follows from settings, position and data (docs/decisions/0001, 0002), so no sample was recorded
and no checkpoint is read. Settings and position are those of the step, also where they changed since
(`RUN/starts.jsonl`, trainer/history.py). `--step N` is the step that brought the count to N, as logs and TensorBoard
number it. Clicks of later rounds depend on the network's answers and are not shown.
"""

import argparse
import copy
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trainer.checkpoint import RunState
from trainer.config import Config, ConfigError, MaeConfig, load_config
from trainer.data.batches import Batch, MaeBatch, SamBatch
from trainer.history import start_of
from trainer.optim import phase_ends
from trainer.outputs import check_folder
from trainer.pictures import grid, sample_row
from trainer.recipe import NOT_RECIPE, recipe
from trainer.stages import Pipeline, build_pipeline

MASKS_SHOWN = 6  # of an image


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of either stage")
    parser.add_argument("--step", type=int, required=True, help="counted from 1")
    parser.add_argument("--out", type=Path, help="folder to write into; default: RUN/replay/step_N")
    parser.add_argument("--num-images", type=int, default=16, help="first images of the step only (default 16)")
    options = parser.parse_args(arguments)
    out = options.out or options.run / "replay" / f"step_{options.step:08d}"
    try:
        check_folder("--out", out)
        for name, value in (("--step", options.step), ("--num-images", options.num_images)):
            if value < 1:
                raise ValueError(f"{name} counts from 1, is {value}")
        now = load_config(options.run / "config.yaml", check_paths=False)
        start = start_of(options.run, options.step)
        config = settings_then(now, start)
        pipeline = open_pipeline(config, start, options.step)
        last = phase_ends(config.phases, pipeline.order.num_samples, config.batch.global_size)[-1]
        if options.step > last:
            raise ValueError(f"--step {options.step} lies after the run's last step, {last}")
        positions = positions_of(config, start, options.step)[: options.num_images]
        samples = [pipeline.dataset[[position]] for position in positions]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    mask_ratio = config.model.mask_ratio if isinstance(config, MaeConfig) else 0.0
    with (out / "samples.jsonl").open("w") as lines:
        for sample in samples:
            record = describe(sample)
            lines.write(json.dumps(record) + "\n")
            picture(sample, mask_ratio).save(out / f"{record['position']:012d}.png")
            print(f"position {record['position']}  {record['key']}  {record['problem'] or ''}")
    print(f"{len(samples)} of the {config.batch.global_size} images of step {options.step}: {out}")
    return 0


def positions_of(config: Config, start: RunState, step: int) -> list[int]:
    """Places in the run of the global batch of a step, as `StepSampler` deals them to the ranks together."""
    first = start.samples_seen + (step - 1 - start.step) * config.batch.global_size
    return list(range(first, first + config.batch.global_size))


def settings_then(now: Config, start: RunState) -> Config:
    """The recipe that the run recorded, with today's settings of all that is none: the data may have moved."""
    tree, today = copy.deepcopy(start.config), now.model_dump(mode="json")
    for key in NOT_RECIPE:
        *sections, name = key.split(".")
        place, source = tree, today
        for section in sections:
            place, source = place[section], source[section]
        if name in source:
            place[name] = source[name]
    return type(now).model_validate(tree)


def open_pipeline(config: Config, start: RunState, step: int) -> Pipeline:
    """The run's data. Raises `ValueError` if they are not what the step was trained on."""
    pipeline = build_pipeline(config)
    found = recipe(config, pipeline)
    if wrong := sorted(key for key in found.keys() | start.recipe.keys() if found.get(key) != start.recipe.get(key)):
        texts = [f"{key}: {start.recipe.get(key)!r} then, {found.get(key)!r} now" for key in wrong]
        raise ValueError(
            f"step {step} was trained with another recipe; set data.shards in the run's config.yaml to the data it was "
            f"trained on. {'; '.join(texts)}"
        )
    return pipeline


def describe(sample: Batch) -> dict[str, object]:
    """What a machine may want of a sample: its place, key, problem, and the prompts in input pixels."""
    record: dict[str, object] = {
        "position": int(sample.positions[0]),
        "key": sample.keys[0],
        "problem": sample.problems[0] if sample.problems else None,
        "weight": float(sample.image_weight[0]),
    }
    if isinstance(sample, SamBatch):
        record["masks"] = [
            {
                "points": sample.point_coords[0, m].tolist(),
                "labels": sample.point_labels[0, m].tolist(),
                "box": sample.boxes[0, m].tolist() if sample.has_box[0, m] else None,
                "asks_itself_for_a_mask": bool(sample.wants_mask[0, m]),
            }
            for m in torch.nonzero(sample.mask_valid[0]).flatten().tolist()
        ]
    return record


def picture(sample: Batch, mask_ratio: float) -> Image.Image:
    """The input as the network gets it; of stage 2 with targets and prompts, of stage 1 with what is hidden."""
    if isinstance(sample, SamBatch):
        shown = torch.nonzero(sample.mask_valid[0]).flatten().tolist()[:MASKS_SHOWN]
        image = sample.images[0].permute(1, 2, 0).numpy()
        masks = [sample.masks[0, m].numpy().astype(bool) for m in shown]
        clicks = [[(x, y, label) for (x, y), label in zip(*prompt_lists(sample, m), strict=True)] for m in shown]
        boxes = [sample.boxes[0, m].tolist() if sample.has_box[0, m] else None for m in shown]
        return Image.fromarray(sample_row(image, masks, clicks, boxes))
    assert isinstance(sample, MaeBatch)
    image = sample.images[0].permute(1, 2, 0).numpy()
    return Image.fromarray(grid([[image, np.where(hidden(sample, mask_ratio), np.uint8(127), image)]]))


def prompt_lists(sample: SamBatch, m: int) -> tuple[list[list[float]], list[int]]:
    """Coordinates and labels of mask `m`'s point slots."""
    return sample.point_coords[0, m].tolist(), sample.point_labels[0, m].tolist()


def hidden(sample: MaeBatch, mask_ratio: float) -> np.ndarray:
    """(Y, X, 1) bool: the patches that the encoder does not see, those of most noise."""
    num_patches, size = sample.noise.shape[1], sample.images.shape[-1]
    side = math.isqrt(num_patches)
    rank = sample.noise[0].argsort().argsort().reshape(side, side).numpy()
    patch = size // side
    num_visible = int(num_patches * (1 - mask_ratio))
    return (rank >= num_visible).repeat(patch, axis=0).repeat(patch, axis=1)[..., None]


if __name__ == "__main__":
    sys.exit(main())
