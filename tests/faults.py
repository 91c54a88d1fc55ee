"""Break things on purpose and see what is lost.

    make faults                                      # everything, with a table at the end
    python -m tests.faults --short                   # one try of each
    python -m tests.faults --only kill_all --out FILE.json

Runs of the real entry point, so small that a step takes a fraction of a second, on CPU processes. A fault counts as
survived if the run ends as documented, the next start goes on from a complete checkpoint, and in the end the samples of
every step are those of a run that nobody disturbed, and so is its last loss. "Trained again" is what that cost.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from tests.conftest import pack_scenes
from tests.fork_ranks import Ranks
from tests.trainer.tiny import losses, mae_arguments
from trainer import guard, loop, train
from trainer.checkpoint import Checkpointer
from trainer.checkpoint_files import check_files, step_directories
from trainer.distributed import single_process
from trainer.mae_task import MaeTask
from trainer.parallel.torch_engine import TorchEngine

GLOBAL_SIZE = 4
SECONDS_TO_END = 120.0  # for a healthy end, on a machine with much else to do
SECONDS_FOR_LONG = 1200.0  # for the thousand steps of `kill_all`, each with a save
SECONDS_AFTER_KILL = 30.0  # within which the others notice that a rank is gone
REL_LOSS = 1e-4  # the same arithmetic in the same order gives equal bits; gloo may add ranks in another order


@dataclass
class Row:
    """What became of one kind of fault."""

    fault: str
    tried: int = 0
    survived: int = 0
    trained_again: int = 0  # samples
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def count(self, problems: list[str], trained_again: int = 0) -> None:
        self.tried += 1
        self.survived += not problems
        self.trained_again += trained_again
        self.problems += problems


class Lab:
    """Data, an undisturbed run, and a folder for each try."""

    def __init__(self, folder: Path, full: bool) -> None:
        self.folder, self.full = folder, full
        self.scenes = {
            "train": pack_scenes(folder, "train", 24, 0),
            "eval": pack_scenes(folder, "eval", 4, 9),
        }
        self._references: dict[tuple[str, ...], Path] = {}
        self._number = 0

    def new_run(self) -> Path:
        self._number += 1
        return self.folder / f"run{self._number}"

    def arguments(self, run: Path, *more: str) -> list[str]:
        """MAE, two ranks' worth of four images a step, saved after every second step."""
        return mae_arguments(self.scenes, run, f"batch.global_size={GLOBAL_SIZE}", "batch.micro=2",
                             "checkpoint.every_steps=2", *more)  # fmt: skip

    def reference(self, *more: str) -> Path:
        """An undisturbed run on two ranks."""
        if more not in self._references:
            run = self.new_run()
            codes = self.start(run, *more).wait(SECONDS_FOR_LONG)
            assert codes == [0, 0], f"undisturbed run ended with {codes}"
            self._references[more] = run
        return self._references[more]

    def start(self, run: Path, *more: str, ranks: int = 2, patch: Callable[[int], None] | None = None) -> Ranks:
        return Ranks(run.with_suffix(".logs"), self.arguments(run, *more), ranks, patch)

    def finish(self, run: Path, *more: str, ranks: int = 2, seconds: float = SECONDS_TO_END) -> tuple[list[str], int]:
        """Start again without a fault. What is not as in the undisturbed run, and how many samples were repeated."""
        processes = self.start(run, *more, ranks=ranks)
        codes = processes.wait(seconds)
        if any(codes):
            return [f"the next start ended with {codes}: {processes.output()[-2000:]}"], 0
        return self.compare(run, *more)

    def compare(self, run: Path, *more: str) -> tuple[list[str], int]:
        wanted, found = lines(self.reference(*more)), lines(run)
        problems = []
        if set(found) != set(wanted):
            strange, missing = sorted(set(found) - set(wanted)), sorted(set(wanted) - set(found))
            problems.append(f"samples differ: {strange[:3]} are new, {missing[:3]} are missing")
        one, other = losses(run), losses(self.reference(*more))
        last = max(other)
        if one.get(last) is None or abs(one[last] - other[last]) > REL_LOSS * abs(other[last]):
            problems.append(f"loss of step {last} is {one.get(last)}, undisturbed {other[last]}")
        return problems, len(found) - len(set(found))


def lines(run: Path) -> list[tuple[int, int, str]]:
    """(step, position, key) of everything that all ranks trained on. A line that a kill cut short is not counted."""
    found = []
    for path in sorted(run.glob("samples_rank*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            found.append((entry["step"], entry["position"], entry["key"]))
    return found


def wait_for_file(path: Path, processes: Ranks, timeout_s: float = SECONDS_TO_END) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if processes.poll() or time.monotonic() > deadline:
            processes.close()
            raise AssertionError(f"{path} did not come:\n{processes.output()[-3000:]}")
        time.sleep(0.01)


def wait_for_progress(pointer: Path, before: str, processes: Ranks) -> None:
    """Until LATEST names another checkpoint than before, or the run is at its end."""
    deadline = time.monotonic() + SECONDS_TO_END
    while not processes.poll() and time.monotonic() < deadline:
        if pointer.exists() and pointer.read_text() != before:
            return
        time.sleep(0.01)


def slowed(owner: object, name: str, marker: Path, seconds: float) -> Callable[[int], None]:
    """A patch: `owner.name` says that it began and takes longer."""

    def patch(rank: int) -> None:
        original = getattr(owner, name)

        def longer(*args, **kwargs):
            if rank == 0:
                marker.touch()
            time.sleep(seconds)
            return original(*args, **kwargs)

        setattr(owner, name, longer)

    return patch


def save_at_once(rank: int) -> None:
    """A patch: training waits for each save, so that a slow disk leaves none out."""
    save_in_background = Checkpointer.save_in_background

    def save(checkpointer, *args):
        begun = save_in_background(checkpointer, *args)
        checkpointer.wait()
        return begun

    Checkpointer.save_in_background = save


def all_of(*patches: Callable[[int], None]) -> Callable[[int], None]:
    """A patch: these, one after the other."""

    def patch(rank: int) -> None:
        for one in patches:
            one(rank)

    return patch


# ------------------------------------------------------------------------------------------------------- signals


def stopped_as_documented(lab: Lab, run: Path, processes: Ranks, *more: str) -> tuple[list[str], int]:
    codes = processes.wait(SECONDS_TO_END)
    problems = [] if codes == [75, 75] else [f"exit codes {codes}, not 75: {processes.output()[-1500:]}"]
    later, again = lab.finish(run, *more)
    return problems + later, again


def signal_to_one_rank(lab: Lab, row: Row, where: str) -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    for rank in (1, 0) if lab.full else (1,):
        for number in numbers if lab.full else numbers[:1]:
            run = lab.new_run()
            marker = run.with_suffix(".marker")
            patches = {
                "training": slowed(loop, "seed_step", marker, 0.02),
                "saving": slowed(dcp, "save", marker, 0.5),
                "evaluating": slowed(train, "log_reconstruction", marker, 0.5),
            }
            more = ["log.pictures_every_steps=3"] if where == "evaluating" else []
            processes = lab.start(run, *more, patch=patches[where])
            wait_for_file(marker, processes)
            processes.kill(rank, number)
            row.count(*stopped_as_documented(lab, run, processes, *more))


def signal_training(lab: Lab, row: Row) -> None:
    signal_to_one_rank(lab, row, "training")


def signal_saving(lab: Lab, row: Row) -> None:
    signal_to_one_rank(lab, row, "saving")


def signal_evaluating(lab: Lab, row: Row) -> None:
    signal_to_one_rank(lab, row, "evaluating")


def signal_starting(lab: Lab, row: Row) -> None:
    """While the engine is built, in a run that has a checkpoint: it saves after the first step, or says 128 + n."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) if lab.full else (signal.SIGTERM,):
        run = lab.new_run()
        first = lab.start(run, patch=slowed(loop, "seed_step", run.with_suffix(".first"), 0.1))
        first.wait_for("step 3/")
        first.close()  # leaves a run in the middle, with a checkpoint or none
        marker = run.with_suffix(".marker")
        processes = lab.start(run, patch=slowed(train, "build_engine", marker, 0.3))
        wait_for_file(marker, processes)
        processes.kill(1, number)
        row.count(*stopped_as_documented(lab, run, processes))


# --------------------------------------------------------------------------------------------------------- kills


def kill_one(lab: Lab, row: Row) -> None:
    for rank in (0, 1) if lab.full else (1,):
        for step in (1, 4) if lab.full else (3,):
            run = lab.new_run()
            processes = lab.start(run, patch=slowed(loop, "seed_step", run.with_suffix(".marker"), 0.1))
            processes.wait_for(f"step {step}/")
            processes.kill(rank, signal.SIGKILL)
            started = time.monotonic()
            codes = processes.wait(SECONDS_AFTER_KILL)
            took = time.monotonic() - started
            problems = [] if 999 not in codes and codes[1 - rank] > 0 else [f"after {took:.0f} s the codes are {codes}"]
            row.notes.append(f"the other ended after {took:.1f} s")
            later, again = lab.finish(run)
            row.count(problems + later, again)


def kill_all(lab: Lab, row: Row) -> None:
    """At random moments of one run that saves after every step; one in four while it starts."""
    kills, randomly = (50 if lab.full else 4), random.Random(7)
    steps = 20 * kills
    more = (f"phases=[{{name: pretrain, steps: {steps}}}]", "checkpoint.every_steps=1", "log.every_steps=10")
    run, last = lab.new_run(), 0
    pointer = run / "checkpoints" / "LATEST"
    for number in range(kills):
        before = pointer.read_text() if pointer.exists() else ""
        processes = lab.start(run, *more)
        if number % 4 != 3:
            wait_for_progress(pointer, before, processes)
        time.sleep(randomly.uniform(0.0, 1.0))
        for rank in range(2):
            processes.kill(rank, signal.SIGKILL)
        processes.close()
        newest = Checkpointer(run / "checkpoints", 3, single_process("cpu")).newest(read=True)
        step = train.read_run_state(newest).step if newest else 0
        problems = [] if step >= last else [f"newest complete checkpoint is of step {step}, after one of {last}"]
        last = max(last, step)
        row.count(problems)
    row.notes.append(f"killed between steps 0 and {last} of {steps}")
    problems, row.trained_again = lab.finish(run, *more, seconds=SECONDS_FOR_LONG)
    row.problems += problems


# --------------------------------------------------------------------------------------------- files and the disk


def damaged_files(lab: Lab, row: Row) -> None:
    """The newest checkpoint of a half-finished run is damaged: the one before is taken, with a word about it."""
    half = lab.new_run()
    processes = lab.start(half, patch=slowed(loop, "seed_step", half.with_suffix(".marker"), 0.1))
    processes.wait_for("step 5/")
    processes.kill(0, signal.SIGTERM)
    processes.wait(SECONDS_TO_END)
    kinds = ("truncated", "bit flipped", "missing", "no marker") if lab.full else ("bit flipped", "truncated")
    for kind in kinds:
        run = lab.new_run()
        subprocess.run(["cp", "-r", str(half), str(run)], check=True)
        newest = step_directories(run / "checkpoints")[-1]
        damage(newest, kind)
        assert check_files(newest, read=True), kind
        problems, again = lab.finish(run)
        said = f"{newest.name} is passed over" in run.with_suffix(".logs").joinpath("rank0.log").read_text()
        row.count(problems + ([] if said else [f"{kind}: nothing was said of it"]), again)


def damage(checkpoint: Path, kind: str) -> None:
    file = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    if kind == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif kind == "bit flipped":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif kind == "missing":
        file.unlink()
    else:
        (checkpoint / "COMPLETE").unlink()


def disk_full(lab: Lab, row: Row) -> None:
    """A small tmpfs is full for a while: saves fail, training goes on, and later saves get through."""
    run = lab.new_run()
    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(checkpoints)], capture_output=True
    )
    if mounted.returncode:
        row.notes.append("not tried: mounting a tmpfs needs root")
        return
    try:
        filler = checkpoints / "filler"
        with filler.open("wb") as file:
            file.write(b"\0" * (255 << 20))
        processes = lab.start(run, patch=slowed(loop, "seed_step", run.with_suffix(".marker"), 0.3))
        processes.wait_for("could not be saved")
        filler.unlink()
        codes = processes.wait(SECONDS_TO_END)
        problems = [] if codes == [0, 0] else [f"exit codes {codes}: {processes.output()[-1500:]}"]
        later, again = lab.compare(run)
        row.count(problems + later, again)
        # And to the end: the last checkpoint cannot be written.
        for path in step_directories(checkpoints):
            subprocess.run(["rm", "-r", str(path)], check=True)
        filler.write_bytes(b"\0" * (255 << 20))
        codes = lab.start(run).wait(SECONDS_TO_END)
        row.count([] if codes == [74, 74] else [f"full to the end: exit codes {codes}, not 74"])
    finally:
        subprocess.run(["umount", str(checkpoints)], check=False)


def slow_disk(lab: Lab, row: Row) -> None:
    """The last save takes longer than `guard.hang_minutes`, which is no hang."""
    run = lab.new_run()
    more = ["guard.hang_minutes=0.1", "checkpoint.every_steps=100"]
    processes = lab.start(run, *more, patch=slowed(dcp, "save", run.with_suffix(".marker"), 12.0))
    codes = processes.wait(SECONDS_TO_END)
    row.count([] if codes == [0, 0] else [f"exit codes {codes}: {processes.output()[-1500:]}"])


def fill(filler: Path) -> Path:
    """Write a file until there is no room; to be deleted for more."""
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 65536)
        except OSError:
            return filler


def run_dir_full(lab: Lab, row: Row) -> None:
    """The whole run directory is on a full disk: nothing is written, training goes on; the last save says 74."""
    for for_a_while in (True, False) if lab.full else (True,):
        run = lab.new_run()
        run.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(run)], capture_output=True
        ).returncode:
            row.notes.append("not tried: mounting a tmpfs needs root")
            return
        try:
            patches = (
                slowed(loop, "seed_step", run.with_suffix(".marker"), 0.3),
                spoiled(1, range(7, 8), float("nan"), times=1),
            )
            more = ["phases=[{name: pretrain, steps: 16}]", "checkpoint.keep_last=1"]
            processes = lab.start(run, *more, patch=all_of(*patches))
            processes.wait_for("step 3/")
            fillers = [fill(run / "filler")]
            processes.wait_for("could not be saved")  # what that save had written is free again
            fillers.append(fill(run / "second_filler"))
            processes.wait_for("step 11/")
            if for_a_while:
                for filler in fillers:
                    filler.unlink()
            codes = processes.wait(SECONDS_TO_END)
            wanted = 0 if for_a_while else 74
            problems = [] if codes == [wanted, wanted] else [f"exit codes {codes}: {processes.output()[-1500:]}"]
            problems += [] if "cannot be written" in processes.output() else ["nothing was said of it"]
            if for_a_while and max(losses(run)) != 16:
                problems.append(f"numbers of steps {sorted(losses(run))} alone")
            row.count(problems)
        finally:
            subprocess.run(["umount", "--lazy", str(run)], check=False)


def run_dir_gone(lab: Lab, row: Row) -> None:
    """The run directory is deleted under a run, and then a step is skipped, which is logged there."""
    run = lab.new_run()
    patches = (
        slowed(loop, "seed_step", run.with_suffix(".marker"), 0.2),
        spoiled(1, range(9, 10), float("nan"), times=1),
    )
    processes = lab.start(run, "phases=[{name: pretrain, steps: 14}]", patch=all_of(*patches))
    processes.wait_for("step 4/")
    subprocess.run(["rm", "-rf", str(run)], check=False)
    codes = processes.wait(SECONDS_TO_END)
    problems = [] if codes == [0, 0] else [f"exit codes {codes}: {processes.output()[-1500:]}"]
    problems += [] if (run / "unhealthy_rank1.jsonl").exists() else ["the skipped step is nowhere"]
    problems += [] if (run / "checkpoints" / "step_00000014").exists() else ["the last checkpoint is nowhere"]
    row.count(problems)


# ------------------------------------------------------------------------------------------------- unhealthy steps


def spoiled(rank_at_fault: int, steps: range, factor: float, times: int = 10**9) -> Callable[[int], None]:
    """A patch: on one rank the loss of these steps is multiplied, each step at most so many times."""

    def patch(rank: int) -> None:
        forward, seen = MaeTask.forward, {}
        current = {"step": -1}
        seed_step = loop.seed_step

        def note_step(seed, step, world):
            current["step"] = step
            return seed_step(seed, step, world)

        def spoil(task, batch):
            result = forward(task, batch)
            step = current["step"]
            if rank == rank_at_fault and task.training and step in steps and seen.get(step, 0) < times:
                seen[step] = seen.get(step, 0) + 1
                return result[0] * factor, result[1]
            return result

        loop.seed_step, MaeTask.forward = note_step, spoil

    return patch


ENGINES = {
    "ddp": ["engine.kind=ddp"],
    "fsdp2": ["engine.kind=fsdp2"],
    "zero2": ["engine.kind=deepspeed"],
    "zero3": ["engine.kind=deepspeed", "engine.zero_stage=3"],
}


def not_finite(lab: Lab, row: Row) -> None:
    """One rank's loss is NaN in one step, once: nobody takes the step, its keys are logged, training goes on."""
    for name in ENGINES if lab.full else ("ddp", "zero2"):
        for factor in (float("nan"), float("inf")) if lab.full else (float("nan"),):
            run = lab.new_run()
            processes = lab.start(run, *ENGINES[name], patch=spoiled(1, range(2, 3), factor, times=1))
            codes = processes.wait(SECONDS_TO_END)
            problems = [] if codes == [0, 0] else [f"{name}: exit codes {codes}: {processes.output()[-1500:]}"]
            entries = [json.loads(line) for line in (run / "unhealthy_rank1.jsonl").read_text().splitlines()]
            trained = {key for step, _, key in lines(run) if step == 2}
            if [(e["step"], e["event"]) for e in entries] != [(2, "skipped")] or not set(entries[0]["keys"]) <= trained:
                problems.append(f"{name}: logged {entries}, trained {trained}")
            skipped = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["optim/skipped_steps"]
            problems += [] if skipped == 1 else [f"{name}: {skipped} steps counted as skipped"]
            row.count(problems)


def roll_back(lab: Lab, row: Row) -> None:
    """Steps are skipped past the budget, once: back to the last checkpoint, and then as if nothing had been."""
    run = lab.new_run()
    processes = lab.start(run, "guard.max_skipped=1", patch=spoiled(0, range(2, 4), float("nan"), times=1))
    codes = processes.wait(SECONDS_TO_END)
    problems = [] if codes == [0, 0] else [f"exit codes {codes}: {processes.output()[-1500:]}"]
    problems += [] if "back to the last checkpoint (1 of 2)" in processes.output() else ["no rollback was said"]
    # The undisturbed run, with the two steps taken: the loss must be its own only if the rollback undid the skipping.
    later, again = lab.compare(run)
    row.count(problems + later, again)


def roll_back_then_stop(lab: Lab, row: Row) -> None:
    """Rolled back, stopped, started: the last start must not go on from a checkpoint that the rollback gave up."""
    for keep_last in (3, 1) if lab.full else (1,):
        more = ["phases=[{name: pretrain, steps: 12}]", f"checkpoint.keep_last={keep_last}", "checkpoint.every_steps=1"]
        run = lab.new_run()
        spoil = spoiled(0, range(2, 6, 3), float("nan"), times=1)

        patches = (slowed(loop, "seed_step", run.with_suffix(".marker"), 0.2), spoil, save_at_once)
        processes = lab.start(run, *more, "guard.max_skipped=1", patch=all_of(*patches))
        processes.wait_for("going on from")
        processes.kill(0, signal.SIGTERM)
        processes.wait(SECONDS_TO_END)
        went_back = re.search(r"going on from \S+step_0*2\n", processes.output())  # the next start empties the log
        problems, again = stopped_as_documented(lab, run, processes, *more)
        row.count(problems + ([] if went_back else [f"keep_last {keep_last}: not to step 2"]), again)


def not_finite_in_fp16(lab: Lab, row: Row) -> None:
    """A finite loss whose gradient is NaN on one rank in every other step: no search for a loss scale explains that."""

    def patch(rank: int) -> None:
        forward, seed_step, current = MaeTask.forward, loop.seed_step, {"step": -1}

        def note_step(seed, step, world):
            current["step"] = step
            return seed_step(seed, step, world)

        def spoil(task, batch):
            loss, metrics = forward(task, batch)
            if rank == 1 and task.training and current["step"] % 2:
                weight = next(weight for weight in task.parameters() if weight.requires_grad)
                loss = loss + (0 * weight).sum().sqrt()  # 0, with an infinite slope
            return loss, metrics

        loop.seed_step, MaeTask.forward = note_step, spoil

    for name in ("ddp", "zero2") if lab.full else ("ddp",):
        run = lab.new_run()
        more = ["phases=[{name: pretrain, steps: 40}]", "engine.precision=fp16", "engine.initial_loss_scale=1024"]
        budget = ["guard.max_skipped=5", "guard.max_rollbacks=0"]
        processes = lab.start(run, *more, *budget, *ENGINES[name], patch=patch)
        codes = processes.wait(SECONDS_TO_END)
        problems = [] if codes == [70, 70] else [f"{name}: exit codes {codes}: {processes.output()[-1500:]}"]
        logged = run / "unhealthy_rank1.jsonl"
        entries = [json.loads(line) for line in logged.read_text().splitlines()] if logged.exists() else []
        if [entry["step"] for entry in entries] != [1, 3, 5, 7, 9, 11]:
            problems.append(f"{name}: logged {entries}")
        row.count(problems)


def not_finite_at_the_end(lab: Lab, row: Row) -> None:
    """The last step is judged like any other: its keys are logged; past the budget it is done again."""
    for more in ([], ["guard.max_skipped=0"]) if lab.full else (["guard.max_skipped=0"],):
        run = lab.new_run()
        processes = lab.start(run, *more, patch=spoiled(1, range(5, 6), float("nan"), times=1))
        codes = processes.wait(SECONDS_TO_END)
        problems = [] if codes == [0, 0] else [f"exit codes {codes}: {processes.output()[-1500:]}"]
        logged = run / "unhealthy_rank1.jsonl"
        entries = [json.loads(line) for line in logged.read_text().splitlines()] if logged.exists() else []
        if [(entry["step"], entry["event"]) for entry in entries] != [(5, "skipped")]:
            problems.append(f"{more}: logged {entries}")
        later, again = lab.compare(run) if more else ([], 0)
        row.count(problems + later, again)


def gives_up(lab: Lab, row: Row) -> None:
    """Steps are skipped past the second budget too: it stops, with its own code."""
    run = lab.new_run()
    processes = lab.start(
        run, "guard.max_skipped=1", "guard.max_rollbacks=1", patch=spoiled(0, range(2, 99), float("nan"))
    )
    codes = processes.wait(SECONDS_TO_END)
    problems = [] if codes == [70, 70] else [f"exit codes {codes}: {processes.output()[-1500:]}"]
    problems += [] if "unhealthy_rank*.jsonl" in processes.output(1) else ["it does not say where to look"]
    row.count(problems)


def loss_spike(lab: Lab, row: Row) -> None:
    run = lab.new_run()
    spoil = spoiled(1, range(4, 5), 1e4)

    def patch(rank: int) -> None:
        guard.SpikeDetector.WARM_UP = 3
        spoil(rank)

    processes = lab.start(run, patch=patch)
    codes = processes.wait(SECONDS_TO_END)
    problems = [] if codes == [0, 0] else [f"exit codes {codes}"]
    entries = [json.loads(line) for line in (run / "unhealthy_rank1.jsonl").read_text().splitlines()]
    trained = {key for step, _, key in lines(run) if step == 4}
    if [(e["step"], e["event"]) for e in entries] != [(4, "loss spike")] or not set(entries[0]["keys"]) <= trained:
        problems.append(f"logged {entries}")
    row.count(problems)


# -------------------------------------------------------------------------------------------- hanging, slow, memory


def sleeps(rank_at_fault: int, steps: range, seconds: float) -> Callable[[int], None]:
    """A patch: one rank takes longer in these steps, where it would load."""

    def patch(rank: int) -> None:
        seed_step = loop.seed_step

        def late(seed, step, world):
            seed_step(seed, step, world)
            if rank == rank_at_fault and step in steps:
                time.sleep(seconds)

        loop.seed_step = late

    return patch


def hang(lab: Lab, row: Row) -> None:
    for rank in (0, 1) if lab.full else (1,):
        run = lab.new_run()
        processes = lab.start(run, "guard.hang_minutes=0.1", patch=sleeps(rank, range(3, 4), 1e4))
        codes = processes.wait(SECONDS_TO_END)
        named = f"Behind the others: rank {rank} on " in processes.output(1 - rank)
        problems = [] if codes == [76, 76] else [f"exit codes {codes}, not 76"]
        problems += [] if named else [f"it is not named: {processes.output(1 - rank)[-1500:]}"]
        later, again = lab.finish(run)
        row.count(problems + later, again)


def slow(lab: Lab, row: Row) -> None:
    run = lab.new_run()

    def patch(rank: int) -> None:
        next_micro = train.build_batches

        def late(*args, **kwargs):
            for batch in next_micro(*args, **kwargs):
                time.sleep(0.5 if rank == 1 else 0.0)
                yield batch

        train.build_batches = late

    processes = lab.start(run, patch=patch)
    codes = processes.wait(SECONDS_TO_END)
    problems = [] if codes == [0, 0] else [f"exit codes {codes}: {processes.output()[-1500:]}"]
    named = re.search(r"rank 1 on \S+ is slow: load ", processes.output())
    problems += [] if named else [f"it is not named: {processes.output()[-1500:]}"]
    later, again = lab.compare(run)
    row.count(problems + later, again)


def slow_backward(lab: Lab, row: Row) -> None:
    """It shows where ranks do not wait for each other: in the micro-batches before the last, of replicas."""
    run = lab.new_run()

    def patch(rank: int) -> None:
        backward = TorchEngine.backward

        def late(engine, loss, last):
            time.sleep(0.3 if rank == 1 else 0.0)
            backward(engine, loss, last)

        TorchEngine.backward = late

    more = ["batch.micro=1", "phases=[{name: pretrain, steps: 12}]", "log.every_steps=6"]
    processes = lab.start(run, *more, patch=patch)
    codes = processes.wait(SECONDS_TO_END)
    problems = [] if codes == [0, 0] else [f"exit codes {codes}: {processes.output()[-1500:]}"]
    named = re.search(r"rank 1 on \S+ is slow: .*accumulate 0.[3-9]", processes.output())
    problems += [] if named else [f"it is not named: {processes.output()[-1500:]}"]
    row.count(problems)


def out_of_memory(lab: Lab, row: Row) -> None:
    """As the allocator would say it: a CPU has no limit to run into."""
    run = lab.new_run()

    def patch(rank: int) -> None:
        forward = MaeTask.forward

        def burst(task, batch):
            if rank == 1:
                raise torch.OutOfMemoryError("tried to allocate more than there is")
            return forward(task, batch)

        MaeTask.forward = burst

    processes = lab.start(run, patch=patch)
    codes = processes.wait(SECONDS_AFTER_KILL)
    problems = [] if codes[1] == 71 and codes[0] not in (0, 999) else [f"exit codes {codes}"]
    said = processes.output(1)
    problems += [] if "out of memory. Lower or set, the cheapest first: batch.micro (now 2)" in said else [said[-1500:]]
    later, again = lab.finish(run)
    row.count(problems + later, again)


FAULTS: dict[str, Callable[[Lab, Row], None]] = {
    function.__name__: function
    for function in (
        signal_training, signal_saving, signal_evaluating, signal_starting, kill_one, kill_all, damaged_files,
        disk_full, slow_disk, run_dir_full, run_dir_gone, not_finite, not_finite_in_fp16, not_finite_at_the_end,
        roll_back, roll_back_then_stop, gives_up, loss_spike, hang, slow, slow_backward, out_of_memory,
    )
}  # fmt: skip


def table(rows: list[Row]) -> str:
    lines = ["| fault | tried | survived | samples trained again | |", "|---|--:|--:|--:|---|"]
    for row in rows:
        lines.append(f"| {row.fault} | {row.tried} | {row.survived} | {row.trained_again} | {'; '.join(row.notes)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one try of each, four kills instead of fifty")
    parser.add_argument("--only", nargs="+", choices=FAULTS, help="these alone")
    parser.add_argument("--out", type=Path, help="the rows as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), full=not options.short)
        for name in options.only or FAULTS:
            row = Row(name.replace("_", " "))
            started = time.monotonic()
            try:
                FAULTS[name](lab, row)
            except (AssertionError, OSError) as error:
                row.count([f"{type(error).__name__}: {error}"])
            rows.append(row)
            print(f"{row.fault}: {row.survived} of {row.tried}, {time.monotonic() - started:.0f} s", flush=True)
            for problem in row.problems:
                print(f"  {problem}", flush=True)
    if options.out:
        options.out.write_text(json.dumps([asdict(row) for row in rows]))
    print("\n" + table(rows))
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
