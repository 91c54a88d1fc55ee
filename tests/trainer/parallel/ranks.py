"""What several ranks do for test_engines.py: all scenarios in one start, because importing takes longer than running.

Run by `launch_ranks`; writes one file of results a rank.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from tests.trainer.parallel.drive import Record, different_keys, make_engine, run_steps, whole_state
from tests.trainer.parallel.toy import batches_of_step
from trainer.checkpoint import Checkpointer, RunState
from trainer.distributed import (
    World,
    barrier,
    broadcast_object,
    gather_objects,
    max_on_host,
    start_world,
    stop_world,
    sum_on_host,
)

# name -> what make_engine needs.
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "fsdp2": {"kind": "fsdp2"},
    "zero2": {"kind": "deepspeed"},
    "hsdp": {"kind": "hsdp", "shard_group_size": 1},
    "hsdp pairs": {"kind": "hsdp", "shard_group_size": 2},
    "zero0": {"kind": "deepspeed", "zero_stage": 0},
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
    "zero2 offload": {"kind": "deepspeed", "zero_stage": 2, "offload_optimizer": True},
    "zero3 offload": {"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": True},
}
FP16 = {"precision": "fp16", "initial_loss_scale": 1024.0}
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32 clipped": {"grad_clip": 0.5},
    "bf16 clipped": {"precision": "bf16", "grad_clip": 0.5},
    "fp16 clipped": {**FP16, "grad_clip": 0.5},
}
# Not under every engine: DeepSpeed's own half precision, and gradients that travel in bf16.
OWN_FP16 = {"precision": "deepspeed_fp16", "initial_loss_scale": 1024.0, "grad_clip": 0.5}
LOW_REDUCE = {"precision": "bf16", "reduce_dtype": "bf16", "grad_clip": 0.5}
STEPS = range(5)


def train(world: World, engine_name: str, case: str, accumulation: int) -> Record:
    """A few steps from the start."""
    return train_with(world, engine_name, CASES[case], accumulation)


def train_with(world: World, engine_name: str, settings: dict[str, Any], accumulation: int = 2) -> Record:
    engine = make_engine(world, **ENGINES[engine_name], **settings)
    record = run_steps(engine, world, STEPS, accumulation)
    engine.close()
    return record


def own_fp16(world: World, engine_name: str, folder: Path) -> dict[str, Any]:
    """DeepSpeed's own fp16: training, and a frozen part and a buffer that must not be rounded."""
    record = train_with(world, engine_name, OWN_FP16)
    engine = make_engine(world, frozen=True, **ENGINES[engine_name], **OWN_FP16)
    half = {name for name, value in engine.task.named_parameters() if value.dtype == torch.float16}
    state = whole_state(engine)
    checkpointer = Checkpointer(folder / f"own_fp16_{engine_name}", keep_last=1, world=world)
    run_steps(engine, world, range(2))
    checkpointer.save(engine, RunState(step=2, samples_seen=16, phase=0))
    saved = whole_state(engine)
    engine.close()
    other = make_engine(world, "fsdp2", "fp16", frozen=True)
    checkpointer.load(checkpointer.newest(), other)
    result = {
        "record": record,
        "half": sorted(half),
        "fourier": state["model.fourier"],
        "frozen": state["model.encoder.0.up.weight"],
        "dtypes": {value.dtype for value in state.values()},
        "not_loaded": different_keys(saved, whole_state(other)),
    }
    other.close()
    return result


def meta(world: World, engine_name: str) -> dict[str, Any]:
    """Only rank 0 builds a task with numbers."""
    engine = make_engine(world, on_meta=not world.is_main, **ENGINES[engine_name])
    first = engine.full_weights()
    record = run_steps(engine, world, STEPS)
    engine.close()
    return {"first": first, "record": record}


def overflow(world: World, engine_name: str, precision: dict[str, Any]) -> dict[str, Any]:
    """One rank's gradients are infinite in step 1 of three: what changed, and what each rank thinks of it."""
    engine = make_engine(world, **ENGINES[engine_name], **precision)
    run_steps(engine, world, range(1))
    before = whole_state(engine)
    bad = run_steps(engine, world, range(1, 2), accumulation=2, spoil=1)
    after = whole_state(engine)
    run_steps(engine, world, range(2, 3))
    result = {
        "changed": [key for key in different_keys(before, after) if not key.startswith("scaler.")],
        "norm": bad.norms[0],
        "scale": bad.scale,
        "skipped": bad.skipped,
        "skipped_later": engine.num_skipped,
        "step": float(whole_state(engine)["optim.step.decoder.head.weight"]),
    }
    engine.close()
    return result


def phase_change(world: World, engine_name: str, folder: Path) -> dict[str, Any]:
    """Frozen encoder for three steps, then all of it for three, through a checkpoint and a new engine."""
    checkpointer = Checkpointer(folder / f"phases_{engine_name}_{world.size}", keep_last=1, world=world)
    engine = make_engine(world, frozen=True, **ENGINES[engine_name])
    first = run_steps(engine, world, range(3), accumulation=2)
    saved = whole_state(engine)
    checkpointer.save(engine, RunState(step=3, samples_seen=24, phase=0))
    engine.close()
    engine = make_engine(world, **ENGINES[engine_name])
    checkpointer.load(checkpointer.newest(), engine)
    loaded = whole_state(engine)
    second = run_steps(engine, world, range(3, 6), accumulation=2)
    state = whole_state(engine)
    result = {
        "losses": first.losses + second.losses,
        "norms": first.norms + second.norms,
        "weights": second.weights,
        "not_loaded": different_keys(saved, {key: value for key, value in loaded.items() if key in saved}),
        "fresh": {key: float(value.abs().sum()) for key, value in loaded.items() if key not in saved},
        "steps": {key: float(value) for key, value in state.items() if key.startswith("optim.step.")},
    }
    engine.close()
    return result


def relay(world: World, names: list[str], folder: Path) -> dict[str, Any]:
    """Each engine takes over the checkpoint of the one before, trains two steps and saves."""
    checkpointer = Checkpointer(folder / "relay", keep_last=20, world=world)
    result: dict[str, Any] = {"losses": [], "norms": [], "not_loaded": {}}
    for name in names:
        newest = checkpointer.newest()
        engine = make_engine(world, **ENGINES[name])
        run_state = checkpointer.load(newest, engine)
        wanted = broadcast_object(torch.load(newest.with_suffix(".pt")) if world.is_main else None, world)
        result["not_loaded"][name] = different_keys(wanted, whole_state(engine))
        step = run_state.step
        record = run_steps(engine, world, range(step, step + 2), accumulation=2)
        result["losses"] += record.losses
        result["norms"] += record.norms
        state = whole_state(engine)
        path = checkpointer.save(engine, RunState(step + 2, run_state.samples_seen + 16, 0))
        if world.is_main:
            torch.save(state, path.with_suffix(".pt"))
        barrier(world)
        engine.close()
    return result


def local_until_last(world: World) -> dict[str, bool]:
    """DDP between micro-batches: before the last the ranks' gradients differ, after it they are one."""
    engine = make_engine(world, "ddp")
    one = {}
    for index, batch in enumerate(batches_of_step(0, 2, world)):
        batch = {name: value.to(world.device) for name, value in batch.items()}
        engine.backward(engine(batch)[0], last=index == 1)
        norm = float(engine.task.decoder.head.weight.grad.norm())
        one["after last" if index else "before"] = max_on_host([norm, -norm], world) == [norm, -norm]
    engine.close()
    return one


def host_agreements(world: World) -> dict[str, Any]:
    """What trainer/distributed.py offers."""
    return {
        "world": (world.rank, world.size, world.local_rank, world.local_size, world.num_nodes, world.node),
        "sum": sum_on_host([world.rank + 1.0, 2.0**53 * world.rank], world),
        "max": max_on_host([float(world.rank), -1.0], world),
        "broadcast": broadcast_object({"from": world.rank}, world),
        "gather": gather_objects(world.rank, world),
    }


def main(folder: Path, engine_names: list[str], relay_only: bool) -> None:
    world = start_world(timeout_minutes=2)
    results: dict[str, Any] = {"host": host_agreements(world), "ddp local": local_until_last(world)}
    for name in [] if relay_only else engine_names:
        for case in CASES:
            for accumulation in (1, 2):
                results[f"train {name} {case} {accumulation}"] = train(world, name, case, accumulation)
        results[f"overflow {name} fp16"] = overflow(world, name, FP16)
        results[f"overflow {name} fp32"] = overflow(world, name, {})
        results[f"phases {name}"] = phase_change(world, name, folder)
        results[f"low reduce {name}"] = train_with(world, name, LOW_REDUCE)
        results[f"meta {name}"] = meta(world, name)
        if name in ("zero1", "zero2", "zero3"):
            results[f"own fp16 {name}"] = own_fp16(world, name, folder)
    results["relay"] = relay(world, [*engine_names, "ddp"], folder)
    torch.save(results, folder / f"rank{world.rank}_of_{world.size}.pt")
    stop_world(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), relay_only="relay" in sys.argv[3:])
