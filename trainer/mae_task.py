"""One training step of stage 1: hide patches, reconstruct them, score what was hidden (MAE, sections 3 and 4).

Letters: B images, H W input pixels, L patches, D values a patch.
"""

import torch
from torch import Tensor, nn

from model.mae import MaskedAutoencoder, patchify, unpatchify
from trainer.config import MaeConfig
from trainer.data.batches import MaeBatch
from trainer.data.images import jitter_colors


class MaeTask(nn.Module):
    """`forward(batch) -> (loss, metrics)`; in evaluation `(rebuilt, hidden)` for pictures, both (B, 3, H, W)."""

    def __init__(self, mae: MaskedAutoencoder, config: MaeConfig) -> None:
        super().__init__()
        self.mae, self.config = mae, config
        mae.activation_checkpointing = config.engine.activation_checkpointing

    def shard_units(self) -> list[nn.Module]:
        return self.mae.shard_units()

    def compile_parts(self) -> None:
        """torch.compile of every block, in place: no parameter changes its name."""
        for block in self.mae.shard_units():
            block.compile()

    def forward(self, batch: MaeBatch) -> tuple[Tensor, dict[str, Tensor]] | tuple[Tensor, Tensor]:
        images = jitter_colors(batch.images, batch.color_factors) if self.config.data.color_jitter else batch.images
        images = self.mae.normalize_images(images)
        predictions, hidden = self.mae(images, batch.noise)  # (B, L, D), (B, L)
        if not self.training:
            return self.rebuild(images, predictions, hidden)
        per_image = self.mae.forward_loss(images, predictions, hidden)  # (B,)
        loss = (per_image * batch.image_weight).sum() / batch.num_images
        return loss, {"loss": loss.detach()}

    def rebuild(self, images: Tensor, predictions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted pixels 0..255, and where they were hidden. Normalised targets get their patch's own statistics."""
        patches = patchify(images, self.mae.patch_size)
        if self.mae.norm_pix:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            predictions = predictions.float() * (variance + 1e-6).sqrt() + mean
        size, grid = self.mae.patch_size, self.mae.grid
        pixels = unpatchify(predictions.float(), size, grid) * self.mae.pixel_std + self.mae.pixel_mean
        return pixels, unpatchify(hidden[..., None].float().expand_as(patches), size, grid)
