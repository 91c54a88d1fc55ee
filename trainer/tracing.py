"""A profiler trace of some steps, on request: `profile.steps=[10,15]`. Open it in Perfetto or chrome://tracing."""

from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from trainer.distributed import World
from trainer.run_files import Forgiving


class Tracer:
    """Records steps `first` to `last` (counted from 1) on rank 0 into `profile/steps_FIRST_to_LAST.json.gz`."""

    def __init__(self, steps: tuple[int, int] | None, run_dir: Path, world: World) -> None:
        self.steps = steps if world.is_main else None
        self.folder = run_dir / "profile"
        self.profiler: profile | None = None
        self.activities = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            self.activities.append(ProfilerActivity.CUDA)

    def before(self, step: int) -> None:
        """Start if `step`, the one about to be done, is the first to be recorded."""
        if self.steps and step == self.steps[0]:
            self.profiler = profile(activities=self.activities)
            self.profiler.start()

    def after(self, step: int) -> str | None:
        """Write the trace if `step` was the last to be recorded; then the table of the most expensive operators."""
        if self.profiler is None or self.steps is None or step != self.steps[1]:
            return None
        self.profiler.stop()
        first, last = self.steps
        with Forgiving(str(self.folder)):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.profiler.export_chrome_trace(str(self.folder / f"steps_{first}_to_{last}.json.gz"))
        by = "self_cuda_time_total" if len(self.activities) > 1 else "self_cpu_time_total"
        table = self.profiler.key_averages().table(sort_by=by, row_limit=30)
        self.profiler = None
        return table
