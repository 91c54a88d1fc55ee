"""What will this run need, and how long will it take? On any laptop, without a GPU.

    python -m trainer.plan launch/configs/sam_vith.yaml --gpus 256 --gpu a100-80gb
    python -m trainer.plan launch/configs/sam_vith.yaml --gpus 256 --gpu a100-80gb --step-seconds 2.72 --steps 90000
    python -m trainer.plan launch/configs/sam_vith.yaml --gpus 256 --gpu a100-80gb --in-hours 90
    python -m trainer.plan launch/configs/sam_vith.yaml --gpus 256 --gpu a100-80gb --dry-run --then-gpus 192
    python -m trainer.plan launch/configs/sam_vith.yaml --gpus 256 --gpu h200-141gb --plot plan.png

Settings may follow as `dotted.key=value`. Data need not be there. Exit codes: 0, 1 if the configured setting does not
fit, what was asked cannot be, or the dry run found a problem, 2 wrong settings.
"""

import argparse
import sys
from pathlib import Path

from trainer.config import Config, ConfigError, SamConfig, load_config
from trainer.data.order import num_micro_batches
from trainer.plan import dry_run, memory, timing
from trainer.plan.count import TRAINING, Work, count_work
from trainer.plan.hardware import GPUS, Gpu
from trainer.plan.plot import plot

GIB = 2.0**30


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        config = load_config(options.config, options.overrides, check_paths=False)
    except ConfigError as error:
        print(f"{options.config} cannot be planned:\n{error}", file=sys.stderr)
        return 2
    gpu = GPUS[options.gpu]
    try:
        if config.engine.kind == "hsdp":
            memory.shard_group(config, options.gpus, options.gpus_per_node)
        images, source = timing.images_of(config, options.images, options.steps is not None)
    except ValueError as error:
        print(f"{options.config} cannot be planned:\n{error}", file=sys.stderr)
        return 2
    work = count_work(config)
    step, wrong = report_time(config, options, gpu, work, images, source)
    if not options.no_memory:
        wrong |= report_memory(config, options, gpu)
    if options.dry_run:
        wrong |= report_dry_run(config, options)
    if options.plot:
        reached = step.utilisation / timing.useful_share(config.batch.global_size, options.gpus)
        plot(config, gpu, options.gpus_per_node, reached, images, options.plot)
        print(f"\n{options.plot} is written")
    return int(wrong)


def count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"should be at least 1, is {text}")
    return number


def positive(text: str) -> float:
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"should be above 0, is {text}")
    return number


def share(text: str) -> float:
    if (number := positive(text)) > 1:
        raise argparse.ArgumentTypeError(f"is a share of the peak, 0.03 for 3 %, and not {text}")
    return number


def picture(text: str) -> Path:
    """Looked at before minutes of work, not after."""
    if not (path := Path(text)).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} does not exist")
    if path.suffix not in (".png", ".pdf", ".svg", ".jpg"):
        raise argparse.ArgumentTypeError(f"should end in .png, .pdf, .svg or .jpg, is {text}")
    return path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    parser.add_argument("--gpus", type=count, default=256)
    parser.add_argument("--gpus-per-node", type=count, default=8)
    parser.add_argument("--gpu", choices=sorted(GPUS), default="a100-80gb")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--mfu", type=share, help="share of the GPU's peak that useful FLOPs reach")
    speed.add_argument("--step-seconds", type=positive, help="a measured step, with accumulation")
    parser.add_argument("--steps", type=count, help="instead of the config's phases")
    parser.add_argument("--images", type=count, help="an epoch has, instead of those that data.shards holds")
    parser.add_argument("--in-hours", type=positive, help="can the run end in this time?")
    parser.add_argument("--no-memory", action="store_true", help="time only: seconds instead of minutes")
    parser.add_argument(
        "--dry-run", action="store_true", help="build engine and data as ranks 0 and last, one fake step"
    )
    parser.add_argument("--then-gpus", type=count, default=192, help="with --dry-run: go on with so many")
    parser.add_argument("--plot", type=picture, help="write step time, memory and hours from 8 to 1024 GPUs here")
    options = parser.parse_intermixed_args(arguments)
    if options.no_memory and options.mfu is None and options.step_seconds is None:
        parser.error("--no-memory leaves out the roofline that a step's time comes from: give --mfu or --step-seconds")
    return options


def report_time(
    config: Config, options: argparse.Namespace, gpu: Gpu, work: Work, images: int, source: str
) -> tuple[timing.Step, bool]:
    """FLOPs, roofline, step, run, traffic, reading. The step, and True if `--in-hours` cannot be."""
    size, gpus = config.batch.global_size, options.gpus
    second = "prompt rounds" if isinstance(config, SamConfig) else "decoder"
    print(f"{config.stage} {config.model.size}, {size} images a step on {gpus} {gpu.name}\n\nFLOPs an image")
    print(f"  encoder forward           {work.encoder / 1e12:10.3f} TFLOP")
    print(f"  {second + ' forward':<25} {work.decoder / 1e12:10.3f} TFLOP")
    print(f"  training, nothing twice   {work.training / 1e12:10.3f} TFLOP")
    if work.encoder_passes != TRAINING:
        print("  the encoder is frozen: " + ("forward only" if work.encoder_passes else "its embeddings are read"))
    least = 0.0
    if not options.no_memory:
        least = report_roofline(config, gpu, gpus)
    step = timing.step_time(work, gpus, size, gpu, options.mfu, options.step_seconds, least)
    run = timing.length(config, step, gpus, gpu, options.steps, images)
    print(f"\nTime ({step.source})")
    print(f"  step                      {step.seconds:10.3f} s = {step.utilisation:.1%} of peak")
    if idle := max(gpus - size, 0):
        print(f"  WARNING: {idle} of {gpus} GPUs compute nothing: batch.global_size={size} gives them no image")
    elif spare := gpus * -(-size // gpus) - size:
        print(
            f"  WARNING: {spare} of {size + spare} samples a step are fillers of weight zero: {gpus} GPUs share {size}"
        )
    print(
        f"  run                       {run.num_steps:10d} steps = {run.epochs:.2f} epochs of {run.num_samples} images"
    )
    print(f"                            {run.hours:10.1f} h = {run.gpu_hours:,.0f} GPU-hours")
    print(f"  images                    {source}")
    print(f"  energy                    {run.megawatt_hours:10.1f} MWh at board power, times {timing.FACILITY}")
    report_flow(config, options, gpu, step)
    if options.in_hours is None:
        return step, False
    why = timing.impossible(work, config, run.num_steps, options.in_hours, gpus, gpu)
    print(f"\nIn {options.in_hours:g} h: " + (why if why else "not ruled out by arithmetic"))
    return step, why is not None


def report_roofline(config: Config, gpu: Gpu, gpus: int) -> float:
    """Least seconds of a rank's share of a step."""
    masks = memory.masks_of(config)
    encoder, decoder = timing.step_roofline(config, memory.activations(config), masks, gpu)
    with_masks = f" with {masks} masks" if masks else ""
    print(f"\nLeast time for one image{with_masks} on one {gpu.name}, recomputing as configured")
    for name, part in (("encoder", encoder), ("decoder", decoder)):
        bound = "arithmetic" if part.by_flops > part.by_bytes else "memory"
        flops, moved = part.by_flops * 1e3, part.by_bytes * 1e3
        print(f"  {name:<12} {flops:8.1f} ms of FLOPs {moved:8.1f} ms of bytes (eager kernels): {bound}-bound")
    return -(-config.batch.global_size // gpus) * (encoder.seconds + decoder.seconds)


def report_flow(config: Config, options: argparse.Namespace, gpu: Gpu, step: timing.Step) -> None:
    """What moves: between GPUs, from disk, to disk."""
    shape = memory.shape_of(config)
    gpus, per_node = options.gpus, options.gpus_per_node
    num_micro = num_micro_batches(config.batch.global_size, gpus, config.batch.micro)
    print(f"\nTraffic a GPU sends in a step ({num_micro} micro-batches)")
    for sharding in memory.shardings_of(config, gpus, per_node):
        flow = timing.traffic(sharding, 4.0 * shape.num_parameters, gpus, per_node, num_micro, gpu)
        print(
            f"  {sharding:<6} {flow.in_node / 1e9:6.2f} GB in the node {flow.seconds_in_node * 1e3:7.1f} ms, "
            f"{flow.between_nodes / 1e9:6.2f} GB between nodes {flow.seconds_between * 1e3:7.1f} ms; {flow.overlap}"
        )
    read = timing.reading(config, step, gpus, per_node)
    size = memory.checkpoint_bytes(config)
    seconds = timing.checkpoint_seconds(size, -(-gpus // per_node))
    print(f"\nReading    {read.images_per_second_node:.1f} images/s a node: {read.cores_node:.1f} cores")
    print(f"Checkpoint {size / 1e9:.2f} GB, {seconds:.1f} s at 2 GB/s a node")


def report_memory(config: Config, options: argparse.Namespace, gpu: Gpu) -> bool:
    """Parts, what fits, the recommendation. True if the configured setting does not fit."""
    here = memory.estimate(config, options.gpus, options.gpus_per_node)
    print(f"\nMemory of a GPU as configured ({memory.sharding_of(config)}, micro-batch {config.batch.micro})")
    is_sam = isinstance(config, SamConfig)
    for name, value in vars(here).items():
        name = "decoder" if name == "rounds" and not is_sam else name
        print(f"  {name:<12} {value / GIB:8.2f} GiB")
    unknown = memory.not_counted(config)
    verdict = "fits" if here.total <= gpu.memory_bytes else "MAY NOT FIT" if unknown else "DOES NOT FIT"
    print(f"  {'total':<12} {here.total / GIB:8.2f} GiB of {gpu.memory_bytes / GIB:.0f}: {verdict}")
    if unknown:
        print(f"  not counted: {'; '.join(unknown)}")
    fits = memory.fits_of(config, options.gpus, options.gpus_per_node, gpu.memory_bytes)
    print(
        "\n  sharding  recomputed         states     total   largest micro-batch"
        + "   most masks at one image" * is_sam
    )
    for fit in fits:
        parts = {"none": [], "selective": ["selective"], "block": ["blocks"]}[fit.blocks] + ["rounds"] * fit.rounds
        again = "+".join(parts) or "nothing"
        print(
            f"  {fit.sharding:<8}  {again:<16} {fit.memory.states / GIB:7.2f} {fit.memory.total / GIB:9.2f} GiB "
            f"{fit.max_images:12d}" + f" {fit.max_masks:20d}" * is_sam
        )
    chosen, why = memory.recommend(fits, config.batch.micro)
    if chosen is None:
        print(f"\nRecommended: none. {why}")
    else:
        engine, _, stage = chosen.sharding.partition("zero")
        settings = [f"engine.kind={engine or 'deepspeed'}", *([f"engine.zero_stage={stage}"] if stage else [])]
        settings.append(f"engine.activation_checkpointing={chosen.blocks}")
        if isinstance(config, SamConfig):
            settings.append(f"engine.checkpoint_rounds={str(chosen.rounds).lower()}")
        print(f"\nRecommended: {' '.join(settings)}\n  {why}; recomputes no more than it must")
    return here.total > gpu.memory_bytes and not unknown


def report_dry_run(config: Config, options: argparse.Namespace) -> bool:
    """Engine and data of the first and the last rank; positions of all ranks. True if something is wrong."""
    gpus = options.gpus
    print(f"\nDry run on {gpus} ranks, then {options.then_gpus}")
    problems = dry_run.check_positions(config, (gpus, options.then_gpus))
    for size in (gpus, options.then_gpus):
        print(f"  samples of {size} ranks: {dry_run.fillers(config, size)} zero-weight fillers a step")
    if config.engine.kind == "deepspeed":
        print("  DeepSpeed's engine cannot be built without its processes: only the data was checked")
    else:
        for rank, seen in dry_run.first_and_last(config, gpus, min(options.gpus_per_node, gpus)).items():
            print(
                f"  rank {rank}: engine built, one step taken; {seen['built'] / GIB:.3f} GiB before it, "
                f"{seen['weights'] / GIB:.3f} GiB of it weights, {seen['tensors']} tensors in a checkpoint"
            )
    for problem in problems:
        print(f"  WRONG: {problem}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
