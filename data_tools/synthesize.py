"""Make an SA-1B-format data set whose masks are exact: for the demo, the tests and a first try without a download.

    python -m data_tools.synthesize --out demo/raw/train --num-images 4000 --seed 0
    python -m data_tools.synthesize --out DIR --num-images 100 --seed 7 --size 512

A scene is a textured background with a few large objects painted one over the other; some objects are a whole with
parts on it, and both the whole and its parts are annotated. Each scene is a function of (seed, number) alone.

Letters: H W pixels of the image, N masks.
"""

import argparse
import io
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_tools import rle
from data_tools.pool import run_in_pool

JPEG_QUALITY = 95
MIN_AREA_SHARE = 0.04  # of the image: smaller visible masks are not annotated; 2.6 patches of the tiny models
MIN_CONTRAST = 0.45  # distance of an object's colour from what it lies on; the RGB cube has side 1


@dataclass(frozen=True)
class Scene:
    """An image and its exact visible masks."""

    image: np.ndarray  # (H, W, 3) uint8
    masks: np.ndarray  # (N, H, W) bool


def synthesize_scene(seed: int, number: int, height: int, width: int) -> Scene:
    """Scene `number` of the data set `seed`."""
    rng = np.random.Generator(np.random.Philox(key=[seed, number]))
    y, x = np.mgrid[0:height, 0:width] + 0.5
    background = rng.random(3)
    canvas = textured(rng, background, x, y)
    masks: list[np.ndarray] = []
    colors = [background]
    for _ in range(int(rng.integers(2, 5))):
        size = rng.uniform(0.36, 0.7) * min(height, width)
        center = rng.uniform(0.18, 0.82, 2) * (width, height)
        whole = shape(rng, x - center[0], y - center[1], size / 2)
        color = contrasting(rng, colors)
        added, parts = [whole], []
        canvas = np.where(whole[..., None], textured(rng, color, x, y), canvas)
        if rng.random() < 0.4:
            for _ in range(int(rng.integers(1, 3))):
                offset = rng.uniform(-0.22, 0.22, 2) * size
                part_size = rng.uniform(0.4, 0.6) * size
                part = shape(rng, x - center[0] - offset[0], y - center[1] - offset[1], part_size / 2) & whole
                parts = [other & ~part for other in parts] + [part]
                part_color = contrasting(rng, [*colors, color])
                canvas = np.where(part[..., None], textured(rng, part_color, x, y), canvas)
        added += parts
        masks = [mask & ~whole for mask in masks] + added
        colors.append(color)
    image = (canvas + rng.normal(0, 0.02, canvas.shape)).clip(0, 1) * 255
    large = [mask for mask in masks if mask.sum() >= MIN_AREA_SHARE * height * width]
    return Scene(image.round().astype(np.uint8), np.array(large, bool).reshape(-1, height, width))


def contrasting(rng: np.random.Generator, colors: list[np.ndarray]) -> np.ndarray:
    """A colour far from all of `colors`, or the farthest of some tries."""
    tries = rng.random((24, 3))
    distance = np.linalg.norm(tries[:, None] - np.array(colors)[None], axis=2).min(axis=1)
    far = np.flatnonzero(distance > MIN_CONTRAST)
    return tries[far[0] if len(far) else distance.argmax()]


def textured(rng: np.random.Generator, color: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(H, W, 3) in 0..1: the colour with a slow gradient and stripes, checks or speckles of low contrast."""
    height, width = x.shape
    direction = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(direction) + y * math.sin(direction)
    gradient = 0.08 * (along / max(height, width) - 0.5)
    period = rng.uniform(0.03, 0.09) * min(height, width)
    kind = rng.integers(4)
    if kind == 0:
        pattern = np.sign(np.sin(2 * math.pi * along / period))
    elif kind == 1:
        pattern = np.sign(np.sin(2 * math.pi * x / period) * np.sin(2 * math.pi * y / period))
    elif kind == 2:
        pattern = rng.normal(0, 0.7, x.shape)
    else:
        pattern = np.zeros_like(x)
    return (color + gradient[..., None] + 0.05 * pattern[..., None]).clip(0, 1)


def shape(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """A random shape of about `radius` pixels around the origin of the coordinates x, y: (H, W) bool."""
    kinds: list[Callable[..., np.ndarray]] = [ellipse, bar, triangle, star, crescent, ring, angle, cross, blob]
    kind = kinds[int(rng.integers(len(kinds)))]
    turn = rng.uniform(0, 2 * math.pi)
    u = (x * math.cos(turn) + y * math.sin(turn)) / radius
    v = (y * math.cos(turn) - x * math.sin(turn)) / radius
    return kind(rng, u, v)


def ellipse(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u**2 + (v / rng.uniform(0.55, 1.0)) ** 2 < 1


def bar(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (np.abs(u) < 1) & (np.abs(v) < rng.uniform(0.35, 0.6))


def triangle(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    slope = rng.uniform(0.45, 0.8)
    return (v > -0.7) & (np.abs(u) < (1.0 - v) * slope)


def star(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    points = int(rng.integers(4, 7))
    return np.hypot(u, v) < 0.78 + 0.22 * np.cos(points * np.arctan2(v, u))


def crescent(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    shift = rng.uniform(0.55, 0.75)
    return (u**2 + v**2 < 1) & ((u - shift) ** 2 + v**2 > 0.7)


def ring(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    distance = u**2 + v**2
    return (distance < 1) & (distance > rng.uniform(0.16, 0.3))


def angle(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    thick = rng.uniform(0.6, 0.9)
    return (np.maximum(np.abs(u), np.abs(v)) < 0.85) & ((u < -0.85 + thick) | (v < -0.85 + thick))


def cross(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    thick = rng.uniform(0.32, 0.45)
    return (np.maximum(np.abs(u), np.abs(v)) < 0.95) & (np.minimum(np.abs(u), np.abs(v)) < thick)


def blob(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    direction = np.arctan2(v, u)
    phases = rng.uniform(0, 2 * math.pi, 3)
    wave = sum(0.14 * np.cos((k + 2) * direction + phase) for k, phase in enumerate(phases))
    return np.hypot(u, v) < 0.75 + wave


def annotation(mask: np.ndarray, number: int) -> dict[str, object]:
    """SA-1B's annotation of one mask; the box has inclusive maxima, as in the released files."""
    height, width = mask.shape
    runs = rle.from_bitmap(mask)
    ys, xs = np.nonzero(mask)
    middle = len(ys) // 2
    return {
        "bbox": [float(xs.min()), float(ys.min()), float(np.ptp(xs)), float(np.ptp(ys))],
        "area": int(mask.sum()),
        "segmentation": rle.to_coco(runs),
        "predicted_iou": 1.0,
        "point_coords": [[float(xs[middle]), float(ys[middle])]],
        "crop_box": [0, 0, width, height],
        "id": number,
        "stability_score": 1.0,
    }


def write_scene(out: Path, seed: int, number: int, size: int) -> int:
    """Write `sa_{id}.jpg` and `sa_{id}.json`; returns the number of masks. Ids of different seeds do not collide."""
    scene = synthesize_scene(seed, number, size, size)
    image_id = seed * 1_000_000 + number
    buffer = io.BytesIO()
    Image.fromarray(scene.image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    record = {
        "image": {"image_id": image_id, "width": size, "height": size, "file_name": f"sa_{image_id}.jpg"},
        "annotations": [annotation(mask, image_id * 100 + i) for i, mask in enumerate(scene.masks)],
    }
    (out / f"sa_{image_id}.jpg").write_bytes(buffer.getvalue())
    (out / f"sa_{image_id}.json").write_text(json.dumps(record))
    return len(scene.masks)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-images", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--workers", type=int, default=1, help="processes; the scenes do not depend on it")
    options = parser.parse_args(arguments)
    if options.num_images < 1 or options.size < 16 or options.seed < 0 or options.workers < 1:
        print("synthesize: --num-images must be at least 1, --size 16, --seed 0, --workers 1", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    write = partial(write_scene, options.out, options.seed, size=options.size)
    written = run_in_pool(write, iter(range(options.num_images)), options.workers)
    num_masks = sum(num for _, num in tqdm(written, total=options.num_images, unit="image", disable=None))
    print(f"{options.out}: {options.num_images} images, {num_masks} masks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
