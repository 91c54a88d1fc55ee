"""What saving a checkpoint costs: how long training waits, how much host memory it takes, how long the disk takes.

    python -m bench.save --size vit_h --folder runs/bench_save            # 641 M parameters, 7.7 GB: one process
    python -m bench.save --size vit_b --folder /tmp/bench_save

The state is that of the SAM task (fp32 weights, two moments, step counts) under DDP; nothing is trained. On a GPU the
wait is the copy to host memory; on a CPU it is a copy within it.
"""

import argparse
import os
import resource
import shutil
import sys
import threading
import time
from pathlib import Path

import torch

from model.build import build_sam
from trainer.checkpoint import Checkpointer, RunState
from trainer.config import SamConfig
from trainer.distributed import single_process
from trainer.optim import param_groups
from trainer.parallel.engine import Engine, build_engine
from trainer.sam_task import SamTask


def config_of(size: str) -> SamConfig:
    return SamConfig.model_validate(
        {
            "stage": "sam",
            "run_dir": "unused",
            "model": {"size": size},
            "data": {"shards": "unused", "holdout_images": 1},
            "optim": {"lr": 1e-4},
            "schedule": {"warmup_steps": 0},
            "phases": [{"name": "joint", "steps": 1}],
            "batch": {"global_size": 1, "micro": 1},
            "checkpoint": {"every_steps": 1},
        }
    )


def build(size: str) -> Engine:
    config = config_of(size)
    task = SamTask(build_sam(size), config, frozen=())
    groups = param_groups(task.named_parameters(), config.optim, 0, {})
    return build_engine(task, config, groups, single_process())


class PeakMemory:
    """Largest resident memory of this process while the block runs, in bytes; read every 10 ms from /proc."""

    def __enter__(self) -> "PeakMemory":
        self.before = self.peak = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, resident_bytes())


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="vit_h")
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to be measured; must not exist")
    parser.add_argument("--saves", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.folder.exists():
        print(f"bench.save: {options.folder} exists", file=sys.stderr)
        return 2
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    engine = build(options.size)
    state_bytes = sum(value.nbytes for _, value in engine.state_items())
    print(f"{options.size}: state {state_bytes / 1e9:.2f} GB, resident before {resident_bytes() / 1e9:.2f} GB")
    checkpointer = Checkpointer(options.folder, 1, single_process())
    try:
        for step in range(1, options.saves + 1):
            with PeakMemory() as memory:
                started = time.perf_counter()
                checkpointer.save_in_background(engine, RunState(step, step, 0))
                waited = time.perf_counter() - started
                problem = checkpointer.wait()
                total = time.perf_counter() - started
            if problem:
                print(f"bench.save: {problem}", file=sys.stderr)
                return 1
            print(
                f"save {step}: training waits {waited:.1f} s, written and checked after {total:.1f} s, "
                f"{(memory.peak - memory.before) / 1e9:.2f} GB more host memory"
            )
        path = checkpointer.newest()
        started = time.perf_counter()
        assert checkpointer.newest(read=True) == path
        checked = time.perf_counter() - started
        started = time.perf_counter()
        with PeakMemory() as memory:
            checkpointer.load(path, engine)
        print(f"checksums read in {checked:.1f} s; loaded in {time.perf_counter() - started:.1f} s, "
              f"{(memory.peak - memory.before) / 1e9:.2f} GB more host memory")  # fmt: skip
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
