"""Images of every kind come out upright and RGB; reduced decoding, resizing and jitter equal their references."""

import io

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision.transforms.v2 import functional

from trainer.data.images import (
    SampleError,
    decode_jpeg,
    image_size,
    jitter_colors,
    needed_size,
    reduced_size,
    resize_window,
)


def smooth_picture(height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: a gradient a channel, and a bright corner at the upper left that shows rotations."""
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack(
        [40 + 120 * x / width, 40 + 120 * y / height, 90 + 30 * np.sin(x / 17) * np.cos(y / 23)], axis=-1
    )
    picture[: height // 4, : width // 4] += 70
    return picture.astype(np.uint8)


def encoded(picture: np.ndarray, mode: str = "RGB", kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


PICTURE = smooth_picture(96, 144)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_to_size_and_pixels(orientation):
    # How a camera held so stores the upright picture: the inverse of what the tag asks for.
    store = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, 1),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: lambda p: np.rot90(p, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(np.ascontiguousarray(store(PICTURE)), exif=exif, quality=95)
    assert image_size(data) == (96, 144)
    assert mean_difference(decode_jpeg(data, 96, 144), PICTURE) < 3  # the loss of JPEG at quality 95


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "JPEG", {"progressive": True}),
        ("RGB", "JPEG", {"subsampling": 0}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("P", "PNG", {}),
    ],
)
def test_every_kind_of_file_becomes_rgb(mode, kind, options):
    """PNG too: ImageNet holds one under a JPEG's name."""
    data = encoded(PICTURE, mode, kind, **({"quality": 95} | options if kind == "JPEG" else options))
    image = decode_jpeg(data, 96, 144)
    expected = np.asarray(Image.fromarray(PICTURE).convert(mode).convert("RGB"))
    assert image_size(data) == (96, 144)
    assert image.dtype == np.uint8
    assert mean_difference(image, expected) < 4


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_one_pixel_survives_decoding_and_resizing(mode):
    data = encoded(np.full((1, 1, 3), 200, np.uint8), mode)
    image = decode_jpeg(data, 1, 1)
    assert image.shape == (1, 1, 3)
    resized = resize_window(image, (0, 0, 1, 1), 5, 4)
    assert resized.shape == (5, 4, 3)
    assert (resized == image[0, 0]).all()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"no image at all",
        encoded(PICTURE)[:40],
        encoded(PICTURE)[:-200],
        encoded(PICTURE, kind="PNG")[:300],
    ],
    ids=["empty", "marker", "text", "header", "tail", "png"],
)
def test_what_does_not_decode_is_a_sample_error(data):
    with pytest.raises(SampleError, match="does not decode"):
        decode_jpeg(data, 1, 1)


@pytest.mark.parametrize("height, width", [(96, 144), (97, 143), (8, 8), (1, 300), (333, 7)])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.25, 0.3, 0.5, 0.6, 1.0])
def test_reduced_decoding_gives_the_promised_size(height, width, share):
    min_height, min_width = max(1, round(height * share)), max(1, round(width * share))
    image = decode_jpeg(encoded(smooth_picture(height, width)), min_height, min_width)
    assert image.shape[:2] == reduced_size(height, width, min_height, min_width)
    assert image.shape[0] >= min_height
    assert image.shape[1] >= min_width
    if share <= 0.25 and min(height, width) > 8:
        assert image.size < height * width * 3 / 3, "nothing was saved"


@pytest.mark.parametrize("size", [(48, 72), (40, 60), (20, 30), (12, 18)])
def test_reduced_decoding_is_close_to_full_decoding_and_resizing(size):
    data = encoded(PICTURE, quality=95)
    small, full = decode_jpeg(data, *size), decode_jpeg(data, 96, 144)
    assert small.shape[0] < 96
    ours = resize_window(small, (0, 0, small.shape[1], small.shape[0]), *size)
    theirs = resize_window(full, (0, 0, 144, 96), *size)
    # A reduced decode averages blocks where the triangle filter reaches beyond: edges differ, areas do not.
    assert mean_difference(ours, theirs) < 2.5


@pytest.mark.parametrize("bicubic", [False, True])
def test_resizing_equals_pillow(bicubic):
    """Where Pillow goes across first, as here, every bit; elsewhere the rounding between its two passes shows."""
    rng = np.random.default_rng(0)
    method = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    exact = 0
    for _ in range(60):
        height, width, out_height, out_width = rng.integers(20, 120, 4).tolist()
        low = smooth_picture(height, width)
        noisy = np.clip(low + rng.normal(0, 12, low.shape), 0, 255).astype(np.uint8)
        (x0, x1), (y0, y1) = np.sort(rng.random(2)) * [0.3, 0.3] * width, np.sort(rng.random(2)) * [0.3, 0.3] * height
        window = (x0, y0, x1 + 0.5 * width, y1 + 0.5 * height)
        expected = np.asarray(Image.fromarray(noisy).resize((out_width, out_height), method, box=window))
        found = resize_window(noisy, window, out_height, out_width, bicubic)
        exact += np.array_equal(found, expected)
        assert np.abs(found.astype(int) - expected).max() <= (4 if bicubic else 1)
        flipped = resize_window(noisy, window, out_height, out_width, bicubic, flip=True)
        assert np.array_equal(flipped, found[:, ::-1])
    assert exact >= 20


def test_a_window_is_the_crop_of_the_resized_whole():
    """At whole output pixels, except within the filter's reach of the window's edge."""
    whole = resize_window(PICTURE, (0, 0, 144, 96), 48, 72)
    part = resize_window(PICTURE, (24, 12, 120, 84), 36, 48)
    inner = part[2:-2, 2:-2].astype(int)
    assert np.abs(inner - whole[6 + 2 : 42 - 2, 12 + 2 : 60 - 2]).max() <= 1
    channels_first = part.transpose(2, 0, 1)
    assert channels_first.flags.c_contiguous


def test_the_needed_size_is_enough_and_never_more_than_there_is():
    assert needed_size(2250, 2250, 1024) == 1024
    assert needed_size(2250, 1125, 1024) == 2048
    assert needed_size(300, 300, 1024) == 300


@pytest.mark.parametrize(
    "factors", [(1.0, 1.0, 1.0), (0.8, 1.0, 1.0), (1.2, 1.0, 1.0), (1.0, 0.6, 1.0), (1.0, 1.4, 1.0), (1.0, 1.0, 0.0),
                (1.0, 1.0, 1.4), (1.2, 0.8, 1.1)]
)  # fmt: skip
def test_color_jitter_equals_torchvisions(factors):
    images = torch.from_numpy(PICTURE.copy()).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
    rows = torch.tensor([factors, (1.0, 1.0, 1.0)])
    brightness, contrast, saturation = factors
    expected = functional.adjust_brightness(images[:1].float() / 255, brightness)
    expected = functional.adjust_contrast(expected, contrast)
    expected = functional.adjust_saturation(expected, saturation)
    found = jitter_colors(images, rows) / 255
    # torchvision rounds its grey weights to four digits.
    torch.testing.assert_close(found[:1], expected, rtol=0, atol=1 / 255)
    torch.testing.assert_close(found[1:], images[1:].float() / 255, rtol=0, atol=1e-5)


@pytest.mark.parametrize("factors", [(1.2, 0.8, 1.1), (1.0, 1.3, 0.5)])
def test_color_jitter_of_a_padded_picture_is_that_of_the_picture(factors):
    """Contrast turns about the mean of the picture; padding would make it brightness too."""
    picture = torch.from_numpy(PICTURE.copy()).permute(2, 0, 1)[None]
    _, _, height, width = picture.shape
    padded = torch.zeros(2, 3, max(height, width) + 9, max(height, width) + 9, dtype=torch.uint8)
    padded[:1, :, :height, :width] = picture  # the second fills up a batch and has no content
    sizes = torch.tensor([(height, width), (0, 0)])
    found = jitter_colors(padded, torch.tensor([factors] * 2), sizes)
    alone = jitter_colors(picture, torch.tensor([factors]))
    torch.testing.assert_close(found[:1, :, :height, :width], alone, rtol=0, atol=1e-3)  # sums in another order
    assert found.isfinite().all()


def test_masks_lie_on_the_pixels_as_stored():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    turned = encoded(PICTURE, exif=exif, quality=95)
    as_stored = decode_jpeg(turned, *PICTURE.shape[:2], upright=False)
    assert mean_difference(as_stored, PICTURE) < 2  # JPEG at quality 95
    assert mean_difference(decode_jpeg(turned, *PICTURE.shape[:2]), PICTURE) > 20
