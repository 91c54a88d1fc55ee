"""Masks as runs against bitmaps: pycocotools decodes, numpy does the rest the slow way.

Letters: H W source pixels, N masks, h w cells of the target grid.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco_mask

from data_tools import rle

DATA = Path(__file__).parents[3] / "shared" / "data"
IDENTITY = rle.AxisTransform(1.0, 1.0, 0.0, 0.0)

bitmaps = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=14)) | st.builds(
    np.full, array_shapes(min_dims=2, max_dims=2, max_side=14), st.booleans()
)
EDGE_CASES = {
    "empty": np.zeros((5, 7), bool),
    "full": np.ones((5, 7), bool),
    "one pixel image": np.ones((1, 1), bool),
    "first pixel": np.eye(5, 7, dtype=bool) & (np.arange(7) == 0),
    "last pixel": np.arange(35).reshape(5, 7) == 34,
    "one row": np.array([[1, 0, 0, 1, 1, 0, 1]], bool),
    "one column": np.array([[1], [0], [0], [1], [1]], bool),
    "checkerboard": np.indices((6, 7)).sum(axis=0) % 2 == 0,
}
edge_case = pytest.mark.parametrize("bitmap", EDGE_CASES.values(), ids=EDGE_CASES.keys())


def coco_encode(bitmap: np.ndarray) -> dict:
    return coco_mask.encode(np.asfortranarray(bitmap, dtype=np.uint8))


def window_of(bitmap: np.ndarray, x: int, y: int, width: int, height: int) -> np.ndarray:
    """Crop with background outside, by looking at every pixel."""
    out = np.zeros((height, width), bool)
    for row in range(height):
        for column in range(width):
            if 0 <= y + row < bitmap.shape[0] and 0 <= x + column < bitmap.shape[1]:
                out[row, column] = bitmap[y + row, x + column]
    return out


def overlaps(length: int, cells: int, scale: float, offset: float, mirror: float | None) -> np.ndarray:
    """(cells, length) float64: length of target cell c that source pixel i lies over."""
    left, right = np.arange(length) * scale + offset, (np.arange(length) + 1) * scale + offset
    if mirror is not None:
        left, right = mirror - right, mirror - left
    cell = np.arange(cells)[:, None]
    return np.clip(np.minimum(right, cell + 1) - np.maximum(left, cell), 0, None)


def slow_coverage(bitmap: np.ndarray, height: int, width: int, transform: rle.AxisTransform) -> np.ndarray:
    """(h, w) float64: area of object in every target cell, from the bitmap."""
    rows = overlaps(bitmap.shape[0], height, transform.scale_y, transform.offset_y, None)
    mirror = transform.width if transform.flip else None
    columns = overlaps(bitmap.shape[1], width, transform.scale_x, transform.offset_x, mirror)
    return rows @ bitmap.astype(np.float64) @ columns.T


def check_against_pycocotools(segmentation: dict) -> rle.Runs:
    """Everything that pycocotools knows of a mask, and back to the same string."""
    runs = rle.parse(segmentation)
    assert np.array_equal(rle.to_bitmap(runs), coco_mask.decode(segmentation))
    assert rle.area(runs) == coco_mask.area(segmentation)
    assert rle.box(runs) == tuple(coco_mask.toBbox(segmentation))
    assert coco_mask.decode(rle.to_coco(runs)).tobytes() == coco_mask.decode(segmentation).tobytes()
    return runs


# Reading and writing


@given(bitmaps)
def test_agrees_with_pycocotools(bitmap):
    encoded = coco_encode(bitmap)
    runs = check_against_pycocotools(encoded)
    assert rle.to_coco(rle.from_bitmap(bitmap))["counts"] == encoded["counts"].decode()
    assert runs.counts.sum() == bitmap.size
    assert (runs.counts[1:] > 0).all()


@edge_case
def test_edge_cases_agree_with_pycocotools(bitmap):
    encoded = coco_encode(bitmap)
    check_against_pycocotools(encoded)
    check_against_pycocotools(encoded | {"counts": encoded["counts"].decode()})
    assert rle.to_coco(rle.from_bitmap(bitmap))["counts"] == encoded["counts"].decode()


def test_a_million_pixel_checkerboard():
    bitmap = np.indices((1001, 1001)).sum(axis=0) % 2 == 1  # odd height: no run crosses from column to column
    runs = check_against_pycocotools(coco_encode(bitmap))
    assert len(runs.counts) == 1001 * 1001
    assert np.array_equal(rle.to_bitmap(rle.flip_horizontal(runs)), bitmap[:, ::-1])
    assert np.array_equal(rle.to_bitmap(rle.crop(runs, -1, 3, 400, 500)), np.pad(bitmap, 1)[4:504, :400])
    # Cells of 4 x 4 pixels each cover 8 of them; the last row and column of the image have no cell.
    assert np.array_equal(
        rle.coverage([runs], 250, 250, rle.AxisTransform(0.25, 0.25, 0, 0))[0], np.full((250, 250), 0.5)
    )


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum))
def test_empty_runs_are_joined(counts):
    runs = rle.parse({"size": [1, sum(counts)], "counts": counts})
    assert rle.to_bitmap(runs)[0].tolist() == np.repeat(np.arange(len(counts)) % 2, counts).tolist()
    assert (runs.counts[1:] > 0).all()


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ({"size": [4, 4], "counts": [3, 4]}, "sum to 7"),
        ({"size": [4, 4], "counts": [20, -4]}, "negative"),
        ({"size": [4, 4], "counts": [8.0, 8.0]}, "integers"),
        ({"size": [4, 4], "counts": [[0, 0, 4, 0, 4, 4]]}, "RLE"),  # a polygon
        ({"size": [4, 4], "counts": [2**62] * 4 + [16]}, "has a run of"),  # 64 bits wrap to the right total
        ({"size": [4, 4], "counts": [2**70, 16]}, "RLE"),
        ({"size": [4, 4], "counts": None}, "NoneType"),
        ({"size": [4, 4], "counts": "P"}, "cut short"),
        ({"size": [4, 4], "counts": "0\x7f"}, "encoding"),
        ({"size": [4, 4], "counts": "0ü"}, "ASCII"),
        ({"size": [4, 4], "counts": ""}, "sum to 0"),
        ({"size": [4, 0], "counts": ""}, "size"),
        ({"size": [4], "counts": "0"}, "size"),
        ({"size": [4.0, 4], "counts": "`0"}, "size"),
        ({"counts": "`0"}, "size"),
        ({}, "size"),
    ],
)
def test_malformed_runs_are_refused(segmentation, message):
    with pytest.raises(ValueError, match=message):
        rle.parse(segmentation)


@given(st.binary(max_size=40), st.integers(1, 5), st.integers(1, 5))
def test_any_bytes_are_refused_or_fill_the_mask(data, height, width):
    try:
        runs = rle.parse({"size": [height, width], "counts": data})
    except ValueError:
        return
    assert runs.counts.min() >= 0
    assert sum(runs.counts.tolist()) == height * width


# Geometry


@given(bitmaps, st.integers(-16, 16), st.integers(-16, 16), st.integers(1, 20), st.integers(1, 20))
def test_crop(bitmap, x, y, width, height):
    cropped = rle.crop(rle.from_bitmap(bitmap), x, y, width, height)
    expected = window_of(bitmap, x, y, width, height)
    assert np.array_equal(rle.to_bitmap(cropped), expected)
    assert np.array_equal(cropped.counts, rle.from_bitmap(expected).counts)  # canonical


@given(bitmaps)
def test_flip(bitmap):
    flipped = rle.flip_horizontal(rle.from_bitmap(bitmap))
    assert np.array_equal(flipped.counts, rle.from_bitmap(bitmap[:, ::-1]).counts)


@given(bitmaps, st.integers(1, 30), st.integers(1, 30))
def test_resample_takes_the_pixel_under_the_centre(bitmap, height, width):
    rows = (2 * np.arange(height) + 1) * bitmap.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * bitmap.shape[1] // (2 * width)
    resampled = rle.resample_nearest(rle.from_bitmap(bitmap), height, width)
    assert np.array_equal(resampled.counts, rle.from_bitmap(bitmap[np.ix_(rows, columns)]).counts)


@edge_case
def test_geometry_of_edge_cases(bitmap):
    runs = rle.from_bitmap(bitmap)
    height, width = bitmap.shape
    assert np.array_equal(rle.to_bitmap(rle.flip_horizontal(runs)), bitmap[:, ::-1])
    assert np.array_equal(rle.to_bitmap(rle.crop(runs, 0, 0, width, height)), bitmap)
    assert rle.area(rle.crop(runs, width, 0, 3, 3)) == 0
    assert np.array_equal(rle.to_bitmap(rle.resample_nearest(runs, height, width)), bitmap)
    assert np.array_equal(rle.coverage([runs], height, width, IDENTITY)[0], bitmap)


@given(bitmaps)
def test_contains(bitmap):
    runs = rle.from_bitmap(bitmap)
    height, width = bitmap.shape
    for y in range(-1, height + 1):
        for x in range(-1, width + 1):
            inside = 0 <= x < width and 0 <= y < height
            assert rle.contains(runs, x, y) == (inside and bitmap[y, x])


# Coverage

scales = st.floats(0.03, 4.0)
offsets = st.floats(-20.0, 20.0)


@settings(max_examples=300)
@given(st.lists(bitmaps, min_size=1, max_size=4), st.integers(1, 12), st.integers(1, 12), st.data())
def test_coverage_is_the_exact_area(masks, height, width, data):
    flip = data.draw(st.booleans())
    mirror = data.draw(st.floats(0.0, 20.0))
    transform = rle.AxisTransform(
        data.draw(scales), data.draw(scales), data.draw(offsets), data.draw(offsets), flip, mirror
    )
    result = rle.coverage([rle.from_bitmap(mask) for mask in masks], height, width, transform)
    assert result.dtype == np.float32
    expected = np.stack([slow_coverage(mask, height, width, transform) for mask in masks])
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


@given(arrays(np.bool_, (16, 24)), st.booleans())
def test_shares_of_powers_of_two_have_no_rounding(bitmap, flip):
    """Half covered is exactly half: targets are `coverage >= 0.5`."""
    transform = rle.AxisTransform(0.25, 0.25, 0.0, 0.0, flip, 6.0)
    blocks = bitmap.reshape(4, 4, 6, 4).mean(axis=(1, 3))
    assert np.array_equal(
        rle.coverage([rle.from_bitmap(bitmap)], 4, 6, transform)[0], blocks[:, ::-1] if flip else blocks
    )


@given(st.lists(bitmaps, min_size=1, max_size=4), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_covered_is_coverage_of_half(masks, height, width, flip):
    """Against numpy on whole numbers: with 4 x 4 pixels a cell nothing rounds, and a half is a half."""
    fine = [np.resize(mask.ravel(), (4 * height, 4 * width)) for mask in masks]
    transform = rle.AxisTransform(0.25, 0.25, 0.0, 0.0, flip, float(width))
    found, areas = rle.covered([rle.from_bitmap(mask) for mask in fine], height, width, transform)
    wanted = np.stack([mask.reshape(height, 4, width, 4).sum((1, 3)) >= 8 for mask in fine])
    assert np.array_equal(found, wanted[:, :, ::-1] if flip else wanted)
    assert areas.tolist() == wanted.sum((1, 2)).tolist()


def test_coverage_of_no_masks_and_of_masks_of_different_sizes():
    assert rle.coverage([], 3, 5, IDENTITY).shape == (0, 3, 5)
    masks = [np.ones((2, 9), bool), np.zeros((4, 4), bool), np.ones((7, 1), bool)]
    result = rle.coverage([rle.from_bitmap(mask) for mask in masks], 3, 5, IDENTITY)
    for mask, cells in zip(masks, result, strict=True):
        assert np.array_equal(cells, window_of(mask, 0, 0, 5, 3))


def test_the_comparison_can_fail():
    """A single pixel moved, or a shift of a thousandth of a cell, is seen by the checks above."""
    bitmap = np.zeros((40, 60), bool)
    bitmap[10:30, 7:50] = True
    transform = rle.AxisTransform(0.11, 0.13, 0.4, 0.2)
    expected = slow_coverage(bitmap, 6, 8, transform)
    moved = bitmap.copy()
    moved[10, 7] = False
    shifted = rle.AxisTransform(0.11, 0.13, 0.401, 0.2)
    assert np.allclose(rle.coverage([rle.from_bitmap(bitmap)], 6, 8, transform)[0], expected, rtol=0, atol=1e-6)
    assert not np.allclose(rle.coverage([rle.from_bitmap(moved)], 6, 8, transform)[0], expected, rtol=0, atol=1e-6)
    assert not np.allclose(rle.coverage([rle.from_bitmap(bitmap)], 6, 8, shifted)[0], expected, rtol=0, atol=1e-6)


@given(st.floats(0.1, 3), st.floats(-5, 5), st.booleans(), st.integers(0, 8), st.integers(0, 8))
def test_apply_and_coverage_mean_the_same(scale, offset, flip, x, y):
    """The target cell under a pixel's centre is one that coverage gives the pixel to."""
    transform = rle.AxisTransform(scale, scale, offset, offset, flip, 20.0)
    bitmap = np.zeros((9, 9), bool)
    bitmap[y, x] = True
    target_x, target_y = transform.apply(x + 0.5, y + 0.5)
    if 0 <= target_x < 40 and 0 <= target_y < 40:
        assert rle.coverage([rle.from_bitmap(bitmap)], 40, 40, transform)[0, int(target_y), int(target_x)] > 0


# Points


@given(bitmaps, st.data())
@example(np.ones((1, 1), bool), None)
def test_every_pixel_has_its_share_of_the_uniforms(bitmap, data):
    """Ranks of evenly spread uniforms list every candidate exactly once."""
    height, width = bitmap.shape
    runs = rle.from_bitmap(bitmap)
    x0, y0, x1, y1 = 0, 0, width, height
    if data is not None:
        x0, x1 = sorted(data.draw(st.tuples(st.integers(0, width), st.integers(0, width))))
        y0, y1 = sorted(data.draw(st.tuples(st.integers(0, height), st.integers(0, height))))
    for sample, wanted in ((rle.sample_foreground, bitmap), (rle.sample_background, ~bitmap)):
        ys, xs = np.nonzero(wanted[y0:y1, x0:x1])
        candidates = set(zip((xs + x0).tolist(), (ys + y0).tolist(), strict=True))
        uniforms = (np.arange(len(candidates)) + 0.5) / max(1, len(candidates))
        drawn = [sample(runs, u, (x0, y0, x1, y1)) for u in uniforms]
        assert len(drawn) == len(candidates)
        assert set(drawn) == candidates
        if not candidates:
            assert sample(runs, 0.3, (x0, y0, x1, y1)) is None
        else:
            assert sample(runs, np.nextafter(1.0, 0.0), (x0, y0, x1, y1)) in candidates


def test_without_a_window_points_come_from_the_whole_mask():
    bitmap = EDGE_CASES["checkerboard"]
    runs = rle.from_bitmap(bitmap)
    for u in (0.0, 0.31, 0.99):
        x, y = rle.sample_foreground(runs, u)
        assert bitmap[y, x]
        x, y = rle.sample_background(runs, u)
        assert not bitmap[y, x]
    assert rle.sample_foreground(rle.from_bitmap(EDGE_CASES["empty"]), 0.5) is None
    assert rle.sample_background(rle.from_bitmap(EDGE_CASES["full"]), 0.5) is None


# Overlap


@given(array_shapes(min_dims=2, max_dims=2, max_side=12).flatmap(lambda s: st.tuples(*[arrays(np.bool_, s)] * 2)))
def test_intersection_and_iou(pair):
    a, b = (rle.from_bitmap(bitmap) for bitmap in pair)
    both, either = (pair[0] & pair[1]).sum(), (pair[0] | pair[1]).sum()
    assert rle.intersection_area(a, b) == both
    assert rle.iou(a, b) == (both / either if either else 1.0)
    assert rle.iou(a, a) == 1.0


def test_masks_of_different_sizes_do_not_compare():
    with pytest.raises(ValueError, match="7x5 and 5x7"):
        rle.intersection_area(rle.from_bitmap(np.ones((5, 7), bool)), rle.from_bitmap(np.ones((7, 5), bool)))


# Real masks


@pytest.mark.real_data
def test_cocoapi_vectors():
    path = DATA / "extra" / "instances_val2014_fakesegm100_results.json"
    if not path.exists():
        pytest.skip(f"no cocoapi vectors at {path}")
    vectors = json.loads(path.read_bytes())
    assert len(vectors) == 734
    for vector in vectors:
        runs = check_against_pycocotools(vector["segmentation"])
        bitmap = rle.to_bitmap(runs)
        assert np.array_equal(rle.flip_horizontal(runs).counts, rle.from_bitmap(bitmap[:, ::-1]).counts)


@pytest.mark.real_data
def test_genuine_sa1b_masks():
    paths = sorted((DATA / "sa1b_genuine").glob("sa_*.json"))
    if not paths:
        pytest.skip(f"no genuine SA-1B pairs at {DATA / 'sa1b_genuine'}")
    for path in paths:
        annotations = json.loads(path.read_bytes())["annotations"]
        for annotation in annotations:
            runs = rle.parse(annotation["segmentation"])
            assert rle.to_coco(runs) == annotation["segmentation"]  # byte for byte what Meta wrote
            assert rle.area(runs) == annotation["area"]
            x, y, width, height = rle.box(runs)
            assert [x, y, width - 1, height - 1] == annotation["bbox"]
        for annotation in annotations[:3]:
            runs = check_against_pycocotools(annotation["segmentation"])
            bitmap = rle.to_bitmap(runs).astype(bool)
            scale = 256 / max(bitmap.shape)
            transform = rle.AxisTransform(scale * 1.1, scale * 1.1, -20.3, -11.7, flip=True, width=256.0)
            expected = slow_coverage(bitmap, 256, 256, transform)
            np.testing.assert_allclose(rle.coverage([runs], 256, 256, transform)[0], expected, rtol=0, atol=1e-6)


# Compilation


@pytest.mark.slow
def test_a_second_process_compiles_nothing():
    """Kernels come from the cache on disk: workers start in the time that numba takes to import."""
    code = (
        "from data_tools import rle\n"
        "kernels = [k for k in vars(rle).values() if hasattr(k, 'stats') and hasattr(k, 'signatures')]\n"
        "assert kernels and all(k.signatures for k in kernels)\n"
        "print(sum(sum(k.stats.cache_misses.values()) for k in kernels))"
    )
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "0"
