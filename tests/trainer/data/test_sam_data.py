"""Stage 2's samples: image, targets and prompts lie where the geometry says, broken ones train nothing."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools import rle
from data_tools.sample_format import Quarantined, load_manifest, save_quarantine
from tests.trainer.tiny import sam_arguments
from trainer.config import SamConfig, load_config
from trainer.data.images import SampleError
from trainer.data.mae_data import random_crop
from trainer.data.sam_data import SamDataset, place
from trainer.data.shards import ShardReader
from trainer.prompts import content_mask
from trainer.stages import build_pipeline


def dataset(scenes, tmp_path: Path, *more: str) -> SamDataset:
    path, *overrides = sam_arguments(scenes, tmp_path, *more)
    config = load_config(Path(path), overrides)
    assert isinstance(config, SamConfig)
    return build_pipeline(config).dataset  # type: ignore[return-value]


@pytest.mark.parametrize("more", [[], ["data.scale_jitter=[0.8,1.2]", "data.horizontal_flip=0.5"]])
def test_prompts_lie_on_their_masks(scenes, tmp_path, more):
    """At the input's own resolution: foreground points on the target, background points off it, boxes around it."""
    data = dataset(
        scenes, tmp_path, "loss.resolution=64", "prompts.types={point: 0.6, box: 0.4, mask: 0, none: 0}", *more
    )
    batch = data[list(range(24))]
    seen = {0: 0, 1: 0, "box": 0}
    for i, m in zip(*np.nonzero(batch.mask_valid.numpy()), strict=True):
        target = batch.masks[i, m].numpy()
        height, width = batch.image_sizes[i].tolist()
        for (x, y), label in zip(batch.point_coords[i, m].tolist(), batch.point_labels[i, m].tolist(), strict=True):
            if label < 0:
                continue
            assert -0.5 <= x <= width - 0.5
            assert -0.5 <= y <= height - 0.5
            # Scaled pixels may straddle the edge of the half-covered target: look one cell around.
            x0, y0 = round(x), round(y)
            near = target[max(0, y0 - 1) : y0 + 2, max(0, x0 - 1) : x0 + 2]
            assert (near == label).any()
            seen[label] += 1
        if batch.has_box[i, m]:
            ys, xs = np.nonzero(target)
            tight = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            # The target keeps half-covered cells only: it loses thin tips, and gains at most half a cell.
            outside = (batch.boxes[i, m].numpy() - tight) * [-1, -1, 1, 1]
            assert (outside > -0.51).all(), outside
            assert (outside < 4).all(), outside
            seen["box"] += 1
    assert min(seen.values()) >= 5, seen


def test_flip_mirrors_image_target_and_prompts_alike(scenes, tmp_path):
    plain = dataset(scenes, tmp_path, "data.horizontal_flip=0.0")[[0, 1, 2]]
    flipped = dataset(scenes, tmp_path, "data.horizontal_flip=1.0")[[0, 1, 2]]
    assert torch.equal(flipped.images, plain.images.flip(-1))
    assert torch.equal(flipped.masks, plain.masks.flip(-1))
    valid = plain.point_labels >= 0
    mirrored = 63 - plain.point_coords[..., 0]
    torch.testing.assert_close(flipped.point_coords[..., 0][valid], mirrored[valid], rtol=0, atol=1e-4)


def test_targets_equal_the_decoded_masks(scenes, tmp_path):
    """Without augmentation the 64-pixel target of a 64-pixel image is one of the stored masks, bit for bit."""
    data = dataset(scenes, tmp_path, "loss.resolution=64", "data.horizontal_flip=0.0")
    batch = data[[5]]
    raw = data.reader.read(data.order.row(5))
    stored = [rle.to_bitmap(rle.parse(a["segmentation"])) for a in raw.record.annotations]
    for m in np.flatnonzero(batch.mask_valid[0].numpy()):
        assert any(np.array_equal(batch.masks[0, m].numpy(), mask) for mask in stored)


def test_a_sample_depends_on_its_position_alone(scenes, tmp_path):
    data = dataset(
        scenes, tmp_path, "data.scale_jitter=[0.8,1.2]", "prompts.rounds=3", "prompts.rounds_without_click=2"
    )
    together, alone = data[[3, 7, -1]], data[[7]]
    for name in ("images", "masks", "point_coords", "click_uniforms", "gets_click", "drop_path_uniforms", "boxes"):
        assert torch.equal(getattr(together, name)[1], getattr(alone, name)[0]), name
    assert together.image_weight.tolist() == [1.0, 1.0, 0.0]
    assert together.gets_click.sum(dim=1)[:2].tolist() == [0, 0]


def test_a_broken_sample_has_no_weight_and_is_named(scenes, tmp_path, monkeypatch):
    data = dataset(scenes, tmp_path)
    read = data.reader.read

    def damaged(row):
        raw = read(row)
        return raw if row != data.order.row(1) else type(raw)(raw.jpeg[:200], raw.record)

    monkeypatch.setattr(data.reader, "read", damaged)
    batch = data[[0, 1, 2]]
    assert batch.image_weight.tolist() == [1.0, 0.0, 1.0]
    assert len(batch.problems) == 1
    assert batch.keys[1] in batch.problems[0]
    assert batch.local_counts()[0] == 2.0


def test_quarantined_positions_train_nothing_and_move_nobody(scenes, tmp_path):
    copy = tmp_path / "shards"
    shutil.copytree(scenes["train"], copy)
    plain = dataset({**scenes, "train": copy}, tmp_path)
    row = plain.order.row(1)
    save_quarantine(copy, [Quarantined(row, "sa_x", "checksum")])
    batch, before = dataset({**scenes, "train": copy}, tmp_path)[[0, 1, 2]], plain[[0, 1, 2]]
    assert batch.image_weight.tolist() == [1.0, 0.0, 1.0]
    assert "quarantined: checksum" in batch.problems[0]
    assert batch.keys[0] == before.keys[0]
    assert batch.keys[2] == before.keys[2]


def test_a_record_that_does_not_fit_its_image_is_an_error():
    from trainer.data.sam_data import decode_placed

    with pytest.raises(SampleError):
        decode_placed(b"no image", 10, 10, place(10, 10, 64, 1.0, (0, 0), False))


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(1500, 2250, 1.0), (1500, 2250, 1.2), (64, 40, 0.8), (1, 1, 1.0)]
)
def test_placement_keeps_the_aspect_and_fits_the_input(height, width, scale):
    placement = place(height, width, 1024, scale, (0.5, 0.5), False)
    x0, y0, x1, y1 = placement.window
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height
    assert max(placement.height, placement.width) <= 1024
    factor = scale * 1024 / max(height, width)
    # Whole pixels on both sides: off by at most one input pixel, or one source pixel's worth.
    assert placement.width == pytest.approx((x1 - x0) * factor, abs=max(1, factor))
    assert placement.height == pytest.approx((y1 - y0) * factor, abs=max(1, factor))


def test_content_excludes_padding(scenes, tmp_path):
    batch = dataset(scenes, tmp_path, "data.scale_jitter=[0.5,0.5]")[[0]]
    assert batch.image_sizes.tolist() == [[32, 32]]
    content = content_mask(batch.image_sizes, batch.images.shape[-1], 16)
    assert content.sum() == 64
    assert content[0, 0, :8, :8].all()


def test_hold_out_and_training_share_no_image(scenes):
    reader = ShardReader(scenes["train"])
    train, held_out = reader.split(8)
    rows = set(np.concatenate([shard.rows() for shard in train]).tolist())
    assert rows.isdisjoint(held_out.tolist())
    assert len(rows) + len(held_out) == load_manifest(scenes["train"]).num_samples
    assert len(held_out) > 0


def test_random_crops_have_the_asked_area_and_fit():
    rng = np.random.default_rng(0)
    for _ in range(200):
        x, y, w, h = random_crop(120, 200, (0.2, 1.0), rng.random((10, 4)))
        assert x >= 0
        assert x + w <= 200
        assert y >= 0
        assert y + h <= 120
        assert w * h >= 0.19 * 120 * 200
