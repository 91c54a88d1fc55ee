"""Stage 1: position in the run to a random crop and its masking noise.

Letters: B images, S input pixels a side, L patches.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from trainer.config import MaeData
from trainer.data.batches import MaeBatch, StageClock
from trainer.data.images import SampleError, decode_jpeg, image_size, needed_size, resize_window
from trainer.data.order import SAMPLE_DRAWS, DataOrder, keyed_rng
from trainer.data.shards import ShardReader

ASPECT_RANGE = (3 / 4, 4 / 3)  # of the random crop, as torchvision's RandomResizedCrop
CROP_TRIES = 10


class MaeDataset(Dataset):
    """Map-style dataset whose items are micro-batches: a list of positions in, a `MaeBatch` out."""

    def __init__(
        self, reader: ShardReader, order: DataOrder, settings: MaeData, seed: int, image_size: int, num_patches: int
    ) -> None:
        self.reader, self.order, self.settings, self.seed = reader, order, settings, seed
        self.image_size, self.num_patches = image_size, num_patches

    def __getitem__(self, positions: Sequence[int]) -> MaeBatch:
        size = self.image_size
        images = np.zeros((len(positions), 3, size, size), np.uint8)
        weights = np.zeros(len(positions), np.float32)
        factors = np.ones((len(positions), 3), np.float32)
        noise = np.zeros((len(positions), self.num_patches), np.float32)
        keys, problems, clock = [""] * len(positions), [], StageClock()
        for i, position in enumerate(positions):
            noise[i] = np.linspace(0, 1, self.num_patches)  # of a filler: any order without ties
            if position < 0:
                continue
            rng = keyed_rng(self.seed, SAMPLE_DRAWS, position)
            # Every draw of a sample is made before anything that can fail or that its content decides.
            crop_draws, flip, jitter = rng.random((CROP_TRIES, 4)), rng.random(), rng.random(3)
            noise[i] = rng.random(self.num_patches, np.float32)
            row = self.order.row(position)
            keys[i] = self.reader.name_of(row)
            try:
                with clock.stage("read"):
                    raw = self.reader.read(row)
                keys[i] = raw.record.key
                with clock.stage("jpeg"):
                    images[i] = self._crop(raw.jpeg, crop_draws, flip < self.settings.horizontal_flip)
            except SampleError as error:
                problems.append(f"{keys[i]}: {error}")
                continue
            weights[i] = 1.0
            factors[i] = 1.0 + self.settings.color_jitter * (2.0 * jitter - 1.0)
        return MaeBatch(
            positions=torch.tensor(positions, dtype=torch.int64),
            image_weight=torch.from_numpy(weights),
            keys=keys,
            problems=problems,
            num_images=0.0,
            num_masks=0.0,
            stage_seconds=clock.seconds,
            images=torch.from_numpy(images),
            color_factors=torch.from_numpy(factors),
            noise=torch.from_numpy(noise),
        )

    def _crop(self, jpeg: bytes, draws: np.ndarray, flip: bool) -> np.ndarray:
        """Random resized crop (3, S, S), decoded no larger than the crop needs."""
        height, width = image_size(jpeg)
        x, y, crop_width, crop_height = random_crop(height, width, self.settings.crop_scale, draws)
        size = self.image_size
        image = decode_jpeg(jpeg, needed_size(height, crop_height, size), needed_size(width, crop_width, size))
        scale_x, scale_y = image.shape[1] / width, image.shape[0] / height
        window = (x * scale_x, y * scale_y, (x + crop_width) * scale_x, (y + crop_height) * scale_y)
        crop = resize_window(image, window, size, size, self.settings.interpolation == "bicubic", flip)
        return crop.transpose(2, 0, 1)


def random_crop(height: int, width: int, scale: tuple[float, float], draws: np.ndarray) -> tuple[int, int, int, int]:
    """x, y, width, height of a random crop whose share of the area lies in `scale` and aspect in 3/4..4/3.

    draws: (tries, 4) uniforms for area, aspect, x and y. The first that fits wins; if none does, the centre crop of
    the nearest allowed aspect (as torchvision's RandomResizedCrop).
    """
    for area_draw, aspect_draw, x_draw, y_draw in draws:
        area = height * width * (scale[0] + area_draw * (scale[1] - scale[0]))
        low, high = (math.log(bound) for bound in ASPECT_RANGE)
        aspect = math.exp(low + aspect_draw * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(x_draw * (width - w + 1)), int(y_draw * (height - h + 1)), w, h
    w = min(width, max(1, round(height * ASPECT_RANGE[1])))
    h = min(height, max(1, round(width / ASPECT_RANGE[0])))
    return (width - w) // 2, (height - h) // 2, w, h
