"""What is trained, with which learning rate and decay: groups of parameter names, and the check that they fit."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ParamGroup:
    """Parameters (names of the task's `named_parameters()`) that share a learning rate and a weight decay."""

    names: tuple[str, ...]
    lr_scale: float  # of the schedule's learning rate
    weight_decay: float


def check_groups(task: nn.Module, groups: Sequence[ParamGroup]) -> None:
    """All groups together are exactly the parameters with requires_grad, each once, in float32; else ValueError."""
    named = [name for group in groups for name in group.names]
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    problems = []
    if any(not group.names for group in groups):
        problems.append("a group is empty")
    if twice := sorted({name for name in named if named.count(name) > 1} if len(named) != len(set(named)) else ()):
        problems.append(f"in two groups: {', '.join(twice)}")
    if strange := sorted(set(named) - trained):
        problems.append(f"no trained parameters of the task: {', '.join(strange)}")
    if left_out := sorted(trained - set(named)):
        problems.append(f"trained but in no group: {', '.join(left_out)}")
    if narrow := sorted(name for name, parameter in task.named_parameters() if parameter.dtype.itemsize < 4):
        problems.append(f"not float32 (lower precision is autocast's business): {', '.join(narrow)}")
    if problems:
        raise ValueError("parameter groups: " + "; ".join(problems))
