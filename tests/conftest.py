"""Small packed data sets that many tests train on, made once a session."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

from data_tools import pack, synthesize

torch.set_num_threads(1)
# No test asserts a time: on a busy machine an example may take any.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    """Tests look at a CPU, so that they say the same on every machine; `-m gpu` is for those that need a GPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and `-m gpu`")


def pack_scenes(root: Path, name: str, num_images: int, seed: int, size: int = 64) -> Path:
    """Synthetic scenes, packed in shards of 10."""
    raw, shards = root / f"raw_{name}", root / name
    assert synthesize.main(
        ["--out", str(raw), "--num-images", str(num_images), "--seed", str(seed), "--size", str(size)]
    ) in (0, None)
    assert pack.main(["sa1b", str(raw), "--out", str(shards), "--shard-size", "10", "--workers", "1"]) in (0, None)
    return shards


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`train` (24 images) and `eval` (4 images), 64 pixels, packed."""
    root = tmp_path_factory.mktemp("scenes")
    return {"train": pack_scenes(root, "train", 24, 0), "eval": pack_scenes(root, "eval", 4, 9)}
