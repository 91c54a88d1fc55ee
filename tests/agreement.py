"""Every engine, accumulation and number of processes trains the same network: 20 steps of the real entry point.

    python -m tests.agreement --short          # a representative of each engine, and the injected errors
    python -m tests.agreement                  # all: 8 engines x accumulation 1 and 4 x 1, 2 and 4 processes x 2 stages
    python -m tests.agreement optim.ema_decay=0.9    # the same with a setting for every run

Compared with one plain process without accumulation: all weights at the end, as the norm of the difference over the
norm, and the gradient norm of every step (AdamW hides a constant factor on the gradient from the weights).

A case that differs is tried again with another seed. Sums in another order differ by rounding, and now and then that
puts one unit of a ReLU on the other side of its kink, which AdamW, dividing by the gradient, turns into 3e-4 of the
weights within 20 steps (seen with SAM on one process with accumulation 4, whatever the engine, and traced to
`output_hypernetworks_mlps.2`). A wrong engine differs with every seed.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from tests.conftest import pack_scenes
from tests.fork_ranks import Ranks
from tests.trainer.tiny import mae_arguments, sam_arguments
from trainer import train
from trainer.checkpoint import Checkpointer, load_weights
from trainer.distributed import single_process
from trainer.parallel.torch_engine import DdpEngine, TorchEngine

ENGINES = {
    "ddp": ["engine.kind=ddp"],
    "fsdp2": ["engine.kind=fsdp2"],
    "hsdp": ["engine.kind=hsdp"],  # groups of one or two, by the number of processes
    "zero0": ["engine.kind=deepspeed", "engine.zero_stage=0"],
    "zero1": ["engine.kind=deepspeed", "engine.zero_stage=1"],
    "zero2": ["engine.kind=deepspeed", "engine.zero_stage=2"],
    "zero3": ["engine.kind=deepspeed", "engine.zero_stage=3"],
    "zero2 offload": ["engine.kind=deepspeed", "engine.zero_stage=2", "engine.offload_optimizer=true"],
}
GLOBAL_SIZE = 16
SEEDS = (0, 1)
STEPS = {"sam": "[{name: freeze, steps: 5, frozen: [image_encoder]}, {name: joint, steps: 15}]",
         "mae": "[{name: pretrain, steps: 20}]"}  # fmt: skip
# fp32 sums in another order differ by some 1e-7; 20 steps of AdamW, which divides by the gradient, make less than 1e-4
# of the weights' norm of it. A gradient norm shows the weights' difference, a little larger.
MAX_WEIGHTS, MAX_GRADIENTS = 1e-4, 2e-3


@dataclass(frozen=True)
class Case:
    """One training: 20 steps."""

    stage: str
    engine: str
    ranks: int
    accumulation: int
    error: str = ""  # injected, of `ERRORS`

    def __str__(self) -> str:
        return f"{self.stage} {self.error or self.engine} {self.ranks} {self.accumulation}"

    def settings(self) -> list[str]:
        micro = max(1, GLOBAL_SIZE // self.ranks // self.accumulation)
        group = [f"engine.shard_group_size={max(1, self.ranks // 2)}"] if self.engine == "hsdp" else []
        return [f"batch.micro={micro}", *ENGINES[self.engine], *group]


class Bench:
    """The data, the plain runs that others are compared with, and the others."""

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self.folder, self.overrides = folder, overrides
        self.scenes = {"train": pack_scenes(folder, "train", 24, 0), "eval": pack_scenes(folder, "eval", 4, 9)}
        self.references: dict[tuple[str, int], Path] = {}

    def run(self, case: Case, seed: int) -> Path:
        self.folder.joinpath("runs").mkdir(exist_ok=True)
        run = Path(tempfile.mkdtemp(dir=self.folder / "runs", prefix=f"{case}_".replace(" ", "_")))
        base = sam_arguments if case.stage == "sam" else mae_arguments
        arguments = base(
            self.scenes, run, f"batch.global_size={GLOBAL_SIZE}", f"phases={STEPS[case.stage]}", f"seed={seed}",
            "engine.deterministic=true", *self.overrides, *case.settings(),
        )  # fmt: skip
        processes = Ranks(run.with_suffix(".logs"), arguments, case.ranks, ERRORS.get(case.error))
        codes = processes.wait(1200.0)  # the first time DeepSpeed compiles its optimizer for the CPU
        assert not any(codes), f"{case} ended with {codes}: {processes.output()[-3000:]}"
        return run

    def differences(self, case: Case, seed: int) -> tuple[float, float]:
        """Of the weights (norm over norm) and of the gradient norms (largest, relative)."""
        if (case.stage, seed) not in self.references:
            self.references[case.stage, seed] = self.run(Case(case.stage, "ddp", 1, 1), seed)
        reference = self.references[case.stage, seed]
        run = self.run(case, seed)
        ours, theirs = weights(run), weights(reference)
        assert ours.keys() == theirs.keys()
        squares = [((ours[name] - theirs[name]).square().sum(), theirs[name].square().sum()) for name in theirs]
        distance = math.sqrt(sum(float(d) for d, _ in squares) / sum(float(w) for _, w in squares))
        one, other = norms(run), norms(reference)
        assert len(one) == len(other) == 20, (len(one), len(other))
        shutil.rmtree(run)
        return distance, max(abs(a - b) / b for a, b in zip(one, other, strict=True))


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = Checkpointer(run / "checkpoints", 3, single_process("cpu")).newest()
    assert newest is not None
    return {name: value.double() for name, value in load_weights(newest).items()}


def norms(run: Path) -> list[float]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry["train/grad_norm"] for entry in entries if "train/grad_norm" in entry]


def wrong_scale(rank: int) -> None:
    """The mean over micro-batches where the sum belongs."""
    backward = TorchEngine.backward
    TorchEngine.backward = lambda engine, loss, last: backward(engine, loss / 4, last)


def skipped_reduce(rank: int) -> None:
    """Each rank trains on its own gradient."""
    DdpEngine._prepare_reduction = lambda engine, last: None


def shifted_cursor(rank: int) -> None:
    """The samples begin one too late."""
    build = train.build_batches
    train.build_batches = lambda *args: build(*args[:-1], args[-1] + 1)


ERRORS = {function.__name__: function for function in (wrong_scale, skipped_reduce, shifted_cursor)}


def cases(short: bool) -> list[Case]:
    if short:
        return [
            Case("sam", "fsdp2", 2, 4),
            Case("sam", "zero3", 2, 1),
            Case("mae", "zero0", 2, 4),
            Case("mae", "hsdp", 4, 1),
            Case("mae", "zero3", 2, 4),
        ]
    return [Case(*values) for values in product(STEPS, ENGINES, (1, 2, 4), (1, 4))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path, help="the rows as JSON")
    parser.add_argument("--stages", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="settings of every run, after --")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: dict[str, tuple[float, float]] = {}
    wrong = []
    plan = [case for case in cases(options.short) if case.engine in options.engines and case.stage in options.stages]
    plan += [Case("mae", "ddp", 2, 4, error) for error in ERRORS]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.overrides)
        for case in plan:
            for seed in SEEDS:
                label = f"{case} seed {seed}"
                of_weights, of_gradients = rows[label] = bench.differences(case, seed)
                agrees = of_weights <= MAX_WEIGHTS and of_gradients <= MAX_GRADIENTS
                verdict = "" if agrees else "DIFFERS"
                print(f"{label:32} weights {of_weights:.1e}  gradient norms {of_gradients:.1e}  {verdict}", flush=True)
                if agrees or case.error:  # an injected error is to differ, and has to once
                    break
            if agrees == bool(case.error):
                wrong.append(str(case))
            if options.out:
                options.out.write_text(json.dumps({"rows": rows, "bad": wrong}))
    print(f"{len(rows)} runs; not as they should be: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
