"""Masks as runs: everything training asks of a mask, without ever making a bitmap of the full image.

COCO's run-length encoding reads a mask column by column; runs alternate background, object, background, ..., the first
of them possibly empty. A mask of SA-1B has some hundred to some thousand runs, its bitmap 3.4 million pixels.

Letters: H W source pixels, N masks, h w cells of a target grid. A pixel (x, y) is the square [x, x+1) x [y, y+1).
The compiled kernels have explicit signatures and are cached on disk: no worker process compiles them anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np


@dataclass(frozen=True)
class Runs:
    """One mask. `counts` are canonical: only the first may be 0; they sum to height * width."""

    height: int
    width: int
    counts: np.ndarray  # (R,) int64


@dataclass(frozen=True)
class AxisTransform:
    """Axis-aligned affine map of source to target coordinates, then mirrored in `width` (target units) if `flip`."""

    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float
    flip: bool = False
    width: float = 0.0

    def apply(self, x: float, y: float) -> tuple[float, float]:
        x, y = x * self.scale_x + self.offset_x, y * self.scale_y + self.offset_y
        return (self.width - x if self.flip else x), y


def parse(segmentation: dict[str, Any]) -> Runs:
    """COCO RLE, compressed (str or bytes) or a list of counts. Raises `ValueError` unless it fills its size exactly."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
        raise ValueError(f"RLE size should be [height, width], is {size!r}")
    height, width = size
    if isinstance(counts, str):
        try:
            counts = counts.encode("ascii")
        except UnicodeEncodeError:
            raise ValueError("RLE counts hold characters outside ASCII") from None
    if isinstance(counts, bytes):
        decoded = np.empty(len(counts) + 1, np.int64)
        length = _decode_counts(counts, decoded)
        if length < 0:
            raise ValueError("RLE counts are cut short or hold characters outside the encoding")
        runs = decoded[:length]
        if _is_canonical(runs, height * width):
            return Runs(height, width, runs)
    elif isinstance(counts, list | tuple | np.ndarray):
        runs = np.asarray(counts)
        if runs.size and not np.issubdtype(runs.dtype, np.integer):
            raise ValueError("RLE counts should be integers")
        runs = runs.astype(np.int64)
    else:
        raise ValueError(f"RLE counts should be a string or a list, is {type(counts).__name__}")
    if runs.size and runs.min() < 0:
        raise ValueError("RLE has a negative run")
    if runs.size and runs.max() > height * width:  # before summing: the sum of such runs may wrap at 64 bits
        raise ValueError(f"RLE has a run of {int(runs.max())}, its size {height}x{width} has {height * width} pixels")
    if runs.sum() != height * width:
        raise ValueError(f"RLE runs sum to {int(runs.sum())}, its size {height}x{width} has {height * width} pixels")
    return Runs(height, width, _canonical(runs))


def to_coco(mask: Runs) -> dict[str, Any]:
    """Compressed COCO RLE, `{"size": [h, w], "counts": str}`."""
    out = np.empty(13 * len(mask.counts) + 1, np.uint8)
    length = _encode_counts(mask.counts, out)
    return {"size": [mask.height, mask.width], "counts": out[:length].tobytes().decode("ascii")}


def from_bitmap(bitmap: np.ndarray) -> Runs:
    """Runs of a bitmap (H, W)."""
    flat = np.asarray(bitmap, bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0], changes, [flat.size]])
    counts = np.diff(edges)
    if flat.size and flat[0]:
        counts = np.concatenate([[0], counts])
    return Runs(bitmap.shape[0], bitmap.shape[1], counts.astype(np.int64))


def to_bitmap(mask: Runs) -> np.ndarray:
    """(H, W) uint8; for evaluation, pictures and tests."""
    values = (np.arange(len(mask.counts)) % 2).astype(np.uint8)
    return np.repeat(values, mask.counts).reshape((mask.height, mask.width), order="F")


def area(mask: Runs) -> int:
    """Number of object pixels."""
    return int(mask.counts[1::2].sum())


def box(mask: Runs) -> tuple[int, int, int, int]:
    """Tight box x, y, width, height; all 0 for an empty mask (as pycocotools' toBbox)."""
    x, y, width, height = _box(mask.counts, mask.height)
    return int(x), int(y), int(width), int(height)


def contains(mask: Runs, x: int, y: int) -> bool:
    """Whether pixel (x, y) is object; False outside the image."""
    if not (0 <= x < mask.width and 0 <= y < mask.height):
        return False
    return bool(np.searchsorted(np.cumsum(mask.counts), x * mask.height + y, side="right") % 2)


def crop(mask: Runs, x: int, y: int, width: int, height: int) -> Runs:
    """The window of `width` x `height` at (x, y); what it shows outside the image is background."""
    out = np.empty(len(mask.counts) + 2 * width + 2, np.int64)
    length = _crop(mask.counts, mask.height, mask.width, x, y, width, height, out)
    return Runs(height, width, out[:length].copy())


def flip_horizontal(mask: Runs) -> Runs:
    """Mirrored left to right."""
    out = np.empty(len(mask.counts) + 2 * mask.width + 2, np.int64)
    length = _flip(mask.counts, mask.height, mask.width, out)
    return Runs(mask.height, mask.width, out[:length].copy())


def resample_nearest(mask: Runs, height: int, width: int) -> Runs:
    """To another grid by the source pixel under each target pixel's centre."""
    out = np.empty(len(mask.counts) * max(1, -(-width // mask.width)) + 2 * width + 2, np.int64)
    length = _resample_nearest(mask.counts, mask.height, mask.width, height, width, out)
    return Runs(height, width, out[:length].copy())


def coverage(masks: Sequence[Runs], height: int, width: int, transform: AxisTransform) -> np.ndarray:
    """Share of every target cell that each mask covers, exactly: (N, height, width) float32.

    What falls outside the grid is dropped. The cost is a few operations a run and a target cell.
    """
    out = np.zeros((len(masks), height, width), np.float32)
    if masks:
        _coverage(*_flatten(masks, transform), out)
    return out


def covered(masks: Sequence[Runs], height: int, width: int, transform: AxisTransform) -> tuple[np.ndarray, np.ndarray]:
    """Where each mask covers half of a target cell or more, (N, height, width) uint8, and of how many, (N,).

    `coverage(...) >= 0.5` without the floats in between.
    """
    out, areas = np.zeros((len(masks), height, width), np.uint8), np.zeros(len(masks), np.int64)
    if masks:
        _covered(*_flatten(masks, transform), out, areas)
    return out, areas


def _flatten(masks: Sequence[Runs], transform: AxisTransform) -> tuple:
    """Masks and transform as the kernels take them."""
    return (
        np.concatenate([mask.counts for mask in masks]),
        np.cumsum([len(mask.counts) for mask in masks]),
        np.array([mask.height for mask in masks], np.int64),
        transform.scale_x,
        transform.scale_y,
        transform.offset_x,
        transform.offset_y,
        transform.width if transform.flip else -1.0,
    )


def sample_foreground(mask: Runs, u: float, within: tuple[int, int, int, int] | None = None) -> tuple[int, int] | None:
    """Object pixel (x, y) of rank floor(u * n) among those in `within` (x0 y0 x1 y1); None if there is none."""
    return _sample(mask, u, within, 1)


def sample_background(mask: Runs, u: float, within: tuple[int, int, int, int] | None = None) -> tuple[int, int] | None:
    """Background pixel (x, y) of rank floor(u * n) among those in `within` (x0 y0 x1 y1); None if there is none."""
    return _sample(mask, u, within, 0)


def intersection_area(a: Runs, b: Runs) -> int:
    """Pixels that are object in both masks. Raises `ValueError` for masks of different sizes."""
    if (a.height, a.width) != (b.height, b.width):
        raise ValueError(f"masks of {a.width}x{a.height} and {b.width}x{b.height} cannot be compared")
    return int(_intersection(a.counts, b.counts))


def iou(a: Runs, b: Runs) -> float:
    """Intersection over union; 1 if both are empty."""
    both = intersection_area(a, b)
    union = area(a) + area(b) - both
    return both / union if union else 1.0


def _sample(mask: Runs, u: float, within: tuple[int, int, int, int] | None, value: int) -> tuple[int, int] | None:
    x0, y0, x1, y1 = within or (0, 0, mask.width, mask.height)
    assert 0 <= x0 <= x1 <= mask.width, within
    assert 0 <= y0 <= y1 <= mask.height, within
    x, y = _pixel_of_rank(mask.counts, mask.height, x0, y0, x1, y1, u, value)
    return None if x < 0 else (int(x), int(y))


def _canonical(runs: np.ndarray) -> np.ndarray:
    """Join runs separated by empty ones."""
    if len(runs) == 0:
        return np.zeros(1, np.int64)
    if (runs[1:] > 0).all():
        return runs.astype(np.int64)
    out: list[int] = []
    for number, run in enumerate(runs.tolist()):
        if len(out) % 2 == number % 2:
            out.append(run) if run or not out else None
        else:
            out[-1] += run
    return np.array(out or [0], np.int64)


@numba.njit("boolean(int64[::1], int64)", cache=True, nogil=True)
def _is_canonical(runs, num_pixels):  # pragma: no cover - compiled
    """Whether all runs but the first have a pixel, the first no negative number, and all sum to the mask's size."""
    if len(runs) == 0 or runs[0] < 0 or runs[0] > num_pixels:
        return False
    total = runs[0]
    for i in range(1, len(runs)):
        if runs[i] < 1 or runs[i] > num_pixels:
            return False
        total += runs[i]
    return total == num_pixels


@numba.njit(
    numba.int64(numba.types.Bytes(numba.uint8, 1, "C", readonly=True), numba.int64[::1]), cache=True, nogil=True
)
def _decode_counts(data, out):  # pragma: no cover - compiled
    """COCO's 5-bit groups, least first; from the third run on, differences to the run two before. -1 = malformed."""
    length, position = 0, 0
    while position < len(data):
        value, shift, more = 0, 0, True
        while more:
            if position >= len(data) or shift > 60:
                return -1
            group = np.int64(data[position]) - 48
            if group < 0 or group > 63:
                return -1
            value |= (group & 31) << shift
            more = (group & 32) != 0
            position += 1
            shift += 5
            if not more and (group & 16):
                value |= np.int64(-1) << shift
        if length > 2:
            value += out[length - 2]
        out[length] = value
        length += 1
    return length


@numba.njit("int64(int64[::1], uint8[::1])", cache=True, nogil=True)
def _encode_counts(counts, out):  # pragma: no cover - compiled
    length = 0
    for i in range(len(counts)):
        value = counts[i] - counts[i - 2] if i > 2 else counts[i]
        more = True
        while more:
            group = value & 31
            value >>= 5
            more = value != -1 if group & 16 else value != 0
            out[length] = (group | 32 if more else group) + 48
            length += 1
    return length


@numba.njit("UniTuple(int64, 4)(int64[::1], int64)", cache=True, nogil=True)
def _box(counts, height):  # pragma: no cover - compiled
    x0, y0, x1, y1 = np.int64(1 << 60), height, np.int64(-1), np.int64(-1)
    position = np.int64(0)
    for i in range(len(counts)):
        start, position = position, position + counts[i]
        if i % 2 and position > start:
            first, last = start // height, (position - 1) // height
            x0, x1 = min(x0, first), max(x1, last)
            if last > first:
                y0, y1 = np.int64(0), height - 1
            else:
                y0, y1 = min(y0, start % height), max(y1, (position - 1) % height)
    if x1 < 0:
        return np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    return x0, y0, x1 - x0 + 1, y1 - y0 + 1


@numba.njit("int64(int64[::1], int64, int64, int64)", cache=True, nogil=True, inline="always")
def _append(out, length, run, value):  # pragma: no cover - compiled
    """Add a run of `value` (0 or 1) to canonical counts; returns the new length. `out[0]` starts as background."""
    if run == 0:
        return length
    if length == 0:
        out[0] = 0
        length = 1
    if (length - 1) % 2 == value:
        out[length - 1] += run
        return length
    out[length] = run
    return length + 1


@numba.njit("int64(int64[::1], int64, int64, int64, int64, int64, int64, int64[::1])", cache=True, nogil=True)
def _crop(counts, src_height, src_width, x0, y0, width, height, out):  # pragma: no cover - compiled
    out[0] = 0
    length = np.int64(1)
    filled = np.int64(0)  # target pixels written so far, in column order
    position = np.int64(0)
    for i in range(len(counts)):
        start, position = position, position + counts[i]
        if i % 2 == 0 or position == start:
            continue
        for column in range(max(start // src_height, x0), min((position - 1) // src_height, x0 + width - 1) + 1):
            top = max(start - column * src_height, y0, 0) - y0
            bottom = min(position - column * src_height, src_height, y0 + height) - y0
            if bottom > top:
                at = (column - x0) * height + top
                length = _append(out, length, at - filled, 0)
                length = _append(out, length, bottom - top, 1)
                filled = at + bottom - top
    return _append(out, length, width * height - filled, 0)


@numba.njit("int64(int64[::1], int64, int64, int64[::1])", cache=True, nogil=True)
def _flip(counts, height, width, out):  # pragma: no cover - compiled
    out[0] = 0
    length = np.int64(1)
    filled = np.int64(0)
    ends = np.cumsum(counts)
    run = len(counts) - 1
    for target in range(width):
        column = width - 1 - target
        low, high = column * height, (column + 1) * height
        while run > 0 and ends[run - 1] > low:
            run -= 1
        i = run
        while i < len(counts) and (ends[i] - counts[i]) < high:
            top, bottom = max(ends[i] - counts[i], low), min(ends[i], high)
            if i % 2 and bottom > top:
                at = target * height + top - low
                length = _append(out, length, at - filled, 0)
                length = _append(out, length, bottom - top, 1)
                filled = at + bottom - top
            i += 1
    return _append(out, length, width * height - filled, 0)


@numba.njit("int64(int64[::1], int64, int64, int64, int64, int64[::1])", cache=True, nogil=True)
def _resample_nearest(counts, src_height, src_width, height, width, out):  # pragma: no cover - compiled
    """Target row t shows source row floor((2t + 1) H / 2h); all in integers."""
    out[0] = 0
    length = np.int64(1)
    filled = np.int64(0)
    ends = np.cumsum(counts)
    for target in range(width):
        column = (2 * target + 1) * src_width // (2 * width)
        low, high = column * src_height, (column + 1) * src_height
        i = np.searchsorted(ends, low, side="right")
        while i < len(counts) and (ends[i] - counts[i]) < high:
            if i % 2:
                top, bottom = max(ends[i] - counts[i], low) - low, min(ends[i], high) - low
                # First target rows whose source row is at least top, bottom.
                first = max(0, (2 * top * height - src_height + 2 * src_height - 1) // (2 * src_height))
                last = max(0, (2 * bottom * height - src_height + 2 * src_height - 1) // (2 * src_height))
                first, last = min(first, height), min(last, height)
                if last > first:
                    at = target * height + first
                    length = _append(out, length, at - filled, 0)
                    length = _append(out, length, last - first, 1)
                    filled = at + last - first
            i += 1
    return _append(out, length, width * height - filled, 0)


@numba.njit(
    "void(int64[::1], int64, float64, float64, float64, float64, float64, float64[:, ::1], int64[::1])",
    cache=True,
    nogil=True,
)
def _add_runs(counts, height, scale_x, scale_y, offset_x, offset_y, flip_width, edges, box):  # pragma: no cover
    """Add a mask's runs to `edges` (columns, rows + 2): what each cell covers more than the one above it.

    A run costs its two ends, whatever its length; summed down a column, the edges are the covered shares. `box`
    (r0 r1 c0 c1) becomes the cells that are touched.
    """
    columns, rows = edges.shape[0], edges.shape[1] - 2
    box[0], box[1], box[2], box[3] = rows, 0, columns, 0
    position, column = np.int64(0), np.int64(-1)
    left, right, c0, c1 = 0.0, 0.0, np.int64(0), np.int64(0)  # where the source column lies in the target
    for i in range(len(counts)):
        start, position = position, position + counts[i]
        if i % 2 == 0 or position == start:
            continue
        for x in range(start // height, (position - 1) // height + 1):
            if x != column:
                column = x
                left, right = x * scale_x + offset_x, (x + 1) * scale_x + offset_x
                if flip_width >= 0:
                    left, right = flip_width - right, flip_width - left
                left, right = max(left, 0.0), min(right, float(columns))
                c0, c1 = np.int64(left), min(np.int64(np.ceil(right)), columns)
            top = max(max(start - x * height, 0) * scale_y + offset_y, 0.0)
            bottom = min(min(position - x * height, height) * scale_y + offset_y, float(rows))
            if bottom <= top or right <= left:
                continue
            first, last = np.int64(top), np.int64(bottom)
            top_part, bottom_part = top - first, bottom - last
            for c in range(c0, c1):
                share = min(right, c + 1.0) - max(left, float(c))
                edges[c, first] += share * (1.0 - top_part)
                edges[c, first + 1] += share * top_part
                edges[c, last] -= share * (1.0 - bottom_part)
                edges[c, last + 1] -= share * bottom_part
            box[0], box[1] = min(box[0], first), max(box[1], min(last + 1, rows))
            box[2], box[3] = min(box[2], c0), max(box[3], c1)


@numba.njit("void(float64[:, ::1], int64[::1])", cache=True, nogil=True)
def _sum_down(edges, box):  # pragma: no cover - compiled
    """Turn edges into shares, within the box, in place."""
    for c in range(box[2], box[3]):
        total = 0.0
        for r in range(box[0], box[1]):
            total += edges[c, r]
            edges[c, r] = total


@numba.njit(
    "void(int64[::1], int64[::1], int64[::1], float64, float64, float64, float64, float64, float32[:, :, ::1])",
    cache=True,
    nogil=True,
)
def _coverage(counts, ends, heights, scale_x, scale_y, offset_x, offset_y, flip_width, out):  # pragma: no cover
    """Shares of all masks; `out` is zero before."""
    edges = np.zeros((out.shape[2], out.shape[1] + 2))
    box = np.empty(4, np.int64)
    first_run = 0
    for n in range(len(ends)):
        runs = counts[first_run : ends[n]]
        _add_runs(runs, heights[n], scale_x, scale_y, offset_x, offset_y, flip_width, edges, box)
        _sum_down(edges, box)
        for r in range(box[0], box[1]):
            for c in range(box[2], box[3]):
                share = edges[c, r]
                if share > 1e-12:  # less is rounding
                    out[n, r, c] = share
        for c in range(box[2], box[3]):
            edges[c, box[0] : box[1] + 2] = 0.0
        first_run = ends[n]


@numba.njit(
    "void(int64[::1], int64[::1], int64[::1], float64, float64, float64, float64, float64, uint8[:, :, ::1],"
    " int64[::1])",
    cache=True,
    nogil=True,
)
def _covered(counts, ends, heights, scale_x, scale_y, offset_x, offset_y, flip_width, out, areas):  # pragma: no cover
    """1 where a mask covers half of a cell or more, and how many cells that is; `out` is zero before."""
    edges = np.zeros((out.shape[2], out.shape[1] + 2))
    box = np.empty(4, np.int64)
    half, first_run = np.float32(0.5), 0
    for n in range(len(ends)):
        runs = counts[first_run : ends[n]]
        _add_runs(runs, heights[n], scale_x, scale_y, offset_x, offset_y, flip_width, edges, box)
        _sum_down(edges, box)
        total = np.int64(0)
        for r in range(box[0], box[1]):
            for c in range(box[2], box[3]):
                # In float32, as `coverage` gives it: what is half but for the rounding of the sum is half.
                is_covered = np.float32(edges[c, r]) >= half
                out[n, r, c] = is_covered
                total += is_covered
        areas[n] = total
        for c in range(box[2], box[3]):
            edges[c, box[0] : box[1] + 2] = 0.0
        first_run = ends[n]


@numba.njit("UniTuple(int64, 2)(int64[::1], int64, int64, int64, int64, int64, float64, int64)", cache=True, nogil=True)
def _pixel_of_rank(counts, height, x0, y0, x1, y1, u, value):  # pragma: no cover - compiled
    """Two passes over the runs: count the candidates in the window, then find the one of rank floor(u n)."""
    wanted = np.int64(-1)
    for search in range(2):
        total, position = np.int64(0), np.int64(0)
        for i in range(len(counts)):
            start, position = position, position + counts[i]
            if i % 2 != value or position == start:
                continue
            for x in range(max(start // height, x0), min((position - 1) // height, x1 - 1) + 1):
                top, bottom = max(start - x * height, y0), min(position - x * height, y1)
                if bottom <= top:
                    continue
                if search == 1 and total + bottom - top > wanted:
                    return x, top + wanted - total
                total += bottom - top
        if total == 0:
            break
        wanted = min(np.int64(u * total), total - 1)
    return np.int64(-1), np.int64(-1)


@numba.njit("int64(int64[::1], int64[::1])", cache=True, nogil=True)
def _intersection(a, b):  # pragma: no cover - compiled
    total, i, j = np.int64(0), 0, 0
    left_a = a[0] if len(a) else np.int64(0)
    left_b = b[0] if len(b) else np.int64(0)
    while i < len(a) and j < len(b):
        step = min(left_a, left_b)
        if i % 2 and j % 2:
            total += step
        left_a -= step
        left_b -= step
        if left_a == 0:
            i += 1
            left_a = a[i] if i < len(a) else np.int64(0)
        if left_b == 0:
            j += 1
            left_b = b[j] if j < len(b) else np.int64(0)
    return total
