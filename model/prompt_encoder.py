"""SAM's prompt encoder, batched over images and masks: every mask may carry its own mix of prompts.

Source: SAM (arXiv 2304.02643), appendix A "Prompt encoder"; names and arithmetic as in the released weights.
Legend: B = images, M = masks of an image, P = point slots, T = P + 3 sparse tokens, C = embedding width,
h, w = grid of the image embedding.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.layers import LayerNorm2d


class Prompts(NamedTuple):
    """What each of the M masks of each of the B images is prompted with. Coordinates are input pixels, x before y."""

    point_coords: Tensor  # (B, M, P, 2) float
    point_labels: Tensor  # (B, M, P) int: 1 foreground, 0 background, -1 an empty slot
    boxes: Tensor  # (B, M, 4) float x0 y0 x1 y1; read where has_box
    has_box: Tensor  # (B, M) bool
    mask_logits: Tensor  # (B, M, 4h, 4w) float; read where has_mask
    has_mask: Tensor  # (B, M) bool


class PromptEmbeddings(NamedTuple):
    """Prompts as the mask decoder takes them."""

    sparse: Tensor  # (B, M, T, C)
    sparse_valid: Tensor  # (B, M, T) bool: False marks a slot that nothing may attend to
    dense: Tensor  # (B, M, C, h, w)


class PositionEmbeddingRandom(nn.Module):
    """Random Fourier features (arXiv 2006.10739) of positions in the unit square: (..., 2) -> (..., C)."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, num_pos_feats: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, num_pos_feats))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.positional_encoding_gaussian_matrix)

    def forward(self, positions: Tensor) -> Tensor:
        """Always in float32, and without a matrix product: in bf16 or TF32 the phases are off by as much as a pixel."""
        with torch.autocast(positions.device.type, enabled=False):
            x, y = (2 * positions.float() - 1).unsqueeze(-1).unbind(-2)  # (..., 1) each
            to_x, to_y = self.positional_encoding_gaussian_matrix.float()  # (C/2,) each
            phase = 2 * math.pi * (x * to_x + y * to_y)
            return torch.cat([phase.sin(), phase.cos()], dim=-1)


class PromptEncoder(nn.Module):
    """Points, boxes and mask logits to tokens and a dense map; see `Prompts` and `PromptEmbeddings`.

    All parameters enter the result in every call, used or not, and no shape depends on the data: data-parallel
    wrappers need no search for unused parameters, and nothing waits for the device.
    """

    def __init__(
        self,
        embed_dim: int,
        image_embedding_size: tuple[int, int],
        input_image_size: tuple[int, int],
        mask_in_chans: int,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.image_embedding_size, self.input_image_size = image_embedding_size, input_image_size
        self.pe_layer = PositionEmbeddingRandom(embed_dim // 2)
        # Background point, foreground point, first and second corner of a box.
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, embed_dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, embed_dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_in_chans // 4, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans // 4),
            nn.GELU(),
            nn.Conv2d(mask_in_chans // 4, mask_in_chans, kernel_size=2, stride=2),
            LayerNorm2d(mask_in_chans),
            nn.GELU(),
            nn.Conv2d(mask_in_chans, embed_dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, embed_dim)

    def get_dense_pe(self) -> Tensor:
        """Position encoding of the image embedding, (1, C, h, w)."""
        h, w = self.image_embedding_size
        device = self.pe_layer.positional_encoding_gaussian_matrix.device
        y = (torch.arange(h, device=device, dtype=torch.float32) + 0.5) / h
        x = (torch.arange(w, device=device, dtype=torch.float32) + 0.5) / w
        positions = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1)  # (h, w, 2)
        return self.pe_layer(positions).permute(2, 0, 1)[None]

    def forward(self, prompts: Prompts) -> PromptEmbeddings:
        self._check(prompts)
        points, point_valid = self._embed_points(prompts)
        corners = self._embed_boxes(prompts.boxes)
        has_box = prompts.has_box[..., None]  # (B, M, 1)
        # The released model closes a prompt of points with one token that is no point, unless a box closes it.
        closing = self.not_a_point_embed.weight.expand(*points.shape[:2], 1, -1)
        closing_valid = point_valid.any(dim=-1, keepdim=True) & ~has_box
        sparse = torch.cat([points, closing, corners], dim=2)
        valid = torch.cat([point_valid, closing_valid, has_box, has_box], dim=2)
        # Slots without a prompt become zeros, whatever their coordinates were.
        sparse = torch.where(valid[..., None], sparse, 0.0)
        return PromptEmbeddings(sparse, valid, self._embed_masks(prompts.mask_logits, prompts.has_mask))

    def _check(self, prompts: Prompts) -> None:
        num_images, num_masks, num_points = prompts.point_labels.shape
        h, w = self.image_embedding_size
        expected = {
            "point_coords": (num_images, num_masks, num_points, 2),
            "boxes": (num_images, num_masks, 4),
            "has_box": (num_images, num_masks),
            "mask_logits": (num_images, num_masks, 4 * h, 4 * w),
            "has_mask": (num_images, num_masks),
        }
        for name, shape in expected.items():
            if tuple(getattr(prompts, name).shape) != shape:
                raise ValueError(f"prompts.{name} has shape {tuple(getattr(prompts, name).shape)}, expected {shape}")

    def _encode(self, coords: Tensor) -> Tensor:
        """Input pixels (..., 2) -> (..., C). Pixel centres lie at half-integers."""
        height, width = self.input_image_size
        coords = coords.float() + 0.5
        return self.pe_layer(torch.stack([coords[..., 0] / width, coords[..., 1] / height], dim=-1))

    def _embed_points(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        labels = prompts.point_labels[..., None]  # (B, M, P, 1)
        background, foreground = self.point_embeddings[0].weight[0], self.point_embeddings[1].weight[0]
        tokens = self._encode(prompts.point_coords) + torch.where(labels == 1, foreground, background)
        return tokens, prompts.point_labels >= 0

    def _embed_boxes(self, boxes: Tensor) -> Tensor:
        corner = torch.cat([self.point_embeddings[2].weight, self.point_embeddings[3].weight])  # (2, C)
        return self._encode(boxes.unflatten(-1, (2, 2))) + corner  # (B, M, 2, C)

    def _embed_masks(self, mask_logits: Tensor, has_mask: Tensor) -> Tensor:
        # Zeros where there is no mask, so that what stands in an unused slot cannot reach the gradient as NaN.
        mask_logits = torch.where(has_mask[..., None, None], mask_logits, 0.0)
        embedded = self.mask_downscaling(mask_logits.flatten(0, 1)[:, None])  # (B * M, C, h, w)
        embedded = embedded.unflatten(0, has_mask.shape)
        no_mask = self.no_mask_embed.weight.reshape(-1, 1, 1).to(embedded.dtype)
        return torch.where(has_mask[..., None, None, None], embedded, no_mask)
