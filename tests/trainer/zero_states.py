"""Run on several ranks by test_plan.py: how many bytes of tensors a rank of each ZeRO stage keeps alive."""

import gc
import sys
from pathlib import Path

import torch
from torch import nn

from tests.trainer.parallel.toy import toy_config
from trainer.distributed import World, start_world, stop_world
from trainer.parallel.engine import ParamGroup, build_engine
from trainer.plan.memory import ZERO_BUCKET

WIDTH = 512


class Wide(nn.Module):
    """Enough parameters that padding and scalars do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))

    def shard_units(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.layers(x).square().sum(), {}


def alive() -> dict[int, int]:
    """Address to bytes of every tensor storage that Python can reach."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def held_by(stage: int, world: World) -> tuple[int, int]:
    """(bytes of states, bytes of buckets) in a second step: between backward and step or, under ZeRO-1, at the end of
    the backward pass, until when whole gradients are there.
    """
    before = alive()
    task = Wide()
    sizes: list[int] = []

    def look(*_: object) -> None:
        found = [size for address, size in alive().items() if address not in before]
        if sum(found) > sum(sizes):
            sizes[:] = found

    group = ParamGroup(tuple(name for name, _ in task.named_parameters()), 1.0, 0.0)
    engine = build_engine(task, toy_config("deepspeed", "fp32", zero_stage=stage), [group], world)
    x = torch.zeros(1, WIDTH)
    for step in range(2):
        if step == 1 and stage == 1:
            for parameter in task.parameters():
                parameter.register_post_accumulate_grad_hook(look)
        loss, _ = engine(x)
        engine.backward(loss, last=True)
        del loss
        if step == 0:
            engine.step()
    look()
    buckets = [size for size in sizes if size >= ZERO_BUCKET / 2]
    engine.step()
    engine.close()
    return sum(sizes) - sum(buckets), sum(buckets)


def main(folder: Path) -> None:
    world = start_world(5.0)
    sizes = [parameter.numel() for parameter in Wide().layers[0].parameters()]
    shape = (4 * sum(sizes), 0, sum(sizes))
    found = {stage: (shape, *held_by(stage, world)) for stage in (1, 2, 3)}
    if world.is_main:
        torch.save(found, folder / "states.pt")
    stop_world(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
