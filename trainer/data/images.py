"""JPEG bytes to an RGB array, decoded no larger than needed; resize of a source window; colour jitter on the device."""

import io
import math

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


def decode_jpeg(data: bytes, min_height: int, min_width: int) -> np.ndarray:
    """RGB uint8 (h, w, 3), possibly at one of libjpeg-turbo's M/8 scales but at least `min_height` x `min_width`.

    EXIF rotation, greyscale and CMYK are brought to upright RGB; files other than JPEG go through Pillow.
    Raises `SampleError`.
    """
    try:
        if _is_plain(data) and simplejpeg.decode_jpeg_header(data)[2] in ("YCbCr", "Gray", "RGB"):
            return simplejpeg.decode_jpeg(data, "RGB", min_height=min_height, min_width=min_width)
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except UNDECODABLE as error:
        raise SampleError(f"image does not decode: {error}") from error


def _is_plain(data: bytes) -> bool:
    """A JPEG without EXIF, so certainly upright."""
    return data[:2] == b"\xff\xd8" and EXIF_MARKER not in data[:4096]


def resize_window(
    image: np.ndarray, window: tuple[float, float, float, float], height: int, width: int, bicubic: bool = False
) -> np.ndarray:
    """Antialiased resize of `window` = (x0, y0, x1, y1) of `image`, in its own pixels, to (height, width, 3)."""
    method = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(image).resize((width, height), method, box=window))


def needed_size(size: int, source_window: float, output: int) -> int:
    """Smallest decoded length of a side of `size` pixels if `source_window` of them become `output`."""
    return min(size, math.ceil(size * output / source_window))


def jitter_colors(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast and saturation of uint8 or float images (B, 3, H, W) by `factors` (B, 3); float32 0..255.

    The three in this fixed order, each clipped to the range, as torchvision defines them (its order is random).
    Zero padding stays zero only for brightness: pad after, or mask as `Sam.normalize_images` does.
    """
    brightness, contrast, saturation = (factors[:, i, None, None, None] for i in range(3))
    images = (images.float() * brightness).clamp(0, 255)
    grey_weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None]
    mean = (images * grey_weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    images = (mean + (images - mean) * contrast).clamp(0, 255)
    grey = (images * grey_weights).sum(1, keepdim=True)
    return (grey + (images - grey) * saturation).clamp(0, 255)
