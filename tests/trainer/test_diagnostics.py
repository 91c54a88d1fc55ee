"""Diagnostics against plain numpy and finite differences, and in a run."""

import json

import numpy as np
import pytest
import torch

from tests.trainer.tiny import sam_arguments
from trainer import train
from trainer.config import SamLoss, load_config
from trainer.data.eval_data import diagnostic_batch, evaluation_rows
from trainer.diagnostics import NAMES, diagnose, gradients, iou, means, pairwise_iou
from trainer.losses import dice_loss, focal_loss
from trainer.stages import build_sam_task


@pytest.fixture(scope="module")
def run_dir(scenes, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "sam"
    more = ["phases=[{name: all, steps: 4}]", "diagnostics.every_steps=2", "diagnostics.num_images=3"]
    assert train.main(sam_arguments(scenes, path, *more)) == 0
    return path


def test_gradient_norms_and_cosine_equal_finite_differences():
    torch.manual_seed(0)
    settings = SamLoss(resolution=6)
    logits = torch.randn(1, 2, 6, 6, dtype=torch.float64)  # of the target's own size: no resize between
    targets = (torch.rand(1, 2, 6, 6) > 0.6).to(torch.uint8)

    def slope(loss, i, step=1e-3):
        out = torch.zeros(2, 36, dtype=torch.float64)
        for m in range(2):
            for p in range(36):
                moved = [logits.clone(), logits.clone()]
                for sign, one in zip((1, -1), moved, strict=True):
                    one.view(1, 2, 36)[0, m, p] += sign * step
                high, low = (loss(one)[0, m] for one in moved)
                out[m, p] = (high - low).double() / (2 * step)
        return out

    by_focal = slope(lambda x: settings.focal * focal_loss(x, targets, 0.25, 2.0), 0)
    by_dice = slope(lambda x: settings.dice * dice_loss(x, targets, 1.0), 1)
    focal, dice, cosine = gradients(logits.float(), targets, settings)
    # The losses are fp32: differences of 1e-3 leave about 1e-3 of the slope.
    np.testing.assert_allclose(focal[0], by_focal.norm(dim=1), rtol=5e-3)
    np.testing.assert_allclose(dice[0], by_dice.norm(dim=1), rtol=5e-3)
    np.testing.assert_allclose(cosine[0], torch.cosine_similarity(by_focal, by_dice, dim=1), atol=5e-3)
    assert (cosine < 0.99).all(), "the two losses do not pull at the same pixels alike"


def test_a_loss_without_weight_pulls_nowhere():
    logits, targets = torch.randn(1, 1, 8, 8), torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    focal, dice, cosine = gradients(logits, targets, SamLoss(resolution=8, dice=0.0))
    assert focal > 0
    assert dice == cosine == 0


def test_ious_equal_numpy():
    rng = np.random.default_rng(0)
    masks = rng.random((2, 3, 3, 9, 9)) > 0.5
    found = pairwise_iou(torch.from_numpy(masks))
    for i in range(2):
        for m in range(3):
            a, b, c = masks[i, m]
            expected = np.mean([(x & y).sum() / (x | y).sum() for x, y in ((a, b), (a, c), (b, c))])
            assert float(found[i, m]) == pytest.approx(expected, rel=1e-6)  # fp32
    assert iou(torch.zeros(1, 1, 4, 4, dtype=torch.bool), torch.zeros(1, 1, 4, 4, dtype=torch.bool)) == 1


def test_the_batch_has_clicks_inside_their_objects(run_dir):
    config = load_config(run_dir / "config.yaml")
    reader, rows = evaluation_rows(config)
    batch = diagnostic_batch(reader, rows, config)
    assert batch.valid.any(dim=1).all()
    scale = config.model.image_size / config.loss.resolution
    inside = []
    for i, m in torch.nonzero(batch.valid).tolist():
        first, second = batch.clicks[i, m].tolist()
        assert first != second
        inside += [bool(batch.targets[i, m, int(y / scale), int(x / scale)]) for x, y in (first, second)]
    # A click on a pixel at the border may fall into a target cell that is less than half covered.
    assert np.mean(inside) > 0.8


@torch.no_grad()
def test_a_network_that_ignores_its_prompt_is_seen(run_dir):
    """With the prompt encoder's points made equal, two clicks get one mask: both IoUs are 1."""
    config = load_config(run_dir / "config.yaml")
    reader, rows = evaluation_rows(config)
    batch = diagnostic_batch(reader, rows, config)
    sam = build_sam_task(config, (), False).sam.eval()
    looking = means(diagnose(sam, config, batch).tolist())
    assert looking["other_object_iou"] < 1
    sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.zero_()
    blind = means(diagnose(sam, config, batch).tolist())
    assert blind["same_object_iou"] == blind["other_object_iou"] == 1.0


def test_a_run_writes_the_curves_and_trains_as_without_them(run_dir, scenes, tmp_path):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    curves = {line["step"]: line for line in lines if "diagnostics/seconds" in line}
    assert set(curves) == {2, 4}
    assert {f"diagnostics/{name}" for name in NAMES} <= set(curves[2])
    assert 0 <= curves[4]["diagnostics/hypotheses_iou"] <= 1
    assert curves[4]["diagnostics/chosen_gap"] >= 0
    assert -1 <= curves[4]["diagnostics/gradient_cosine"] <= 1
    plain = tmp_path / "plain"
    assert train.main(sam_arguments(scenes, plain, "phases=[{name: all, steps: 4}]")) == 0
    without = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    losses = [[line["train/loss"] for line in some if "train/loss" in line] for some in (lines, without)]
    assert losses[0] == losses[1]
