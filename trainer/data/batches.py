"""The two batches that cross from loader to GPU: named, typed, with shapes.

Letters: B images, M masks an image, P points a mask, R rounds, H W input pixels, h w target pixels, L patches,
D encoder blocks. Every random draw of a sample was made in the worker, keyed by (seed, position), and travels here.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from torch import Tensor


class StageClock:
    """Seconds spent in the stages of making a batch."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@dataclass(frozen=True)
class Batch(ABC):
    """What the loop knows of a batch.

    `image_weight` is 0 for fillers and for broken samples. `num_images` and `num_masks` count the *global* batch
    (over ranks and micro-batches): the loss divides by them, so the gradient does not know the layout.
    """

    positions: Tensor  # (B,) int64, place in the run; -1 = filler
    image_weight: Tensor  # (B,) float32
    keys: list[str]  # (B)
    problems: list[str]  # one line a broken sample
    num_images: float
    num_masks: float
    stage_seconds: dict[str, float] = field(default_factory=dict, kw_only=True)  # what making it took, by stage

    def to(self, device: torch.device) -> Self:
        """Move all tensors; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        return self._map(Tensor.pin_memory)

    def counted(self, num_images: float, num_masks: float) -> Self:
        """The same batch, told how many images and masks the global batch has."""
        return replace(self, num_images=max(num_images, 1.0), num_masks=max(num_masks, 1.0))

    @abstractmethod
    def local_counts(self) -> tuple[float, float]:
        """Images and masks of this micro-batch that train something."""

    def _map(self, function) -> Self:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in tensors.items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class SamBatch(Batch):
    images: Tensor  # (B, 3, H, W) uint8, zero where padded
    image_sizes: Tensor  # (B, 2) int64, height and width of the content in the input
    color_factors: Tensor  # (B, 3) float32: brightness, contrast, saturation
    masks: Tensor  # (B, M, h, w) uint8: 1 = object
    mask_valid: Tensor  # (B, M) bool
    point_coords: Tensor  # (B, M, P, 2) float32, x y in input pixels
    point_labels: Tensor  # (B, M, P) int64: 1 object, 0 background, -1 none
    boxes: Tensor  # (B, M, 4) float32, x1 y1 x2 y2 in input pixels
    has_box: Tensor  # (B, M) bool
    wants_mask: Tensor  # (B, M) bool: prompted by the network's own answer to its point; the first masks of an image
    num_mask_prompts: int  # most of them in an image, so that the pass that answers decodes no other mask
    click_uniforms: Tensor  # (B, M, R - 1) float32 in [0, 1), one for each later round
    gets_click: Tensor  # (B, R - 1) bool: later rounds that add a point; the others only refine
    drop_path_uniforms: Tensor  # (B, D, 2) float32 in [0, 1)
    image_embeddings: Tensor  # (B, C, H/16, W/16) float16, ready made instead of `images`; (B, 0, 0, 0): from them

    def local_counts(self) -> tuple[float, float]:
        has_mask = self.mask_valid.any(dim=1) * self.image_weight
        return float(has_mask.sum()), float((self.mask_valid.sum(dim=1) * self.image_weight).sum())


@dataclass(frozen=True)
class MaeBatch(Batch):
    images: Tensor  # (B, 3, H, W) uint8
    color_factors: Tensor  # (B, 3) float32
    noise: Tensor  # (B, L) float32: the patches of least noise stay visible

    def local_counts(self) -> tuple[float, float]:
        return float(self.image_weight.sum()), 0.0
