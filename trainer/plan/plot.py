"""Step time, memory and hours from 8 to 1024 GPUs, as a picture."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from trainer.config import Config
from trainer.data.order import num_micro_batches
from trainer.plan import memory, timing
from trainer.plan.count import count_work
from trainer.plan.hardware import Gpu

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)


def points(config: Config, gpu: Gpu, gpus_per_node: int, mfu: float, images: int) -> list[tuple[float, float]]:
    """(seconds a step, hours) for each of SIZES. Communication that outlasts the backward pass is added."""
    work, shape = count_work(config), memory.shape_of(config)
    found = []
    for size in SIZES:
        step = timing.step_time(work, size, config.batch.global_size, gpu, mfu)
        micro = num_micro_batches(config.batch.global_size, size, config.batch.micro)
        flow = timing.traffic(memory.sharding_of(config), 4.0 * shape.num_parameters, size, gpus_per_node, micro, gpu)
        hidden = step.seconds * 2 / 3  # the backward pass of a step
        seconds = step.seconds + max(0.0, flow.seconds_in_node + flow.seconds_between - hidden)
        run = timing.length(config, timing.Step(seconds, 0.0, ""), size, gpu, images=images)
        found.append((seconds, run.hours))
    return found


def plot(config: Config, gpu: Gpu, gpus_per_node: int, mfu: float, images: int, path: Path) -> None:
    """Three panels over the number of GPUs, at one share `mfu` of peak; memory for every sharding."""
    figure, (times, hours, room) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    found = points(config, gpu, gpus_per_node, mfu, images)
    times.plot(SIZES, [seconds for seconds, _ in found], "o-")
    times.set_ylabel("seconds a step")
    hours.plot(SIZES, [hour for _, hour in found], "o-")
    hours.set_ylabel("hours of the whole run")
    for sharding in memory.SHARDINGS:
        sizes = [size for size in SIZES if sharding in memory.shardings_of(config, size, gpus_per_node)]
        totals = [memory.estimate(config, size, gpus_per_node, sharding).total / 2**30 for size in sizes]
        room.plot(sizes, totals, label=sharding)
    room.axhline(gpu.memory_bytes / 2**30, color="black", linestyle=":", label=gpu.name)
    room.set_ylabel("GiB of a GPU")
    room.legend(fontsize="small")
    for axes in (times, hours, room):
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, [str(size) for size in SIZES])
        axes.set_xlabel("GPUs")
        axes.grid(alpha=0.3)
    times.set_yscale("log")
    hours.set_yscale("log")
    figure.suptitle(f"{config.stage} {config.model.size} on {gpu.name} at {mfu:.1%} of peak")
    figure.savefig(path, dpi=110)
    plt.close(figure)
