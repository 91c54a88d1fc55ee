"""Masks of everything in an image: a grid of points, two filters, non-maximum suppression (SAM, appendix B).

Each point gives three hypotheses. Kept are those of high predicted IoU and high stability (the IoU of the mask cut at
logit +offset with the one cut at -offset); of those whose boxes nearly coincide, the one of highest predicted IoU.
Defaults are those of the released generator for one whole image, without crops: its thresholds for SA-1B itself were
the same, over crops at three scales.

Letters: P points, N masks, K hypotheses (3), h w logits, Y X pixels of the image.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import nms

from data_tools import rle
from model.prompt_encoder import Prompts
from model.sam import Sam
from trainer.interactive import trained_tokens, upsample_logits
from trainer.prompts import FOREGROUND


@dataclass(frozen=True)
class Settings:
    """How masks are found and filtered; the defaults are the released generator's."""

    points_per_side: int = 32
    points_at_once: int = 64  # limits memory, changes nothing
    min_predicted_iou: float = 0.88
    min_stability: float = 0.95
    stability_offset: float = 1.0  # of the logit
    max_box_iou: float = 0.7  # of two masks that are both kept
    min_region_area: int = 0  # pixels: smaller holes are filled, smaller islands dropped; 0 = neither


@dataclass(frozen=True)
class Found:
    """One mask, with what SA-1B's annotations say of it. The box has inclusive corners, x0 y0 x1 y1."""

    mask: rle.Runs
    box: tuple[int, int, int, int]
    predicted_iou: float
    stability: float
    point: tuple[float, float]  # pixels of the image


@dataclass(frozen=True)
class Embedded:
    """An image as the decoder needs it."""

    embedding: Tensor  # (1, C, h, w)
    input_size: int  # pixels a side, padded
    content: tuple[int, int]  # height and width in the input
    original: tuple[int, int]  # Y X

    def to_input(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) x y in pixels of the image to pixels of the input."""
        return points * np.array([self.content[1] / self.original[1], self.content[0] / self.original[0]])


@torch.no_grad()
def embed(sam: Sam, image: np.ndarray) -> Embedded:
    """Encode one image (Y, X, 3) uint8: long side to the input's size, as the released predictor does it."""
    size, device = sam.prompt_encoder.input_image_size[0], sam.pixel_mean.device
    height, width = image.shape[:2]
    scale = size / max(height, width)
    content = int(height * scale + 0.5), int(width * scale + 0.5)
    resized = np.asarray(Image.fromarray(image).resize((content[1], content[0]), Image.Resampling.BILINEAR))
    padded = np.zeros((size, size, 3), np.uint8)
    padded[: content[0], : content[1]] = resized
    pixels = torch.from_numpy(padded).permute(2, 0, 1)[None].to(device)
    embedding = sam.encode_images(sam.normalize_images(pixels, torch.tensor([content], device=device)))
    return Embedded(embedding, size, content, (height, width))


@torch.no_grad()
def automatic_masks(sam: Sam, image: np.ndarray, settings: Settings, single: bool = False) -> list[Found]:
    """All masks of an image (Y, X, 3) uint8, best predicted IoU first.

    single: the single-mask token answers, where no other was trained; else the three hypotheses.
    """
    embedded = embed(sam, image)
    points = point_grid(settings.points_per_side) * np.array(embedded.original[::-1])
    found: list[Found] = []
    for first in range(0, len(points), settings.points_at_once):
        found += masks_of_points(sam, embedded, points[first : first + settings.points_at_once], settings, single)
    found = without_duplicates(found, [one.predicted_iou for one in found], settings.max_box_iou)
    return without_small_regions(found, settings) if settings.min_region_area else found


def point_grid(points_per_side: int) -> np.ndarray:
    """(P, 2) x y in the unit square, row by row, at the centres of a square grid."""
    centres = np.linspace(0.5 / points_per_side, 1 - 0.5 / points_per_side, points_per_side)
    return np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)


def masks_of_points(sam: Sam, embedded: Embedded, points: np.ndarray, settings: Settings, single: bool) -> list[Found]:
    """The answers to points (P, 2) x y in pixels of the image that pass both filters."""
    output = sam.decode_masks(embedded.embedding, point_prompts(embedded, points))
    tokens = trained_tokens(single)
    logits = output.low_res_logits[0, :, tokens].flatten(0, 1)  # (P K, h, w)
    predicted = output.iou_predictions[0, :, tokens].flatten().float().tolist()
    found = []
    for n, predicted_iou in enumerate(predicted):
        if settings.min_predicted_iou > 0 and predicted_iou <= settings.min_predicted_iou:
            continue
        one = upsample_logits(logits[n : n + 1], embedded.input_size, embedded.content, embedded.original)[0]
        stable = stability(one, settings.stability_offset)
        if settings.min_stability > 0 and not stable >= settings.min_stability:
            continue
        x, y = points[n * len(points) // len(predicted)].tolist()
        mask = rle.from_bitmap((one > 0).cpu().numpy())
        found.append(Found(mask, inclusive_box(mask), predicted_iou, stable, (x, y)))
    return found


def point_prompts(embedded: Embedded, points: np.ndarray) -> Prompts:
    """One foreground click a mask."""
    device, num_masks = embedded.embedding.device, len(points)
    none = torch.zeros(1, num_masks, dtype=torch.bool, device=device)
    size = 4 * embedded.embedding.shape[-1]
    return Prompts(
        torch.from_numpy(embedded.to_input(points)).float().to(device)[None, :, None],
        torch.full((1, num_masks, 1), FOREGROUND, device=device),
        torch.zeros(1, num_masks, 4, device=device),
        none,
        torch.zeros(1, num_masks, size, size, device=device),
        none,
    )


def stability(logits: Tensor, offset: float) -> float:
    """IoU of a mask (Y, X) cut at logit +offset with the one cut at -offset, of which it is a part (SAM, App. B)."""
    inner, outer = int((logits > offset).sum()), int((logits > -offset).sum())
    return float(np.float32(inner) / np.float32(outer)) if outer else float("nan")  # fp32, as released


def inclusive_box(mask: rle.Runs) -> tuple[int, int, int, int]:
    """x0 y0 x1 y1 of the outermost pixels; all 0 for an empty mask (as SA-1B's boxes: one pixel less than the mask)."""
    x, y, width, height = rle.box(mask)
    return (x, y, x + width - 1, y + height - 1) if width else (0, 0, 0, 0)


def without_duplicates(found: list[Found], scores: list[float], max_box_iou: float) -> list[Found]:
    """Non-maximum suppression of boxes, highest score first."""
    if not found:
        return []
    boxes = torch.tensor([one.box for one in found], dtype=torch.float32)
    keep = nms(boxes, torch.tensor(scores, dtype=torch.float32), max_box_iou)
    return [found[i] for i in keep.tolist()]


def without_small_regions(found: list[Found], settings: Settings) -> list[Found]:
    """Holes filled, islands dropped, then suppressed once more in favour of masks that were left alone."""
    cleaned, untouched = [], []
    for one in found:
        bitmap = rle.to_bitmap(one.mask).astype(bool)
        filled, holes = _without_small(bitmap, settings.min_region_area, holes=True)
        kept, islands = _without_small(filled, settings.min_region_area, holes=False)
        if holes or islands:
            mask = rle.from_bitmap(kept)
            one = Found(mask, inclusive_box(mask), one.predicted_iou, one.stability, one.point)
        cleaned.append(one)
        untouched.append(float(not (holes or islands)))
    return without_duplicates(cleaned, untouched, settings.max_box_iou)


def _without_small(mask: np.ndarray, min_area: int, holes: bool) -> tuple[np.ndarray, bool]:
    """Drop 8-connected regions of fewer than `min_area` pixels, of the background or of the mask; never all of it."""
    _, regions, stats, _ = cv2.connectedComponentsWithStats((mask ^ holes).astype(np.uint8), connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]  # 0 is what lies outside the regions
    small = [number for number, area in enumerate(areas, 1) if area < min_area]
    if not small:
        return mask, False
    if holes:
        return mask | np.isin(regions, small), True
    large = [number for number in range(1, len(areas) + 1) if number not in small] or [1 + int(areas.argmax())]
    return np.isin(regions, large), True


def annotation(one: Found, number: int, original: tuple[int, int]) -> dict[str, Any]:
    """As in SA-1B's JSON files."""
    x0, y0, x1, y1 = one.box
    return {
        "id": number,
        "segmentation": rle.to_coco(one.mask),
        "area": rle.area(one.mask),
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "predicted_iou": one.predicted_iou,
        "stability_score": one.stability,
        "point_coords": [list(one.point)],
        "crop_box": [0, 0, original[1], original[0]],
    }
