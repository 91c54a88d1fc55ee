"""Images and their masks for evaluation: no augmentation, masks whole and at original resolution."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from data_tools import rle
from data_tools.sample_format import Record
from trainer.config import SamConfig
from trainer.data.images import SampleError, decode_jpeg
from trainer.data.sam_data import Placement, decode_placed, place
from trainer.data.shards import ShardReader, open_shards
from trainer.diagnostics import CLICK_RANKS, OBJECTS_PER_IMAGE, DiagnosticBatch, choose_objects, click_inside
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
    reader: ShardReader, rows: np.ndarray, config: SamConfig, rank: int, num_ranks: int
) -> Iterator[tuple[int, EvalBatch]]:
    """This rank's share of `rows`, an image at a time with its index in `rows`; each image on exactly one rank.

    All ranks yield equally many, since the forward pass is collective under sharding: those that run out yield blank
    images without truths. Nor may it differ in its calls: all images of a turn count as holding as many masks as the
    fullest, by the index.
    """
    num_masks = reader.columns["num_masks"]
    for first in range(0, len(rows), num_ranks):
        most = int(num_masks[rows[first : first + num_ranks]].max())
        index = first + rank
        yield index, replace(evaluation_batch(reader, rows[index : index + 1], config), least_masks=most)


def evaluation_batch(reader: ShardReader, rows: np.ndarray, config: SamConfig, keep_masks: bool = False) -> EvalBatch:
    """Read, place and decode; at least one image, blank if there is none."""
    size = config.model.image_size
    images = np.zeros((max(1, len(rows)), 3, size, size), np.uint8)
    sizes = np.full((len(images), 2), size, np.int64)
    truths: list[list[rle.Runs]] = [[] for _ in images]
    keys = [""] * len(images)
    for i, row in enumerate(rows):
        try:
            record, placement, content = read_whole(reader, int(row), size)
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
        random_clicks=config.evaluate.random_clicks,
        boundary=config.evaluate.boundary,
        single_token=config.loss.multimask == "single",
        masks_at_once=config.data.max_masks,
        keep_masks=keep_masks,
        single_token_for_boxes=config.loss.single_token_for_boxes,
    )


def read_whole(reader: ShardReader, row: int, size: int) -> tuple[Record, Placement, np.ndarray]:
    """A sample as SAM sees it without augmentation: its long side `size` pixels. `SampleError` if it is broken."""
    raw = reader.read(row)
    record = raw.record
    placement = place(record.height, record.width, size, 1.0, (0.0, 0.0), False)
    return record, placement, decode_placed(raw.jpeg, record.height, record.width, placement)


def original_image(reader: ShardReader, row: int) -> np.ndarray:
    """The image as stored, (Y, X, 3) uint8, for pictures."""
    raw = reader.read(int(row))
    return decode_jpeg(raw.jpeg, raw.record.height, raw.record.width, upright=False)


def diagnostic_batch(reader: ShardReader, rows: np.ndarray, config: SamConfig) -> DiagnosticBatch:
    """Images with a few objects and two clicks on each; at least one image, blank if there is none or it is broken."""
    size, target_size = config.model.image_size, config.loss.resolution
    num_images = max(1, len(rows))
    images = np.zeros((num_images, 3, size, size), np.uint8)
    sizes = np.full((num_images, 2), size, np.int64)
    targets = np.zeros((num_images, OBJECTS_PER_IMAGE, target_size, target_size), np.uint8)
    valid = np.zeros((num_images, OBJECTS_PER_IMAGE), bool)
    clicks = np.zeros((num_images, OBJECTS_PER_IMAGE, len(CLICK_RANKS), 2), np.float32)
    for i, row in enumerate(rows):
        try:
            record, placement, content = read_whole(reader, int(row), size)
        except SampleError as error:
            print(f"{reader.name_of(int(row))} is left out of the diagnostics: {error}", flush=True)
            continue
        images[i, :, : placement.height, : placement.width] = content.transpose(2, 0, 1)
        sizes[i] = placement.height, placement.width
        to_target, to_input = placement.transform(target_size, size), placement.transform(size, size)

        def target_of(mask: rle.Runs, transform: rle.AxisTransform = to_target) -> np.ndarray:
            return rle.coverage([mask], target_size, target_size, transform)[0] >= 0.5

        masks = [rle.parse(annotation["segmentation"]) for annotation in record.annotations]
        for m, mask in enumerate(choose_objects(masks, target_of)):
            targets[i, m], valid[i, m] = target_of(mask), True
            clicks[i, m] = [click_inside(mask, rank, to_input) for rank in CLICK_RANKS]
    return DiagnosticBatch(*(torch.from_numpy(array) for array in (images, sizes, targets, valid, clicks)))
