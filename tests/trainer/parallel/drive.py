"""Drives an engine over the toy task: the same few steps on one process and on several ranks."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.trainer.parallel.toy import ToyTask, batches_of_step, toy_config, toy_groups
from trainer.distributed import World, sum_on_host
from trainer.parallel.engine import Engine, build_engine


@dataclass
class Record:
    """What a run of some steps showed."""

    losses: list[float] = field(default_factory=list)  # global, of each step
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)  # rank 0 only
    skipped: int = 0
    scale: float = 1.0


def make_engine(
    world: World, kind: str, precision: str = "fp32", frozen: bool = False, on_meta: bool = False, **changes: Any
) -> Engine:
    with torch.device("meta" if on_meta else "cpu"):
        task = ToyTask(frozen=frozen)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(float(world.rank))  # rank 0's weights must become everyone's
    if not on_meta:
        task.to(world.device)
    return build_engine(task, toy_config(kind, precision, **changes), toy_groups(task), world)


def run_steps(
    engine: Engine,
    world: World,
    steps: range,
    accumulation: int = 1,
    wrong_factor: float = 1.0,
    spoil: int | None = None,
) -> Record:
    """Train over `steps`. `wrong_factor` on the loss plays an engine that scales wrongly.

    In step `spoil` the last rank's loss is infinite, so that its gradients are.
    """
    record = Record()
    for step in steps:
        total = 0.0
        micro_batches = batches_of_step(step, accumulation, world)
        for index, batch in enumerate(micro_batches):
            loss, metrics = engine({name: value.to(world.device) for name, value in batch.items()})
            total += float(metrics["loss"])
            factor = float("inf") if step == spoil and world.rank == world.size - 1 else wrong_factor
            engine.backward(loss * factor, last=index == len(micro_batches) - 1)
        record.norms.append(float(engine.step()))
        record.losses.extend(sum_on_host([total], world))
    record.weights = engine.full_weights()
    record.skipped, record.scale = engine.num_skipped, engine.loss_scale
    return record


def whole_state(engine: Engine) -> dict[str, Tensor]:
    """A copy of the engine's state with whole tensors, on the CPU."""
    state = engine.state_dict()
    whole = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}
    return {key: value.detach().to("cpu", copy=True) for key, value in whole.items()}


def different_keys(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Keys that are not in both, or not equal bit for bit."""
    return sorted(
        key for key in one.keys() | other.keys() if key not in one or key not in other or not one[key].equal(other[key])
    )
