"""Stage 2: position in the run to an image, its masks as targets, and their first prompts.

The order of the stages: read -> draw everything -> geometry -> image -> masks -> prompts -> collate. Masks stay runs
until the target; the only bitmap made is the target at the loss resolution.

Letters: B images, M masks, P point slots, S input pixels a side, s target pixels a side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from data_tools import rle
from data_tools.sample_format import Record
from trainer.config import SamConfig
from trainer.data.batches import SamBatch, StageClock
from trainer.data.embeddings import COMPUTED, EmbeddingStore
from trainer.data.images import SampleError, decode_jpeg, needed_size, resize_window
from trainer.data.order import MASK_ORDER, SAMPLE_DRAWS, DataOrder, keyed_rng
from trainer.data.shards import ShardReader
from trainer.prompts import FirstPrompt, PromptType, first_prompt, later_rounds_with_click, num_draws


@dataclass(frozen=True)
class Placement:
    """How a source image lies in the square input: a source window, its size in the input, mirrored or not."""

    window: tuple[int, int, int, int]  # x0 y0 x1 y1, whole source pixels
    height: int  # of the content in the input, pixels; the rest is padding right and below
    width: int
    flip: bool

    def transform(self, grid: int, image_size: int) -> rle.AxisTransform:
        """Source coordinates to a grid of `grid` cells over the input."""
        x0, y0, x1, y1 = self.window
        share = grid / image_size
        scale_x, scale_y = self.width * share / (x1 - x0), self.height * share / (y1 - y0)
        return rle.AxisTransform(
            scale_x, scale_y, -x0 * scale_x, -y0 * scale_y, flip=self.flip, width=self.width * share
        )


def place(height: int, width: int, image_size: int, scale: float, shift: tuple[float, float], flip: bool) -> Placement:
    """Long side to `scale * image_size`; what overhangs the input is cropped at `shift` in [0, 1), the rest padded.

    With scale 1 this is SAM's preprocessing. The document's `RandomResizedCrop(scale=(0.8, 1.2))`, taken literally,
    never zooms out and stretches; this is the reading its comment asks for (a slight zoom in or out).
    """
    factor = scale * image_size / max(height, width)
    window, sizes = [], []
    for length, place_draw in ((width, shift[0]), (height, shift[1])):
        visible = min(length, max(1, round(image_size / factor)))
        start = int(place_draw * (length - visible + 1))
        window.append((start, start + visible))
        sizes.append(min(image_size, max(1, round(visible * factor))))
    (x0, x1), (y0, y1) = window
    return Placement((x0, y0, x1, y1), sizes[1], sizes[0], flip)


@dataclass(frozen=True)
class Draws:
    """All random numbers of one sample, made at once, before anything that its content decides."""

    scale: float
    shift: tuple[float, float]
    flip: float
    color: np.ndarray  # (3,)
    prompts: np.ndarray  # (M, num_draws)
    clicks: np.ndarray  # (M, rounds - 1)
    gets_click: np.ndarray  # (rounds - 1,) bool
    drop_path: np.ndarray  # (blocks, 2)


def draw(rng: np.random.Generator, config: SamConfig, num_blocks: int) -> Draws:
    """Draw in a fixed order from the sample's own generator; what depends on the content has a stream of its own."""
    num_masks = config.data.max_masks
    return Draws(
        scale=rng.random(),
        shift=(rng.random(), rng.random()),
        flip=rng.random(),
        color=rng.random(3),
        prompts=rng.random((num_masks, num_draws(config.prompts))),
        clicks=rng.random((num_masks, config.prompts.rounds - 1), np.float32),
        gets_click=later_rounds_with_click(config.prompts, rng),
        drop_path=rng.random((num_blocks, 2), np.float32),
    )


class SamDataset(Dataset):
    """Map-style dataset whose items are micro-batches: a list of positions in, a `SamBatch` out."""

    def __init__(
        self,
        reader: ShardReader,
        order: DataOrder,
        config: SamConfig,
        num_blocks: int,
        embeddings: EmbeddingStore | None = None,
    ) -> None:
        self.reader, self.order, self.config, self.num_blocks = reader, order, config, num_blocks
        self.embeddings = embeddings

    def __getitem__(self, positions: Sequence[int]) -> SamBatch:
        clock = StageClock()
        with clock.stage("collate"):
            arrays = self._empty(len(positions))
        keys, problems = [""] * len(positions), []
        for i, position in enumerate(positions):
            if position < 0:
                continue
            rng = keyed_rng(self.config.seed, SAMPLE_DRAWS, position)
            draws = draw(rng, self.config, self.num_blocks)
            row = self.order.row(position)
            keys[i] = self.reader.name_of(row)
            try:
                with clock.stage("read"):
                    raw = self.reader.read(row)
                keys[i] = raw.record.key
                mask_order = keyed_rng(self.config.seed, MASK_ORDER, position).permutation(len(raw.record.annotations))
                if self.embeddings is not None and self.embeddings.done[row] != COMPUTED:
                    raise SampleError("has no embedding: its image could not be read")
                jpeg = None if self.embeddings else raw.jpeg
                self._fill(arrays, i, raw.record, jpeg, mask_order, draws, clock)
                if self.embeddings is not None:
                    with clock.stage("read"):
                        arrays["image_embeddings"][i] = self.embeddings.values[row]
            except SampleError as error:
                problems.append(f"{keys[i]}: {error}")
        return SamBatch(
            positions=torch.tensor(positions, dtype=torch.int64),
            keys=keys,
            problems=problems,
            num_images=0.0,
            num_masks=0.0,
            num_mask_prompts=int(arrays["wants_mask"].sum(axis=1).max()),
            stage_seconds=clock.seconds,
            **{name: torch.from_numpy(array) for name, array in arrays.items()},
        )

    def _empty(self, batch: int) -> dict[str, np.ndarray]:
        """The arrays of a batch that trains nothing; valid samples fill their places."""
        config = self.config
        masks, points, rounds = config.data.max_masks, len(config.prompts.num_points), config.prompts.rounds
        size, target = config.model.image_size, config.loss.resolution
        embedding = self.embeddings.shape if self.embeddings else (0, 0, 0)
        return {
            "image_weight": np.zeros(batch, np.float32),
            "images": np.zeros((batch, 3, size, size), np.uint8),
            "image_sizes": np.full((batch, 2), size, np.int64),
            "color_factors": np.ones((batch, 3), np.float32),
            "masks": np.zeros((batch, masks, target, target), np.uint8),
            "mask_valid": np.zeros((batch, masks), bool),
            "point_coords": np.zeros((batch, masks, points, 2), np.float32),
            "point_labels": np.full((batch, masks, points), -1, np.int64),
            "boxes": np.zeros((batch, masks, 4), np.float32),
            "has_box": np.zeros((batch, masks), bool),
            "wants_mask": np.zeros((batch, masks), bool),
            "click_uniforms": np.zeros((batch, masks, rounds - 1), np.float32),
            "gets_click": np.ones((batch, rounds - 1), bool),
            "drop_path_uniforms": np.ones((batch, self.num_blocks, 2), np.float32),
            "image_embeddings": np.zeros((batch, *embedding), np.float16),
        }

    def _fill(
        self,
        arrays: dict[str, np.ndarray],
        i: int,
        record: Record,
        jpeg: bytes | None,
        mask_order: np.ndarray,
        draws: Draws,
        clock: StageClock,
    ) -> None:
        """Decode sample `i` of the batch into the arrays; without `jpeg` all but its pixels."""
        config = self.config
        size = config.model.image_size
        low, high = config.data.scale_jitter or (1.0, 1.0)
        scale = low + draws.scale * (high - low)
        flip = draws.flip < config.data.horizontal_flip
        placement = place(record.height, record.width, size, scale, draws.shift, flip)
        with clock.stage("jpeg"):
            image = None if jpeg is None else decode_placed(jpeg, record.height, record.width, placement)
        with clock.stage("masks"):
            chosen, targets = choose_masks(record, placement, mask_order, config)
        with clock.stage("prompts"):
            transform = placement.transform(size, size)
            prompts = [
                first_prompt(mask, placement.window, transform, draws.prompts[m], config.prompts)
                for m, mask in enumerate(chosen)
            ]
        # Those that want the network's own answer come first: the pass that makes it decodes the first slots only.
        slots = sorted(range(len(chosen)), key=lambda m: prompts[m].type != PromptType.MASK)
        with clock.stage("collate"):
            self._collate(arrays, i, image, placement, targets, slots, draws)
            for m, slot in enumerate(slots):
                write_prompt(arrays, i, m, prompts[slot])

    def _collate(
        self,
        arrays: dict[str, np.ndarray],
        i: int,
        image: np.ndarray | None,
        placement: Placement,
        targets: np.ndarray,
        slots: list[int],
        draws: Draws,
    ) -> None:
        """Copy what was made for sample `i` into the batch."""
        if image is not None:
            arrays["images"][i, :, : placement.height, : placement.width] = image.transpose(2, 0, 1)
        arrays["image_sizes"][i] = placement.height, placement.width
        arrays["color_factors"][i] = 1.0 + self.config.data.color_jitter * (2.0 * draws.color - 1.0)
        arrays["click_uniforms"][i] = draws.clicks
        arrays["gets_click"][i] = draws.gets_click
        arrays["drop_path_uniforms"][i] = draws.drop_path
        num = len(slots)
        np.take(targets, slots, axis=0, out=arrays["masks"][i, :num], mode="clip")  # mode raise would copy once more
        arrays["mask_valid"][i, :num] = True
        arrays["image_weight"][i] = float(num > 0)


def write_prompt(arrays: dict[str, np.ndarray], i: int, m: int, prompt: FirstPrompt) -> None:
    """Put the first prompt of mask `m` of image `i` into the batch."""
    arrays["point_coords"][i, m] = prompt.coords
    arrays["point_labels"][i, m] = prompt.labels
    arrays["boxes"][i, m] = prompt.box
    arrays["has_box"][i, m] = prompt.type == PromptType.BOX
    arrays["wants_mask"][i, m] = prompt.type == PromptType.MASK


def decode_placed(jpeg: bytes, height: int, width: int, placement: Placement) -> np.ndarray:
    """The content of the input, (placement.height, placement.width, 3) uint8, decoded no larger than it needs.

    height, width: the size the record states. The pixels as stored, whatever EXIF says, since masks lie on them.
    Raises `SampleError` if the image has another aspect.
    """
    x0, y0, x1, y1 = placement.window
    image = decode_jpeg(
        jpeg,
        needed_size(height, y1 - y0, placement.height),
        needed_size(width, x1 - x0, placement.width),
        upright=False,
    )
    scale_x, scale_y = image.shape[1] / width, image.shape[0] / height
    if abs(scale_x - scale_y) * max(height, width) > 2:  # reduced scales round each side up by less than a pixel
        raise SampleError(f"image of {image.shape[1]}x{image.shape[0]} does not fit the recorded {width}x{height}")
    window = (x0 * scale_x, y0 * scale_y, x1 * scale_x, y1 * scale_y)
    return resize_window(image, window, placement.height, placement.width, flip=placement.flip)


def choose_masks(
    record: Record, placement: Placement, mask_order: np.ndarray, config: SamConfig
) -> tuple[list[rle.Runs], np.ndarray]:
    """Up to `max_masks` masks at random that show in the target, and the targets (chosen, s, s) uint8.

    A target pixel is object where the mask covers at least half of it. A mask that covers no pixel so, being cropped
    away or too thin for the loss resolution, is passed over for the next. Raises `SampleError` for broken runs.
    """
    size, max_masks = config.loss.resolution, config.data.max_masks
    transform = placement.transform(size, config.model.image_size)
    candidates = list(mask_order)
    largest = config.data.max_mask_area
    max_area = (1.0 if largest is None else largest) * record.height * record.width
    chosen: list[rle.Runs] = []
    targets = [np.empty((0, size, size), np.uint8)]
    while candidates and len(chosen) < max_masks:
        wanted = max_masks - len(chosen)
        batch = []
        for number in candidates[:wanted]:
            try:
                mask = rle.parse(record.annotations[number]["segmentation"])
            except ValueError as error:
                raise SampleError(f"mask {number}: {error}") from error
            if (mask.height, mask.width) != (record.height, record.width):
                raise SampleError(
                    f"mask {number} is {mask.width}x{mask.height}, the image {record.width}x{record.height}"
                )
            if 0 < rle.area(mask) <= max_area:
                batch.append(mask)
        del candidates[:wanted]
        if not batch:
            continue
        bitmaps, areas = rle.covered(batch, size, size, transform)
        shown = np.flatnonzero(areas)
        chosen += [batch[number] for number in shown]
        targets.append(bitmaps if len(shown) == len(batch) else bitmaps[shown])
    return chosen, targets[-1] if len(targets) == 2 else np.concatenate(targets)
