"""Train a stage: MAE (`stage: mae`) or SAM (`stage: sam`). Start it again to go on where it was.

    python -m trainer.train launch/configs/sam_tiny.yaml                               # one process
    torchrun --standalone --nproc-per-node 2 -m trainer.train launch/configs/sam_tiny.yaml engine.kind=fsdp2
    deepspeed --num_gpus 8 --module trainer.train launch/configs/sam_vith.yaml engine.kind=deepspeed
    sbatch launch/sam_vith.slurm                                                       # 32 nodes of 8 GPUs

Any setting of `trainer/config.py` can follow as `dotted.key=value`. Exit codes: 0 done, 2 wrong settings or data, 75
stopped by a signal after saving.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from trainer.checkpoint import Checkpointer, RunState, read_run_state
from trainer.config import Config, ConfigError, SamConfig, dump_config, load_config
from trainer.data.eval_data import evaluation_rows
from trainer.data.loader import build_batches
from trainer.distributed import World, start_world, stop_world
from trainer.environment import environment
from trainer.evaluate import diagnose_and_log, evaluate_and_log
from trainer.flops import flops_per_image, peak_flops
from trainer.guard import EXIT_STOPPED, Guard
from trainer.loop import BadSamples, Plan, train
from trainer.metrics import Logger
from trainer.optim import (
    base_lr,
    check_rates,
    describe_groups,
    first_trained,
    lr_at,
    param_groups,
    phase_ends,
    steps_of,
)
from trainer.parallel.averaged import AveragedEngine
from trainer.parallel.engine import Engine, build_engine
from trainer.reconstruct import log_reconstruction
from trainer.sam_task import SamTask
from trainer.stages import Pipeline, build_pipeline, build_task, encoder_depth
from trainer.tracing import Tracer


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        config = load_config(options.config, options.overrides)
    except ConfigError as error:
        print(f"{options.config} cannot be run:\n{error}", file=sys.stderr)
        return 2
    world = start_world(config.engine.timeout_minutes)
    try:
        with Guard() as guard:
            finished = run(config, world, guard)
    except ValueError as error:
        print(f"rank {world.rank}: {error}", file=sys.stderr)
        return 2
    finally:
        stop_world(world)
    return 0 if finished else EXIT_STOPPED


def run(config: Config, world: World, guard: Guard) -> bool:
    """All phases of the run, each an engine of its own that starts from the newest checkpoint. True when done."""
    pipeline = build_pipeline(config)
    ends = phase_ends(config.phases, pipeline.order.num_samples, config.batch.global_size)
    checkpointer = Checkpointer(config.run_dir / "checkpoints", config.checkpoint.keep_last, world)
    newest = checkpointer.newest()
    if newest:
        # Before anything is written: a mistaken start must not touch the run.
        check_same_run(read_run_state(newest), fingerprint(config, pipeline), newest)
    logger = Logger(config.run_dir, world)
    announce(config, pipeline, ends, world, logger)
    try:
        for phase, end in enumerate(ends):
            if not run_phase(config, phase, ends, pipeline, checkpointer, world, logger, guard):
                return False
            logger.say(f"phase {config.phases[phase].name} is complete at step {end}")
    finally:
        logger.close()
    return True


def run_phase(
    config: Config,
    phase: int,
    ends: list[int],
    pipeline: Pipeline,
    checkpointer: Checkpointer,
    world: World,
    logger: Logger,
    guard: Guard,
) -> bool:
    """Build, restore, train. A change of phase goes through the resume path: save, rebuild, load. False: stopped."""
    newest = checkpointer.newest()
    first_step = read_run_state(newest).step if newest else 0
    if first_step >= ends[phase]:
        return True
    task = build_task(config, config.phases[phase].frozen, initial_weights=newest is None)
    if isinstance(task, SamTask) and task.weight_report:
        logger.text("initial_weights", task.weight_report)
    depth = encoder_depth(config) if isinstance(config, SamConfig) else 0
    groups = param_groups(task.named_parameters(), config.optim, depth, first_trained(config.phases))
    engine = build_engine(task.to(world.device), config, groups, world)
    check_rates(engine.rates(), groups, config.optim.lr)
    if config.optim.ema_decay is not None:
        engine = AveragedEngine(engine, groups, config.optim.ema_decay)
    for line in describe_groups(groups, base_lr(config.optim, config.batch)):
        logger.say(line)
    if newest:
        checkpointer.load(newest, engine)
        logger.say(f"going on from {newest}")
    plan = make_plan(config, phase, ends, pipeline, world, first_step)
    batches = build_batches(pipeline.dataset, config, world, first_step, ends[phase])
    sample_log = None
    if config.log.sample_keys:
        sample_log = (config.run_dir / f"samples_rank{world.rank}.jsonl").open("a")
    try:
        evaluate = build_evaluation(config, pipeline, world, logger, guard)
        tracer = Tracer(config.profile.steps, config.run_dir, world)
        diagnose = build_diagnosis(config, world, logger)
        stopped = train(
            engine, batches, plan, world, checkpointer, logger, guard, evaluate, diagnose, tracer, sample_log
        )
    finally:
        batches.close()
        engine.close()
        if sample_log:
            sample_log.close()
    return not stopped


def make_plan(config: Config, phase: int, ends: list[int], pipeline: Pipeline, world: World, first_step: int) -> Plan:
    """Everything the loop needs to know, derived from config, data and world."""
    num_samples, global_size = pipeline.order.num_samples, config.batch.global_size
    schedule = config.schedule
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = steps_of(schedule.warmup_epochs or 0, num_samples, global_size)
    save_every = config.checkpoint.every_steps or steps_of(
        config.checkpoint.every_epochs or 0, num_samples, global_size
    )
    peak = peak_flops(world.device, config.engine.precision)
    frozen = config.phases[phase].frozen
    return Plan(
        first_step=first_step,
        last_step=ends[phase],
        num_steps=ends[-1],
        num_micro=num_micro_batches(config, world),
        global_size=global_size,
        seed=config.seed,
        flops_per_image=flops_per_image(config, frozen, pipeline.dataset) if peak and world.is_main else None,
        peak_flops=peak,
        log_every=config.log.every_steps,
        save_every=save_every,
        evaluate_every=config.evaluate.every_steps
        if isinstance(config, SamConfig)
        else config.log.pictures_every_steps,
        diagnose_every=config.diagnostics.every_steps if isinstance(config, SamConfig) else None,
        bad_samples=BadSamples(config.data.max_bad_samples, config.data.shards),
        lr_at=partial(
            lr_at,
            schedule=schedule,
            peak=base_lr(config.optim, config.batch),
            warmup_steps=warmup,
            num_steps=ends[-1],
        ),
        state_at=lambda step: RunState(step, step * global_size, phase, fingerprint(config, pipeline)),
    )


def num_micro_batches(config: Config, world: World) -> int:
    """Accumulation follows from the global batch, the ranks and the micro-batch."""
    per_rank = -(-config.batch.global_size // world.size)
    return -(-per_rank // config.batch.micro)


def build_evaluation(config: Config, pipeline: Pipeline, world: World, logger: Logger, guard: Guard):
    """What the loop calls at evaluation steps: mIoU and masks for SAM, a reconstruction for MAE."""
    if isinstance(config, SamConfig):
        reader, rows = evaluation_rows(config)
        rows = rows[: config.evaluate.num_images]
        return lambda engine, step: evaluate_and_log(
            engine, reader, rows, config, world, logger, step, lambda: guard.stop_requested
        )
    return lambda engine, step: log_reconstruction(engine, pipeline.dataset, world, logger, step)


def build_diagnosis(config: Config, world: World, logger: Logger) -> Callable[[Engine, int], None]:
    """What the loop calls at diagnostic steps; stage mae has none."""
    if not isinstance(config, SamConfig):
        return lambda engine, step: None
    reader, rows = evaluation_rows(config)
    rows = rows[: config.diagnostics.num_images]
    return lambda engine, step: diagnose_and_log(engine, reader, rows, config, world, logger, step)


def fingerprint(config: Config, pipeline: Pipeline) -> dict[str, object]:
    """What fixes the network and the sequence of samples and draws: a run resumes only on the same."""
    return {
        "stage": config.stage,
        "seed": config.seed,
        "global_size": config.batch.global_size,
        "lanes": config.data.lanes,
        "window": config.data.window,
        "num_samples": pipeline.order.num_samples,
        "manifest": pipeline.fingerprint,
        "model": config.model.model_dump(mode="json", exclude={"init_from", "patch_resize"}),
    }


def check_same_run(state: RunState, wanted: dict[str, object], checkpoint: Path) -> None:
    """Raise `ValueError` with every difference if the checkpoint belongs to another network or sequence of samples."""
    differences = [
        f"{key}: {state.fingerprint.get(key)!r} there, {value!r} now"
        for key, value in wanted.items()
        if state.fingerprint.get(key) != value
    ]
    if differences:
        raise ValueError(f"{checkpoint} belongs to another run; use a new run_dir. " + "; ".join(differences))


def announce(config: Config, pipeline: Pipeline, ends: list[int], world: World, logger: Logger) -> None:
    """Say before step 0 what will happen, and write the resolved config into the run directory."""
    if not world.is_main:
        return
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(dump_config(config))
    logger.text("config", dump_config(config))
    logger.text("environment", environment(world))
    samples, batch = pipeline.order.num_samples, config.batch
    logger.say(f"{config.stage} {config.model.size}, engine {config.engine.kind} {config.engine.precision}")
    epochs = ends[-1] * batch.global_size / samples
    logger.say(f"{samples} samples, {ends[-1]} steps of {batch.global_size} = {epochs:.1f} epochs")
    logger.say(
        f"{world.size} ranks x {num_micro_batches(config, world)} micro-batches of at most {batch.micro} images on "
        f"{world.device}, {config.data.workers} loader workers a rank"
    )
    for phase, end in zip(config.phases, ends, strict=True):
        logger.say(f"phase {phase.name} to step {end}, frozen: {', '.join(phase.frozen) or 'nothing'}")


if __name__ == "__main__":
    sys.exit(main())
