"""A task in the shape of ours, small enough for a second: what the engines are tried with.

An encoder of two blocks that runs once, a decoder that runs several rounds in one forward pass, each fed with the
detached answer of the one before, a first guess under no_grad, recomputation, and a parameter that counts nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.config import MaeConfig
from trainer.distributed import World
from trainer.parallel.engine import ParamGroup

DIM = 10
GLOBAL_BATCH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.up = nn.Linear(DIM, 3 * DIM)
        self.down = nn.Linear(3 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.from_answer = nn.Linear(3, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, 3)  # 3 rows on 2 ranks: an uneven shard

    def forward(self, features: Tensor, answer: Tensor) -> Tensor:
        return self.head(self.norm(features + self.from_answer(answer)))


class ToyTask(nn.Module):
    """`forward(batch)`: batch maps "x" (B, DIM) and "y" (B, 3); loss is a sum over samples by the global batch."""

    def __init__(self, frozen: bool = False, rounds: int = 3, recompute: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.ModuleList([Block(), Block()])
        self.decoder = Decoder()
        self.counts_nothing = nn.Parameter(torch.ones(3))
        self.register_buffer("fourier", torch.randn(DIM))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.frozen, self.rounds, self.recompute = frozen, rounds, recompute
        self.encoder.requires_grad_(not frozen)

    def shard_units(self) -> list[nn.Module]:
        return list(self.encoder)

    def compile_parts(self) -> None:
        for block in self.encoder:
            block.compile()

    def _call(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        return checkpoint(module, *inputs, use_reentrant=False) if self.recompute else module(*inputs)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.fourier.dtype == torch.float32
        features = batch["x"] + torch.sin(self.fourier)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            for block in self.encoder:
                features = self._call(block, features)
        with torch.no_grad():
            answer = self.decoder(features, torch.zeros_like(batch["y"]))
        total = 0.0 * self.counts_nothing.sum()
        for _ in range(self.rounds):
            logits = self._call(self.decoder, features, answer.float())
            total = total + (logits.float() - batch["y"]).square().sum() / GLOBAL_BATCH
            answer = logits.detach()
        return total, {"loss": total.detach()}


def toy_config(kind: str = "ddp", precision: str = "fp32", **changes: Any) -> MaeConfig:
    """A valid configuration; `changes` are keys of `engine` and, of `optim`, grad_clip."""
    clip = changes.pop("grad_clip", None)
    return MaeConfig.model_validate(
        {
            "stage": "mae",
            "run_dir": "unused",
            "model": {"size": "vit_tiny"},
            "data": {"shards": "unused"},
            "optim": {"lr": 0.01, "grad_clip": clip},
            "schedule": {"warmup_steps": 0},
            "phases": [{"name": "all", "steps": 1}],
            "batch": {"global_size": GLOBAL_BATCH, "micro": 2},
            "engine": {"kind": kind, "precision": precision, **changes},
            "checkpoint": {"every_steps": 1},
        }
    )


def toy_groups(task: ToyTask) -> list[ParamGroup]:
    """Encoder and decoder apart, weights and the rest apart: none mixes parameters of different step counts."""
    names: dict[tuple[bool, bool], list[str]] = {}
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            names.setdefault((name.startswith("encoder"), parameter.ndim > 1), []).append(name)
    return [
        ParamGroup(tuple(group), lr_scale=0.5 if in_encoder else 1.0, weight_decay=0.1 if decays else 0.0)
        for (in_encoder, decays), group in names.items()
    ]


def batches_of_step(step: int, accumulation: int, world: World) -> list[dict[str, Tensor]]:
    """This rank's micro-batches: the global batch of a step is the same for every number of ranks."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(GLOBAL_BATCH, DIM, generator=generator)
    y = torch.tanh(x[:, :3] * 2)
    own = slice(world.rank, None, world.size)
    return [
        {"x": part_x, "y": part_y}
        for part_x, part_y in zip(x[own].chunk(accumulation), y[own].chunk(accumulation), strict=True)
    ]
