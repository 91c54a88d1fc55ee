"""The losses of SAM as pure functions of logits and targets, one value a mask; always computed in fp32.

Letters: ... any leading axes (images, masks, hypotheses), h w logit pixels, s target pixels, P points. Leading axes of
logits and targets may broadcast. Sources: "doc" the user's document, "SAM" Kirillov et al. 2023 (App. A), RetinaNet Lin
et al. 2017, MaskFormer Cheng et al. 2021 (whose 20:1 SAM follows), PointRend Kirillov et al. 2020.
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
    against = torch.where(targets > 0.5, -logits, logits)
    cross_entropy = F.softplus(against)  # -log p_t
    # (1 - p_t)^gamma by its logarithm: a power of an exact 0 has no finite slope for gamma below 1.
    miss = torch.exp(gamma * F.logsigmoid(against))
    alpha_t = alpha * targets + (1 - alpha) * (1 - targets)
    return (alpha_t * miss * cross_entropy).mean(dim=(-2, -1))


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


OVERSAMPLING, UNCERTAIN_SHARE = 3, 0.75  # PointRend, section 3.1: candidates a point, share of the least certain


def sample_points(logits: Tensor, targets: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
    """Logits and truth at points, most of them where the mask is least certain (PointRend, section 3.1).

    logits (G, K, h, w), targets (G, s, s) with values 0 and 1: both to (G, K, 1, P), a row of pixels to the losses
    above. Logits are interpolated, the truth is that of the pixel a point lies in. Three quarters of the points are
    those of smallest |logit| among three times as many uniform ones, the rest is uniform. Drawn on the device from
    torch's generator, which the loop seeds for each step and rank.
    """
    num_masks, num_answers = logits.shape[:2]
    logits = logits.float()
    num_uncertain = int(UNCERTAIN_SHARE * num_points)
    with torch.no_grad():
        shape = (num_masks * num_answers, OVERSAMPLING * num_points, 2)
        candidates = torch.rand(shape, device=logits.device)  # x y in the unit square
        certainty = read_at(logits.detach(), candidates).abs()
        chosen = certainty.topk(num_uncertain, dim=1, largest=False).indices
        uncertain = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
        rest = torch.rand((shape[0], num_points - num_uncertain, 2), device=logits.device)
        points = torch.cat([uncertain, rest], dim=1)  # (G K, P, 2)
        side = targets.shape[-1]
        x, y = (points * side).long().clamp(max=side - 1).unbind(-1)
        truth = targets.flatten(1).gather(1, (y * side + x).view(num_masks, -1))  # (G, K P)
    size = (num_masks, num_answers, 1, num_points)
    return read_at(logits, points).view(size), truth.view(size)


def read_at(logits: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of (G, K, h, w) at the points (G K, P, 2), x y in the unit square: (G K, P)."""
    flat = logits.flatten(0, 1)[:, None]
    grid = 2 * points[:, None] - 1  # (G K, 1, P, 2)
    return F.grid_sample(flat, grid, mode="bilinear", padding_mode="border", align_corners=False)[:, 0, 0]


def resize_logits(logits: Tensor, size: int) -> Tensor:
    """Bilinear resize of (..., h, w) logits to (..., size, size), in fp32 (half precision would move the edge)."""
    logits = logits.float()
    if logits.shape[-1] == size:
        return logits
    flat = logits.flatten(0, -3)[:, None]
    return F.interpolate(flat, (size, size), mode="bilinear", align_corners=False).view(*logits.shape[:-2], size, size)
