"""The only training loop, for both stages. It is handed objects and knows no task, network, pipeline or backend."""

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from trainer.checkpoint import Checkpointer, RunState
from trainer.data.batches import Batch
from trainer.distributed import World, sum_on_host
from trainer.guard import Guard, Outcome
from trainer.metrics import Logger, Meter, console_line, throughput
from trainer.parallel.engine import Engine
from trainer.run_files import LineFile
from trainer.tracing import Tracer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What this stretch of the run does, all derived from the config once. Intervals are in steps."""

    first_step: int
    last_step: int  # of this phase
    num_steps: int  # of the whole run
    num_micro: int  # micro-batches a rank and step
    global_size: int
    seed: int
    flops_per_image: float | None  # forward and backward; None where no peak is known to compare it with
    peak_flops: float | None  # of a device, a second
    log_every: int
    save_every: int
    evaluate_every: int
    diagnose_every: int | None  # None: never
    bad_samples: "BadSamples"
    lr_at: Callable[[int], float]
    state_at: Callable[[int], RunState]


def train(
    engine: Engine,
    batches: Iterator[Batch],
    plan: Plan,
    world: World,
    checkpointer: Checkpointer,
    logger: Logger,
    guard: Guard,
    evaluate: Callable[[Engine, int], float | None],
    diagnose: Callable[[Engine, int], None],
    tracer: Tracer,
    sample_log: LineFile | None,
) -> Outcome:
    """Train from `plan.first_step` to `plan.last_step`, or until a signal or the guard ends it before.

    No steps are asked for where a signal came so late that the evaluation at the end of the run is all that is missing.
    """
    meter = Meter()
    guard.begin(restored=plan.first_step > 0)
    if plan.first_step == plan.last_step:
        guard.at("evaluate", plan.last_step)
        keep_if_best(evaluate(engine, plan.last_step), True, plan.last_step, plan, engine, checkpointer)
        return Outcome.STOPPED if guard.anyone_asked_to_stop() else Outcome.DONE
    engine.task.train()
    for step in range(plan.first_step, plan.last_step):
        seed_step(plan.seed, step, world)
        engine.set_lr(plan.lr_at(step))
        tracer.before(step + 1)
        guard.at("load", step)
        with meter.timed("data"):
            micro_batches = [next(batches) for _ in range(plan.num_micro)]
        guard.at("agree", step)
        with meter.timed("wait"):
            num_images, num_masks, num_bad, verdict = agree(micro_batches, guard, world)
        plan.bad_samples.count(num_bad, num_images, micro_batches)
        if verdict is Outcome.ROLL_BACK:
            return verdict

        losses = []
        for number, batch in enumerate(micro_batches):
            guard.at("forward", step)
            note_samples(batch, step, meter, sample_log)
            with meter.timed("transfer"):
                on_device = batch.counted(num_images, num_masks).to(world.device)
            loss, metrics = engine(on_device)
            last = number + 1 == plan.num_micro
            guard.at("backward" if last else "accumulate", step)
            engine.backward(loss, last)
            losses.append(loss.detach())
            meter.add(metrics)
        guard.at("optimizer", step)
        grad_norm = engine.step()
        meter.end_step(grad_norm)
        guard.note_step(step, torch.stack(losses).sum(), grad_norm, keys_of(micro_batches))

        done = step + 1
        stop = verdict is Outcome.STOPPED
        if table := tracer.after(done):
            logger.text(f"profile/step_{done}", table)
        if done % plan.log_every == 0 or done == plan.last_step or stop:
            guard.at("log", step)
            write_log(done, step, plan, engine, meter, checkpointer, logger, world)
            guard.check_loss_scale(done, engine.loss_scale)
            guard.name_slow_ranks()
            meter = Meter()
        evaluation_due = done % plan.evaluate_every == 0 or done == plan.last_step
        if stop or evaluation_due or done % plan.save_every == 0:  # what may be saved is judged first
            guard.at("settle", step)
            if guard.settle() is Outcome.ROLL_BACK:
                return Outcome.ROLL_BACK
            checkpointer.hold = guard.skipped_steps()
        guard.at("save", step)
        saved = save_if_due(done, stop, plan, engine, checkpointer)
        if evaluation_due and not stop:
            # After the save: whatever happens in an evaluation, no step is lost. A signal cuts it short; the next step
            # is then the last. At the end of the run, where there is none, the next start evaluates.
            guard.at("evaluate", step)
            with meter.paused():
                keep_if_best(evaluate(engine, done), saved, done, plan, engine, checkpointer)
            engine.task.train()
        if plan.diagnose_every and done % plan.diagnose_every == 0 and not stop:
            guard.at("diagnose", step)
            with meter.paused():
                diagnose(engine, done)
            engine.task.train()
        if stop or (done == plan.num_steps and guard.anyone_asked_to_stop()):
            checkpointer.wait()
            logger.say(f"stopped at step {done} of {plan.num_steps}; the same command goes on from here")
            return Outcome.STOPPED
    return Outcome.DONE


def agree(micro_batches: list[Batch], guard: Guard, world: World) -> tuple[float, float, int, Outcome | None]:
    """Images, masks and new bad samples of the global batch, and the guard's verdict over all ranks.

    One sum between hosts a step.
    """
    counts = [batch.local_counts() for batch in micro_batches]
    images, masks = (float(sum(column)) for column in zip(*counts, strict=True))
    bad = float(sum(len(new_problems(batch)) for batch in micro_batches))
    num_images, num_masks, num_bad, *report = sum_on_host([images, masks, bad, *guard.report()], world)
    return num_images, num_masks, int(num_bad), guard.judge(report)


def save_if_due(done: int, stop: bool, plan: Plan, engine: Engine, checkpointer: Checkpointer) -> bool:
    """Save in the background where the plan says so; where training ends, wait until it is written."""
    if stop or done == plan.last_step:
        checkpointer.save(engine, plan.state_at(done))
        return True
    return done % plan.save_every == 0 and checkpointer.save_in_background(engine, plan.state_at(done))


def keep_if_best(
    score: float | None, saved: bool, done: int, plan: Plan, engine: Engine, checkpointer: Checkpointer
) -> None:
    """Note an evaluation's score, and see that the best one has a checkpoint."""
    if score is None or not checkpointer.note_score(done, score) or saved:
        return
    checkpointer.wait()
    checkpointer.save_in_background(engine, plan.state_at(done))


def write_log(
    done: int,
    step: int,
    plan: Plan,
    engine: Engine,
    meter: Meter,
    checkpointer: Checkpointer,
    logger: Logger,
    world: World,
) -> None:
    """Scalars and the console line. All ranks call; waits for the device."""
    values = meter.collect(world) | {"optim/lr": plan.lr_at(step), "optim/loss_scale": engine.loss_scale}
    values |= {f"optim/lr_group_{i}": lr for i, lr in enumerate(engine.lrs())}
    values["optim/skipped_steps"] = float(engine.num_skipped)
    values |= throughput(
        values["speed/step_seconds"], plan.global_size, plan.flops_per_image, plan.peak_flops, world.size
    )
    values["checkpoint/stall_seconds"] = checkpointer.stall_seconds
    values["checkpoint/failed_saves"] = float(checkpointer.num_failed)
    logger.scalars(done, values)
    logger.say(console_line(done, plan.num_steps, values, plan.global_size))


def keys_of(micro_batches: list[Batch]) -> list[str]:
    """Keys of the samples that were trained on, without those that fill up."""
    return [
        key
        for batch in micro_batches
        for key, position in zip(batch.keys, batch.positions.tolist(), strict=True)
        if position >= 0
    ]


EMPTY_STEPS = 20  # in a row, whose samples are whole and have no mask to train on


class BadSamples:
    """Stops the run when too many samples train nothing: then the data is wrong, not a sample."""

    def __init__(self, budget: int, shards: str) -> None:
        self.budget, self.shards = budget, shards
        self.num_bad = 0  # over all ranks, since this process started
        self.last: deque[str] = deque(maxlen=3)  # of this rank
        self.num_empty = 0

    def count(self, num_bad: int, num_images: float, micro_batches: list[Batch]) -> None:
        """Add a step's, and whether any image trains. Past a budget raises `ValueError`, on all ranks at once."""
        self.num_bad += num_bad
        self.num_empty = 0 if num_images else self.num_empty + 1
        if self.num_empty == EMPTY_STEPS:
            raise ValueError(
                f"{EMPTY_STEPS} steps in a row had nothing to train on: no mask of their images is left. Look at "
                "data.max_mask_area, loss.resolution (thin masks cover no pixel of it) and data.scale_jitter"
            )
        for batch in micro_batches:
            self.last.extend(new_problems(batch))
        if self.num_bad > self.budget:
            raise ValueError(
                f"{self.num_bad} samples could not be trained on, data.max_bad_samples is {self.budget}. "
                f"The last on this rank: {'; '.join(self.last) or 'none'}. "
                f"`python -m data_tools.verify {self.shards} --deep --quarantine` sets such samples aside"
            )


def new_problems(batch: Batch) -> list[str]:
    """Problems that nobody has set aside yet: what is quarantined is known, and would use the budget up again."""
    return [problem for problem in batch.problems if ": quarantined: " not in problem]


def seed_step(seed: int, step: int, world: World) -> None:
    """What randomness is not shipped with the batch (decoder dropout) depends on (seed, step, rank) alone."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + world.rank) % 2**63)


def note_samples(batch: Batch, step: int, meter: Meter, sample_log: LineFile | None) -> None:
    """Count and name broken samples; write down what was trained on, if asked."""
    meter.add_batch(batch)
    for problem in batch.problems:
        log.warning("step %d: sample trains nothing: %s", step, problem)
    if sample_log is not None:
        positions, weights = batch.positions.tolist(), batch.image_weight.tolist()
        entries = [
            {"step": step, "position": position, "key": key, "weight": weight}
            for position, key, weight in zip(positions, batch.keys, weights, strict=True)
            if position >= 0
        ]
        sample_log.write("".join(json.dumps(entry) + "\n" for entry in entries))
