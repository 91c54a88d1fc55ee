"""What the losses pull at, how far the hypotheses lie apart, and how closely the answer follows the prompt.

Switched on by `diagnostics.every_steps`. The same held-out images, objects and clicks every time, in evaluation mode
and apart from training: no step changes by it. docs/diagnostics.md says what each curve would mean and what it costs.

Letters: B images, M objects of an image, K hypotheses (3), h w logits, s target pixels a side.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data_tools import rle
from model.prompt_encoder import Prompts
from model.sam import Sam
from trainer.config import SamConfig, SamLoss
from trainer.losses import dice_loss, focal_loss, mask_iou, resize_logits
from trainer.prompts import FOREGROUND, content_mask, to_input

OBJECTS_PER_IMAGE = 8  # evenly spaced from the smallest to the largest
CLICK_RANKS = (0.3, 0.7)  # of an object's pixels, column by column: two clicks left and right of its middle
NAMES = (
    "focal_gradient",
    "dice_gradient",
    "gradient_cosine",
    "hypotheses_iou",
    "chosen_gap",
    "same_object_iou",
    "other_object_iou",
)


@dataclass(frozen=True)
class DiagnosticBatch:
    images: Tensor  # (B, 3, H, W) uint8, zero where padded
    image_sizes: Tensor  # (B, 2) int64, height and width of the content in the input
    targets: Tensor  # (B, M, s, s) uint8
    valid: Tensor  # (B, M) bool
    clicks: Tensor  # (B, M, 2, 2) float32: two clicks inside each object, x y in input pixels

    def to(self, device: torch.device) -> "DiagnosticBatch":
        return replace(self, **{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})


def choose_objects(masks: list[rle.Runs], target_of: Callable[[rle.Runs], np.ndarray]) -> list[rle.Runs]:
    """Up to OBJECTS_PER_IMAGE masks that show in the target, evenly spaced in the order of their areas."""
    visible = sorted((mask for mask in masks if target_of(mask).any()), key=rle.area)
    if len(visible) <= OBJECTS_PER_IMAGE:
        return visible
    return [visible[i] for i in np.linspace(0, len(visible) - 1, OBJECTS_PER_IMAGE).round().astype(int)]


def click_inside(mask: rle.Runs, rank: float, transform: rle.AxisTransform) -> tuple[float, float]:
    """The object pixel of that rank in [0, 1), in input pixels."""
    return to_input(rle.sample_foreground(mask, rank), transform)


@torch.no_grad()
def diagnose(sam: Sam, config: SamConfig, batch: DiagnosticBatch) -> Tensor:
    """Sums over objects of NAMES, then how many objects and how many pairs of objects there were: (9,) float64."""
    embeddings = sam.encode_images(sam.normalize_images(batch.images, batch.image_sizes))
    first, second = (answer_to_click(sam, embeddings, batch.clicks[:, :, i]) for i in range(2))
    logits, predicted = first
    content = content_mask(batch.image_sizes, batch.images.shape[-1], logits.shape[-1])
    size = config.loss.resolution
    truth = batch.targets[:, :, None].expand(-1, -1, logits.shape[2], -1, -1)
    true_iou = mask_iou(resize_logits(logits, size), truth)  # (B, M, K)
    best, chosen = true_iou.argmax(dim=-1, keepdim=True), predicted.argmax(dim=-1, keepdim=True)
    focal, dice, cosine = gradients(pick(logits, best), batch.targets, config.loss)
    shown = (pick(logits, chosen) > 0) & content
    again = (pick(second[0], second[1].argmax(dim=-1, keepdim=True)) > 0) & content
    per_object = [
        focal,
        dice,
        cosine,
        pairwise_iou((logits > 0) & content[:, :, None]),
        true_iou.amax(dim=-1) - true_iou.gather(-1, chosen)[..., 0],
        iou(shown, again),
    ]
    pairs = batch.valid & batch.valid.roll(-1, dims=1) & (batch.valid.sum(dim=1, keepdim=True) > 1)
    sums = [(value.double() * batch.valid).sum() for value in per_object]
    sums.append((iou(shown, shown.roll(-1, dims=1)).double() * pairs).sum())
    return torch.stack([*sums, batch.valid.sum().double(), pairs.sum().double()])


def means(sums: list[float]) -> dict[str, float]:
    """What `diagnose` summed, over all ranks, as means; pairs count for the last name alone."""
    *totals, num_objects, num_pairs = sums
    counts = [num_objects] * (len(NAMES) - 1) + [num_pairs]
    return {name: total / count for name, total, count in zip(NAMES, totals, counts, strict=True) if count}


def answer_to_click(sam: Sam, embeddings: Tensor, clicks: Tensor) -> tuple[Tensor, Tensor]:
    """The three hypotheses for one click (B, M, 2) on each object: logits (B, M, K, h, w), predicted IoU (B, M, K)."""
    shape, size = clicks.shape[:2], 4 * embeddings.shape[-1]
    none = torch.zeros(shape, dtype=torch.bool, device=clicks.device)
    prompts = Prompts(
        clicks[:, :, None],
        torch.full((*shape, 1), FOREGROUND, device=clicks.device),
        clicks.new_zeros(*shape, 4),
        none,
        clicks.new_zeros(*shape, size, size),
        none,
    )
    output = sam.decode_masks(embeddings, prompts)
    return output.low_res_logits[:, :, 1:].float(), output.iou_predictions[:, :, 1:].float()


def gradients(logits: Tensor, targets: Tensor, settings: SamLoss) -> tuple[Tensor, Tensor, Tensor]:
    """Norms of the weighted focal and dice loss's gradients at the logits (B, M, h, w), and their cosine: (B, M) each.

    A loss of weight 0 has the norm 0, and then the cosine is 0. All pixels count, also where
    `loss.sampled_points` trains on some of them.
    """
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        resized = resize_logits(leaf, settings.resolution)
        focal = settings.focal * focal_loss(resized, targets, settings.focal_alpha, settings.focal_gamma)
        dice = settings.dice * dice_loss(resized, targets, settings.dice_smooth)
        pulls = [
            torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0].flatten(2).double() for loss in (focal, dice)
        ]
    norms = [pull.norm(dim=-1) for pull in pulls]
    product = norms[0] * norms[1]
    cosine = torch.where(product > 0, (pulls[0] * pulls[1]).sum(dim=-1) / product.clamp(min=1e-300), 0.0)
    return norms[0], norms[1], cosine


def pairwise_iou(masks: Tensor) -> Tensor:
    """Mean IoU of the pairs among the hypotheses (B, M, K, h, w) bool: (B, M)."""
    num = masks.shape[2]
    pairs = [iou(masks[:, :, i], masks[:, :, j]) for i in range(num) for j in range(i)]
    return torch.stack(pairs).mean(dim=0)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """(B, M, h, w) bool twice to (B, M); 1 where both are empty."""
    union = (a | b).sum(dim=(-2, -1))
    return torch.where(union > 0, (a & b).sum(dim=(-2, -1)) / union.clamp(min=1), 1.0)


def pick(logits: Tensor, index: Tensor) -> Tensor:
    """(B, M, K, h, w) at (B, M, 1) to (B, M, h, w)."""
    return logits.gather(2, index[..., None, None].expand(-1, -1, 1, *logits.shape[-2:]))[:, :, 0]
