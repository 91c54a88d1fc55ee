"""Every engine, accumulation and number of processes trains the same network: 20 steps of the real entry point.

    python -m tests.agreement --short          # a representative of each engine, and the injected errors
    python -m tests.agreement                  # all: 8 engines x accumulation 1 and 4 x 1, 2 and 4 processes x 2 stages

Compared with one plain process without accumulation: all weights at the end, as the norm of the difference over the
norm, and the gradient norm of every step (AdamW hides a constant factor on the gradient from the weights).
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
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
STEPS = {"sam": "[{name: freeze, steps: 5, frozen: [image_encoder]}, {name: joint, steps: 15}]",
         "mae": "[{name: pretrain, steps: 20}]"}  # fmt: skip
# fp32 sums in another order differ by some 1e-7; 20 steps of AdamW, which divides by the gradient, make less than 1e-4
# of the weights' norm of it. A gradient norm shows the weights' difference, a little larger.
MAX_WEIGHTS, MAX_GRADIENTS = 1e-4, 2e-3


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scenes = {"train": pack_scenes(folder, "train", 24, 0), "eval": pack_scenes(folder, "eval", 4, 9)}
        self.references = {stage: self.run(stage, "reference", 1, 1, ["engine.kind=ddp"]) for stage in STEPS}

    def run(
        self,
        stage: str,
        name: str,
        ranks: int,
        accumulation: int,
        settings: list[str],
        patch: Callable[[int], None] | None = None,
    ) -> Path:
        run = self.folder / f"{stage}_{name}_{ranks}_{accumulation}".replace(" ", "_")
        base = sam_arguments if stage == "sam" else mae_arguments
        micro = max(1, GLOBAL_SIZE // ranks // accumulation)
        arguments = base(
            self.scenes, run, f"batch.global_size={GLOBAL_SIZE}", f"batch.micro={micro}", f"phases={STEPS[stage]}",
            "engine.deterministic=true", *settings,
        )  # fmt: skip
        processes = Ranks(run.with_suffix(".logs"), arguments, ranks, patch)
        codes = processes.wait(300.0)
        assert not any(codes), f"{run.name} ended with {codes}: {processes.output()[-3000:]}"
        return run

    def differences(self, stage: str, run: Path) -> tuple[float, float]:
        """Of the weights (norm over norm) and of the gradient norms (largest, relative)."""
        ours, theirs = weights(run), weights(self.references[stage])
        assert ours.keys() == theirs.keys()
        squares = [((ours[name] - theirs[name]).square().sum(), theirs[name].square().sum()) for name in theirs]
        distance = math.sqrt(sum(float(d) for d, _ in squares) / sum(float(w) for _, w in squares))
        one, other = norms(run), norms(self.references[stage])
        assert len(one) == len(other) == 20, (len(one), len(other))
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


def settings_of(engine: str, ranks: int) -> list[str]:
    group = [f"engine.shard_group_size={max(1, ranks // 2)}"] if engine == "hsdp" else []
    return [*ENGINES[engine], *group]


def cases(short: bool) -> list[tuple[str, str, int, int]]:
    """(stage, engine, processes, accumulation)."""
    if short:
        return [("sam", "fsdp2", 2, 4), ("mae", "hsdp", 4, 1), ("mae", "zero3", 2, 4)]
    return [
        (stage, engine, ranks, accumulation)
        for stage, engine, ranks, accumulation in product(STEPS, ENGINES, (1, 2, 4), (1, 4))
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path, help="the rows as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for stage, engine, ranks, accumulation in cases(options.short):
            run = bench.run(stage, engine, ranks, accumulation, settings_of(engine, ranks))
            rows.append((f"{stage} {engine} {ranks} {accumulation}", *bench.differences(stage, run)))
        for name, patch in ERRORS.items():
            run = bench.run("mae", name, 2, 4, ["engine.kind=ddp"], patch)
            rows.append((name, *bench.differences("mae", run)))
    bad = []
    for name, of_weights, of_gradients in rows:
        agrees = of_weights <= MAX_WEIGHTS and of_gradients <= MAX_GRADIENTS
        bad += [name] if agrees == (name in ERRORS) else []
        print(f"{name:24} weights {of_weights:.1e}  gradient norms {of_gradients:.1e}  {'' if agrees else 'DIFFERS'}")
    if options.out:
        options.out.write_text(json.dumps({"rows": rows, "bad": bad}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
