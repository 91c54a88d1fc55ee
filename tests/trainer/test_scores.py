"""Every measure against a reference that shares no code with it: scipy, plain loops, COCOeval over the whole set."""

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage

from data_tools import rle
from trainer.scores import (
    average_precision,
    bitmap_iou,
    boundary_f,
    boundary_iou,
    calibration,
    contour,
    filled_box_iou,
    match_image,
    size_of,
)

GENUINE = Path(__file__).parents[3] / "shared" / "data" / "sa1b_genuine"


def blobs(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A mask with several pieces, holes and parts at the border."""
    noise = ndimage.gaussian_filter(rng.random((height, width)), 3.0)
    return noise > np.quantile(noise, rng.uniform(0.3, 0.9))


def a_pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 150, 2)
    first = blobs(rng, height, width)
    second = first.copy() if seed % 3 else blobs(rng, height, width)
    if seed % 3 == 1:
        second = np.roll(first, rng.integers(-4, 5, 2), (0, 1))
    return first, second


def boundary_iou_reference(a: np.ndarray, b: np.ndarray) -> float:
    d = max(1, round(0.02 * math.sqrt(a.shape[0] ** 2 + a.shape[1] ** 2)))
    square = np.ones((3, 3), bool)
    bands = [m & ~ndimage.binary_erosion(m, square, iterations=d, border_value=0) for m in (a, b)]
    union = (bands[0] | bands[1]).sum()
    return (bands[0] & bands[1]).sum() / union if union else 1.0


def boundary_f_reference(a: np.ndarray, b: np.ndarray, reach: int | None = None) -> float:
    """Dilation by an explicit disc, contours by an explicit loop."""
    reach = reach or math.ceil(0.008 * math.sqrt(a.shape[0] ** 2 + a.shape[1] ** 2))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = x**2 + y**2 <= reach**2

    def edges(mask):
        out = np.zeros_like(mask)
        for i in range(mask.shape[0]):
            for j in range(mask.shape[1]):
                near = [(i + di, j + dj) for di, dj in ((0, 1), (1, 0), (1, 1))]
                inside = [p for p in near if p[0] < mask.shape[0] and p[1] < mask.shape[1]]
                out[i, j] = any(mask[p] != mask[i, j] for p in inside)
        return out

    first, second = edges(a), edges(b)
    if not first.any() and not second.any():
        return 1.0
    if not first.any() or not second.any():
        return 0.0
    precision = (first & ndimage.binary_dilation(second, disc)).sum() / first.sum()
    recall = (second & ndimage.binary_dilation(first, disc)).sum() / second.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_iou_and_filled_box_equal_numpy():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.random((9, 7)) > 0.5, rng.random((9, 7)) > 0.5
        assert bitmap_iou(a, b) == (a & b).sum() / (a | b).sum()
        ys, xs = np.nonzero(a)
        box = np.zeros_like(a)
        box[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] = True
        assert filled_box_iou(rle.from_bitmap(a)) == pytest.approx((a & box).sum() / (a | box).sum(), abs=1e-12)
    assert bitmap_iou(a & ~a, b & ~b) == 1.0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_boundary_measures_equal_morphology_by_scipy(seed):
    a, b = a_pair(seed)
    # Counts of pixels decide; only the last division may round.
    assert boundary_iou(a, b) == pytest.approx(boundary_iou_reference(a, b), abs=1e-12)
    assert boundary_f(a, b) == pytest.approx(boundary_f_reference(a, b), abs=1e-12)


@pytest.mark.real_data
@pytest.mark.skipif(not GENUINE.is_dir(), reason="no genuine SA-1B files beside the project")
def test_boundary_measures_and_iou_equal_scipy_on_genuine_masks():
    """Masks of the full 1500 pixels and more, against themselves moved by some pixels."""
    record = json.loads(next(iter(sorted(GENUINE.glob("sa_*.json")))).read_text())
    areas = [annotation["area"] for annotation in record["annotations"]]
    for number in (int(np.argmin(areas)), int(np.argsort(areas)[len(areas) // 2])):
        encoded = record["annotations"][number]["segmentation"]
        truth = coco_mask.decode(encoded).astype(bool)
        moved = np.roll(truth, (5, -9), (0, 1))
        assert bitmap_iou(moved, truth) == (moved & truth).sum() / (moved | truth).sum()
        assert bitmap_iou(moved, truth) == rle.iou(rle.from_bitmap(moved), rle.parse(encoded))
        assert boundary_iou(moved, truth) == pytest.approx(boundary_iou_reference(moved, truth), abs=1e-12)
        ys, xs = np.nonzero(truth | moved)
        margin = 40  # more than the tolerance: the loops of the reference are slow on the whole image
        window = np.s_[max(0, ys.min() - margin) : ys.max() + margin, max(0, xs.min() - margin) : xs.max() + margin]
        reach = math.ceil(0.008 * math.hypot(*truth.shape))
        expected = boundary_f_reference(moved[window], truth[window], reach)
        assert boundary_f(moved, truth) == pytest.approx(expected, abs=1e-12)


def test_boundary_measures_see_what_iou_does_not():
    """A disc with a rough edge against the smooth one: IoU stays high, the band does not."""
    y, x = np.mgrid[:200, :200]
    angle, radius = np.arctan2(y - 100, x - 100), np.hypot(y - 100, x - 100)
    smooth, rough = radius < 80, radius < 80 + 7 * np.sin(30 * angle)
    assert bitmap_iou(smooth, rough) > 0.85
    assert boundary_iou(smooth, rough) < 0.6
    assert boundary_f(smooth, rough) < 0.6
    assert boundary_iou(smooth, smooth) == boundary_f(smooth, smooth) == 1.0


def test_the_images_border_is_a_boundary_for_one_measure_and_none_for_the_other():
    full, empty = np.ones((60, 60), bool), np.zeros((60, 60), bool)
    assert not contour(full).any()
    assert boundary_f(full, empty) == 1.0, "two empty contours agree"
    assert boundary_iou(full, empty) == 0.0
    assert boundary_f(np.pad(np.ones((20, 20), bool), 20), empty) == 0.0


def test_size_classes_are_cocos():
    assert [size_of(area) for area in (1, 1023, 1024, 9215, 9216, 10**7)] == [
        *["small"] * 2,
        *["medium"] * 2,
        *["large"] * 2,
    ]


def test_calibration_by_hand():
    found = calibration([0.95, 0.91, 0.35, 1.2], [0.85, 0.95, 0.45, 1.0])
    assert found["bias"] == pytest.approx((0.1 - 0.04 - 0.1 + 0.2) / 4)
    assert found["error"] == pytest.approx((0.1 + 0.04 + 0.1 + 0.2) / 4)
    # Bins: 0.9 to 1 holds three masks (1.2 counts as 1), 0.3 to 0.4 one.
    top = abs((0.95 + 0.91 + 1.0) / 3 - (0.85 + 0.95 + 1.0) / 3)
    assert found["ece"] == pytest.approx((3 * top + 1 * 0.1) / 4)
    assert calibration([0.5, 0.7], [0.5, 0.7])["ece"] == pytest.approx(0.0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_calibration_of_what_is_not_finite_is_not_a_number(bad):
    found = calibration([0.5, bad], [0.5, 0.7])
    assert found.keys() == {"bias", "error", "ece"}
    assert all(map(math.isnan, found.values()))


# ----------------------------------------------------------------------------------------------------- AP and AR


def scenes_with_answers(seed: int, num_images: int = 6):
    """Truths, answers (moved truths, noise, too many, none) and scores of some images of different sizes."""
    rng = np.random.default_rng(seed)
    scenes = []
    for number in range(num_images):
        height, width = (int(v) for v in rng.integers(90, 200, 2))
        truths = []
        for _ in range(int(rng.integers(1, 9))):
            side = int(rng.choice([12, 30, 60, 85]))
            y, x = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
            mask = np.zeros((height, width), bool)
            mask[y : y + side, x : x + side] = blobs(rng, side, side) | (rng.random() < 0.5)
            truths.append(mask)
        answers = [np.roll(t, rng.integers(-6, 7, 2), (0, 1)) for t in truths if rng.random() < 0.9]
        answers += [blobs(rng, height, width) for _ in range(int(rng.integers(0, 3)))]
        if number == 2:
            answers = []
        # Rounded, so that there are ties, also between images.
        scenes.append((truths, answers, [round(float(s), 1) for s in rng.uniform(0.3, 1.05, len(answers))]))
    return scenes


def coco_annotation(mask: np.ndarray) -> dict:
    """pycocotools' own encoding, not ours."""
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def coco_reference(scenes, max_detections: list[int] | None = None) -> COCOeval:
    images, annotations, detections = [], [], []
    for number, (truths, answers, scores) in enumerate(scenes, 1):
        images.append({"id": number, "height": truths[0].shape[0], "width": truths[0].shape[1]})
        for mask in truths:
            encoded = {"segmentation": coco_annotation(mask), "area": int(mask.sum()), "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": 1, **encoded})
        for mask, score in zip(answers, scores, strict=True):
            detections.append(
                {"image_id": number, "category_id": 1, "score": score, "segmentation": coco_annotation(mask)}
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(detections), "segm")
        if max_detections:
            evaluator.params.maxDets = max_detections
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def ours(scenes) -> dict[str, float]:
    return average_precision(
        [
            match_image([rle.from_bitmap(m) for m in truths], [rle.from_bitmap(m) for m in answers], scores)
            for truths, answers, scores in scenes
        ]
    )


def precision_by_hand(scenes, threshold: float) -> float:
    """AP of one IoU threshold in plain loops: greedy matching, precision made falling, read at 101 recalls."""
    ranked, num_truths = [], 0
    for truths, answers, scores in scenes:
        num_truths += len(truths)
        free = set(range(len(truths)))
        for i in sorted(range(len(answers)), key=lambda i: -scores[i]):
            ious = {t: (answers[i] & truths[t]).sum() / (answers[i] | truths[t]).sum() for t in free}
            best = max(ious, key=ious.get) if ious else None
            hit = best is not None and ious[best] >= threshold
            if hit:
                free.discard(best)
            ranked.append((scores[i], hit))
    ranked.sort(key=lambda item: -item[0])
    hits = np.cumsum([hit for _, hit in ranked])
    recall, precision = hits / num_truths, hits / np.arange(1, len(ranked) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = [int(np.searchsorted(recall, r, side="left")) for r in np.linspace(0, 1, 101)]
    return float(np.mean([precision[i] if i < len(precision) else 0.0 for i in at]))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ap_and_ar_equal_cocoeval_over_the_whole_set(seed):
    scenes = scenes_with_answers(seed)
    found, wanted = ours(scenes), coco_reference(scenes).stats  # 100 masks an image are never reached here
    names = {"ap": 0, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar": 8, "ar_small": 9, "ar_medium": 10}
    for name, index in names.items():
        if name in found:
            assert found[name] == pytest.approx(wanted[index], abs=1e-9), name
        else:
            assert wanted[index] == -1
    assert 0.05 < found["ap"] < 0.95


def test_ap_equals_plain_loops():
    """Without sizes: an independent reading of what COCOeval does."""
    scenes = scenes_with_answers(3)
    by_hand = np.mean([precision_by_hand(scenes, threshold) for threshold in np.linspace(0.5, 0.95, 10)])
    assert ours(scenes)["ap"] == pytest.approx(by_hand, abs=1e-9)


def test_the_headline_survives_another_limit_of_detections():
    """COCOeval's own summary says -1 once the limit is not 100; ours reads the table."""
    scenes = scenes_with_answers(0)
    assert coco_reference(scenes, [1, 10, 1000]).stats[0] == -1
    assert ours(scenes)["ap"] > 0


def test_more_than_a_hundred_masks_of_an_image_count():
    rng = np.random.default_rng(0)
    truths = []
    for number in range(150):
        mask = np.zeros((200, 200), bool)
        mask[10 * (number // 15) : 10 * (number // 15) + 8, 12 * (number % 15) : 12 * (number % 15) + 10] = True
        truths.append(mask)
    scene = [(truths, truths, rng.random(150).tolist())]
    assert ours(scene)["ap"] == pytest.approx(1.0)
    assert ours(scene)["ar"] == 1.0
    assert coco_reference(scene).stats[8] < 0.7, "which the usual limit of 100 hides"
