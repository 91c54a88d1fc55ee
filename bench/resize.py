"""Claim: the resize kernel of `trainer/data/images.py` beats what libraries offer for the same result.

    python -m bench.resize                  # CPU ms an image, about a minute
    python -m bench.resize --repeats 9

What a loader needs: a window of fractional pixels of an RGB image, shrunk with antialiasing, as channel planes. "sam":
genuine SA-1B images decoded at 1/2, whole, long side to 1024. "mae": photos, a random crop to 224. Every candidate
ends with the planes that a batch holds. OpenCV and torch take windows of whole pixels only: theirs is the nearest, so
their crop lies up to half a pixel off.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image

from trainer.data.images import decode_jpeg, resize_window
from trainer.data.mae_data import random_crop

Window = tuple[float, float, float, float]
Case = tuple[np.ndarray, Window, int, int]  # image, window, height, width


def ours(image: np.ndarray, window: Window, height: int, width: int) -> np.ndarray:
    return np.ascontiguousarray(resize_window(image, window, height, width).transpose(2, 0, 1))


def pillow(image: np.ndarray, window: Window, height: int, width: int) -> np.ndarray:
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, box=window)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def whole_pixels(image: np.ndarray, window: Window) -> np.ndarray:
    x0, y0, x1, y1 = (round(edge) for edge in window)
    return image[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]


def opencv(image: np.ndarray, window: Window, height: int, width: int, how: int) -> np.ndarray:
    resized = cv2.resize(whole_pixels(image, window), (width, height), interpolation=how)
    return np.ascontiguousarray(resized.transpose(2, 0, 1))


def torch_bytes(image: np.ndarray, window: Window, height: int, width: int) -> np.ndarray:
    part = torch.from_numpy(whole_pixels(image, window)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(part, (height, width), mode="bilinear", antialias=True)
    return resized[0].contiguous().numpy()


CANDIDATES: dict[str, Callable[..., np.ndarray]] = {
    "ours": ours,
    "Pillow, triangle": pillow,
    "torch, bytes, antialias": torch_bytes,
    "OpenCV, INTER_AREA": lambda *case: opencv(*case, how=cv2.INTER_AREA),
    "OpenCV, INTER_LINEAR (aliases)": lambda *case: opencv(*case, how=cv2.INTER_LINEAR),
}


def sam_cases(data: Path) -> list[Case]:
    cases = []
    for path in sorted((data / "sa1b_genuine").glob("*.jpg")):
        jpeg = path.read_bytes()
        height, width, *_ = simplejpeg.decode_jpeg_header(jpeg)
        factor = 1024 / max(height, width)
        image = decode_jpeg(jpeg, round(height * factor), round(width * factor))
        window = (0.0, 0.0, float(image.shape[1]), float(image.shape[0]))
        cases.append((image, window, round(height * factor), round(width * factor)))
    return cases


def mae_cases(data: Path) -> list[Case]:
    rng, cases = np.random.default_rng(0), []
    for path in sorted((data / "photos").glob("*/*.jpg"))[:64]:
        image = decode_jpeg(path.read_bytes(), 1 << 16, 1 << 16)
        x, y, w, h = random_crop(*image.shape[:2], (0.08, 1.0), rng.random((10, 4)))
        cases.append((image, (x, y, x + w, y + h), 224, 224))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="holds sa1b_genuine and photos")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    for name, cases in (("sam", sam_cases(options.data)), ("mae", mae_cases(options.data))):
        times: dict[str, list[float]] = {candidate: [] for candidate in CANDIDATES}
        for repeat in range(options.repeats + 1):
            for candidate, resize in CANDIDATES.items():  # in turn: a change of load meets all alike
                start = time.process_time()
                for case in cases:
                    resize(*case)
                if repeat:
                    times[candidate].append(1e3 * (time.process_time() - start) / len(cases))
        for candidate, values in times.items():
            apart = max(np.abs(CANDIDATES[candidate](*c).astype(int) - pillow(*c)).max() for c in cases)
            mean = np.mean([np.abs(CANDIDATES[candidate](*c).astype(int) - pillow(*c)).mean() for c in cases])
            print(f"{name}  {candidate:32} {statistics.median(values):7.2f} ms  "
                  f"from Pillow: at most {apart:3d}, mean {mean:.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
