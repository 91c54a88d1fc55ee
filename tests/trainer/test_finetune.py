"""Fine-tuning as docs/recipes.md says: own COCO file, a released file's weights, embeddings once, export."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools import pack
from model.build import build_sam
from tests.data_tools.tiny import HEIGHT, WIDTH, jpeg_bytes
from tests.model.support import randomize
from trainer import embed, export, train
from trainer.checkpoint import Checkpointer, load_weights
from trainer.distributed import single_process

CONFIG = Path(__file__).parents[2] / "launch" / "configs" / "sam_finetune.yaml"


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    """Own data, packed: 12 images with two polygons each; and `sam.pth`, as a released file would be."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "images").mkdir()
    tree = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    rng = np.random.default_rng(0)
    for number in range(12):
        name = f"{number:03d}.jpg"
        (folder / "images" / name).write_bytes(jpeg_bytes(number))
        tree["images"].append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
        for k in range(2):
            x, y = 30 * k + rng.integers(0, 12), rng.integers(0, 20)
            polygon = [x, y, x + 20, y, x + 20, y + 18, x, y + 18]
            tree["annotations"].append(
                {
                    "id": 2 * number + k,
                    "image_id": number,
                    "category_id": 1,
                    "iscrowd": 0,
                    "segmentation": [[float(value) for value in polygon]],
                    "bbox": [float(x), float(y), 20.0, 18.0],
                    "area": 360.0,
                }
            )
    (folder / "instances.json").write_text(json.dumps(tree))
    arguments = ["--annotations", str(folder / "instances.json"), "--images", str(folder / "images")]
    assert pack.main(["coco", *arguments, "--out", str(folder / "shards")]) in (0, None)
    torch.save(randomize(build_sam("vit_tiny", 128)).state_dict(), folder / "sam.pth")
    return folder


def arguments(mine: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        str(CONFIG),
        f"run_dir={run_dir}",
        f"data.shards={mine / 'shards'}",
        f"data.embeddings={mine / 'embeddings'}",
        f"model.init_from={mine / 'sam.pth'}",
        "model.size=vit_tiny",
        "model.image_size=64",  # the file is for 128: its tables are resized
        "data.holdout_images=2",
        "data.max_masks=2",
        "data.workers=0",
        "loss.resolution=16",
        "phases=[{name: head, steps: 2, frozen: [image_encoder]}]",
        "batch.global_size=2",
        "engine.precision=fp32",
        "schedule.warmup_steps=1",
        "optim.ema_decay=0.5",
        *more,
    ]


def newest(run_dir: Path) -> Path:
    found = Checkpointer(run_dir / "checkpoints", 1, single_process("cpu")).newest()
    assert found is not None
    return found


def test_frozen_encoder(mine, tmp_path):
    command = arguments(mine, tmp_path / "run")
    assert train.main(command) == 2, "no embeddings yet"
    assert embed.main(command) == 0
    assert train.main(command) == 0
    weights, start = load_weights(newest(tmp_path / "run")), torch.load(mine / "sam.pth", weights_only=True)
    same = "image_encoder.blocks.0.attn.qkv.weight"
    assert torch.equal(weights[f"sam.{same}"], start[same])
    moved = "mask_decoder.mask_tokens.weight"
    assert not torch.equal(weights[f"sam.{moved}"], start[moved])
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "mine.pth")]) == 0
    exported = torch.load(tmp_path / "mine.pth", weights_only=True)
    assert torch.equal(exported[moved], weights[f"sam.{moved}"])
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])


def test_trained_encoder(mine, tmp_path):
    trained = ["phases=[{name: all, steps: 2}]", "data.embeddings=null", "optim.layer_decay=0.6"]
    assert train.main(arguments(mine, tmp_path / "run", *trained, "data.horizontal_flip=0.5")) == 0
    weights = load_weights(newest(tmp_path / "run"))
    start = torch.load(mine / "sam.pth", weights_only=True)
    name = "image_encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(weights[f"sam.{name}"], start[name])
