"""Time, traffic, reading, energy of a run, from the FLOPs and bytes of one micro-batch and a stated speed.

*Useful* FLOPs are those of the published architecture, three forward passes an image whatever is recomputed: so the
same step has the same utilisation in every implementation. This one computes 5 % less in the encoder (nothing for
padding) and a little more for relative position inside the fused kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_tools.sample_format import MANIFEST_NAME, load_manifest
from trainer.config import Config, SamConfig, is_remote
from trainer.optim import phase_ends
from trainer.plan.count import Work, count_work
from trainer.plan.hardware import Gpu
from trainer.plan.memory import Activations
from trainer.plan.simulate import Part, Simulation

SA1B_IMAGES, IMAGENET_IMAGES = 11_185_362, 1_281_167  # until there is a packed data set to count
DEFAULT_SHARE = 3.3  # a step takes so many times its roofline if nothing is stated: sam_vith_paper, eager, on an H200
FACILITY = 1.3  # energy of the whole machine over that of its GPUs, an assumption
LOADER_IMAGES_PER_CORE = {"sam": 42.9, "mae": 405.0}  # docs/performance.md, one core of an AMD EPYC


@dataclass(frozen=True)
class Roofline:
    """Least seconds of one part for a micro-batch, forward, backward and what is recomputed."""

    by_flops: float
    by_bytes: float  # as eager kernels move them; fused ones move less

    @property
    def seconds(self) -> float:
        return max(self.by_flops, self.by_bytes)


def step_roofline(config: Config, costs: Activations, masks: int, gpu: Gpu) -> tuple[Roofline, Roofline]:
    """Encoder and all rounds for one image."""
    rounds = config.prompts.rounds if isinstance(config, SamConfig) else 1

    def bound(part_of: Callable[[Simulation], Part], times: int) -> Roofline:
        flops = costs.along(lambda s: part_of(s).flops + part_of(s).backward_flops, 1, masks)
        moved = costs.along(lambda s: part_of(s).bytes_moved + part_of(s).backward_bytes_moved, 1, masks)
        return Roofline(times * flops / gpu.peak_flops, times * moved / gpu.memory_bandwidth)

    first, later = bound(lambda s: s.first, 1), bound(lambda s: s.decoder, rounds - 1)
    both = Roofline(first.by_flops + later.by_flops, first.by_bytes + later.by_bytes)
    return bound(lambda s: s.encoder, 1), both


@dataclass(frozen=True)
class Step:
    """One optimizer step on so many GPUs."""

    seconds: float
    utilisation: float  # useful FLOPs over the peak of all GPUs
    source: str  # where the seconds come from


def useful_share(global_size: int, num_gpus: int) -> float:
    """Of the GPUs' samples; the rest is GPUs without an image, or fillers of weight zero."""
    return global_size / (num_gpus * -(-global_size // num_gpus))


def step_time(
    work: Work,
    num_gpus: int,
    global_size: int,
    gpu: Gpu,
    mfu: float | None = None,
    step_seconds: float | None = None,
    roofline_seconds: float = 0.0,
) -> Step:
    """From a measured step, a stated utilisation, or the roofline of a rank's share."""
    images = -(-global_size // num_gpus)
    least = images * work.training / gpu.peak_flops
    useful = useful_share(global_size, num_gpus)
    if step_seconds is not None:
        return Step(step_seconds, useful * least / step_seconds, "given")
    if mfu is not None:
        return Step(least / mfu, useful * mfu, "from the utilisation given")
    seconds = DEFAULT_SHARE * max(roofline_seconds, least)
    return Step(seconds, useful * least / seconds, f"assumed: {DEFAULT_SHARE} times the roofline")


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends in a step, and the least time they take."""

    in_node: float
    between_nodes: float
    seconds_in_node: float
    seconds_between: float
    overlap: str


def traffic(
    sharding: str, parameter_bytes: float, num_ranks: int, ranks_of_node: int, num_micro: int, gpu: Gpu
) -> Traffic:
    """Ring collectives of fp32 values, `num_micro` forward passes a step."""

    def ring(num: int) -> float:  # of one all-gather or one reduce-scatter
        return parameter_bytes * (num - 1) / num if num > 1 else 0.0

    local = min(ranks_of_node, num_ranks)
    nodes = -(-num_ranks // ranks_of_node)
    overlap = "gradients travel during the backward pass"
    if sharding == "hsdp":
        # Gathered for the forward and the backward pass of every micro-batch; reduced at the last one only.
        inside = ring(local) * (2 * num_micro + 1)
        between = 2 * ring(nodes) / local
        overlap = "blocks are gathered ahead of the pass that needs them; gradients travel during the backward pass"
    else:
        flat = {
            "ddp": 2 * ring(num_ranks),
            "zero0": 2 * ring(num_ranks),
            "zero1": 2 * ring(num_ranks),
            "zero2": (num_micro + 1) * ring(num_ranks),  # reduces at every micro-batch
            "zero3": 3 * num_micro * ring(num_ranks),
            "fsdp2": (2 * num_micro + 1) * ring(num_ranks),
        }[sharding]
        if sharding in ("fsdp2", "zero3"):
            overlap = "blocks are gathered ahead of the pass that needs them; gradients travel during the backward pass"
        elif sharding in ("zero1", "zero2"):
            overlap = "gradients travel during the backward pass; the new weights after the step, alone"
        # As many rings as a node has GPUs, each crossing its border once: every link carries its share.
        inside, between = flat, 0.0 if nodes == 1 else flat / local
    return Traffic(inside, between, inside / gpu.node_bandwidth, between / gpu.network_bandwidth, overlap)


@dataclass(frozen=True)
class Length:
    """A whole run."""

    num_steps: int
    num_samples: int
    epochs: float
    hours: float
    gpu_hours: float
    megawatt_hours: float


def images_of(config: Config, given: int | None, steps_known: bool = False) -> tuple[int, str]:
    """Images to train on, and where the number comes from: given, the packed data set's, or the published data set's
    where data.shards is that of the shipped recipes. `ValueError` if there is none of these.
    """
    if given is not None:
        return given, "as given"
    shards = config.data.shards
    if not is_remote(shards) and (Path(shards) / MANIFEST_NAME).is_file():
        return load_manifest(Path(shards)).num_samples - config.data.holdout_images, f"as {shards} holds"
    if shards == ("data/sa1b" if isinstance(config, SamConfig) else "data/imagenet"):
        return num_samples_of(config), "as published"
    if steps_known or all(phase.steps for phase in config.phases):
        return num_samples_of(config), f"as published, {shards} cannot be looked at"  # for the epochs alone
    raise ValueError(
        f"data.shards={shards}: nobody knows how many images that is, so how many steps an epoch has; give --images N, "
        "or --steps N, or pack it first"
    )


def num_samples_of(config: Config) -> int:
    """Images of the published data sets: the plan needs no data."""
    if isinstance(config, SamConfig):
        return SA1B_IMAGES - config.data.holdout_images
    return IMAGENET_IMAGES


def length(
    config: Config, step: Step, num_gpus: int, gpu: Gpu, num_steps: int | None = None, images: int | None = None
) -> Length:
    """Of `images` images an epoch, the published number if none is given."""
    samples = images or num_samples_of(config)
    steps = num_steps or phase_ends(config.phases, samples, config.batch.global_size)[-1]
    hours = steps * step.seconds / 3600
    return Length(
        steps,
        samples,
        steps * config.batch.global_size / samples,
        hours,
        hours * num_gpus,
        hours * num_gpus * gpu.watts * FACILITY / 1e6,
    )


def impossible(work: Work, config: Config, num_steps: int, hours: float, num_gpus: int, gpu: Gpu) -> str | None:
    """Why a run cannot or will hardly end within `hours`; None if arithmetic does not speak against it."""
    available = hours * 3600 / num_steps
    least = -(-config.batch.global_size // num_gpus) * work.training / gpu.peak_flops
    utilisation = least / available
    if utilisation < 0.6:
        return None
    answer, verdict = "not to be expected", "more than any published run of this kind"
    if utilisation > 1:
        answer, verdict = "impossible", "more than a GPU can do at all"
    return (
        f"{answer}. {num_steps} steps in {hours:g} h leave {available * 1e3:.0f} ms a step; "
        f"{work.training / 1e12:.1f} TFLOP an image need {least * 1e3:.0f} ms at 100 % of {gpu.name}'s peak: "
        f"{utilisation:.0%} of peak, {verdict}"
    )


@dataclass(frozen=True)
class Reading:
    """What the loader must deliver."""

    images_per_second_node: float
    cores_node: float


def reading(config: Config, step: Step, num_gpus: int, gpus_of_node: int) -> Reading:
    per_second = config.batch.global_size / step.seconds * min(gpus_of_node, num_gpus) / num_gpus
    return Reading(per_second, per_second / LOADER_IMAGES_PER_CORE[config.stage])


def checkpoint_seconds(size: int, num_nodes: int, storage_bandwidth: float = 2e9) -> float:
    """For `size` bytes, all nodes writing at `storage_bandwidth` bytes/s each, read back once for their checksums."""
    return 2 * size / (storage_bandwidth * num_nodes)


def images_per_second(config: Config, gpu: Gpu, utilisation: float = 0.4) -> float:
    """What one GPU would take at a good utilisation; a loader that delivers this never holds it up."""
    return utilisation * gpu.peak_flops / count_work(config).training
