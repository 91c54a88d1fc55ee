"""What is in a packed data set: masks per image, areas, sizes, scores.

    python -m data_tools.stats DIR                       # text
    python -m data_tools.stats DIR --out FOLDER          # also FOLDER/stats.json and FOLDER/stats.png
    python -m data_tools.stats DIR --max-images 0        # read the masks of all images, not of 10,000 spread evenly

Numbers of images come from the index and are exact; those of masks need the JSON and are exact only if every image is
read. Exit status: 0, or 2 if DIR is not a packed data set or holds no sample.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from data_tools.sample_format import Manifest, load_manifest, open_index, parse_record, read_raw

QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)  # per cent
NUM_BINS = 40


@dataclass(frozen=True)
class Quantity:
    """One measured quantity: all its values and how to draw them."""

    name: str
    values: np.ndarray
    log: bool  # logarithmic bins

    def summary(self) -> dict[str, Any]:
        """Mean, quantiles and histogram, as plain numbers."""
        edges = self.bins()
        counts, _ = np.histogram(self.values, edges)
        quantiles = np.percentile(self.values, QUANTILES)
        return {
            "num_values": len(self.values),
            "mean": float(self.values.mean()),
            "quantiles": {f"p{q}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        }

    def bins(self) -> np.ndarray:
        low, high = float(self.values.min()), float(self.values.max())
        if low == high:
            low, high = low * 0.9, high * 1.1 + 1e-9
        if self.log and low > 0:
            edges = np.geomspace(low, high, NUM_BINS + 1)
        else:
            edges = np.linspace(low, high, NUM_BINS + 1)
        edges[0], edges[-1] = low, high  # geomspace may round the largest value out of the last bin
        return edges


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for stats.json and stats.png")
    parser.add_argument("--max-images", type=int, default=10_000, help="images whose JSON is read; 0 for all")
    options = parser.parse_args(arguments)
    try:
        manifest = load_manifest(options.directory)
        quantities = measure(options.directory, manifest, options.max_images)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(as_text(manifest, quantities))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        totals = {name: getattr(manifest, f"num_{name}") for name in ("positions", "samples", "masks", "bytes")}
        tree = {"kind": manifest.kind, **totals, "quantities": {q.name: q.summary() for q in quantities}}
        (options.out / "stats.json").write_text(json.dumps(tree, indent=1) + "\n")
        draw(quantities, options.out / "stats.png")
    return 0


def measure(directory: Path, manifest: Manifest, max_images: int) -> list[Quantity]:
    """Raises `ValueError` for a data set without samples or a negative limit."""
    if max_images < 0:
        raise ValueError(f"--max-images should be 0 or more, is {max_images}")
    columns = open_index(directory)
    positions = np.flatnonzero(columns["jpg_size"])
    if len(positions) == 0:
        raise ValueError(f"{directory} holds no sample")
    quantities = [
        Quantity("image height in pixels", columns["height"][positions], False),
        Quantity("image width in pixels", columns["width"][positions], False),
        Quantity("JPEG size in bytes", columns["jpg_size"][positions], True),
    ]
    if manifest.kind == "images":
        return quantities
    quantities.append(Quantity("masks per image", columns["num_masks"][positions], False))
    if max_images and len(positions) > max_images:
        positions = positions[np.linspace(0, len(positions) - 1, max_images).astype(int)]
    rows = []
    for position in tqdm(positions, desc="reading masks", disable=None):
        data = read_raw(directory, manifest, columns, int(position), "json")
        try:
            record = parse_record(data)
        except ValueError as error:
            raise ValueError(
                f"position {position}: {error}; run `python -m data_tools.verify {directory} --deep`"
            ) from error
        pixels = record.height * record.width
        for each in record.annotations:
            rows.append((each["area"], 100 * each["area"] / pixels, each["predicted_iou"], each["stability_score"]))
    if rows:
        area, share, iou, stability = np.array(rows, np.float64).T
        quantities += [
            Quantity("mask area in pixels", area, True),
            Quantity("mask area in % of the image", share, True),
            Quantity("predicted IoU", iou, False),
            Quantity("stability score", stability, False),
        ]
    return quantities


def as_text(manifest: Manifest, quantities: list[Quantity]) -> str:
    """A table for the terminal."""
    num_gaps = manifest.num_positions - manifest.num_samples
    lines = [
        f"{manifest.kind}: {manifest.num_samples:,} images ({num_gaps:,} gaps) with {manifest.num_masks:,} masks "
        f"in {len(manifest.shards):,} shards, {manifest.num_bytes / 1e9:,.2f} GB",
        "",
        f"{'':30}{'values':>12}{'mean':>12}" + "".join(f"{f'{q} %':>12}" for q in QUANTILES),
    ]
    for quantity in quantities:
        summary = quantity.summary()
        numbers = [summary["mean"], *summary["quantiles"].values()]
        lines.append(f"{quantity.name:30}{summary['num_values']:>12,}" + "".join(f"{n:>12,.4g}" for n in numbers))
    return "\n".join(lines)


def draw(quantities: list[Quantity], path: Path) -> None:
    """One histogram a quantity."""
    columns = 4
    rows = -(-len(quantities) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows))  # without pyplot: no window system, no global state
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, quantity in zip(axes.flat, quantities, strict=False):
        edges = quantity.bins()
        axis.hist(quantity.values, edges)
        axis.set_title(quantity.name)
        if quantity.log and edges[0] > 0:
            axis.set_xscale("log")
    for axis in list(axes.flat)[len(quantities) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    sys.exit(main())
