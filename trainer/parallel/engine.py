"""The one door to parallelism: the loop and the checkpointer know an `Engine`, and nothing behind it.

The loop, for every step: `set_lr`, then for every micro-batch `loss, metrics = engine(batch)` and
`engine.backward(loss, last)`, then `grad_norm = engine.step()`.

Loss convention: the task's loss of a micro-batch is already divided by what counts over the *global* batch, so the
true gradient is the plain sum over micro-batches and ranks. Whatever a backend divides by on its own is undone behind
this door. See docs/decisions/0004-engine-door.md and 0005-checkpoint-schema.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from trainer.config import Run
from trainer.distributed import World
from trainer.parallel.groups import ParamGroup as ParamGroup
from trainer.parallel.groups import check_groups
from trainer.parallel.torch_engine import DdpEngine, Fsdp2Engine, HsdpEngine


class Engine(Protocol):
    """Forward, backward, step and state of a task over all ranks. Every method is called by all ranks together."""

    @property
    def task(self) -> nn.Module:
        """The task itself, for `train()` and `eval()`. Its parameters may be shards: compute through the engine."""

    def __call__(self, batch: Any) -> Any:
        """The task's forward under the precision's autocast: `(loss, metrics)` in training."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch's loss. `last`: of this step's micro-batches, so ranks now reduce."""

    def step(self) -> Tensor:
        """Update the parameters and forget the gradients.

        Returns the global gradient norm before clipping, 0-dim on the device. Where it is not finite no rank takes
        the step, in any precision, and fp16 halves its loss scale.
        """

    def set_lr(self, lr: float) -> None:
        """Learning rate of every group: `lr` times the group's `lr_scale`."""

    def lrs(self) -> list[float]:
        """Learning rate of every group, in the order of the groups."""

    def rates(self) -> dict[str, tuple[float, float]]:
        """Learning rate and weight decay of every trained parameter by name, as the optimizer itself has them."""

    @property
    def loss_scale(self) -> float:
        """Factor on the loss in fp16, else 1. Reading it waits for the GPU."""

    @property
    def num_skipped(self) -> int:
        """Steps not taken since this engine was built. Reading it waits for the GPU."""

    def state_dict(self) -> dict[str, Tensor]:
        """All state by name, fp32, the same schema for every engine; values may be DTensors and share memory."""

    def state_items(self) -> Iterator[tuple[str, Tensor]]:
        """`state_dict` one entry at a time: what has to be gathered need not be whole all at once."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state, of any engine. A parameter without optimizer entries starts with zero moments, step 0."""

    def full_weights(self) -> dict[str, Tensor]:
        """Weights and buffers by the task's names, whole, on the CPU of rank 0; empty elsewhere."""

    def close(self) -> None:
        """Let go of hooks and memory: a new engine can then be built on a fresh task."""


def build_engine(task: nn.Module, config: Run, groups: Sequence[ParamGroup], world: World) -> Engine:
    """The engine that `config.engine` asks for, with AdamW from `config.optim`, around `task`.

    Rank 0's weights are everyone's; on other ranks the task may lie on the meta device. Frozen parameters have
    requires_grad=False by now and are in no group. The task offers `shard_units()`, the modules that may be sharded on
    their own, and `compile_parts()`. Raises ValueError if the groups are not exactly the trained parameters.
    """
    check_groups(task, groups)
    if config.engine.compile:
        task.compile_parts()
    if config.engine.kind == "deepspeed":
        # Here and not above: the import takes seconds, and only this engine needs the package.
        from trainer.parallel.deepspeed_engine import DeepSpeedEngine, ZeroStage0Engine

        zero_class = DeepSpeedEngine if config.engine.zero_stage else ZeroStage0Engine
        return zero_class(task, config, groups, world)
    engine_class = {"ddp": DdpEngine, "fsdp2": Fsdp2Engine, "hsdp": HsdpEngine}[config.engine.kind]
    return engine_class(task, config, groups, world)
