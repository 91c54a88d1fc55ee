"""Numbers of a run for people and machines: TensorBoard, `metrics.jsonl` and one console line a log step.

Metrics stay on the device until a log step: reading one waits for the GPU. Names are `group/name`, as TensorBoard
groups them.
"""

import json
import math
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from trainer.data.batches import Batch
from trainer.distributed import World, max_on_host, sum_on_host
from trainer.run_files import Forgiving, LineFile

STAGES = ("read", "jpeg", "masks", "prompts", "collate")  # of making a batch, as the datasets name them


class Meter:
    """Sums metrics of micro-batches on the device. A loss is normalised over the global batch, so sums are means.

    Seconds are this rank's own. `wait_seconds` is the time spent until all ranks had their data: the slowest rank is
    the one that waited least.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.grad_norm: Tensor | None = None
        self.num_steps = 0
        self.data_seconds = 0.0
        self.wait_seconds = 0.0
        self.transfer_seconds = 0.0
        self.stage_seconds: Counter[str] = Counter()  # in the loader's workers
        self.num_samples = 0  # of this rank, fillers too
        self.num_problems = 0
        self.started = time.perf_counter()

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def add_batch(self, batch: Batch) -> None:
        """Count a micro-batch's samples, problems and what making it took."""
        self.num_samples += len(batch.keys)
        self.num_problems += len(batch.problems)
        self.stage_seconds.update(batch.stage_seconds)

    @contextmanager
    def timed(self, name: Literal["data", "wait", "transfer"]) -> Iterator[None]:
        """Add the time of the block to `data_seconds`, `wait_seconds` or `transfer_seconds`."""
        started = time.perf_counter()
        yield
        attribute = f"{name}_seconds"
        setattr(self, attribute, getattr(self, attribute) + time.perf_counter() - started)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out: an evaluation is no training step."""
        started = time.perf_counter()
        yield
        self.started += time.perf_counter() - started

    def end_step(self, grad_norm: Tensor) -> None:
        self.grad_norm = grad_norm
        self.num_steps += 1

    def collect(self, world: World) -> dict[str, float]:
        """Means a step over all ranks since the meter was new. All ranks call; waits for the device."""
        names = sorted(self.sums)
        stages = sorted(STAGES)
        local = torch.stack([self.sums[name].float() for name in names]).tolist() if names else []
        seconds = time.perf_counter() - self.started
        waits = [0.0] * world.size
        waits[world.rank] = self.wait_seconds
        sums = [self.data_seconds, self.transfer_seconds, float(self.num_problems), float(self.num_samples)]
        total = sum_on_host([*local, *(self.stage_seconds[stage] for stage in stages), *sums, *waits], world)
        waited, slowest, memory = max_on_host([self.data_seconds, seconds, memory_gb(world.device)], world)
        values = {f"train/{name}": total[i] / self.num_steps for i, name in enumerate(names)}
        by_stage = total[len(names) : len(names) + len(stages)]
        data, transfer, problems, samples = total[len(names) + len(stages) :][:4]
        if self.grad_norm is not None:
            values["train/grad_norm"] = float(self.grad_norm)
        values["data/stall_share"] = waited / max(slowest, 1e-9)  # of the time, on the rank that waited most
        values["data/stall_share_mean"] = data / world.size / max(slowest, 1e-9)
        for stage, spent in zip(stages, by_stage, strict=True):  # milliseconds of a worker for one sample
            values[f"data/{stage}_ms"] = 1000 * spent / max(samples, 1.0)
        values["data/transfer_ms"] = 1000 * transfer / max(samples, 1.0)
        values["data/bad_samples"] = problems
        values["speed/step_seconds"] = slowest / self.num_steps
        values["memory/peak_gb"] = memory  # of the rank that has most
        if world.size > 1:
            waits = total[-world.size :]
            values["speed/slowest_rank"] = float(min(range(world.size), key=waits.__getitem__))
            values["speed/wait_share"] = max(waits) / max(slowest, 1e-9)  # on the rank that waited most for the others
        return values


def memory_gb(device: torch.device) -> float:
    """Peak memory in 10^9 bytes: what PyTorch held on a GPU since the last call, or the process's all-time resident."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts it in KiB


def throughput(
    step_seconds: float, global_size: int, flops_per_image: float | None, peak: float | None, num_ranks: int
) -> dict[str, float]:
    """Images a second, and the share of the devices' peak FLOP/s that they are (model FLOPs), where both are known."""
    values = {"speed/images_per_second": global_size / step_seconds}
    if flops_per_image and peak:
        values["speed/mfu"] = values["speed/images_per_second"] * flops_per_image / (peak * num_ranks)
    return values


class Logger:
    """Writes on rank 0; silent elsewhere. `step` is the number of optimizer updates done.

    Nothing that cannot be written ends training: it is said once, left out, and tried again with the next numbers.
    """

    def __init__(self, run_dir: Path, world: World) -> None:
        self.active, self.run_dir = world.is_main, run_dir
        self._lines = LineFile(run_dir / "metrics.jsonl")
        self._tensorboard: SummaryWriter | None = None
        self._tensorboard_due = True  # to be opened
        self._forgiving = {name: Forgiving(name) for name in ("TensorBoard", "standard output")}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if not self.active:
            return
        if self._lines.write(json.dumps({"step": step, "time": time.time(), **finite_or_none(values)}) + "\n"):
            self._tensorboard_due = True

        def write(tensorboard: SummaryWriter) -> None:
            for name, value in values.items():
                tensorboard.add_scalar(name, value, step)

        self._show(write)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """image: (Y, X, 3) uint8."""
        self._show(lambda tensorboard: tensorboard.add_image(name, image, step, dataformats="HWC"))

    def text(self, name: str, text: str) -> None:
        """A text as it stands; the newest of a name is shown."""
        indented = "\n".join("    " + line for line in text.splitlines())
        self._show(lambda tensorboard: tensorboard.add_text(name, indented))

    def file(self, name: str, text: str) -> None:
        """A text as a file of the run directory, for grep; it replaces the one before."""
        if self.active:
            with Forgiving(str(self.run_dir / name)):
                self.run_dir.mkdir(parents=True, exist_ok=True)
                (self.run_dir / name).write_text(text + "\n")

    def say(self, line: str) -> None:
        if self.active:
            with self._forgiving["standard output"]:
                print(line, flush=True)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._show(lambda tensorboard: tensorboard.close())

    def _show(self, write: Callable[[SummaryWriter], None]) -> None:
        """Hand something to TensorBoard, whose thread keeps an error of the disk for the next call, and ends with it.

        A new one is made once `metrics.jsonl` can be written again: each try before would leave an empty file.
        """
        if not self.active or (self._tensorboard is None and not self._tensorboard_due):
            return
        forgiving = self._forgiving["TensorBoard"]
        with forgiving:
            self._tensorboard = self._tensorboard or SummaryWriter(str(self.run_dir / "tensorboard"))
            write(self._tensorboard)
        if not forgiving.works:
            self._tensorboard, self._tensorboard_due = None, False


def finite_or_none(values: Mapping[str, float]) -> dict[str, float | None]:
    """For JSON, which has no NaN and no infinity: programs other than Python's refuse a line with them."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def console_line(step: int, num_steps: int, values: Mapping[str, float], global_size: int) -> str:
    """One line a log step: where the run is, how it learns, how fast it is, when it ends."""
    seconds = values["speed/step_seconds"]
    left = timedelta(seconds=round((num_steps - step) * seconds))
    parts = [f"step {step}/{num_steps}", f"loss {values['train/loss']:.4f}"]
    parts += [f"{name.split('/', 1)[1]} {values[name]:.3f}" for name in values if name.endswith("/iou")]
    parts += [f"lr {values['optim/lr']:.2e}", f"grad {values['train/grad_norm']:.2f}"]
    if values["optim/skipped_steps"]:
        parts.append(f"SKIPPED {values['optim/skipped_steps']:.0f} steps")
    if "speed/mfu" in values:
        parts.append(f"MFU {values['speed/mfu']:.0%}")
    parts += [f"{global_size / seconds:.1f} images/s", f"data wait {values['data/stall_share']:.0%}", f"left {left}"]
    return "  ".join(parts)
