"""Numbers of a run for people and machines: TensorBoard, `metrics.jsonl` and one console line a log step.

Metrics stay on the device until a log step: reading one waits for the GPU. Names are `group/name`, as TensorBoard
groups them.
"""

import json
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from trainer.distributed import World, max_on_host, sum_on_host


class Meter:
    """Sums metrics of micro-batches on the device. A loss is normalised over the global batch, so sums are means."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.grad_norm: Tensor | None = None
        self.num_steps = 0
        self.data_seconds = 0.0
        self.num_problems = 0
        self.started = time.perf_counter()

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def end_step(self, grad_norm: Tensor) -> None:
        self.grad_norm = grad_norm
        self.num_steps += 1

    def collect(self, world: World) -> dict[str, float]:
        """Means a step over all ranks since the meter was new. All ranks call; waits for the device."""
        names = sorted(self.sums)
        local = torch.stack([self.sums[name].float() for name in names]).tolist() if names else []
        total = sum_on_host([*local, float(self.num_problems)], world)
        values = {f"train/{name}": total[i] / self.num_steps for i, name in enumerate(names)}
        seconds = time.perf_counter() - self.started
        waited, slowest = max_on_host([self.data_seconds, seconds], world)
        if self.grad_norm is not None:
            values["train/grad_norm"] = float(self.grad_norm)
        values["data/stall_share"] = waited / max(slowest, 1e-9)  # of the time, on the rank that waited most
        values["data/bad_samples"] = total[-1]
        values["speed/step_seconds"] = slowest / self.num_steps
        return values


class Logger:
    """Writes on rank 0; silent elsewhere. `step` is the number of optimizer updates done."""

    def __init__(self, run_dir: Path, world: World) -> None:
        self.active = world.is_main
        if self.active:
            run_dir.mkdir(parents=True, exist_ok=True)
            self.tensorboard = SummaryWriter(str(run_dir / "tensorboard"))
            self.lines = (run_dir / "metrics.jsonl").open("a", buffering=1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if not self.active:
            return
        self.lines.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """image: (Y, X, 3) uint8."""
        if self.active:
            self.tensorboard.add_image(name, image, step, dataformats="HWC")

    def text(self, name: str, text: str) -> None:
        if self.active:
            self.tensorboard.add_text(name, "```\n" + text + "\n```", 0)

    def say(self, line: str) -> None:
        if self.active:
            print(line, flush=True)

    def close(self) -> None:
        if self.active:
            self.tensorboard.close()
            self.lines.close()


def console_line(step: int, num_steps: int, values: Mapping[str, float], global_size: int) -> str:
    """One line a log step: where the run is, how it learns, how fast it is, when it ends."""
    seconds = values["speed/step_seconds"]
    left = timedelta(seconds=round((num_steps - step) * seconds))
    parts = [f"step {step}/{num_steps}", f"loss {values['train/loss']:.4f}"]
    parts += [f"{name.split('/', 1)[1]} {values[name]:.3f}" for name in values if name.endswith("/iou")]
    parts += [f"lr {values['optim/lr']:.2e}", f"grad {values['train/grad_norm']:.2f}"]
    if values["optim/skipped_steps"]:
        parts.append(f"SKIPPED {values['optim/skipped_steps']:.0f} steps")
    parts += [f"{global_size / seconds:.1f} images/s", f"data wait {values['data/stall_share']:.0%}", f"left {left}"]
    return "  ".join(parts)
