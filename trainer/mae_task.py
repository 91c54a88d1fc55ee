"""One training step of stage 1: hide patches, reconstruct them, score what was hidden (MAE, sections 3 and 4).

Letters: B images, H W input pixels, L patches.
"""

from torch import Tensor, nn

from model.mae import MaskedAutoencoder
from trainer.config import MaeConfig
from trainer.data.batches import MaeBatch
from trainer.data.images import jitter_colors


class MaeTask(nn.Module):
    """`forward(batch) -> (loss, metrics)`."""

    def __init__(self, mae: MaskedAutoencoder, config: MaeConfig) -> None:
        super().__init__()
        self.mae, self.config = mae, config
        mae.activation_checkpointing = config.engine.activation_checkpointing == "block"

    def shard_units(self) -> list[nn.Module]:
        return self.mae.shard_units()

    def forward(self, batch: MaeBatch) -> tuple[Tensor, dict[str, Tensor]]:
        images = jitter_colors(batch.images, batch.color_factors) if self.config.data.color_jitter else batch.images
        images = self.mae.normalize_images(images)
        predictions, hidden = self.mae(images, batch.noise)
        per_image = self.mae.forward_loss(images, predictions, hidden)  # (B,)
        loss = (per_image * batch.image_weight).sum() / batch.num_images
        return loss, {"loss": loss.detach()}
