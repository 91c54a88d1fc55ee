"""Automatic masks against the released generator with the same weights; the command as a user runs it."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage
from segment_anything import SamAutomaticMaskGenerator, SamPredictor

from data_tools import rle
from model.build import build_sam
from model.weights import sam_to_huggingface
from tests.model.test_sam import pair
from tests.trainer.tiny import sam_arguments
from trainer import export, predict, train
from trainer.automatic import Settings, automatic_masks, embed, point_grid, point_prompts
from trainer.predict import answer, load_sam


@pytest.fixture(scope="module")
def networks(photo):
    """Ours and the released one with the same random weights, at 128 pixels.

    A random network's masks are half of every image. Here a channel of the upscaled embedding is made constant, and
    each token takes of it what moves 97 % of its logits below 0: that leaves small masks in different places.
    """
    torch.manual_seed(1)
    ours, theirs = pair("vit_tiny", 128)
    decoder = ours.mask_decoder
    with torch.no_grad():
        decoder.output_upscaling[3].weight[:, 0], decoder.output_upscaling[3].bias[0] = 0, 1
        for head in decoder.output_hypernetworks_mlps:
            head.layers[2].weight[0], head.layers[2].bias[0] = 0, 0
        embedded = embed(ours, photo)
        prompts = point_prompts(embedded, point_grid(8) * np.array([201, 150]))
        logits = ours.decode_masks(embedded.embedding, prompts).low_res_logits[0, ..., :24, :]  # not the padding
        for token, head in enumerate(decoder.output_hypernetworks_mlps):
            high = np.quantile(logits[:, token].numpy(), 0.97)
            head.layers[2].bias[0] = -high / torch.nn.functional.gelu(torch.ones(()))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A smooth random picture, wider than high, so that resize and padding matter."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).random((150, 201, 3)), (6, 6, 0))
    return ((noise - noise.min()) / np.ptp(noise) * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def run_dir(scenes, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "sam"
    assert train.main(sam_arguments(scenes, path, "phases=[{name: joint, steps: 1}]", "schedule.warmup_steps=1")) == 0
    return path


def released(theirs, image: np.ndarray, settings: Settings) -> list[dict]:
    return SamAutomaticMaskGenerator(
        theirs,
        points_per_side=settings.points_per_side,
        points_per_batch=settings.points_at_once,
        pred_iou_thresh=settings.min_predicted_iou,
        stability_score_thresh=settings.min_stability,
        stability_score_offset=settings.stability_offset,
        box_nms_thresh=settings.max_box_iou,
        crop_nms_thresh=settings.max_box_iou,
        min_mask_region_area=settings.min_region_area,
        output_mode="coco_rle",
    ).generate(image)


# A random network predicts IoUs about 0 and has logits of some hundredths, hence these thresholds.
OPEN = Settings(8, 16, 0.0, 0.0, 0.02, 1.0)
FILTERS = {
    "predicted_iou": Settings(8, 16, 0.03, 0.0, 0.02, 1.0),
    "stability": Settings(8, 16, 0.0, 0.08, 0.02, 1.0),
    "suppression": Settings(8, 16, 0.0, 0.0, 0.02, 0.7),
    "all": Settings(8, 20, 0.01, 0.03, 0.02, 0.7),
    "regions": Settings(8, 16, 0.02, 0.0, 0.02, 0.7, 6),
}


@pytest.mark.parametrize("name", FILTERS)
def test_the_masks_are_those_of_the_released_generator(networks, photo, name):
    ours, theirs = networks
    settings = FILTERS[name]
    found, wanted = automatic_masks(ours, photo, settings), released(theirs, photo, settings)
    everything = 3 * settings.points_per_side**2
    assert 3 <= len(wanted) < everything, "the filter takes some and leaves some"
    assert len(found) == len(wanted)
    # Masks of equal predicted IoU may change places, since the networks' sums differ in their last bits.
    of_point = {}
    for one in found:
        of_point.setdefault(tuple(np.round(one.point, 3)), []).append(one)
    for theirs_one in wanted:
        same_point = of_point[tuple(np.round(theirs_one["point_coords"][0], 3))]
        mine = min(same_point, key=lambda one: abs(one.predicted_iou - theirs_one["predicted_iou"]))
        assert mine.predicted_iou == pytest.approx(theirs_one["predicted_iou"], abs=1e-5)
        decoded = coco_mask.decode(theirs_one["segmentation"]).astype(bool)
        differing = np.count_nonzero(rle.to_bitmap(mine.mask).astype(bool) ^ decoded)
        # A pixel whose logit is 0 within rounding may fall on either side; a cleaned region then moves with it.
        assert differing <= 5, (name, differing)
        assert mine.stability == pytest.approx(theirs_one["stability_score"], abs=1e-3)
        x0, y0, x1, y1 = mine.box
        np.testing.assert_allclose([x0, y0, x1 - x0, y1 - y0], theirs_one["bbox"], atol=1)


def test_a_network_of_the_single_token_is_asked_by_it_alone(networks, photo):
    """Where `loss.multimask=single` trained no other, the others must not count."""
    ours = copy.deepcopy(networks[0])

    def areas() -> list[int]:
        return [rle.area(found.mask) for found in automatic_masks(ours, photo, OPEN, single=True)]

    before = areas()
    assert len(before) == OPEN.points_per_side**2
    heads = ours.mask_decoder.output_hypernetworks_mlps
    with torch.no_grad():
        for untrained in heads[1:]:
            untrained.layers[-1].weight.neg_()
    assert areas() == before
    with torch.no_grad():
        heads[0].layers[-1].weight.neg_()
    assert areas() != before


def test_other_settings_give_other_masks(networks, photo):
    """The comparison above can fail: each filter changes the result."""
    counts = {name: len(automatic_masks(networks[0], photo, settings)) for name, settings in FILTERS.items()}
    assert len(automatic_masks(networks[0], photo, OPEN)) == 192
    assert len(set(counts.values())) >= 4, counts


@pytest.mark.parametrize(
    "points, box",
    [
        ([(60.0, 40.0, 1)], None),
        ([], (20.0, 30.0, 150.0, 120.0)),
        ([(60.0, 40.0, 1), (150.0, 100.0, 0)], None),
        ([(60.0, 40.0, 1)], (20.0, 30.0, 150.0, 120.0)),
    ],
)
def test_single_prompts_are_answered_like_the_released_predictor(photo, points, box):
    torch.manual_seed(1)
    ours, theirs = pair("vit_tiny", 128)
    predictor = SamPredictor(theirs)
    predictor.set_image(photo)
    several = len(points) + bool(box) > 1
    masks, ious, _ = predictor.predict(
        np.array([p[:2] for p in points]) if points else None,
        np.array([p[2] for p in points]) if points else None,
        np.array(box) if box else None,
        multimask_output=not several,
    )
    best = int(ious.argmax())
    found = answer(ours, photo, points, box, single=False)
    assert found.predicted_iou == pytest.approx(float(ious[best]), abs=1e-5)
    # A pixel whose logit is 0 within rounding may fall on either side.
    assert np.count_nonzero(rle.to_bitmap(found.mask).astype(bool) ^ masks[best]) <= 3
    assert 0 < np.count_nonzero(masks[best]) < masks[best].size


def test_the_command_writes_a_picture_and_json_from_run_checkpoint_and_file(run_dir, photo, tmp_path):
    image, weights = tmp_path / "sa_17.png", tmp_path / "sam.pth"
    Image.fromarray(photo).save(image)
    assert export.main([str(run_dir), "--out", str(weights)]) == 0
    checkpoint = next((run_dir / "checkpoints").glob("step_*"))
    written = []
    for number, source in enumerate((run_dir, checkpoint, weights)):
        out = tmp_path / f"answer_{number}"
        arguments = [str(source), str(image), "--point", "60,40", "--point", "10,10,0", "--out", str(out)]
        assert predict.main(arguments) == 0
        assert Image.open(f"{out}.png").size == (201, 150)
        written.append(json.loads((tmp_path / f"answer_{number}.json").read_text()))
    assert written[0] == written[1] == written[2]
    assert written[0]["image"] == {"image_id": 17, "width": 201, "height": 150, "file_name": "sa_17.png"}
    (one,) = written[0]["annotations"]
    assert coco_mask.area(one["segmentation"]) == one["area"]
    assert one["point_coords"] == [[60.0, 40.0]]


def test_everything_writes_what_the_packer_reads(run_dir, photo, tmp_path):
    """The JSON beside its image is a sample of the SA-1B kind."""
    from data_tools import pack

    folder = tmp_path / "raw"
    folder.mkdir()
    Image.fromarray(photo).save(folder / "sa_17.jpg")
    thresholds = ["--min-predicted-iou", "0", "--min-stability", "0", "--points-per-side", "4", "--max-box-iou", "0.9"]
    command = [str(run_dir), str(folder / "sa_17.jpg"), "--everything", *thresholds, "--out", str(folder / "sa_17")]
    assert predict.main(command) == 0
    record = json.loads((folder / "sa_17.json").read_text())
    assert record["annotations"]
    keys = {"id", "segmentation", "bbox", "area", "predicted_iou", "stability_score", "crop_box", "point_coords"}
    assert set(record["annotations"][0]) == keys
    (folder / "sa_17.png").unlink()
    assert pack.main(["sa1b", str(folder), "--out", str(tmp_path / "shards"), "--workers", "1"]) in (0, None)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--everything", "--point", "1,2"], "either --everything"),
        (["--point", "1"], "numbers with commas"),
        (["--point", "1,2,3"], "the label is"),
        (["--box", "5,5,1,1"], "x0 < x1"),
        (["--point", "nan,1"], "numbers with commas"),
    ],
)
def test_wrong_arguments_are_explained(run_dir, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        predict.main([str(run_dir), str(tmp_path / "x.png"), *more])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--point", "5000,5"], "--point 5000,5 lies outside the image"),
        (["--box=-9,-9,-1,-1"], "does not touch the image"),
        (["--everything", "--points-per-side", "0"], "at least 1 is needed"),
        (["--point", "5,5", "--out", "nowhere/x"], "nowhere is no folder"),
        (["--everything", "--max-box-iou", "nan"], "--max-box-iou nan: an IoU lies between 0 and 1"),
        (["--everything", "--min-region-area", "-5"], "--min-region-area -5: an area in pixels"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(run_dir, photo, tmp_path, capsys, more, message):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    assert predict.main([str(run_dir), str(tmp_path / "photo.png"), *more]) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_read_is_named(run_dir, tmp_path, capsys):
    assert predict.main([str(run_dir), str(tmp_path / "x.png"), "--point", "1,2"]) == 2
    assert "x.png" in capsys.readouterr().err
    with pytest.raises(ValueError, match="does not exist"):
        load_sam(tmp_path / "nowhere")
    torch.save(sam_to_huggingface(build_sam("vit_tiny", 64).state_dict()), tmp_path / "transformers.pth")
    load_sam(tmp_path / "transformers.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no weights of a SAM"):
        load_sam(tmp_path / "other.pth")
