"""A profiler trace of some steps, on request: `profile.steps=[10,15]`. Open it in Perfetto or chrome://tracing."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.distributed import World
from trainer.run_files import Forgiving


class Tracer:
    """Records steps `first` to `last` (counted from 1) on rank 0 into `profile/steps_FIRST_to_LAST.json.gz`.

    A stretch of training that begins or ends inside the window (a change of phase, a stop, a restart) has a trace of
    its own steps of it. `close` must be called: a process that ends with a profiler running ends in a crash.
    """

    def __init__(self, steps: tuple[int, int] | None, run_dir: Path, world: World) -> None:
        self.steps = steps if world.is_main else None
        self.folder = run_dir / "profile"
        self.profiler: profile | None = None
        self.first = self.last = 0  # recorded
        self.device = world.device

    def before(self, step: int) -> None:
        """Start if `step`, the one about to be done, is the first of this stretch to be recorded."""
        if self.profiler is None and self.steps and self.steps[0] <= step <= self.steps[1]:
            self.first = step
            self.profiler = profile(activities=activities_of(self.device))
            self.profiler.start()

    def after(self, step: int) -> str | None:
        """Write the trace if `step` was the last to be recorded; then the table of the most expensive operators."""
        self.last = step
        return self.close() if self.steps and step == self.steps[1] else None

    def close(self) -> str | None:
        """Stop where it is running and write what there is; the table if that is a step or more."""
        if self.profiler is None:
            return None
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        if self.last < self.first:
            return None
        with Forgiving(str(self.folder)):
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.folder / f"steps_{self.first}_to_{self.last}.json.gz"))
        return table_of(profiler, self.device)


def activities_of(device: torch.device) -> list[ProfilerActivity]:
    """What is worth recording: the host, and a GPU if training is on one."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def table_of(profiler: profile, device: torch.device, num_rows: int = 30) -> str:
    """The operators that take most of the device's time."""
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=by, row_limit=num_rows, max_name_column_width=80)
