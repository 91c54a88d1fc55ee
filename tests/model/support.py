"""What the network tests share."""

from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """max|a - b| / max|b|"""
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


@torch.no_grad()
def randomize(module: Module, seed: int = 0) -> Module:
    """Add noise to every parameter, so that zeros and ones of the initialisation hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return module
