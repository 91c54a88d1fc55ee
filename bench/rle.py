"""Claim: targets straight from runs cost a fraction of decoding the masks and resizing the bitmaps.

    python -m bench.rle [--data ../shared/data/sa1b_genuine] [--grid 256] [--masks 64] [--repeats 9]

Both ways make the targets of the same masks of genuine SA-1B images, one thread, in turn in the same run; medians per
image over the repeats. The peer decodes with pycocotools and area-resizes with Pillow's box filter, in bytes because
that is its fastest path. Both start from the JSON's compressed strings; the column "kernel" leaves our parsing out.
The answers differ a little: Pillow counts a source pixel for the cell that holds its centre, ours is the exact area.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from data_tools import rle


def peer_targets(segmentations: list[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """(N, height, width) float32 in [0, 1] by way of full bitmaps."""
    out = np.empty((len(segmentations), height, width), np.float32)
    for target, segmentation in zip(out, segmentations, strict=True):
        bitmap = Image.fromarray(coco_mask.decode(segmentation) * np.uint8(255))
        target[:] = np.asarray(bitmap.resize((width, height), Image.Resampling.BOX))
    return out / np.float32(255)


def median_ms(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/sa1b_genuine"))
    parser.add_argument("--grid", type=int, default=256, help="cells of the long side")
    parser.add_argument("--masks", type=int, default=64, help="at most, per image")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    paths = sorted(options.data.glob("*.json"))
    if not paths:
        parser.error(f"no SA-1B JSON in {options.data}")
    print("image              size  masks    runs  kernel ms  runs ms  bitmaps ms   ratio  max diff")
    totals = np.zeros(3)
    for path in paths:
        segmentations = [a["segmentation"] for a in json.loads(path.read_bytes())["annotations"]][: options.masks]
        height, width = segmentations[0]["size"]
        scale = options.grid / max(height, width)
        rows, columns = round(height * scale), round(width * scale)
        # Both fill the same grid exactly, so that their answers can be compared.
        transform = rle.AxisTransform(columns / width, rows / height, 0.0, 0.0)
        masks = [rle.parse(s) for s in segmentations]
        ours = rle.coverage(masks, rows, columns, transform)
        difference = np.abs(ours - peer_targets(segmentations, rows, columns)).max()
        work = (
            lambda: rle.coverage(masks, rows, columns, transform),  # noqa: B023 - called within the iteration
            lambda: rle.coverage([rle.parse(s) for s in segmentations], rows, columns, transform),  # noqa: B023
            lambda: peer_targets(segmentations, rows, columns),  # noqa: B023
        )
        times = np.array([median_ms(one, options.repeats) for one in work])
        totals += times
        num_runs = sum(len(mask.counts) for mask in masks)
        print(
            f"{path.stem:13} {width:>4}x{height:<4} {len(masks):>6} {num_runs:>7} {times[0]:>10.2f} {times[1]:>8.2f}"
            f" {times[2]:>11.1f} {times[2] / times[1]:>6.0f}x {difference:>9.1e}"
        )
    mean = totals / len(paths)
    print(f"mean {mean[0]:>43.2f} {mean[1]:>8.2f} {mean[2]:>11.1f} {mean[2] / mean[1]:>6.0f}x")


if __name__ == "__main__":
    main()
