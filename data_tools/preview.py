"""Contact sheet of a packed data set: images with their masks in colour.

    python -m data_tools.preview DIR --out sheet.png                        # 16 images drawn at random
    python -m data_tools.preview DIR --out sheet.png --num 30 --seed 1
    python -m data_tools.preview DIR --out sheet.png --positions 12 345     # these, e.g. from a log or quarantine.json

Exit status: 0, or 2 if DIR is not a packed data set or a position holds no sample.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageDraw

from data_tools import rle
from data_tools.sample_format import load_manifest, locate, open_index, parse_record, read_raw

CAPTION = 14  # pixels below each image
OPACITY = 0.45  # of a mask's colour; its outline is opaque


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    parser.add_argument("--num", type=int, default=16, help="images")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images and of the colours")
    parser.add_argument("--positions", type=int, nargs="+", help="these rows of the index instead of a random choice")
    parser.add_argument("--side", type=int, default=384, help="pixels of a tile")
    options = parser.parse_args(arguments)
    try:
        sheet = contact_sheet(options.directory, options.positions, options.num, options.side, options.seed)
        sheet.save(options.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {sheet.width} x {sheet.height} pixels")
    return 0


def contact_sheet(directory: Path, positions: list[int] | None, num: int, side: int, seed: int) -> Image.Image:
    """Tiles of `side` pixels in a near-square grid. Raises `ValueError` for positions that hold no sample."""
    if num < 1 or side < 16:
        raise ValueError(f"--num should be 1 or more, is {num}; --side 16 or more, is {side}")
    manifest, columns = load_manifest(directory), open_index(directory)
    rng = np.random.default_rng(seed)
    filled = np.flatnonzero(columns["jpg_size"])
    if positions is None:
        positions = sorted(rng.choice(filled, min(num, len(filled)), replace=False).tolist())
    missing = sorted(set(positions) - set(filled.tolist()))
    if missing or not positions:
        raise ValueError(f"{directory} holds no sample at {missing or 'any position'}")

    tiles = []
    for position in positions:
        jpeg = read_raw(directory, manifest, columns, position, "jpg")
        data = read_raw(directory, manifest, columns, position, "json")
        record = parse_record(data) if data else None  # shards of others hold none
        shard, row = locate(manifest, position)
        name = record.key if record else f"{shard.name}[{row}]"
        masks = [rle.parse(each["segmentation"]) for each in record.annotations] if record else []
        caption = f"{name}  {len(masks)} masks  [{position}]"
        tiles.append((draw_tile(jpeg, masks, side, rng), caption))

    num_columns = math.ceil(math.sqrt(len(tiles)))
    num_rows = math.ceil(len(tiles) / num_columns)
    sheet = Image.new("RGB", (num_columns * side, num_rows * (side + CAPTION)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (tile, caption) in enumerate(tiles):
        x, y = number % num_columns * side, number // num_columns * (side + CAPTION)
        sheet.paste(tile, (x + (side - tile.width) // 2, y + (side - tile.height) // 2))
        pen.text((x + 4, y + side + 1), caption, "black")
    return sheet


def draw_tile(jpeg: bytes, masks: list[rle.Runs], side: int, rng: np.random.Generator) -> Image.Image:
    """The image, at most `side` pixels, under its masks: large ones first, so that small ones stay visible."""
    image = Image.fromarray(simplejpeg.decode_jpeg(jpeg, colorspace="RGB"))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, np.float32).copy()  # (h, w, 3)
    height, width = pixels.shape[:2]
    for mask in sorted(masks, key=rle.area, reverse=True):
        inside = rle.to_bitmap(rle.resample_nearest(mask, height, width)).astype(bool)
        colour = rng.integers(40, 256, 3).astype(np.float32)
        pixels[inside] += OPACITY * (colour - pixels[inside])
        pixels[outline(inside)] = colour
    return Image.fromarray(pixels.round().astype(np.uint8))


def outline(inside: np.ndarray) -> np.ndarray:
    """Pixels of a bitmap (h, w) with a neighbour outside; the image's own border is none."""
    around = np.pad(inside, 1, mode="edge")
    surrounded = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return inside & ~surrounded


if __name__ == "__main__":
    sys.exit(main())
