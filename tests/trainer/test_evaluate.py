"""Scores against plain numpy, every mask counted once, the command line as a user runs it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import rle
from model.build import build_sam
from model.prompt_encoder import Prompts
from tests.trainer.tiny import sam_arguments
from trainer import evaluate, export, train
from trainer.config import load_config
from trainer.data.eval_data import evaluation_batch, evaluation_batches, evaluation_rows
from trainer.evaluate import summarize
from trainer.interactive import bitmap_iou, center_click, deepest, filled_box_iou, interact, upsample_to_original
from trainer.stages import build_sam_task


@pytest.fixture(scope="module")
def run_dir(scenes, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "sam"
    assert train.main(sam_arguments(scenes, path, "phases=[{name: joint, steps: 2}]")) == 0
    return path


def test_iou_and_filled_box_equal_numpy():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.random((9, 7)) > 0.5, rng.random((9, 7)) > 0.5
        assert bitmap_iou(a, b) == (a & b).sum() / (a | b).sum()
        ys, xs = np.nonzero(a)
        box = np.zeros_like(a)
        box[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] = True
        assert filled_box_iou(rle.from_bitmap(a)) == pytest.approx((a & box).sum() / (a | box).sum(), abs=1e-12)
    assert bitmap_iou(a & ~a, b & ~b) == 1.0


def test_clicks_are_the_deepest_pixels_of_the_larger_error():
    truth = np.zeros((12, 12), bool)
    truth[1:8, 2:9] = True
    assert deepest(truth) == (4.0, (5.0, 4.0))
    assert center_click(np.zeros_like(truth), truth) == (5.0, 4.0, 1)
    too_much = truth | (np.arange(12)[:, None] >= 8)
    assert center_click(too_much, truth)[2] == 0
    assert center_click(truth, truth) == (5.0, 4.0, 1), "a perfect answer gets another click inside"
    border = np.ones((5, 9), bool)
    assert deepest(border)[1][1] == 2.0, "the image's border counts as outside"


def test_upsampling_goes_through_the_input_and_drops_the_padding():
    logits = torch.full((1, 1, 4, 4), -1.0)
    logits[..., :3, :2] = 1.0
    bitmap = upsample_to_original(logits, 16, (8, 16), (80, 160))
    assert bitmap.shape == (1, 1, 80, 160)
    assert bitmap[0, 0, :, :70].all()
    assert not bitmap[0, 0, :, 90:].any()


@torch.no_grad()
def test_the_oracle_takes_the_best_of_three_and_the_answer_the_one_predicted_best(scenes, run_dir):
    """Against the network called by hand, its three hypotheses compared in plain numpy."""
    config = load_config(run_dir / "config.yaml")
    reader, rows = evaluation_rows(config)
    batch = evaluation_batch(reader, rows[:1], config)
    sam = build_sam_task(config, (), False).sam.eval()
    scores = interact(sam, batch)
    embeddings = sam.encode_images(sam.normalize_images(batch.images, batch.image_sizes))
    differ = 0
    for score, mask in zip(scores, batch.truths[0], strict=True):
        truth = rle.to_bitmap(mask).astype(bool)
        x, y, _ = score.clicks[0]
        none = torch.zeros(1, 1, dtype=torch.bool)
        prompts = Prompts(
            torch.tensor([[[[x, y]]]]),
            torch.ones(1, 1, 1),
            torch.zeros(1, 1, 4),
            none,
            torch.zeros(1, 1, 16, 16),
            none,
        )
        output = sam.decode_masks(embeddings, prompts)
        logits = torch.nn.functional.interpolate(output.low_res_logits[0], 64, mode="bilinear")[0, 1:].numpy()
        ious = [((one > 0) & truth).sum() / ((one > 0) | truth).sum() for one in logits]
        assert score.iou["click_1_oracle"] == pytest.approx(max(ious), abs=1e-12)
        chosen = ious[int(output.iou_predictions[0, 0, 1:].argmax())]
        assert score.iou["click_1"] == pytest.approx(chosen, abs=1e-12)
        differ += chosen < max(ious)
    assert differ, "the two protocols must not be the same everywhere, else this shows nothing"


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_mask_is_evaluated_once_on_any_number_of_ranks(scenes, run_dir, num_ranks):
    config = load_config(run_dir / "config.yaml")
    reader, rows = evaluation_rows(config)
    shares = [
        list(evaluation_batches(reader, rows, config, rank, num_ranks, batch_size=2)) for rank in range(num_ranks)
    ]
    assert len({len(batches) for batches in shares}) == 1, "the forward pass is collective"
    keys = [
        key
        for batches in shares
        for batch in batches
        for key, truths in zip(batch.keys, batch.truths, strict=True)
        if truths
    ]
    assert sorted(keys) == sorted(evaluation_batch(reader, rows, config).keys)


def test_the_command_prints_writes_and_draws(run_dir, tmp_path, capsys):
    out, picture = tmp_path / "scores.json", tmp_path / "masks.png"
    assert evaluate.main([str(run_dir), "--out", str(out), "--picture", str(picture)]) == 0
    scores = json.loads(out.read_text())
    by_prompt = {"box", "box_oracle", "click_1", "click_1_oracle", "click_3", "click_5"}
    assert by_prompt | {"filled_box", "num_masks"} == set(scores)
    assert scores["box_oracle"] >= scores["box"]
    assert scores["click_1_oracle"] >= scores["click_1"]
    assert 0.3 < scores["filled_box"] < 0.8
    assert f"{scores['box']:.4f}" in capsys.readouterr().out
    assert Image.open(picture).size[0] > 600


def test_a_run_without_checkpoints_says_so(run_dir, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    assert evaluate.main([str(tmp_path)]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err


def test_no_mask_is_an_error():
    with pytest.raises(ValueError, match="no mask"):
        summarize([])


def test_the_export_holds_exactly_the_networks_names_and_loads(run_dir, tmp_path):
    out = tmp_path / "sam.pth"
    assert export.main([str(run_dir), "--out", str(out)]) == 0
    weights = torch.load(out, weights_only=True)
    sam = build_sam("vit_tiny", image_size=64)
    sam.load_state_dict(weights, strict=True)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert export.main([str(tmp_path), "--out", str(out)]) == 2
