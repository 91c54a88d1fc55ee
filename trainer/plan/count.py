"""FLOPs of the published architecture for one image, counted by torch on the real modules.

Two things that this implementation does otherwise are undone: relative position is counted with the plain formula (the
fused kernel widens its heads), and the projections of padded window tokens, which it skips, are added.
"""

from dataclasses import dataclass
from functools import lru_cache
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.attention import plain_attention
from model.build import SIZES
from model.prompt_encoder import Prompts
from model.sam import Sam
from trainer.config import Config, MaeConfig, SamConfig
from trainer.plan.simulate import fake_batch, fake_task, frozen_of, mae_encode, pretend_gpu

TRAINING = 3  # passes: forward, and twice as much backward
OUTPUT_TOKENS = 5  # of the mask decoder: IoU and four masks
SPARE_TOKENS = 3  # this prompt encoder always has room for a closing token and a box
FIRST_TOKENS = 7  # of a published prompt in round 1: output tokens, one click and a closing one, or the two of a box


@dataclass(frozen=True)
class Work:
    """FLOPs for one image, forward."""

    encoder: float
    decoder: float  # all prompt rounds with all masks, or MAE's decoder
    encoder_passes: int = TRAINING  # 1 where it is frozen, 0 where its embeddings are read

    @property
    def training(self) -> float:
        return self.encoder_passes * self.encoder + TRAINING * self.decoder


def encoder_passes(config: Config, frozen: tuple[str, ...]) -> int:
    """Of a step that leaves `frozen` as it is."""
    if isinstance(config, SamConfig) and config.data.embeddings is not None:
        return 0
    return 1 if "image_encoder" in frozen else TRAINING


@lru_cache(maxsize=8)
def count_work(config: Config) -> Work:
    """In the last phase, which trains most."""
    with pretend_gpu(), torch.no_grad(), patch("model.attention.fused_attention", plain_attention):
        task = fake_task(config)
        if isinstance(config, MaeConfig):
            with FlopCounterMode(display=False) as encoder:
                latent, finish = mae_encode(task, fake_batch(config, 1, 0))
            with FlopCounterMode(display=False) as decoder:
                finish(latent)
            return Work(encoder.get_total_flops(), decoder.get_total_flops())
        images = torch.empty(1, 3, config.model.image_size, config.model.image_size)
        with FlopCounterMode(display=False) as encoder:
            embedding = task.sam.encode_images(images)
        three = [count_decoder(task.sam, embedding, points) for points in (1, 2, 3)]
    tokens = [points + SPARE_TOKENS + OUTPUT_TOKENS for points in (1, 2, 3)]
    a_round = [parabola(tokens, three, wanted) for wanted in tokens_of_rounds(config)]
    passes = encoder_passes(config, frozen_of(config))
    return Work(encoder.get_total_flops() + padding_flops(config), config.data.max_masks * sum(a_round), passes)


def count_decoder(sam: Sam, embedding: torch.Tensor, points: int) -> float:
    """One mask of one image, one round."""
    side = 4 * embedding.shape[-1]
    prompts = Prompts(
        torch.empty(1, 1, points, 2),
        torch.empty(1, 1, points, dtype=torch.int64),
        torch.empty(1, 1, 4),
        torch.empty(1, 1, dtype=torch.bool),
        torch.empty(1, 1, side, side),
        torch.empty(1, 1, dtype=torch.bool),
    )
    with FlopCounterMode(display=False) as counter:
        sam.decode_masks(embedding, prompts)
    return counter.get_total_flops()


def tokens_of_rounds(config: SamConfig) -> list[float]:
    """Tokens in each round as published: one more with every click; the mean over which middle rounds have none."""
    rounds, without = config.prompts.rounds, config.prompts.rounds_without_click
    if rounds == 1:
        return [FIRST_TOKENS]
    clicks = rounds - 1 - without
    before_last = rounds - 1 if without else rounds  # with `without`, the last round has no click of its own
    return [FIRST_TOKENS + clicks * min(number / max(before_last - 1, 1), 1.0) for number in range(rounds)]


def parabola(x: list[int], y: list[float], at: float) -> float:
    """Through three points: attention among tokens is quadratic in their number, all else linear."""
    total = 0.0
    for i in range(3):
        weight = 1.0
        for j in range(3):
            if j != i:
                weight *= (at - x[j]) / (x[i] - x[j])
        total += weight * y[i]
    return total


def padding_flops(config: SamConfig) -> float:
    """FLOPs of projecting padded window tokens, which the published encoder does and this one does not."""
    size = SIZES[config.model.size]
    grid = config.model.image_size // 16
    padded = -(-grid // size.window_size) * size.window_size
    windowed = size.depth - len(size.global_attn_indexes)
    return 2.0 * (padded**2 - grid**2) * 4 * size.embed_dim**2 * windowed  # query, key, value and output projection
