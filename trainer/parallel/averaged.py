"""An exponential moving average of the weights around any engine: what evaluation and export then use.

After each step the average of a trained parameter p is `decay * average + (1 - decay) * p`, in fp32, sharded as p is.
It starts at the weights that the parameter has when it is first trained, and is in every checkpoint as `ema.<name>`.
Training itself never sees it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from trainer.parallel.engine import Engine
from trainer.parallel.groups import ParamGroup
from trainer.parallel.initial import local_part

PREFIX = "ema."


class AveragedEngine:
    """An `Engine` like the one inside it; forward passes in evaluation mode run on the average."""

    def __init__(self, engine: Engine, groups: Sequence[ParamGroup], decay: float) -> None:
        self.engine, self.decay = engine, decay
        parameters = dict(engine.task.named_parameters())
        self._live = {name: parameters[name].detach() for group in groups for name in group.names}
        if hollow := [name for name, value in self._live.items() if value.numel() == 0]:
            raise ValueError(
                f"optim.ema_decay needs the weights on every rank or in FSDP2's shards; {hollow[0]} is not there "
                "(engine.zero_stage 3): use zero_stage 2 or engine.kind=fsdp2"
            )
        self._average = {name: value.float().clone() for name, value in self._live.items()}

    def __getattr__(self, name: str) -> Any:
        """All that an average does not change is the inner engine's: task, backward, set_lr, rates, close, ..."""
        return getattr(self.engine, name)

    def __call__(self, batch: Any) -> Any:
        """Forward pass, see `Engine`; on the average while the task is in evaluation mode."""
        if self.engine.task.training:
            return self.engine(batch)
        weights = {name: local_part(value).clone() for name, value in self._live.items()}
        self._show(self._average)
        try:
            return self.engine(batch)
        finally:
            self._show(weights)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Optimizer step, see `Engine`; then the average follows, after a skipped step too."""
        norm = self.engine.step()
        average = [local_part(value) for value in self._average.values()]
        torch._foreach_lerp_(average, [local_part(value).float() for value in self._live.values()], 1.0 - self.decay)
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """State by name, see `Engine`, and the averages."""
        return dict(self.state_items())

    def state_items(self) -> Iterator[tuple[str, Tensor]]:
        """`state_dict`, one entry at a time."""
        yield from self.engine.state_items()
        yield from ((PREFIX + name, value) for name, value in self._average.items())

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state, see `Engine`. A parameter that has no average yet starts one at its weights."""
        self.engine.load_state_dict({key: value for key, value in state.items() if not key.startswith(PREFIX)})
        for name, average in self._average.items():
            value = state.get(PREFIX + name, self._live[name])
            if value is not average:
                average.copy_(value)

    @torch.no_grad()
    def _show(self, values: Mapping[str, Tensor]) -> None:
        """Let the network have these weights. What FSDP2 still holds gathered from an earlier pass is let go of."""
        for module in self.engine.task.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for name, live in self._live.items():
            local_part(live).copy_(local_part(values[name]))
