"""Autocast over fp32 weights, and the loss scale that fp16 needs: the same arithmetic under every engine."""

import os
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "bf16", "fp16", "deepspeed_fp16"]
_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "deepspeed_fp16": torch.float16,
}


def dtype_of(name: str) -> torch.dtype:
    """The type behind a name of the configuration."""
    return _DTYPES[name]


def make_deterministic() -> None:
    """The same bits from the same run on the same hardware; operations that cannot raise an error that names them.

    To be called before the first CUDA call, since cuBLAS reads its setting once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context a forward pass runs under; for fp32 it switches autocast off.

    Without autocast's weight cache. Older PyTorch caches a weight that is first used under `no_grad` (SAM's first guess
    of a mask) without its history, and loses its gradient in the pass that counts (pytorch issues 65766, 112583); and
    the cache would keep alive what FSDP2 has freed. Nearly all weights are used once a pass and lose nothing by it.
    """
    lowered = None if precision == "fp32" else dtype_of(precision)
    return torch.autocast(device.type, dtype=lowered, enabled=lowered is not None, cache_enabled=False)


class LossScale:
    """Dynamic loss scale of fp16, as torch.amp.GradScaler has it; constant 1 in the other precisions.

    Everything stays on `device`: deciding to skip a step never waits for the GPU. Skipped steps are counted in every
    precision, because a step whose gradient is not finite is never taken.
    """

    GROWTH = 2.0
    BACKOFF = 0.5

    def __init__(self, precision: Precision, initial: float, growth_steps: int, device: torch.device) -> None:
        self.dynamic = precision in ("fp16", "deepspeed_fp16")
        self.growth_steps = growth_steps
        self.scale = torch.tensor(initial if self.dynamic else 1.0, device=device)
        self.growth_tracker = torch.zeros((), device=device)  # good steps since the scale last changed
        self.num_skipped = torch.zeros((), device=device)  # since this object was made

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """After a step: halve the scale if it was skipped (0-dim bool), double it after `growth_steps` good ones."""
        self.num_skipped += skipped
        if not self.dynamic:
            return
        good = torch.where(skipped, torch.zeros_like(self.growth_tracker), self.growth_tracker + 1)
        grow = good >= self.growth_steps
        factor = torch.where(skipped, self.BACKOFF, torch.where(grow, self.GROWTH, 1.0))
        self.scale.mul_(factor)
        self.growth_tracker.copy_(torch.where(grow, torch.zeros_like(good), good))

    def state_dict(self) -> dict[str, Tensor]:
        """Entries of the checkpoint; none unless the scale is dynamic."""
        return {"scaler.scale": self.scale, "scaler.growth_tracker": self.growth_tracker} if self.dynamic else {}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a saved scale; a checkpoint of another precision has none, and the scale stays as it is."""
        if self.dynamic and "scaler.scale" in state:
            self.scale.copy_(state["scaler.scale"])
            self.growth_tracker.copy_(state["scaler.growth_tracker"])
