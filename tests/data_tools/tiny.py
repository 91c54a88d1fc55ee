"""Tiny sources for the tests of the data tools, made on the spot: a few coloured boxes an image."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

HEIGHT, WIDTH = 48, 64
REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def jpeg_bytes(number: int, height: int = HEIGHT, width: int = WIDTH, mode: str = "RGB", form: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (height // 4, width // 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).convert(mode).save(buffer, form)
    return buffer.getvalue()


def annotation(mask: np.ndarray, annotation_id: int) -> dict[str, Any]:
    """As SA-1B writes it: box maxima inclusive, point with fractions, predicted IoU above 1."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    x, y, width, height = coco_mask.toBbox(rle).tolist()
    return {
        "bbox": [x, y, width - 1, height - 1],
        "area": int(coco_mask.area(rle)),
        "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode()},
        "predicted_iou": 1.01,
        "point_coords": [[x + 0.5, y + 0.25]],
        "crop_box": [0, 0.0, float(mask.shape[1]), mask.shape[0]],
        "id": annotation_id,
        "stability_score": 0.97,
    }


def boxes(number: int, num_masks: int = 3, height: int = HEIGHT, width: int = WIDTH) -> list[np.ndarray]:
    rng = np.random.default_rng(number)
    masks = []
    for _ in range(num_masks):
        y, x = rng.integers(0, height - 12), rng.integers(0, width - 12)
        mask = np.zeros((height, width), bool)
        mask[y : y + rng.integers(4, 12), x : x + rng.integers(4, 12)] = True
        masks.append(mask)
    return masks


def record(number: int, num_masks: int = 3) -> dict[str, Any]:
    masks = boxes(number, num_masks)
    return {
        "image": {"image_id": number, "width": WIDTH, "height": HEIGHT, "file_name": f"sa_{number}.jpg"},
        "annotations": [annotation(mask, number * 100 + i) for i, mask in enumerate(masks)],
    }


def sa1b_files(numbers: range) -> dict[str, bytes]:
    """File name to content of an SA-1B source."""
    files = {}
    for number in numbers:
        files[f"sa_{number}.jpg"] = jpeg_bytes(number)
        files[f"sa_{number}.json"] = json.dumps(record(number)).encode()
    return files


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def tar_bytes(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder: what has to be equal for two packed data sets to be the same."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
