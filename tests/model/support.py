"""What the network tests share."""

from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """max|a - b| / max|b|; infinite where one is not a number, which a maximum over several would pass over."""
    found = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    return found.nan_to_num(nan=torch.inf).item()


@torch.no_grad()
def randomize(module: Module, seed: int = 0) -> Module:
    """Add noise to every parameter, so that zeros and ones of the initialisation hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return module


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def worst_gradient(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """The largest `difference` of gradients under the same names, and whose it is.

    Those that are zero but for rounding are left out. A key's bias is one: it shifts all scores of a query alike.
    """
    assert ours.keys() == theirs.keys()
    significant = [name for name in theirs if not name.endswith("k_proj.bias") and theirs[name].abs().max() > 1e-9]
    return max((difference(ours[name], theirs[name]), name) for name in significant)


def spoil_gradient(module: nn.Module) -> None:
    """From now on its output is the same to the bit, and every gradient that comes back through it 1 % too large."""
    module.register_forward_hook(lambda _, __, out: out.detach() + 1.01 * (out - out.detach()))
