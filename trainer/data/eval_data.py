"""Images and their masks for evaluation: no augmentation, masks whole and at original resolution."""

import math
from collections.abc import Iterator

import numpy as np
import torch

from data_tools import rle
from trainer.config import SamConfig
from trainer.data.images import SampleError, decode_jpeg
from trainer.data.sam_data import decode_placed, place
from trainer.data.shards import ShardReader, open_shards
from trainer.interactive import EvalBatch


def evaluation_rows(config: SamConfig) -> tuple[ShardReader, np.ndarray]:
    """Where evaluation reads: all of `data.eval_shards`, or the hold-out of the training shards."""
    if config.data.eval_shards is not None:
        reader = open_shards(config.data.eval_shards, config.data.remote)
        train, _ = reader.split(0)
        return reader, np.concatenate([rows.rows() for rows in train])
    reader = open_shards(config.data.shards, config.data.remote)
    _, held_out = reader.split(config.data.holdout_images)
    if len(held_out) == 0:
        raise ValueError(f"{config.data.shards}: no image fell into the hold-out; raise data.holdout_images")
    return reader, held_out


def evaluation_batches(
    reader: ShardReader, rows: np.ndarray, config: SamConfig, rank: int, num_ranks: int, batch_size: int = 8
) -> Iterator[EvalBatch]:
    """This rank's share of `rows`, every image on exactly one rank; all ranks yield equally many batches.

    Ranks that run out yield batches without truths, since the forward pass is collective under sharding.
    """
    mine = rows[rank::num_ranks]
    num_batches = math.ceil(math.ceil(len(rows) / num_ranks) / batch_size)
    for number in range(num_batches):
        yield evaluation_batch(reader, mine[number * batch_size : (number + 1) * batch_size], config)


def evaluation_batch(reader: ShardReader, rows: np.ndarray, config: SamConfig, keep_masks: bool = False) -> EvalBatch:
    """Read, place and decode; at least one image, blank if there is none."""
    size = config.model.image_size
    images = np.zeros((max(1, len(rows)), 3, size, size), np.uint8)
    sizes = np.full((len(images), 2), size, np.int64)
    truths: list[list[rle.Runs]] = [[] for _ in images]
    keys = [""] * len(images)
    for i, row in enumerate(rows):
        try:
            raw = reader.read(int(row))
            record = raw.record
            placement = place(record.height, record.width, size, 1.0, (0.0, 0.0), False)
            content = decode_placed(raw.jpeg, record.height, record.width, placement)
        except SampleError as error:
            print(f"{reader.name_of(int(row))} is not evaluated: {error}", flush=True)
            continue
        images[i, :, : placement.height, : placement.width] = content.transpose(2, 0, 1)
        sizes[i] = placement.height, placement.width
        masks = [rle.parse(annotation["segmentation"]) for annotation in record.annotations]
        truths[i] = [mask for mask in masks if rle.area(mask) > 0]
        keys[i] = record.key
    return EvalBatch(
        torch.from_numpy(images),
        torch.from_numpy(sizes),
        truths,
        keys,
        clicks=config.evaluate.clicks,
        single_token=config.loss.multimask == "single",
        masks_at_once=config.data.max_masks,
        keep_masks=keep_masks,
    )


def original_image(reader: ShardReader, row: int) -> np.ndarray:
    """The image as stored, (Y, X, 3) uint8, for pictures."""
    raw = reader.read(int(row))
    return decode_jpeg(raw.jpeg, raw.record.height, raw.record.width)
