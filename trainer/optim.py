"""Parameter groups and learning-rate schedules, as pure functions of names and steps."""

import math
import re
from collections.abc import Iterable, Sequence

from torch import Tensor

from trainer.config import Batch, Optim, Phase, Schedule
from trainer.parallel.engine import ParamGroup

LAYER = re.compile(r"(?:^|\.)image_encoder\.(?:(pos_embed|patch_embed)|blocks\.(\d+)\.)")


def layer_multiplier(name: str, num_blocks: int, decay: float) -> float:
    """Layer-wise learning rate decay of the image encoder: `decay ** (num_blocks + 1 - layer)` (ViTDet; SAM App. A).

    Patch and position embedding are layer 0, block i is layer i + 1; neck, prompt encoder and mask decoder get 1.
    """
    found = LAYER.search(name)
    if not found:
        return 1.0
    layer = 0 if found[1] else int(found[2]) + 1
    return decay ** (num_blocks + 1 - layer)


def is_bias_or_norm(name: str, parameter: Tensor) -> bool:
    """What recipes exempt from weight decay: everything of one dimension (timm's and MAE's rule)."""
    return parameter.ndim <= 1 or name.endswith(".bias")


def param_groups(
    parameters: Iterable[tuple[str, Tensor]], optim: Optim, num_blocks: int, first_phase: dict[str, int]
) -> list[ParamGroup]:
    """Trained parameters fused by (learning rate, weight decay, phase in which they are first trained).

    The phase is part of the key because a flat ZeRO group has one step count: parameters that join later must not
    share it. Few groups are what fused AdamW and ZeRO want. `first_phase` maps a top-level part to its phase.
    """
    groups: dict[tuple[float, float, int], list[str]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        scale = layer_multiplier(name, num_blocks, optim.layer_decay)
        exempt = not optim.decay_bias_and_norm and is_bias_or_norm(name, parameter)
        phase = next((p for part, p in first_phase.items() if f".{part}." in f".{name}"), 0)
        groups.setdefault((scale, 0.0 if exempt else optim.weight_decay, phase), []).append(name)
    return [ParamGroup(tuple(names), scale, decay) for (scale, decay, _), names in sorted(groups.items())]


PART = re.compile(r"(?:image_encoder\.)?(?:decoder_)?blocks\.\d+|[^.]+\.[^.]+|[^.]+")


def describe_groups(groups: Sequence[ParamGroup], peak: float) -> list[str]:
    """One line a group: peak rate, weight decay, and which parts of the network are in it."""
    lines = []
    for group in groups:
        parts = dict.fromkeys(PART.match(name.split(".", 1)[1])[0] for name in group.names)  # in order, each once
        rate = f"rate {peak * group.lr_scale:.3g} (x {group.lr_scale:.3g}) decay {group.weight_decay:g}"
        lines.append(f"{rate}: {len(group.names)} tensors of {', '.join(parts)}")
    return lines


def describe_rates(rates: dict[str, tuple[float, float]], names: Sequence[str], lr: float, peak: float) -> str:
    """One line a parameter: peak rate, multiplier, decay, as an engine has them that was set to `lr`."""
    lines = [f"{'peak rate':10} {'x':8} {'decay':6} parameter"]
    for name in names:
        numbers = f"{'frozen':26}"
        if name in rates:
            rate, decay = rates[name]
            numbers = f"{peak * rate / lr:<10.4g} {rate / lr:<8.4g} {decay:<6g}"
        lines.append(f"{numbers} {name.split('.', 1)[1]}")
    return "\n".join(lines)


def check_rates(rates: dict[str, tuple[float, float]], groups: Sequence[ParamGroup], lr: float) -> None:
    """`ValueError` unless every parameter has its group's rate and decay inside the engine, when it was set to `lr`."""
    wanted = {name: (lr * group.lr_scale, group.weight_decay) for group in groups for name in group.names}
    wrong = [
        f"{name} has {rates.get(name)}, not {pair}"
        for name, pair in wanted.items()
        if name not in rates or not all(math.isclose(a, b) for a, b in zip(rates[name], pair, strict=True))
    ]
    if wrong or len(rates) != len(wanted):
        raise ValueError(
            f"the engine trains {len(rates)} parameters, the groups hold {len(wanted)}; (rate, decay): "
            + "; ".join(wrong[:5])
        )


def first_trained(phases: Sequence[Phase]) -> dict[str, int]:
    """For each part frozen at first: index of the phase that first trains it."""
    parts = {part for phase in phases for part in phase.frozen}
    return {
        part: next((i for i, phase in enumerate(phases) if part not in phase.frozen), len(phases)) for part in parts
    }


def steps_of(epochs: float, num_samples: int, global_size: int) -> int:
    """Optimizer steps that see `epochs` times `num_samples` samples; at least one."""
    return max(1, math.floor(epochs * num_samples / global_size + 1e-9))


def phase_ends(phases: Sequence[Phase], num_samples: int, global_size: int) -> list[int]:
    """Step at which each phase ends, counted from the start of the run."""
    ends, end = [], 0
    for phase in phases:
        end += phase.steps or steps_of(phase.epochs or 0, num_samples, global_size)
        ends.append(end)
    return ends


def base_lr(optim: Optim, batch: Batch) -> float:
    """Peak learning rate: as given, or per 256 images of the global batch (MAE A.1)."""
    return optim.lr * batch.global_size / 256 if optim.lr_per_256 else optim.lr


def lr_at(step: int, schedule: Schedule, peak: float, warmup_steps: int, num_steps: int) -> float:
    """Learning rate of the update that takes the run from `step` to `step + 1`.

    Linear from 0 over the warm-up, then the schedule over what remains, so that the two meet.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "multistep":
        return peak * schedule.gamma ** sum(step >= milestone for milestone in schedule.milestones)
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return schedule.min_lr + 0.5 * (peak - schedule.min_lr) * (1 + math.cos(math.pi * min(done, 1.0)))
