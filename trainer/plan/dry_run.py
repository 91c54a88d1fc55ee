"""The whole program at a size that is not there: ranks 0 and last build engine and data and do one fake step.

The process group is torch's fake one, which answers every collective at once, and tensors have no storage. The samples
of *all* ranks are then checked: together they are each step's positions, once each, also after a change of size.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainer.config import Config, SamConfig
from trainer.data.order import StepSampler
from trainer.distributed import World
from trainer.optim import first_trained, param_groups
from trainer.parallel.engine import build_engine
from trainer.plan.simulate import Watch, fake_batch, fake_task, frozen_of, without_initialisation
from trainer.stages import encoder_depth


@contextmanager
def fake_world(rank: int, size: int, local_size: int):
    """A `World` of `size` ranks of which this process is the only one."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    nodes = -(-size // local_size)
    device = torch.device("cpu")
    try:
        place = (rank, size, rank % local_size, local_size, nodes, rank // local_size, device)
        yield World(*place, host_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def real_mesh(*arguments, **keywords):
    """A device mesh is made of real numbers."""
    with unset_fake_temporarily():
        return init_device_mesh(*arguments, **keywords)


def fake_step(
    config: Config, rank: int, size: int, local_size: int, masks: int = 1, num_micro: int = 1
) -> dict[str, float]:
    """Build the config's engine as one rank of `size` and take one step of `num_micro` micro-batches; returns bytes and
    the counts of its parts. `reduced` is what the last backward pass leaves alive less than the one before it.

    DDP's reducer is C++ that reads memory, so there the plain module stands in; what it adds is one bucket.
    """
    with ExitStack() as stack:
        world = stack.enter_context(fake_world(rank, size, local_size))
        stack.enter_context(without_initialisation())
        stack.enter_context(patch("trainer.parallel.torch_engine.init_device_mesh", real_mesh))
        stack.enter_context(patch("trainer.parallel.torch_engine.DistributedDataParallel", PlainReplica))
        stack.enter_context(patch("trainer.parallel.initial.check_filled", lambda task: None))  # it looks at values
        stack.enter_context(FakeTensorMode())
        watch = stack.enter_context(Watch())
        task = fake_task(config, frozen_of(config))
        depth = encoder_depth(config) if isinstance(config, SamConfig) else 0
        groups = param_groups(task.named_parameters(), config.optim, depth, first_trained(config.phases))
        engine = build_engine(task, config, groups, world)
        built = watch.alive
        watch.restart()
        alive = []
        for number in range(num_micro):
            loss, metrics = engine(fake_batch(config, config.batch.micro, masks))
            engine.backward(loss, last=number + 1 == num_micro)
            del loss, metrics
            alive.append(watch.alive)
        engine.step()
        state = engine.state_dict()
        shard = sum(local_bytes(value) for name, value in state.items() if name.startswith("model."))
        reduced = alive[-2] - alive[-1] if num_micro > 1 else 0
        return {"built": built, "peak": watch.peak, "weights": shard, "tensors": len(state), "reduced": reduced}


def first_and_last(config: Config, size: int, local_size: int) -> dict[int, dict[str, float]]:
    """`fake_step` of ranks 0 and last, each in a process of its own: torch remembers shards' shapes by operation and
    mesh, not by rank, so the second rank in a process would be given the first one's.
    """
    ranks = sorted({0, size - 1})
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(ranks), mp_context=spawn, max_tasks_per_child=1) as pool:
        futures = {rank: pool.submit(fake_step, config, rank, size, local_size) for rank in ranks}
        return {rank: future.result() for rank, future in futures.items()}


def local_bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


class PlainReplica(torch.nn.Module):
    """In place of DistributedDataParallel: the same calls, no reducer."""

    def __init__(self, module: torch.nn.Module, **settings) -> None:
        super().__init__()
        self.module = module
        self.reducer = self

    def prepare_for_backward(self, outputs: list) -> None:
        pass

    @contextmanager
    def no_sync(self):
        yield

    def forward(self, batch):
        return self.module(batch)


def check_positions(config: Config, sizes: tuple[int, ...], first_step: int = 1000, steps: int = 2) -> list[str]:
    """Problems with the samples of all ranks at each of `sizes`, going on from step to step; none if all is well."""
    problems, step = [], first_step
    global_size = config.batch.global_size
    for size in sizes:
        end = step + steps
        shares = [
            list(StepSampler(global_size, config.data.lanes, rank, size, config.batch.micro, step, end))
            for rank in range(size)
        ]
        if len({tuple(map(len, share)) for share in shares}) > 1:
            problems.append(f"{size} ranks: micro-batches differ in number or size between ranks")
        positions = [position for share in shares for micro in share for position in micro]
        real = sorted(position for position in positions if position >= 0)
        if real != list(range(step * global_size, end * global_size)):
            problems.append(f"{size} ranks: steps {step} to {end} are not each position once")
        step = end
    return problems


def fillers(config: Config, size: int) -> int:
    """Zero-weight samples a step over all ranks, so that every rank has as many."""
    sampler = [
        StepSampler(config.batch.global_size, config.data.lanes, r, size, config.batch.micro, 0, 1) for r in range(size)
    ]
    return sum(position < 0 for rank in sampler for micro in rank for position in micro)
