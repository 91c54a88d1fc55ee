"""Train a stage: MAE (`stage: mae`) or SAM (`stage: sam`). Start it again to go on where it was.

    python -m trainer.train launch/configs/sam_tiny.yaml                               # one process
    torchrun --standalone --nproc-per-node 2 -m trainer.train launch/configs/sam_tiny.yaml engine.kind=fsdp2
    deepspeed --num_gpus 8 --module trainer.train launch/configs/sam_vith.yaml engine.kind=deepspeed
    sbatch launch/sam_vith.slurm                                                       # 32 nodes of 8 GPUs

Any setting of `trainer/config.py` can follow as `dotted.key=value`. Exit codes: 0 done, 2 wrong settings or
data, 70 not healthy after all rollbacks, 71 out of memory, 74 the last checkpoint could not be written, 75 stopped by
a signal after saving, 76 another rank hung. Of a signal before training has begun: 128 + its number, as shells show it.
"""

import argparse
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from trainer.checkpoint import Checkpointer, RunState, SaveError, read_run_state
from trainer.config import Config, ConfigError, SamConfig, dump_config, load_config
from trainer.data.embeddings import EmbeddingStore, encoder_hash
from trainer.data.eval_data import evaluation_rows
from trainer.data.loader import build_batches
from trainer.data.order import num_micro_batches
from trainer.distributed import World, broadcast_object, start_world, stop_world
from trainer.environment import commit, environment
from trainer.evaluate import diagnose_and_log, evaluate_and_log
from trainer.flops import flops_per_image, peak_flops
from trainer.guard import (
    EXIT_DONE,
    EXIT_GAVE_UP,
    EXIT_NOT_SAVED,
    EXIT_OUT_OF_MEMORY,
    EXIT_STOPPED,
    EXIT_WRONG,
    GaveUp,
    Guard,
    Outcome,
    signals_end_the_process,
)
from trainer.history import STARTS, note_start
from trainer.loop import BadSamples, Plan, train
from trainer.metrics import Logger
from trainer.optim import (
    base_lr,
    check_rates,
    describe_groups,
    describe_rates,
    first_trained,
    lr_at,
    param_groups,
    phase_ends,
    steps_of,
)
from trainer.parallel.averaged import AveragedEngine
from trainer.parallel.engine import Engine, build_engine
from trainer.parallel.precision import make_deterministic
from trainer.recipe import check_recipe, recipe
from trainer.reconstruct import log_reconstruction
from trainer.run_files import Forgiving, LineFile, leave, say_error
from trainer.sam_task import SamTask
from trainer.stages import Pipeline, build_pipeline, build_task, encoder_depth
from trainer.tracing import Tracer

FINISHED = "finished.txt"  # in the run directory: the step at which all was done, the last evaluation included


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
        say_error(f"{options.config} cannot be run:\n{error}")
        return EXIT_WRONG
    if config.engine.deterministic:
        make_deterministic()
    try:
        with signals_end_the_process():
            world = start_world(config.engine.timeout_minutes)
    except ValueError as error:
        say_error(f"the processes cannot meet: {error}")
        return EXIT_WRONG
    with Guard() as guard:
        try:
            return run_guarded(config, world, guard)
        finally:
            stop_world(world)


def run_guarded(config: Config, world: World, guard: Guard) -> int:
    """`run`, with every expected end as an exit code and a line that says what to do."""
    try:
        return EXIT_DONE if run(config, world, guard) else EXIT_STOPPED
    except ValueError as error:
        say_error(f"rank {world.rank}: {message_of(error)}")
        return EXIT_WRONG
    except GaveUp as error:
        say_error(f"rank {world.rank}: {error}")
        return EXIT_GAVE_UP
    except SaveError as error:
        say_error(f"rank {world.rank}: {error}. The checkpoints before are untouched; make room, start again")
        return EXIT_NOT_SAVED
    except torch.OutOfMemoryError as error:
        say_error(f"rank {world.rank}: {explain_out_of_memory(config, world, error)}")
        return EXIT_OUT_OF_MEMORY


def message_of(error: ValueError) -> str:
    """What went wrong in a line; of an error in a loader's worker without the worker's traceback around it."""
    text = str(error).strip()
    if "Original Traceback" not in text:
        return text
    return text.splitlines()[-1].split(": ", 1)[-1]


def run(config: Config, world: World, guard: Guard) -> bool:
    """Train from wherever the newest checkpoint is to the end of the last phase. True when done.

    Each stretch has an engine of its own and starts from the newest checkpoint: a change of phase and a rollback go
    the same way as a restart.
    """
    pipeline = build_pipeline(config)
    ends = phase_ends(config.phases, pipeline.order.num_samples, config.batch.global_size)
    check_profile(config, ends[-1])
    checkpoint = config.checkpoint
    keep_every_steps = checkpoint.keep_every and checkpoint.keep_every * save_interval(config, pipeline)
    checkpointer = Checkpointer(config.run_dir / "checkpoints", checkpoint.keep_last, world, keep_every_steps)
    newest = checkpointer.to_go_on_from()
    if newest:
        # Before anything is written: a mistaken start must not touch the run.
        state = read_run_state(newest)
        check_recipe(state.recipe, recipe(config, pipeline), config.resume.allow_change, newest)
        check_not_past_the_end(newest, state.step, ends[-1], config.batch.global_size)
    logger = Logger(config.run_dir, world)
    announce(config, pipeline, ends, world, logger)
    fp16 = config.engine.precision in ("fp16", "deepspeed_fp16")
    guard.attach(config.guard, world, config.run_dir, config.engine.loss_scale_growth_steps if fp16 else None)
    checkpointer.still_saving = guard.alive
    outcome = Outcome.DONE
    try:
        while outcome is not Outcome.STOPPED:
            if outcome is Outcome.ROLL_BACK:
                # From before the trouble, be it the start: a checkpoint of skipped steps would keep them skipped.
                guard.at("go back", guard.step)
                newest = checkpointer.go_back(guard.healthy_until)
            else:
                newest = checkpointer.newest()
            state = read_run_state(newest) if newest else RunState(step=0, samples_seen=0, phase=0)
            phase = next((number for number, end in enumerate(ends) if state.step < end), None)
            if phase is None and is_finished(config.run_dir, state.step, world):
                return True
            if phase is None:
                phase = len(ends) - 1  # of which a signal has left the last evaluation undone
            if world.is_main:
                with Forgiving(str(config.run_dir / STARTS)):
                    note_start(config.run_dir, state, recipe(config, pipeline), config.model_dump(mode="json"))
            outcome = run_phase(config, phase, ends, pipeline, newest, state, checkpointer, world, logger, guard)
            if outcome is Outcome.DONE:
                check_end(checkpointer, config.phases[phase].name, ends[phase])
                logger.say(f"phase {config.phases[phase].name} is complete at step {ends[phase]}")
                if phase == len(ends) - 1:
                    logger.file(FINISHED, f"step {ends[phase]}")
                    return True
    finally:
        guard.detach()
        logger.close()
    return False


def check_not_past_the_end(newest: Path, step: int, last_step: int, global_size: int) -> None:
    """Raises `ValueError` where an allowed change has made the run shorter than it has been: that is not done."""
    if step > last_step:
        raise ValueError(
            f"checkpoint {newest} is at step {step}, past the run's last step, {last_step}: make phases longer. "
            f"Lengths in epochs are counted from step 0 with batch.global_size={global_size}; after a change of it "
            "give them in steps"
        )


def check_end(checkpointer: Checkpointer, phase: str, end: int) -> None:
    """Raises `GaveUp` if nothing can be made of what a phase ended with: going on would do it again, for ever."""
    newest = checkpointer.newest()
    if newest is None or read_run_state(newest).step < end:
        raise GaveUp(
            f"phase {phase} has reached step {end}, but the checkpoint there cannot be used (not finite or damaged, "
            f"see above); the newest usable is {newest or 'the start'}. Look at the losses before it; a lower optim.lr "
            "or optim.grad_clip may keep the weights finite"
        )


def is_finished(run_dir: Path, step: int, world: World) -> bool:
    """Whether the run has trained to `step` and evaluated there. All ranks call."""
    path = run_dir / FINISHED
    return broadcast_object(world.is_main and path.exists() and path.read_text().split() == ["step", str(step)], world)


def run_phase(
    config: Config,
    phase: int,
    ends: list[int],
    pipeline: Pipeline,
    newest: Path | None,
    state: RunState,
    checkpointer: Checkpointer,
    world: World,
    logger: Logger,
    guard: Guard,
) -> Outcome:
    """Build, restore, train to the end of the phase."""
    guard.at("build", state.step)
    has_numbers = world.is_main or not config.engine.meta_init
    task = build_task(config, config.phases[phase].frozen, initial_weights=newest is None, has_numbers=has_numbers)
    if isinstance(task, SamTask) and task.weight_report:
        logger.say(task.weight_report.summary())
        logger.text("initial_weights", task.weight_report.summary())
        logger.file("initial_weights.txt", f"# from {config.model.init_from}\n{task.weight_report}")
    names = [name for name, _ in task.named_parameters()]
    depth = encoder_depth(config) if isinstance(config, SamConfig) else 0
    groups = param_groups(task.named_parameters(), config.optim, depth, first_trained(config.phases))
    engine = build_engine(task, config, groups, world)
    rates, peak = engine.rates(), base_lr(config.optim, config.batch)
    check_rates(rates, groups, config.optim.lr)
    head = f"# phase {config.phases[phase].name} from step {state.step}\n"
    logger.file("rates.txt", head + describe_rates(rates, names, config.optim.lr, peak))
    if config.optim.ema_decay is not None:
        engine = AveragedEngine(engine, groups, config.optim.ema_decay)
    for line in describe_groups(groups, peak):
        logger.say(line)
    if newest:
        checkpointer.load(newest, engine)
        logger.say(f"going on from {newest}")
    if isinstance(config, SamConfig) and config.data.embeddings is not None:
        check_embeddings(EmbeddingStore(config.data.embeddings), engine, world)
    plan = make_plan(config, phase, ends, pipeline, world, state)
    shift = state.samples_seen - state.step * config.batch.global_size
    batches = build_batches(pipeline.dataset, config, world, state.step, ends[phase], shift)
    sample_log = None
    if config.log.sample_keys:
        sample_log = LineFile(config.run_dir / f"samples_rank{world.rank}.jsonl")
    tracer = Tracer(config.profile.steps, config.run_dir, world)
    try:
        evaluate = build_evaluation(config, pipeline, world, logger, guard)
        diagnose = build_diagnosis(config, world, logger)
        return train(engine, batches, plan, world, checkpointer, logger, guard, evaluate, diagnose, tracer, sample_log)
    finally:
        checkpointer.wait()
        if table := tracer.close():  # its window was cut short
            logger.text(f"profile/step_{tracer.last}", table)
        batches.close()
        engine.close()


def check_profile(config: Config, num_steps: int) -> None:
    """Raises `ValueError` for a trace of steps that the run will not make."""
    if config.profile.steps and config.profile.steps[1] > num_steps:
        first, last = config.profile.steps
        raise ValueError(
            f"profile.steps: [{first},{last}] goes past the run's last step, {num_steps}: name earlier ones"
        )


def check_embeddings(store: EmbeddingStore, engine: Engine, world: World) -> None:
    """`ValueError` on every rank if another encoder than the one in `engine` made them. All ranks call."""
    prefix = "sam.image_encoder."
    weights = engine.full_weights()  # on rank 0
    encoder = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    store.check_encoder(broadcast_object(encoder_hash(encoder), world))


def make_plan(config: Config, phase: int, ends: list[int], pipeline: Pipeline, world: World, start: RunState) -> Plan:
    """Everything the loop needs to know, derived from config, data, world and where it starts."""
    num_samples, global_size = pipeline.order.num_samples, config.batch.global_size
    schedule = config.schedule
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = steps_of(schedule.warmup_epochs or 0, num_samples, global_size)
    facts = {
        "recipe": recipe(config, pipeline),
        "config": config.model_dump(mode="json"),
        "code": f"{commit()}, torch {torch.__version__}",
    }
    peak = peak_flops(world.device, config.engine.precision)
    frozen = config.phases[phase].frozen
    return Plan(
        first_step=start.step,
        last_step=ends[phase],
        num_steps=ends[-1],
        num_micro=num_micro_batches(config.batch.global_size, world.size, config.batch.micro),
        global_size=global_size,
        seed=config.seed,
        flops_per_image=flops_per_image(config, frozen, pipeline.dataset) if peak and world.is_main else None,
        peak_flops=peak,
        log_every=config.log.every_steps,
        save_every=save_interval(config, pipeline),
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
        state_at=lambda step: RunState(step, start.samples_seen + (step - start.step) * global_size, phase, **facts),
    )


def save_interval(config: Config, pipeline: Pipeline) -> int:
    """Steps between two saves."""
    epochs, num_samples = config.checkpoint.every_epochs or 0, pipeline.order.num_samples
    return config.checkpoint.every_steps or steps_of(epochs, num_samples, config.batch.global_size)


def build_evaluation(
    config: Config, pipeline: Pipeline, world: World, logger: Logger, guard: Guard
) -> Callable[[Engine, int], float | None]:
    """What the loop calls at evaluation steps: mIoU and masks for SAM, a reconstruction for MAE.

    It returns the mIoU by which the best checkpoint is kept; None if there is none or a signal cut it short.
    """
    if isinstance(config, SamConfig):
        reader, rows = evaluation_rows(config)
        rows = rows[: config.evaluate.num_images]

        def evaluate(engine: Engine, step: int) -> float | None:
            stop = guard.asked_in_evaluation
            score = evaluate_and_log(engine, reader, rows, config, world, logger, step, stop)
            return score if config.checkpoint.keep_best else None

        return evaluate
    return lambda engine, step: log_reconstruction(engine, pipeline.dataset, world, logger, step)


def build_diagnosis(config: Config, world: World, logger: Logger) -> Callable[[Engine, int], None]:
    """What the loop calls at diagnostic steps; stage mae has none."""
    if not isinstance(config, SamConfig):
        return lambda engine, step: None
    reader, rows = evaluation_rows(config)
    rows = rows[: config.diagnostics.num_images]
    return lambda engine, step: diagnose_and_log(engine, reader, rows, config, world, logger, step)


def explain_out_of_memory(config: Config, world: World, error: Exception) -> str:
    """What to lower, in the order of what it costs; on a GPU, also where the memory is, into the run directory."""
    advice = [f"batch.micro (now {config.batch.micro})"] if config.batch.micro > 1 else []
    if config.engine.activation_checkpointing == "none":
        advice.append("engine.activation_checkpointing=block")
    if isinstance(config, SamConfig):
        if config.prompts.rounds > 1 and not config.engine.checkpoint_rounds:
            advice.append("engine.checkpoint_rounds=true")
        advice.append(f"data.max_masks (now {config.data.max_masks})")
    if world.size > 1 and config.engine.kind == "ddp":
        advice.append("engine.kind=fsdp2")
    where = ""
    if world.device.type == "cuda":
        path = config.run_dir / f"out_of_memory_rank{world.rank}.txt"
        with Forgiving(str(path)):
            path.write_text(f"{error}\n\n{torch.cuda.memory_summary()}")
            torch.cuda.memory._dump_snapshot(str(path.with_suffix(".pickle")))
        where = f" Where it was: {path}, and the .pickle beside it for pytorch.org/memory_viz."
    return f"out of memory. Lower or set, the cheapest first: {'; '.join(advice)}.{where} {error}"


def announce(config: Config, pipeline: Pipeline, ends: list[int], world: World, logger: Logger) -> None:
    """Say before step 0 what will happen, and write the resolved config into the run directory."""
    if not world.is_main:
        return
    logger.file("config.yaml", dump_config(config).rstrip())
    logger.text("config", dump_config(config))
    logger.text("environment", environment(world))
    samples, batch = pipeline.order.num_samples, config.batch
    logger.say(f"{config.stage} {config.model.size}, engine {config.engine.kind} {config.engine.precision}")
    epochs = ends[-1] * batch.global_size / samples
    logger.say(f"{samples} samples, {ends[-1]} steps of {batch.global_size} = {epochs:.1f} epochs")
    num_micro = num_micro_batches(batch.global_size, world.size, batch.micro)
    logger.say(
        f"{world.size} ranks x {num_micro} micro-batches of at most {batch.micro} images on "
        f"{world.device}, {config.data.workers} loader workers a rank"
    )
    if (idle := world.size - batch.global_size) > 0:
        logger.say(
            f"WARNING: {idle} of {world.size} ranks have no image to train on: batch.global_size is {batch.global_size}"
        )
    for phase, end in zip(config.phases, ends, strict=True):
        logger.say(f"phase {phase.name} to step {end}, frozen: {', '.join(phase.frozen) or 'nothing'}")


if __name__ == "__main__":
    leave(main())
