"""What a step trained on: its samples, crops and prompts once more, as pictures and keys.

    python -m trainer.replay runs/sam_vith --step 1234 --out step_1234

Everything of a sample follows from seed, position and data (docs/decisions/0001, 0002), so nothing was recorded and no
checkpoint is read. `--step N` is the step that brought the count to N, as logs and TensorBoard number it. Clicks of
later rounds depend on the network's answers and are not shown.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trainer.checkpoint import Checkpointer, read_run_state
from trainer.config import Config, ConfigError, MaeConfig, load_config
from trainer.data.batches import Batch, MaeBatch, SamBatch
from trainer.distributed import single_process
from trainer.pictures import grid, sample_row
from trainer.stages import Pipeline, build_pipeline
from trainer.train import check_same_run, fingerprint

MASKS_SHOWN = 6  # of an image


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of either stage")
    parser.add_argument("--step", type=int, required=True, help="counted from 1")
    parser.add_argument("--out", type=Path, help="folder to write into; default: RUN/replay/step_N")
    parser.add_argument("--num-images", type=int, default=16, help="first images of the step only (default 16)")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.run / "config.yaml", check_paths=False)
        pipeline = open_pipeline(config)
        positions = positions_of(config, options.step)[: options.num_images]
        samples = [pipeline.dataset[[position]] for position in positions]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    out = options.out or options.run / "replay" / f"step_{options.step:08d}"
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


def positions_of(config: Config, step: int) -> list[int]:
    """Places in the run of the global batch of a step, as `StepSampler` deals them to the ranks together."""
    if step < 1:
        raise ValueError(f"--step counts from 1, is {step}")
    return list(range((step - 1) * config.batch.global_size, step * config.batch.global_size))


def open_pipeline(config: Config) -> Pipeline:
    """The run's data. Raises `ValueError` if they are not what its newest checkpoint was trained on."""
    pipeline = build_pipeline(config)
    newest = Checkpointer(config.run_dir / "checkpoints", config.checkpoint.keep_last, single_process()).newest()
    if newest:
        check_same_run(read_run_state(newest), fingerprint(config, pipeline), newest)
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
