"""Rank 0's initial weights to every rank, whole or as shards; the other ranks may not have built any.

With `engine.meta_init` only rank 0 builds a task with numbers; elsewhere it lies on the meta device and costs nothing
(a node with 8 ranks would hold 8 copies, 20 GB of ViT-H). What is made room for is filled with NaN before it is filled
with weights, so that a tensor which nobody delivers cannot pass for a random one.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.distributed import World


def hand_out(task: nn.Module, world: World) -> None:
    """Bring `task` to the rank's device with rank 0's parameters and buffers, all of them whole."""
    if is_meta(task):
        task.to_empty(device=world.device)
        fill_with_nan(task)
    else:
        task.to(world.device)
    if world.size > 1:
        for _, tensor in _tensors(task):
            dist.broadcast(tensor, src=0)
    check_filled(task)


def take_whole(task: nn.Module, world: World) -> dict[str, Tensor]:
    """On rank 0 its parameters and buffers by name, to be handed out after sharding; nothing elsewhere.

    They stay where they were built, so the device never holds a whole copy. Other ranks' numbers are of no use: the
    task goes to the meta device on every rank, from where `fill_from_rank_0` brings it back.
    """
    whole = dict(_tensors(task)) if world.is_main else {}
    task.to("meta")
    return whole


@torch.no_grad()
def fill_from_rank_0(task: nn.Module, whole: dict[str, Tensor], world: World) -> None:
    """Fill a sharded task, on the meta device until now, from what `take_whole` took. One whole tensor at a time."""
    task.to_empty(device=world.device)
    fill_with_nan(task)
    for name, target in _tensors(task):
        value = whole.pop(name).to(world.device) if world.is_main else None
        if value is None:
            value = torch.empty(target.shape, dtype=target.dtype, device=world.device)
        if world.size > 1:
            dist.broadcast(value, src=0)
        if isinstance(target, DTensor):
            value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(value)
    check_filled(task)


def is_meta(task: nn.Module) -> bool:
    """Whether the task was built without numbers."""
    return any(tensor.is_meta for _, tensor in _tensors(task))


@torch.no_grad()
def fill_with_nan(task: nn.Module) -> None:
    """Every floating-point parameter and buffer, those too that no checkpoint holds."""
    for _, tensor in _tensors(task):
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)


def check_filled(task: nn.Module) -> None:
    """ValueError with every tensor that still has a NaN: nobody initialised it."""
    forgotten = []
    for name, tensor in _tensors(task):
        local = local_part(tensor)
        if local.is_floating_point() and bool(local.isnan().any()):
            forgotten.append(name)
    if forgotten:
        raise ValueError(f"never initialised: {', '.join(forgotten)}")


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _tensors(task: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, persistent or not, without their history."""
    for name, tensor in (*task.named_parameters(), *task.named_buffers()):
        yield name, tensor.detach()
