"""Masks of one image, from any weights: a run, one of its checkpoints, or a released file.

    python -m trainer.predict runs/sam_vith photo.jpg --everything
    python -m trainer.predict sam_vit_h_4b8939.pth photo.jpg --point 320,200 --point 340,90,0
    python -m trainer.predict runs/sam_vith photo.jpg --box 100,60,420,380 --out answer

Writes OUT.png, the image with the masks over it, and OUT.json in SA-1B's format. Points and boxes are pixels of the
image, x before y; a point's label is 1 for the object (default) and 0 for the background. One point or one box is
answered by the hypothesis of highest predicted IoU of three, more prompts by the single-mask token, as in evaluation.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from data_tools import rle
from model.build import build_sam
from model.prompt_encoder import Prompts
from model.sam import Sam
from model.weights import sam_to_sam
from trainer.automatic import Found, Settings, annotation, automatic_masks, embed, inclusive_box, stability
from trainer.config import SamConfig, load_config
from trainer.distributed import single_process
from trainer.interactive import chosen, upsample_logits
from trainer.outputs import check_file
from trainer.pictures import draw_full_size, overlay_many
from trainer.prompts import BACKGROUND, FOREGROUND, NO_POINT
from trainer.stages import pointed_at, read_weights, sam_size

Point = tuple[float, float, int]
Box = tuple[float, float, float, float]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "weights", type=Path, help="run directory, one of its checkpoints, or a file (.pth, .safetensors)"
    )
    parser.add_argument("image", type=Path)
    parser.add_argument("--everything", action="store_true", help="all masks, from a grid of points")
    parser.add_argument("--point", type=parse_point, action="append", default=[], metavar="X,Y[,LABEL]")
    parser.add_argument("--box", type=parse_box, metavar="X0,Y0,X1,Y1")
    parser.add_argument("--out", type=Path, help="path without ending; default: IMAGE_masks here")
    defaults = Settings()
    for name in ("points_per_side", "min_predicted_iou", "min_stability", "max_box_iou", "min_region_area"):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    options = parser.parse_args(arguments)
    if options.everything == bool(options.point or options.box):
        parser.error("give either --everything or some --point and --box")
    out = options.out or Path(f"{options.image.stem}_masks")
    overlay_file, record_file = (Path(f"{out}{suffix}") for suffix in (".png", ".json"))
    try:
        for file in (overlay_file, record_file):
            check_file("--out", file)
        sam, single, single_for_boxes = load_sam(options.weights)
        image = read_image(options.image)
        check_inside(image, options.point, options.box)
        sam.to(single_process().device)
        if options.everything:
            found = automatic_masks(sam, image, settings_of(options), single)
        else:
            single = single or (single_for_boxes and options.box is not None)
            found = [answer(sam, image, options.point, options.box, single)]
    except ValueError as error:
        print(f"predict: {error}", file=sys.stderr)
        return 2
    found = [one for one in found if rle.area(one.mask) > 0]
    picture = draw_full_size(
        overlay_many(image, [rle.to_bitmap(f.mask).astype(bool) for f in found]), options.point, options.box
    )
    Image.fromarray(picture).save(overlay_file)
    record_file.write_text(json.dumps(sa1b_record(options.image, image, found)) + "\n")
    print(f"{len(found)} masks: {overlay_file}, {record_file}")
    return 0


def check_inside(image: np.ndarray, points: list[Point], box: Box | None) -> None:
    """Raises `ValueError` for a point outside the image, or a box that does not touch it."""
    height, width = image.shape[:2]
    for x, y, _ in points:
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(f"--point {x:g},{y:g} lies outside the image of {width}x{height} pixels")
    if box is not None and not (box[0] < width and box[1] < height and box[2] > 0 and box[3] > 0):
        raise ValueError(f"--box {','.join(f'{side:g}' for side in box)} does not touch the image of {width}x{height}")


def settings_of(options: argparse.Namespace) -> Settings:
    if options.points_per_side < 1:
        raise ValueError(f"--points-per-side {options.points_per_side}: at least 1 is needed")
    for name in ("min_predicted_iou", "min_stability", "max_box_iou"):
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: an IoU lies between 0 and 1")
    if options.min_region_area < 0:
        raise ValueError(f"--min-region-area {options.min_region_area}: an area in pixels, 0 for all")
    return Settings(
        points_per_side=options.points_per_side,
        min_predicted_iou=options.min_predicted_iou,
        min_stability=options.min_stability,
        max_box_iou=options.max_box_iou,
        min_region_area=options.min_region_area,
    )


def load_sam(path: Path) -> tuple[Sam, bool, bool]:
    """The network in evaluation mode; whether its single-mask token answers everything, and whether it answers boxes.

    Size and resolution follow from the weights; the token from the run's settings, where there are any: it is the one
    that training gave such prompts to.
    """
    path = pointed_at(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    weights = read_weights(path)
    size, image_size = sam_size(weights)
    sam = build_sam(size, image_size=image_size)
    sam_to_sam(weights, sam, str(path))
    settings = next((p / "config.yaml" for p in (path, path.parent.parent) if (p / "config.yaml").is_file()), None)
    single = single_for_boxes = False
    if settings is not None and not path.is_file():
        config = load_config(settings, check_paths=False)
        assert isinstance(config, SamConfig), "sam_size takes nothing else"
        single = config.loss.multimask == "single"
        single_for_boxes = config.loss.single_token_for_boxes
    return sam.eval(), single, single_for_boxes


def read_image(path: Path) -> np.ndarray:
    """(Y, X, 3) uint8, upright as stored."""
    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except (FileNotFoundError, UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


@torch.no_grad()
def answer(sam: Sam, image: np.ndarray, points: list[Point], box: Box | None, single: bool) -> Found:
    """The mask that the network gives for one set of prompts, in pixels of the image."""
    embedded = embed(sam, image)
    device = embedded.embedding.device
    slots = points or [(0.0, 0.0, NO_POINT)]
    size = 4 * embedded.embedding.shape[-1]
    flag = torch.ones(1, 1, dtype=torch.bool, device=device)
    coords = embedded.to_input(np.array([point[:2] for point in slots], float))
    corners = embedded.to_input(np.array(box or (0.0,) * 4, float).reshape(2, 2)).reshape(1, 1, 4)
    prompts = Prompts(
        torch.from_numpy(coords).float().to(device)[None, None],
        torch.tensor([[[point[2] for point in slots]]], device=device),
        torch.from_numpy(corners).float().to(device),
        flag if box else ~flag,
        torch.zeros(1, 1, size, size, device=device),
        ~flag,
    )
    output = sam.decode_masks(embedded.embedding, prompts)
    logits, predicted = chosen(output, single or len(points) + bool(box) > 1)
    whole = upsample_logits(logits[0], embedded.input_size, embedded.content, embedded.original)[0]
    mask = rle.from_bitmap((whole > 0).cpu().numpy())
    at = points[0][:2] if points else ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)  # type: ignore[index]
    return Found(mask, inclusive_box(mask), float(predicted), stability(whole, Settings().stability_offset), at)


def sa1b_record(path: Path, image: np.ndarray, found: list[Found]) -> dict[str, Any]:
    """The JSON of an image in SA-1B; the image id is the number in the file's name, or 0."""
    number = re.search(r"\d+", path.stem)
    height, width = image.shape[:2]
    return {
        "image": {
            "image_id": int(number[0]) if number else 0,
            "width": width,
            "height": height,
            "file_name": path.name,
        },
        "annotations": [annotation(one, i, (height, width)) for i, one in enumerate(found, 1)],
    }


def parse_point(text: str) -> Point:
    parts = numbers(text, (2, 3))
    label = parts[2] if len(parts) == 3 else FOREGROUND
    if label not in (FOREGROUND, BACKGROUND):
        raise argparse.ArgumentTypeError(f"{text}: the label is 1 (object) or 0 (background)")
    return parts[0], parts[1], int(label)


def parse_box(text: str) -> Box:
    x0, y0, x1, y1 = numbers(text, (4,))
    if not (x0 < x1 and y0 < y1):
        raise argparse.ArgumentTypeError(f"{text}: x0 < x1 and y0 < y1 are needed")
    return x0, y0, x1, y1


def numbers(text: str, counts: tuple[int, ...]) -> list[float]:
    try:
        parts = [float(part) for part in text.split(",")]
    except ValueError:
        parts = []
    if len(parts) not in counts or not all(map(math.isfinite, parts)):
        raise argparse.ArgumentTypeError(f"{text!r}: {' or '.join(map(str, counts))} numbers with commas are needed")
    return parts


if __name__ == "__main__":
    sys.exit(main())
