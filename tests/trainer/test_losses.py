"""Losses against their formulas in plain numpy float64, and that their normalisation ignores the layout."""

import numpy as np
import pytest
import torch

from trainer.losses import (
    dice_loss,
    focal_loss,
    iou_loss,
    mask_iou,
    mean_per_image,
    mean_per_mask,
    read_at,
    sample_points,
)


def reference_focal(logits, targets, alpha, gamma):
    p = 1 / (1 + np.exp(-logits))
    p_t = np.where(targets == 1, p, 1 - p)
    alpha_t = np.where(targets == 1, alpha, 1 - alpha)
    return np.mean(-alpha_t * (1 - p_t) ** gamma * np.log(p_t), axis=(-2, -1))


def reference_dice(logits, targets, smooth):
    p = 1 / (1 + np.exp(-logits))
    overlap = (p * targets).sum(axis=(-2, -1))
    return 1 - (2 * overlap + smooth) / (p.sum(axis=(-2, -1)) + targets.sum(axis=(-2, -1)) + smooth)


@pytest.fixture
def masks():
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 4, (2, 3, 16, 16))
    targets = (generator.random((2, 3, 16, 16)) < 0.3).astype(np.float64)
    targets[0, 0], targets[0, 1] = 0, 1
    return logits, targets


def test_focal_and_dice_equal_their_formulas(masks):
    logits, targets = masks
    ours = [torch.from_numpy(a).float() for a in (logits, targets)]
    # fp32 against float64: 256 terms of relative error 6e-8.
    np.testing.assert_allclose(focal_loss(*ours, 0.25, 2.0), reference_focal(logits, targets, 0.25, 2.0), rtol=1e-6)
    np.testing.assert_allclose(dice_loss(*ours, 1.0), reference_dice(logits, targets, 1.0), rtol=1e-6, atol=1e-7)
    # The comparison can fail: alpha the wrong way round is caught.
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(focal_loss(*ours, 0.75, 2.0), reference_focal(logits, targets, 0.25, 2.0), rtol=1e-6)


def test_the_documents_examples_with_alpha_t():
    easy, hard = np.log(0.01 / 0.99), np.log(0.6 / 0.4)
    pixel = torch.ones(1, 1)
    assert float(focal_loss(pixel * easy, pixel * 0, 0.25, 2.0)) == pytest.approx(0.75 * 1e-4 * -np.log(0.99), rel=1e-4)
    assert float(focal_loss(pixel * hard, pixel, 0.25, 2.0)) == pytest.approx(0.25 * 0.16 * -np.log(0.6), rel=1e-5)


def reference_iou(logits, targets):
    overlap = ((logits > 0) & (targets == 1)).sum(axis=(-2, -1))
    return overlap / np.maximum(((logits > 0) | (targets == 1)).sum(axis=(-2, -1)), 1)


def test_iou_and_its_loss_equal_their_formulas_and_targets_broadcast(masks):
    logits, targets = masks
    ours, truth = torch.from_numpy(logits).float(), torch.from_numpy(targets[:, :1]).to(torch.uint8)
    wanted = reference_iou(logits, targets[:, :1])
    np.testing.assert_allclose(mask_iou(ours, truth), wanted, rtol=1e-6)
    guess = np.linspace(-0.2, 1.3, wanted.size).reshape(wanted.shape)
    found = iou_loss(torch.from_numpy(guess).float(), mask_iou(ours, truth))
    np.testing.assert_allclose(found, (guess - wanted) ** 2, rtol=1e-6, atol=1e-6)
    wanted = reference_focal(logits, np.broadcast_to(targets[:, :1], logits.shape), 0.25, 2.0)
    np.testing.assert_allclose(focal_loss(ours, truth, 0.25, 2.0), wanted, rtol=1e-6)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(focal_loss(ours, 1 - truth, 0.25, 2.0), wanted, rtol=1e-6)


def test_points_are_read_where_they_lie_and_mostly_where_the_mask_is_uncertain():
    torch.manual_seed(0)
    columns = torch.arange(8.0)
    ramp = (columns - 3.5).expand(2, 3, 8, 8).clone()  # the edge lies at x = 0.5 of the unit square
    points = torch.rand(6, 50, 2)
    # Bilinear on a ramp is the ramp, inside the centres of the border pixels.
    wanted = (points[..., 0] * 8 - 0.5).clamp(0, 7) - 3.5
    torch.testing.assert_close(read_at(ramp, points), wanted, rtol=0.0, atol=1e-5)
    truth = (columns > 3).to(torch.uint8).expand(2, 8, 8)
    logits, labels = sample_points(ramp, truth, 4000)
    assert logits.shape == labels.shape == (2, 3, 1, 4000)
    assert ((logits > 0) == (labels == 1)).all(), "the truth is read at the same places"
    # Of 3 P uniform candidates the P * 3/4 nearest to the edge lie within 1/8 of it; the rest P / 4 is uniform.
    near = (logits.abs() <= 1).float().mean().item()
    assert near == pytest.approx(0.75 + 0.25 * 0.25, abs=0.02)
    whole = focal_loss(ramp, truth[:, None], 0.25, 2.0)
    assert (focal_loss(logits, labels, 0.25, 2.0) > whole).all(), "more weight on the edge"


@pytest.mark.parametrize("value", [60000.0, -60000.0, 0.0])
@pytest.mark.parametrize("fill", [0.0, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_extreme_logits_of_fp16_give_finite_losses_and_gradients(value, fill, gamma):
    logits = torch.full((1, 8, 8), value, dtype=torch.float16, requires_grad=True)
    targets = torch.full((1, 8, 8), fill)
    sampled = sample_points(logits[:, None], targets, 12)
    loss = focal_loss(logits, targets, 0.25, gamma).sum() + dice_loss(logits, targets, 1.0).sum()
    loss = loss + focal_loss(*sampled, 0.25, gamma).sum() + dice_loss(*sampled, 1.0).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_iou_is_cut_at_zero_and_carries_no_gradient():
    logits = torch.tensor([[[1.0, -1.0], [0.0, 2.0]]], requires_grad=True)
    truth = torch.tensor([[[1, 1], [0, 0]]])
    iou = mask_iou(logits, truth)
    assert iou.tolist() == [pytest.approx(1 / 3)]
    assert not iou.requires_grad
    assert mask_iou(-torch.ones(1, 2, 2), torch.zeros(1, 2, 2)).tolist() == [0.0]
    assert iou_loss(torch.tensor([0.5]), torch.tensor([1.5])).tolist() == [1.0]


def test_normalisation_does_not_depend_on_how_the_batch_is_cut():
    generator = torch.Generator().manual_seed(0)
    per_mask = torch.rand(6, 4, generator=generator)
    valid = torch.rand(6, 4, generator=generator) > 0.4
    weight = torch.tensor([1.0, 1, 1, 0, 1, 1])
    images = float((valid.any(dim=1) * weight).sum())
    masks = float((valid.sum(dim=1) * weight).sum())
    for mean, count in ((mean_per_image, images), (mean_per_mask, masks)):
        whole = mean(per_mask, valid, weight, count)
        for cut in (1, 2, 4):
            parts = sum(
                mean(a, b, c, count)
                for a, b, c in zip(per_mask.split(cut), valid.split(cut), weight.split(cut), strict=True)
            )
            torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0.0)
    rows = [per_mask[i][valid[i]].mean() for i in range(6) if weight[i] and valid[i].any()]
    torch.testing.assert_close(mean_per_image(per_mask, valid, weight, images), torch.stack(rows).mean())
