"""Synthetic scenes: SA-1B's layout to the letter, exact masks, and nothing that a filled box solves."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data_tools import synthesize
from data_tools.sample_format import parse_record

NUM_SCENES = 200
SA1B_KEYS = [
    "bbox",
    "area",
    "segmentation",
    "predicted_iou",
    "point_coords",
    "crop_box",
    "id",
    "stability_score",
]


@pytest.fixture(scope="module")
def scenes() -> list[synthesize.Scene]:
    return [synthesize.synthesize_scene(0, number, 128, 128) for number in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    assert synthesize.main(["--out", str(out), "--num-images", "12", "--seed", "3", "--size", "96"]) == 0
    return out


def test_a_filled_box_is_a_poor_answer(scenes):
    shares = []
    for scene in scenes:
        for mask in scene.masks:
            ys, xs = np.nonzero(mask)
            shares.append(len(ys) / ((np.ptp(ys) + 1) * (np.ptp(xs) + 1)))
    assert 0.50 < np.mean(shares) < 0.70


def test_masks_are_large_and_different(scenes):
    for scene in scenes:
        assert scene.image.shape == (128, 128, 3)
        assert scene.image.dtype == np.uint8
        assert len(scene.masks) >= 1
        assert scene.masks.sum(axis=(1, 2)).min() >= synthesize.MIN_AREA_SHARE * 128 * 128
        assert len({mask.tobytes() for mask in scene.masks}) == len(scene.masks)


def test_masks_nest_or_are_disjoint(scenes):
    """Visible masks share a pixel only where one is a part of the other; both happen."""
    nested = 0
    for scene in scenes:
        for i, mask in enumerate(scene.masks):
            for other in scene.masks[:i]:
                both = (mask & other).sum()
                assert both in (0, mask.sum(), other.sum())
                nested += both > 0
    assert nested > NUM_SCENES / 10


def test_masks_follow_what_is_seen(scenes):
    """Across a mask's border colours differ far more than within it, so an edge is where the mask says."""
    across, within = [], []
    for scene in scenes[:50]:
        steps = np.abs(np.diff(scene.image.astype(np.int64), axis=1)).sum(axis=2)  # (H, W - 1)
        for mask in scene.masks:
            border = mask[:, 1:] != mask[:, :-1]
            across.append(steps[border].mean())
            within.append(np.median(steps[mask[:, 1:] & mask[:, :-1]]))
    assert np.mean(across) > 5 * np.mean(within)


def test_a_scene_depends_on_seed_and_number_alone(scenes):
    again = synthesize.synthesize_scene(0, 7, 128, 128)
    assert np.array_equal(again.image, scenes[7].image)
    assert np.array_equal(again.masks, scenes[7].masks)
    assert not np.array_equal(synthesize.synthesize_scene(1, 7, 128, 128).image, again.image)
    assert not np.array_equal(scenes[8].image, again.image)


def test_other_shapes_than_square():
    scene = synthesize.synthesize_scene(0, 0, 96, 160)
    assert scene.image.shape == (96, 160, 3)
    assert scene.masks.shape[1:] == (96, 160)


def test_files_are_in_the_sa1b_layout(folder):
    paths = sorted(folder.glob("*.json"))
    assert len(paths) == 12
    assert {path.stem for path in paths} == {path.stem for path in folder.glob("*.jpg")}
    for path in paths:
        record = parse_record(path.read_bytes())
        assert path.stem == f"sa_{record.image_id}" == record.key
        with Image.open(io.BytesIO((folder / record.file_name).read_bytes())) as image:
            assert image.format == "JPEG"
            assert image.size == (record.width, record.height) == (96, 96)
        for annotation in record.annotations:
            assert list(annotation) == SA1B_KEYS
            segmentation = annotation["segmentation"]
            assert segmentation["size"] == [96, 96]
            assert isinstance(segmentation["counts"], str)
            mask = coco_mask.decode(segmentation)
            ys, xs = np.nonzero(mask)
            assert annotation["area"] == mask.sum()
            assert annotation["bbox"] == [xs.min(), ys.min(), np.ptp(xs), np.ptp(ys)]
            [[x, y]] = annotation["point_coords"]
            assert mask[int(y), int(x)]
            assert annotation["crop_box"] == [0, 0, 96, 96]


def test_ids_are_unique_also_between_seeds(folder, tmp_path):
    assert synthesize.main(["--out", str(tmp_path), "--num-images", "3", "--seed", "4", "--size", "64"]) == 0
    ids, names = [], []
    for path in (*folder.glob("*.json"), *tmp_path.glob("*.json")):
        names.append(path.name)
        ids += [annotation["id"] for annotation in json.loads(path.read_bytes())["annotations"]]
    assert len(set(ids)) == len(ids)
    assert len(set(names)) == len(names) == 15


def test_written_twice_the_bytes_are_the_same(folder, tmp_path):
    assert synthesize.main(["--out", str(tmp_path), "--num-images", "4", "--seed", "3", "--size", "96"]) == 0
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


@pytest.mark.parametrize("option", [["--num-images", "0"], ["--size", "8"], ["--seed", "-1"]])
def test_impossible_numbers_are_refused(option, tmp_path, capsys):
    out = tmp_path / "out"
    assert synthesize.main(["--out", str(out), "--num-images", "1", *option]) != 0
    assert "must be at least" in capsys.readouterr().err
    assert not out.exists()
