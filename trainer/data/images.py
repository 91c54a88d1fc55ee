"""JPEG bytes to an RGB array, decoded no larger than needed; resize of a source window; colour jitter on the device."""

import io
import math

import numba
import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

EXIF_MARKER = b"Exif\x00\x00"
UNDECODABLE = (ValueError, OSError, UnidentifiedImageError, Image.DecompressionBombError)


class SampleError(ValueError):
    """A sample that cannot be used: it trains nothing, is named, and the run goes on."""


def image_size(data: bytes) -> tuple[int, int]:
    """Upright (height, width) in pixels, from the header alone. Raises `SampleError`."""
    try:
        if _is_plain(data):
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            return height, width
        with Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except UNDECODABLE as error:
        raise SampleError(f"image does not decode: {error}") from error


def decode_jpeg(data: bytes, min_height: int, min_width: int, upright: bool = True) -> np.ndarray:
    """RGB uint8 (h, w, 3), possibly at 1/2, 1/4 or 1/8 but at least `min_height` x `min_width`.

    Sides are rounded up. Greyscale and CMYK become RGB; files other than JPEG go through Pillow, in full. `upright`:
    turned as EXIF says; without it the pixels as stored, on which masks are given. Raises `SampleError`.
    """
    try:
        if _is_plain(data) or (not upright and data[:2] == b"\xff\xd8"):
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            if colorspace in ("YCbCr", "Gray", "RGB"):
                wanted = reduced_size(height, width, min_height, min_width)
                return simplejpeg.decode_jpeg(data, "RGB", min_height=wanted[0], min_width=wanted[1])
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray((ImageOps.exif_transpose(image) if upright else image).convert("RGB"))
    except UNDECODABLE as error:
        raise SampleError(f"image does not decode: {error}") from error


def reduced_size(height: int, width: int, min_height: int, min_width: int) -> tuple[int, int]:
    """Smallest of the full, 1/2, 1/4 and 1/8 size that is at least as large as asked.

    libjpeg-turbo has all M/8 scales, but vector instructions for these only: 5/8 to 7/8 take longer than full size.
    """
    for divisor in (8, 4, 2):
        size = -(-height // divisor), -(-width // divisor)
        if size[0] >= min_height and size[1] >= min_width:
            return size
    return height, width


def _is_plain(data: bytes) -> bool:
    """A JPEG without EXIF, so certainly upright."""
    return data[:2] == b"\xff\xd8" and EXIF_MARKER not in data[:4096]


def resize_window(
    image: np.ndarray,
    window: tuple[float, float, float, float],
    height: int,
    width: int,
    bicubic: bool = False,
    flip: bool = False,
) -> np.ndarray:
    """Antialiased resize of `window` = (x0, y0, x1, y1) of `image`, in its own pixels, to (height, width, 3).

    Pillow's arithmetic at about a third of its time, mirrored left to right if `flip`; why not a library:
    docs/decisions/0012. The result is a view of channel planes: `transpose(2, 0, 1)` of it, which is what batches hold,
    is contiguous. Pillow may resize downwards before across, and then some values differ by the rounding in between.
    """
    x0, y0, x1, y1 = (np.float32(edge) for edge in window)  # Pillow's own precision
    x_starts, x_weights = _filter_weights(image.shape[1], x0, x1, width, bicubic)
    y_starts, y_weights = _filter_weights(image.shape[0], y0, y1, height, bicubic)
    if flip:
        x_starts, x_weights = x_starts[::-1].copy(), x_weights[:, ::-1].copy()
    top, bottom = int(y_starts[0]), int(y_starts[-1]) + len(y_weights)
    rows = np.empty((bottom - top, 3, width), np.uint8)
    planes = np.empty((3, height, width), np.uint8)
    # Pillow's arrays are read-only, which the kernel's signature is not: they are copied.
    pixels = np.require(image[top:bottom], np.uint8, "CW").reshape(bottom - top, -1)
    _resize_across(pixels, x_starts, x_weights, rows)
    _resize_down(rows, y_starts - top, y_weights, planes)
    return planes.transpose(1, 2, 0)


@numba.njit("float64(float64, boolean)", cache=True, nogil=True, inline="always")
def _filter(x, bicubic):  # pragma: no cover - compiled
    """Pillow's triangle and cubic (a = -0.5) filters."""
    x = abs(x)
    if not bicubic:
        return 1.0 - x if x < 1.0 else 0.0
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 if x < 2.0 else 0.0


@numba.njit("Tuple((int64[::1], int32[:, ::1]))(int64, float32, float32, int64, boolean)", cache=True, nogil=True)
def _filter_weights(size, low, high, out_size, bicubic):  # pragma: no cover - compiled
    """First source pixel of each output pixel, and its weights in units of 2**-22, as Pillow rounds them.

    The weights are (taps, out_size); first + taps never passes the end of the source.
    """
    scale = np.float64(high - low) / out_size
    stretch = max(scale, 1.0)
    support = (2.0 if bicubic else 1.0) * stretch
    taps = min(int(2.0 * support) + 1, size)
    starts, weights, row = np.empty(out_size, np.int64), np.zeros((taps, out_size), np.int32), np.empty(taps + 2)
    for i in range(out_size):
        centre = low + (i + 0.5) * scale
        first, last = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), size)
        total = 0.0
        for k in range(last - first):
            row[k] = _filter((k + first - centre + 0.5) * (1.0 / stretch), bicubic)
            total += row[k]
        starts[i] = min(first, size - taps)
        for k in range(last - first):
            weight = (row[k] / total if total != 0.0 else row[k]) * (1 << 22)
            weights[first - starts[i] + k, i] = np.int32(weight - 0.5 if weight < 0.0 else weight + 0.5)
    return starts, weights


@numba.njit("void(uint8[:, ::1], int64[::1], int32[:, ::1], uint8[:, :, ::1])", cache=True, nogil=True)
def _resize_across(pixels, starts, weights, rows):  # pragma: no cover - compiled
    """Rows of interleaved RGB to rows of three planes, rounded to bytes. `weights` is (taps, out_size).

    Fetching pixels is kept apart from the arithmetic: fetching cannot become vector instructions, the rest does, which
    halves the time. A pixel is fetched as one word of its three bytes.
    """
    width, taps = rows.shape[2], len(weights)
    low, high = min(starts[0], starts[-1]), max(starts[0], starts[-1]) + taps  # source pixels that are looked at
    half, byte = np.int32(1 << 21), np.uint32(255)
    words, fetched, sums = np.empty(high - low, np.uint32), np.empty(width, np.uint32), np.empty((3, width), np.int32)
    for r in range(len(rows)):
        source = pixels[r, 3 * low : 3 * high]
        for x in range(high - low):
            red, green, blue = np.uint32(source[3 * x]), np.uint32(source[3 * x + 1]), np.uint32(source[3 * x + 2])
            words[x] = red | green << np.uint32(8) | blue << np.uint32(16)
        sums[:] = half
        for k in range(taps):
            weight = weights[k]
            for i in range(width):
                fetched[i] = words[np.uint64(starts[i] - low + k)]  # unsigned: spares the test for negative indices
            for c in range(3):
                shift, total = np.uint32(8 * c), sums[c]
                for i in range(width):
                    total[i] += weight[i] * np.int32((fetched[i] >> shift) & byte)
        for c in range(3):
            target, total = rows[r, c], sums[c]
            for i in range(width):
                target[i] = min(max(total[i] >> 22, 0), 255)


@numba.njit("void(uint8[:, :, ::1], int64[::1], int32[:, ::1], uint8[:, :, ::1])", cache=True, nogil=True)
def _resize_down(rows, starts, weights, planes):  # pragma: no cover - compiled
    """Rows of planes to the planes of the result. `weights` is (taps, out_size)."""
    height, width = planes.shape[1:]
    half, sums = np.int32(1 << 21), np.empty(width, np.int32)
    for y in range(height):
        for c in range(3):
            sums[:] = half
            for k in range(len(weights)):
                weight, source = weights[k, y], rows[starts[y] + k, c]
                for x in range(width):
                    sums[x] += weight * np.int32(source[x])
            target = planes[c, y]
            for x in range(width):
                target[x] = min(max(sums[x] >> 22, 0), 255)


def needed_size(size: int, source_window: float, output: int) -> int:
    """Smallest decoded length of a side of `size` pixels if `source_window` of them become `output`."""
    return min(size, math.ceil(size * output / source_window))


def jitter_colors(images: Tensor, factors: Tensor, content_sizes: Tensor | None = None) -> Tensor:
    """Brightness, contrast and saturation of uint8 or float images (B, 3, H, W) by `factors` (B, 3); float32 0..255.

    The three in this fixed order, each clipped to the range, as torchvision defines them (its order is random).
    `content_sizes` (B, 2): height and width of what is not zero padding; the padding counts for no mean, and does not
    stay zero: mask as `Sam.normalize_images` does.
    """
    brightness, contrast, saturation = (factors[:, i, None, None, None] for i in range(3))
    images = (images.float() * brightness).clamp(0, 255)
    if content_sizes is None:
        content_sizes = torch.tensor([images.shape[2:]], device=images.device)
    num_pixels = content_sizes.prod(dim=1).clamp(min=1)[:, None, None, None]
    mean = grey_of(images).sum((2, 3), keepdim=True) / num_pixels  # padding is 0 still and adds nothing
    images = (mean + (images - mean) * contrast).clamp(0, 255)
    grey = grey_of(images)
    return (grey + (images - grey) * saturation).clamp(0, 255)


def grey_of(images: Tensor) -> Tensor:
    """Luma (ITU-R BT.601) of (B, 3, H, W): (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue
