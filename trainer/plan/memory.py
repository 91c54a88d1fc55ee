"""Memory of one GPU, part by part, for every engine and sharding; what fits; and which setting to take.

States are closed forms (checked against real processes in tests/trainer/test_plan.py), activations come from the real
task on fake tensors (simulate.py). Letters: N trained parameters, S ranks that share a shard, B images, M masks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Literal

from trainer.config import Config, SamConfig
from trainer.data.order import num_micro_batches
from trainer.plan.simulate import Simulation, fake_task, frozen_of, pretend_gpu, simulate

FP32 = 4  # bytes; weights, gradients and moments all are (docs/decisions/0004)
DDP_BUCKET = 25 << 20  # bytes; gradients are views of the buckets, so only the one in flight counts twice
ZERO_BUCKET = 2 * 50_000_000 * FP32  # two of trainer/parallel/deepspeed_engine.py's: one fills while one travels
ZERO3_LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters: so many stay gathered between uses
WORKSPACE = 0.6 * 2**30  # CUDA context's share in the process, cuBLAS and NCCL buffers (an allowance, not measured)
FRAGMENTATION = 1.03  # of activations: the allocator's rounding (an allowance, not measured)

FEW = 2  # masks of a simulation

Recompute = Literal["none", "selective", "block"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "block")  # from little to much
SHARDINGS = ("ddp", "fsdp2", "hsdp", "zero0", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Shape:
    """What a memory estimate needs to know of a network."""

    num_parameters: int
    num_root: int  # not inside any shard unit
    largest_unit: int  # parameters of the largest shard unit
    num_trained: int | None = None  # in the last phase, which trains most; None: all of them

    @property
    def trained(self) -> int:
        return self.num_parameters if self.num_trained is None else self.num_trained


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the worst moment of a step."""

    parameters: float
    gradients: float
    moments: float
    average: float  # of the weights, with optim.ema_decay
    gathered: float  # whole blocks that shards are gathered into, and their gradients
    buckets: float
    encoder: float  # saved activations
    rounds: float  # saved activations of all prompt rounds, or of MAE's decoder
    working: float  # short-lived tensors at the worst moment
    workspace: float

    @property
    def states(self) -> float:
        return self.parameters + self.gradients + self.moments + self.average

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def sharding_of(config: Config) -> str:
    """Name of the config's way to spread states: an engine, or ZeRO with its stage."""
    engine = config.engine
    return f"zero{engine.zero_stage}" if engine.kind == "deepspeed" else engine.kind


def shardings_of(config: Config, num_ranks: int, ranks_of_node: int) -> tuple[str, ...]:
    """Those that can be had with the config's other settings on so many ranks."""
    without = set()
    if config.optim.ema_decay is not None:  # averages weights that ZeRO-3 does not show
        without.add("zero3")
    if num_ranks % group_asked_for(config, num_ranks, ranks_of_node):
        without.add("hsdp")
    return tuple(sharding for sharding in SHARDINGS if sharding not in without)


def group_asked_for(config: Config, num_ranks: int, ranks_of_node: int) -> int:
    """Ranks that are to share one copy under HSDP, whether that divides or not."""
    return config.engine.shard_group_size or min(ranks_of_node, num_ranks)


def shard_group(config: Config, num_ranks: int, ranks_of_node: int) -> int:
    """Ranks that share one copy under HSDP. `ValueError` if the engine could not be built."""
    size = group_asked_for(config, num_ranks, ranks_of_node)
    if num_ranks % size:
        raise ValueError(
            f"engine.kind=hsdp: groups of {size} do not divide {num_ranks} ranks; set engine.shard_group_size to a "
            "number that does"
        )
    return size


def not_counted(config: Config) -> list[str]:
    """Settings of the config that change memory and are in no estimate."""
    engine = config.engine
    found = []
    if engine.offload_optimizer:
        found.append("engine.offload_optimizer (less: masters and moments leave the GPU)")
    if engine.precision == "deepspeed_fp16":
        found.append("engine.precision=deepspeed_fp16 (less: weights and gradients have two bytes)")
    if engine.reduce_dtype != "fp32":
        found.append(f"engine.reduce_dtype={engine.reduce_dtype} (other buckets)")
    if engine.compile:
        found.append("engine.compile (less: fused kernels keep less)")
    return found


def shape_of(config: Config) -> Shape:
    """Counts of the network; what is recomputed does not matter."""
    return _shape_of(with_recompute(config, "none", False))


def checkpoint_bytes(config: Config) -> int:
    """All weights; of the trained ones two moments, and the average where there is one. All fp32."""
    shape = shape_of(config)
    copies = 2 if config.optim.ema_decay is None else 3
    return FP32 * (shape.num_parameters + copies * shape.trained)


@lru_cache(maxsize=8)
def _shape_of(config: Config) -> Shape:
    with pretend_gpu():
        task = fake_task(config, frozen_of(config))
        units = [sum(p.numel() for p in unit.parameters()) for unit in task.shard_units()]
        total = sum(p.numel() for p in task.parameters())
        trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    return Shape(total, total - sum(units), max(units), trained)


def states(
    sharding: str, shape: Shape, num_ranks: int, ranks_of_node: int, num_micro: int = 1, averaged: bool = False
) -> Memory:
    """Everything but activations, with `num_micro` micro-batches a step. One rank needs no shards and no buckets.

    `averaged`: with optim.ema_decay. Evaluation then keeps the weights aside in one copy more, but has no gradients and
    saves no activations, so it is not the worst moment.
    """
    n, trained = shape.num_parameters * FP32, shape.trained * FP32
    average = trained if averaged else 0
    shards = {"ddp": 1, "zero0": 1, "hsdp": min(ranks_of_node, num_ranks)}.get(sharding, num_ranks)
    memory = Memory(n, trained, 2 * trained, average, 0, 0, 0, 0, 0, WORKSPACE)
    if sharding == "ddp":
        return replace(memory, buckets=DDP_BUCKET if num_ranks > 1 else 0)
    if sharding in ("fsdp2", "hsdp"):
        # The root is gathered from its forward to its backward. Of units, the one that runs and the one fetched ahead,
        # and in the backward pass the gradient of the one before, whole, in the reduce-scatter's input.
        whole = (shape.num_root + 2 * shape.largest_unit) * FP32
        # Ranks reduce at the last micro-batch only: until then each adds up the whole gradient, and then has its shard.
        gradients = trained / shards + (trained if num_micro > 1 and shards > 1 else 0)
        return replace(
            memory,
            parameters=n / shards,
            gradients=gradients,
            moments=2 * trained / shards,
            average=average / shards,
            gathered=2 * whole if num_ranks > 1 else 0,
        )
    if sharding == "zero0":
        return replace(memory, buckets=ZERO_BUCKET if num_ranks > 1 else 0)
    # ZeRO keeps an fp32 master of its part beside the module's weights, although those are fp32 already.
    master = trained / shards
    whole_weights = n if sharding != "zero3" else n / shards
    gradients = trained if sharding == "zero1" else trained / shards
    gathered = min(shape.num_parameters, ZERO3_LIVE) * FP32 if sharding == "zero3" and num_ranks > 1 else 0
    return replace(
        memory,
        parameters=whole_weights + master,
        gradients=gradients,
        moments=2 * trained / shards,
        gathered=gathered,
        buckets=ZERO_BUCKET if num_ranks > 1 else 0,
    )


@dataclass(frozen=True)
class Activations:
    """Bytes as functions of images and masks: one number a batch, one an image, one a mask."""

    points: tuple[tuple[int, int, Simulation], ...]  # (B, M, simulation): (1, m), (2, m), (1, 2 m)
    rounds: int

    def along(self, read: Callable[[Simulation], float], images: int, masks: int) -> float:
        """A number of the simulation for so many images and masks; exact at the three points, linear beyond."""
        (_, few, base), (_, _, twice), (_, _, more) = self.points
        by_image = read(twice) - read(base)
        by_mask = (read(more) - read(base)) / few if few else 0.0  # of one image
        return read(base) + (images - 1) * by_image + images * (masks - few) * by_mask

    def at(self, images: int, masks: int) -> tuple[float, float, float]:
        """(encoder, rounds, working) bytes."""

        def along(read: Callable[[Simulation], float]) -> float:
            return self.along(read, images, masks)

        encoder = along(lambda s: s.encoder.saved_bytes)
        first, later = along(lambda s: s.first.saved_bytes), along(lambda s: s.decoder.saved_bytes)
        decoder = first + later * (self.rounds - 1)
        # While rounds run, everything is saved; their backward frees them from the last to the first. When the
        # encoder's starts, the rounds are gone.
        in_first = encoder + first + along(lambda s: s.first.extra_bytes)
        in_rounds = max(in_first, encoder + decoder + along(lambda s: s.decoder.extra_bytes))
        in_encoder = encoder + along(lambda s: s.encoder.extra_bytes)
        working = max(in_rounds, in_encoder) - encoder - decoder + along(lambda s: s.output_bytes)
        return encoder, decoder, working


@lru_cache(maxsize=8)
def activations(config: Config) -> Activations:
    """Three simulations; a few masks say as much as many, since everything is linear in them."""
    blocks = config.engine.activation_checkpointing
    if not isinstance(config, SamConfig):
        one, two = (simulated(with_recompute(config, blocks, False), images, 0) for images in (1, 2))
        return Activations(((1, 0, one), (2, 0, two), (1, 0, one)), 1)
    rounds = config.engine.checkpoint_rounds
    points = []
    for images, masks in ((1, FEW), (2, FEW), (1, 2 * FEW)):
        # What the encoder does not recompute changes nothing for the rounds, so two variants serve for all four.
        encoder = simulated(with_recompute(config, blocks, blocks != "none"), images, masks)
        decoder = simulated(with_recompute(config, "block" if rounds else "none", rounds), images, masks)
        points.append((images, masks, replace(encoder, first=decoder.first, decoder=decoder.decoder)))
    return Activations(tuple(points), config.prompts.rounds)


@lru_cache(maxsize=32)
def simulated(config: Config, images: int, masks: int) -> Simulation:
    return simulate(config, images, masks)


def masks_of(config: Config) -> int:
    return config.data.max_masks if isinstance(config, SamConfig) else 0


def estimate(
    config: Config,
    num_ranks: int,
    ranks_of_node: int,
    sharding: str | None = None,
    images: int | None = None,
    masks: int | None = None,
) -> Memory:
    """Memory of one GPU; what is not given is the config's. No rank holds more than the largest micro-batch.

    Accumulation is that of the config's micro-batch also where `images` is another: a larger one that needs none is not
    allowed for, so that more images never need less memory.
    """
    images = config.batch.micro if images is None else images
    masks = masks_of(config) if masks is None else masks
    num_micro = num_micro_batches(config.batch.global_size, num_ranks, config.batch.micro)
    averaged = config.optim.ema_decay is not None
    sharding = sharding or sharding_of(config)
    group = shard_group(config, num_ranks, ranks_of_node) if sharding == "hsdp" else ranks_of_node
    held = states(sharding, shape_of(config), num_ranks, group, num_micro, averaged)
    encoder, rounds, working = activations(config).at(images, masks)
    return replace(
        held, encoder=encoder * FRAGMENTATION, rounds=rounds * FRAGMENTATION, working=working * FRAGMENTATION
    )


@lru_cache(maxsize=8)
def with_recompute(config: Config, blocks: Recompute, rounds: bool) -> Config:
    """The same run, recomputing so much of the encoder's blocks, and the prompt rounds or not."""
    engine = config.engine.model_copy(
        update={
            "activation_checkpointing": blocks,
            "checkpoint_rounds": rounds and isinstance(config, SamConfig),
        }
    )
    return config.model_copy(update={"engine": engine})


@dataclass(frozen=True)
class Fit:
    """A sharding and what to recompute, with what then fits."""

    sharding: str
    blocks: Recompute
    rounds: bool  # recompute them
    memory: Memory  # at the config's micro-batch and masks
    max_images: int  # at the config's masks; 0: not even one
    max_masks: int  # at one image


def largest(fits, limit: int) -> int:
    """Largest number in 0..limit that fits; `fits` is monotonous."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def fits_of(config: Config, num_ranks: int, ranks_of_node: int, capacity: float) -> list[Fit]:
    """Every sharding with every way to recompute, cheapest recomputation first; selective only where asked for."""
    found = []
    is_sam = isinstance(config, SamConfig)
    selective = config.engine.activation_checkpointing == "selective"
    all_blocks = RECOMPUTE if selective else ("none", "block")
    for blocks, rounds in product(all_blocks, (False, True) if is_sam else (False,)):
        variant = with_recompute(config, blocks, rounds)
        for sharding in shardings_of(config, num_ranks, ranks_of_node):

            def total(images: int | None = None, masks: int | None = None, variant=variant, sharding=sharding) -> float:
                return estimate(variant, num_ranks, ranks_of_node, sharding, images, masks).total

            max_images = largest(lambda b: b == 0 or total(images=b) <= capacity, 4096)
            max_masks = largest(lambda m: m == 0 or total(images=1, masks=m) <= capacity, 4096) if is_sam else 0
            memory = estimate(variant, num_ranks, ranks_of_node, sharding)
            found.append(Fit(sharding, blocks, rounds, memory, max_images, max_masks))
    return found


def recommend(fits: list[Fit], micro: int) -> tuple[Fit | None, str]:
    """The setting with the least recomputation and the least traffic between nodes that fits, and why."""
    for fit in fits:  # least recomputed first
        if fit.sharding == "ddp" and fit.max_images >= micro:
            return fit, "whole states fit beside the activations, so nothing needs gathering"
    order = ("hsdp", "zero1", "zero2", "fsdp2", "zero3")
    cost = {blocks: number for number, blocks in enumerate(RECOMPUTE)}

    def rank(fit: Fit) -> tuple[int, int]:
        return cost[fit.blocks] + 2 * fit.rounds, order.index(fit.sharding) if fit.sharding in order else len(order)

    for fit in sorted(fits, key=rank):
        if fit.max_images >= micro:
            return fit, "whole states do not fit; this shards them with the least traffic between nodes"
    return None, "nothing fits: lower batch.micro (accumulation follows by itself) or data.max_masks"
