"""COCO instances (polygons, RLE, crowds) in SA-1B's layout."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from data_tools import rle
from data_tools.sample_format import Record
from data_tools.sources.checks import is_numbers
from data_tools.sources.listing import Entry, Location, Source

FAR = 10  # image sides a polygon may reach
WARN_EMPTY = "COCO mask without a pixel, dropped"
WARN_CROWD = "COCO crowd region, dropped"


def list_coco(annotations: Path, images: Path) -> Source:
    """One position for each image of an instances file, sorted by key (the file name's stem).

    Raises `ValueError` for a file that is not COCO instances or has no image.
    """
    try:
        tree = json.loads(annotations.read_bytes())
        by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in tree["annotations"]:
            by_image[annotation["image_id"]].append(annotation)
        listed = [(Path(image["file_name"]).stem, image) for image in _distinct(tree["images"])]
        listed.sort(key=lambda pair: (pair[0], str(pair[1]["id"])))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{annotations} is not a COCO instances file: {error!r}") from error
    if not listed:
        raise ValueError(f"{annotations} lists no images")
    if not images.is_dir():
        raise ValueError(f"--images {images} is not a folder")

    entries, num_bytes, taken = [], 0, set()
    for key, image in listed:
        path = images / image["file_name"]
        location = Location(path, image["file_name"]) if path.is_file() else None
        num_bytes += path.stat().st_size if location else 0
        data = json.dumps({"image": image, "annotations": by_image[image["id"]]}).encode()
        problem = "" if location else f"{path} does not exist"
        if key in taken:
            problem = f"another image has the key {key} already"
        taken.add(key)
        entries.append(Entry(key, location, data, problem))
    return Source(annotations, tuple(entries), num_bytes)


def record_from_coco(
    data: bytes, key: str, height: int, width: int, keep_crowds: bool, warnings: Counter[str]
) -> Record:
    """One image of COCO as an SA-1B record. Scores that COCO does not have are 1, the crop is the whole image.

    Raises `ValueError` for an annotation that is neither polygons nor RLE of the image's size.
    """
    tree = json.loads(data)
    image, annotations = tree["image"], []
    if (image.get("height", height), image.get("width", width)) != (height, width):
        stated = f"{image.get('width')} x {image.get('height')}"
        raise ValueError(f"COCO says {stated} pixels, the JPEG has {width} x {height}")
    if isinstance(image["id"], bool) or not isinstance(image["id"], int) or not 0 <= image["id"] < 2**63:
        raise ValueError(f"the image's id should be a 63-bit number, is {image['id']!r}")
    for annotation in tree["annotations"]:
        if annotation.get("iscrowd") and not keep_crowds:
            warnings[WARN_CROWD] += 1
            continue
        try:
            runs = rle.parse(_as_rle(annotation.get("segmentation"), height, width))
        except ValueError as error:
            raise ValueError(f"annotation {annotation.get('id')}: {error}") from error
        if rle.area(runs) == 0:
            warnings[WARN_EMPTY] += 1
            continue
        annotations.append(_sa1b_annotation(annotation, runs, height, width))
    return Record(image["id"], width, height, f"{key}.jpg", annotations)


def _sa1b_annotation(annotation: dict[str, Any], runs: rle.Runs, height: int, width: int) -> dict[str, Any]:
    """SA-1B's fields in SA-1B's order; box maxima inclusive as there. COCO's category and crowd flag come along."""
    x, y, box_width, box_height = rle.box(runs)
    return {
        "bbox": [float(x), float(y), float(box_width - 1), float(box_height - 1)],
        "area": int(rle.area(runs)),
        "segmentation": rle.to_coco(runs),
        "predicted_iou": 1.0,
        "point_coords": [deepest_point(rle.to_bitmap(runs))],
        "crop_box": [0.0, 0.0, float(width), float(height)],
        "id": annotation.get("id"),  # checks.check_annotation says if it is none
        "stability_score": 1.0,
        "category_id": annotation.get("category_id", 0),
        "iscrowd": int(annotation.get("iscrowd", 0)),
    }


def _as_rle(segmentation: object, height: int, width: int) -> dict[str, Any]:
    """Polygons become RLE; RLE stays what it is."""
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [height, width]:
            raise ValueError(f"RLE size is {segmentation.get('size')}, the image's [{height}, {width}]")
        return {
            "size": [height, width],
            "counts": segmentation.get("counts"),
        }  # as a string or a list, both of which rle.parse checks
    if isinstance(segmentation, list) and segmentation:
        for polygon in segmentation:
            if not isinstance(polygon, list) or len(polygon) % 2 or not is_numbers(polygon, max(6, len(polygon))):
                raise ValueError(f"a polygon needs an even number of coordinates, 6 or more; is {polygon!r}")
            if max(map(abs, polygon)) > FAR * max(height, width):  # rasterising takes time and memory by its extent
                raise ValueError(f"a polygon reaches {max(map(abs, polygon)):g}, far beyond {width} x {height} pixels")
        merged = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        return {"size": [height, width], "counts": merged["counts"].decode()}
    raise ValueError(f"should be polygons or RLE, is {segmentation!r}")


def deepest_point(mask: np.ndarray) -> list[float]:
    """[x, y] of a pixel deep inside the mask: the one whose nearest edge along its row or column is farthest."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    y0, x0 = rows[0], columns[0]
    inside = np.pad(mask[y0 : rows[-1] + 1, x0 : columns[-1] + 1].astype(bool), 1)
    depth = np.minimum(_edge_distance(inside, 0), _edge_distance(inside, 1))
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return [float(x + x0 - 1), float(y + y0 - 1)]


def _edge_distance(inside: np.ndarray, axis: int) -> np.ndarray:
    """Steps along an axis from each pixel to the nearest one outside, 0 outside; the border is outside."""
    place = np.arange(inside.shape[axis]).reshape((-1, 1) if axis == 0 else (1, -1))
    before = np.maximum.accumulate(np.where(inside, -1, place), axis)
    after = np.flip(np.minimum.accumulate(np.flip(np.where(inside, inside.shape[axis], place), axis), axis), axis)
    return np.minimum(place - before, after - place)


def _distinct(images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Images by id; a file that lists one twice (merged files do) counts it once."""
    return list({image["id"]: image for image in images}.values())
