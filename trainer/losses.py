"""The losses of SAM as pure functions of logits and targets, one value a mask; always computed in fp32.

Letters: ... any leading axes (images, masks, hypotheses), h w target pixels. Sources: "doc" the user's document, "SAM"
Kirillov et al. 2023 (App. A), RetinaNet Lin et al. 2017, MaskFormer Cheng et al. 2021 (whose 20:1 SAM follows).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def focal_loss(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss, mean over pixels: (..., h, w) to (...).

    `-alpha_t (1 - p_t)^gamma log p_t` with alpha for object and 1 - alpha for background pixels (RetinaNet, eq. 5).
    The 20:1 weight against dice makes sense with the mean over pixels only (MaskFormer).
    """
    logits, targets = logits.float(), targets.float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")  # -log p_t
    # 1 - p_t from the logit itself: exp(-cross_entropy) would lose it for confident pixels.
    miss = torch.sigmoid(torch.where(targets > 0.5, -logits, logits))
    alpha_t = alpha * targets + (1 - alpha) * (1 - targets)
    return (alpha_t * miss**gamma * cross_entropy).mean(dim=(-2, -1))


def dice_loss(logits: Tensor, targets: Tensor, smooth: float) -> Tensor:
    """`1 - (2 sum(p g) + s) / (sum p + sum g + s)` over pixels: (..., h, w) to (...) (doc; MaskFormer's form)."""
    probabilities, targets = logits.float().sigmoid(), targets.float()
    overlap = (probabilities * targets).sum(dim=(-2, -1))
    total = probabilities.sum(dim=(-2, -1)) + targets.sum(dim=(-2, -1))
    return 1 - (2 * overlap + smooth) / (total + smooth)


@torch.no_grad()
def mask_iou(logits: Tensor, targets: Tensor) -> Tensor:
    """IoU of the mask cut at logit 0 with the target: (..., h, w) to (...); 0 where both are empty."""
    predicted, truth = logits > 0, targets > 0.5
    intersection = (predicted & truth).sum(dim=(-2, -1)).float()
    union = (predicted | truth).sum(dim=(-2, -1)).float()
    return intersection / union.clamp(min=1)


def iou_loss(predicted_iou: Tensor, true_iou: Tensor) -> Tensor:
    """Squared error of the IoU head; the truth carries no gradient (SAM App. A)."""
    return (predicted_iou.float() - true_iou.detach()) ** 2


def mean_per_image(per_mask: Tensor, mask_valid: Tensor, image_weight: Tensor, num_images: float) -> Tensor:
    """Doc's normalisation: mean over an image's valid masks, then over the global batch's images. (B, M) to ().

    `num_images` counts the global batch, so the sum of this over ranks and micro-batches is the batch's mean.
    """
    valid = mask_valid.float()
    per_image = (per_mask * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)
    return (per_image * image_weight).sum() / num_images


def mean_per_mask(per_mask: Tensor, mask_valid: Tensor, image_weight: Tensor, num_masks: float) -> Tensor:
    """Paper recipe's normalisation: one mask count over the whole global batch. (B, M) to ()."""
    return (per_mask * mask_valid.float() * image_weight[:, None]).sum() / num_masks
