"""What a mask is worth: IoU, boundary measures, calibration, AP and AR. Pure functions of masks and numbers.

Letters: Y X pixels of the original image, N masks. Sources: "BIoU" Cheng et al. 2021 (Boundary IoU), "DAVIS" Perazzi et
al. 2016 (its boundary measure F), "COCO" Lin et al. 2014, whose evaluation is pycocotools' COCOeval, "SAM" Kirillov et
al. 2023.
"""

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from data_tools import rle

BOUNDARY_IOU_SHARE = 0.02  # of the diagonal: width of the band (BIoU)
BOUNDARY_F_SHARE = 0.008  # of the diagonal: tolerance (DAVIS)
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, math.inf)}  # pixels of area (COCO)
MAX_DETECTIONS = (1, 100, 1000)  # an image; AP and AR are read at the last (SAM D.3)
NUM_CALIBRATION_BINS = 10


def size_of(area: int) -> str:
    """COCO's class of a mask's area in original pixels: small below 32 x 32, large from 96 x 96, else medium."""
    return next(name for name, (_, above) in SIZES.items() if area < above)


def bitmap_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool bitmaps (Y, X); 1 if both are empty."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def filled_box_iou(mask: rle.Runs) -> float:
    """IoU of a mask with its own filled box: what a box prompt is worth without a network."""
    _, _, width, height = rle.box(mask)
    return rle.area(mask) / (width * height) if width * height else 1.0


# ---------------------------------------------------------------------------------------------------- boundaries


def boundary_iou(a: np.ndarray, b: np.ndarray) -> float:
    """IoU of the inner bands of two bool bitmaps (Y, X): pixels of a mask at most d from its outside (BIoU, eq. 2).

    d is 2 % of the image's diagonal, rounded, at least 1, in steps of the 3 x 3 erosion (so the chessboard distance);
    the image's border counts as outside.
    """
    band = max(1, round(BOUNDARY_IOU_SHARE * math.hypot(*a.shape)))
    first, second = _cut_to_content(a, b)
    return bitmap_iou(inner_band(first, band), inner_band(second, band))


def inner_band(mask: np.ndarray, width: int) -> np.ndarray:
    """Pixels of a bool mask (Y, X) at a chessboard distance of at most `width` pixels from its outside."""
    padded = np.pad(mask, 1).astype(np.uint8)
    distance = cv2.distanceTransform(padded, cv2.DIST_C, cv2.DIST_MASK_3)[1:-1, 1:-1]  # exact for this distance
    return mask & (distance <= width)


def boundary_f(a: np.ndarray, b: np.ndarray) -> float:
    """F of the contours of prediction `a` and truth `b`, bool (Y, X) (DAVIS): 2 P R / (P + R).

    P is the share of a's contour pixels at most r from b's contour, R the same the other way round; r is 0.8 % of the
    image's diagonal, rounded up, as Euclidean distance. Two empty contours have F = 1, one empty one F = 0. A contour
    that runs along the image's border is none.
    """
    reach = math.ceil(BOUNDARY_F_SHARE * math.hypot(*a.shape))
    first, second = (contour(mask) for mask in _cut_to_content(a, b))
    if not first.any() or not second.any():
        return float(first.any() == second.any())
    precision = np.count_nonzero(first & _near(second, reach)) / np.count_nonzero(first)
    recall = np.count_nonzero(second & _near(first, reach)) / np.count_nonzero(second)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def contour(mask: np.ndarray) -> np.ndarray:
    """Pixels of a bool mask (Y, X) that differ from their neighbour to the right, below, or both (DAVIS)."""
    out = np.zeros_like(mask)
    out[:, :-1] |= mask[:, :-1] ^ mask[:, 1:]
    out[:-1] |= mask[:-1] ^ mask[1:]
    out[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return out


def _near(points: np.ndarray, reach: int) -> np.ndarray:
    """Pixels at a Euclidean distance of at most `reach` from a True one."""
    distance = cv2.distanceTransform((~points).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # Squared distances are whole numbers; the next above reach^2 is sqrt(reach^2 + 1), further off than this rounding.
    return distance <= reach + 1e-3


def _cut_to_content(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both bitmaps cut to where either has a pixel, and one pixel around: the same measures, sooner."""
    both = a | b
    ys, xs = np.flatnonzero(both.any(axis=1)), np.flatnonzero(both.any(axis=0))
    if len(ys) == 0:
        return a[:1, :1], b[:1, :1]
    window = np.s_[max(0, ys[0] - 1) : ys[-1] + 2, max(0, xs[0] - 1) : xs[-1] + 2]
    return a[window], b[window]


# --------------------------------------------------------------------------------------------------- calibration


def calibration(predicted: Sequence[float], true: Sequence[float]) -> dict[str, float]:
    """How well predicted IoUs (N) say the true ones: `bias` (predicted - true), `error` (mean absolute), `ece`.

    `ece` is the expected calibration error (Guo et al. 2017): predictions, clipped to [0, 1], in 10 equal bins, the
    mean over masks of |mean predicted - mean true| of their bin. A perfect ranking may still be badly calibrated. All
    are NaN if a prediction is not finite.
    """
    p, t = np.asarray(predicted, float), np.asarray(true, float)
    if not np.isfinite(p).all():  # it is in no bin
        return dict.fromkeys(("bias", "error", "ece"), math.nan)
    bins = calibration_bins(p, t)
    gap = sum(count * abs(mean_p - mean_t) for mean_p, mean_t, count in bins if count)
    return {"bias": float(np.mean(p - t)), "error": float(np.mean(np.abs(p - t))), "ece": gap / len(p)}


def calibration_bins(predicted: np.ndarray, true: np.ndarray) -> list[tuple[float, float, int]]:
    """Mean predicted (clipped to [0, 1]), mean true and number of masks of each of 10 bins of predicted IoU."""
    clipped = np.clip(predicted, 0, 1)
    index = np.minimum((clipped * NUM_CALIBRATION_BINS).astype(int), NUM_CALIBRATION_BINS - 1)
    out = []
    for number in range(NUM_CALIBRATION_BINS):
        inside = index == number
        count = int(inside.sum())
        out.append((float(clipped[inside].mean()), float(true[inside].mean()), count) if count else (0.0, 0.0, 0))
    return out


# ----------------------------------------------------------------------------------------------------- AP and AR


def match_image(truths: Sequence[rle.Runs], found: Sequence[rle.Runs], scores: Sequence[float]) -> list[Any]:
    """COCOeval's matching of one image's masks, class-agnostic: one entry for each range of area.

    Small enough to be gathered over ranks, where the masks are not. `average_precision` joins the entries.
    """
    height, width = (truths or found)[0].height, (truths or found)[0].width
    data = {
        "images": [{"id": 1, "height": height, "width": width}],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": [
            {
                "id": i,
                "image_id": 1,
                "category_id": 1,
                "iscrowd": 0,
                "area": rle.area(m),
                "segmentation": rle.to_coco(m),
            }
            for i, m in enumerate(truths, 1)
        ],
    }
    # Without boxes: given one, pycocotools would take the box's area for the mask's.
    detections = [
        {"image_id": 1, "category_id": 1, "score": score, "segmentation": rle.to_coco(mask)}
        for mask, score in zip(found, scores, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO()
        truth.dataset = data
        truth.createIndex()
        answer = truth.loadRes(detections) if detections else COCO()
        evaluator = COCOeval(truth, answer, "segm")
        evaluator.params = _params([1])
        evaluator.evaluate()
    return evaluator.evalImgs


def average_precision(images: Sequence[list[Any]]) -> dict[str, float]:
    """AP and AR over IoU 0.50 to 0.95 in steps of 0.05 (COCO), in all and by size, from each image's `match_image`.

    At most 1000 masks an image. Read from COCOeval's tables: its own summary has a fixed limit of 100 and says -1 for
    the headline where the limit is another. What has no truth in any image is left out.
    """
    evaluator = COCOeval(iouType="segm")
    evaluator.params = _params(list(range(1, len(images) + 1)))
    evaluator._paramsEval = evaluator.params
    num_areas = len(evaluator.params.areaRng)
    evaluator.evalImgs = [entries[area] for area in range(num_areas) for entries in images]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.accumulate()
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]  # (T, R, 1, A, D) and (T, 1, A, D)
    out = {}
    for area, label in enumerate(evaluator.params.areaRngLbl):
        suffix = "" if label == "all" else f"_{label}"
        for name, table in (("ap", precision[:, :, 0, area, -1]), ("ar", recall[:, 0, area, -1])):
            if (table > -1).any():
                out[name + suffix] = float(table[table > -1].mean())
    return out


def _params(image_ids: list[int]) -> Params:
    params = Params(iouType="segm")
    params.imgIds, params.catIds, params.maxDets = image_ids, [1], list(MAX_DETECTIONS)
    params.useCats = 1
    return params
