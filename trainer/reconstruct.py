"""What the masked autoencoder sees: input, masked input, reconstruction, of the same few images every time."""

import numpy as np
import torch
from torch.utils.data import Dataset

from trainer.distributed import World
from trainer.metrics import Logger
from trainer.parallel.engine import Engine
from trainer.pictures import reconstruction

NUM_IMAGES = 4


@torch.no_grad()
def log_reconstruction(engine: Engine, dataset: Dataset, world: World, logger: Logger, step: int) -> None:
    """Write the picture `mae/reconstruction`. All ranks call, since the forward pass may be collective."""
    engine.task.eval()
    batch = dataset[list(range(NUM_IMAGES))]
    rebuilt, hidden = engine(batch.to(world.device))
    pixels = [tensor.permute(0, 2, 3, 1).float().cpu().numpy() for tensor in (batch.images, rebuilt, hidden)]
    images, rebuilt_pixels = (values.clip(0, 255).astype(np.uint8) for values in pixels[:2])
    logger.picture(step, "mae/reconstruction", reconstruction(images, rebuilt_pixels, pixels[2] > 0))
