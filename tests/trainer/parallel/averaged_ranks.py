"""What two ranks do for test_averaged.py: every engine in one start. Writes one file of results a rank."""

import sys
from pathlib import Path
from typing import Any

import torch

from tests.trainer.parallel.drive import make_engine, run_steps, whole_state
from tests.trainer.parallel.ranks import ENGINES
from tests.trainer.parallel.toy import batches_of_step, toy_groups
from trainer.checkpoint import Checkpointer, RunState, load_weights
from trainer.distributed import World, start_world, stop_world
from trainer.parallel.averaged import AveragedEngine
from trainer.parallel.engine import Engine

DECAY, STEPS = 0.75, 3


def evaluated(engine: Engine, world: World) -> float:
    """Loss of one batch in evaluation mode."""
    engine.task.eval()
    with torch.no_grad():
        loss, _ = engine(batches_of_step(9, 1, world)[0])
    engine.task.train()
    return float(loss)


def averaged(world: World, name: str, folder: Path) -> dict[str, Any]:
    """A few steps under an average, an evaluation between them, a checkpoint and a start from it."""
    inner = make_engine(world, **ENGINES[name])
    groups = toy_groups(inner.task)
    engine = AveragedEngine(inner, groups, DECAY)
    found: dict[str, Any] = {"rates": engine.rates(), "states": [whole_state(engine)]}
    for step in range(STEPS):
        run_steps(engine, world, range(step, step + 1))
        found["states"].append(whole_state(engine))
        found[f"evaluated {step}"] = evaluated(engine, world)
        found[f"unchanged {step}"] = whole_state(engine)
    path = Checkpointer(folder / name, 2, world).save(engine, RunState(STEPS, 0, 0))
    found["exported"] = load_weights(path)
    engine.close()

    inner = make_engine(world, **ENGINES[name])
    again = AveragedEngine(inner, groups, DECAY)
    Checkpointer(folder / name, 2, world).load(path, again)
    found["loaded"] = whole_state(again)
    again.close()
    plain = make_engine(world, **ENGINES[name])
    Checkpointer(folder / name, 2, world).load(path, plain)  # without an average: the plain weights
    found["plain"] = whole_state(plain)
    with torch.no_grad():
        for key, value in found["exported"].items():  # what an evaluation of the average alone gives
            plain.load_state_dict(plain.state_dict() | {f"model.{key}": value})
    found["evaluated alone"] = evaluated(plain, world)
    plain.close()
    return found


def main(folder: Path, engine_names: list[str]) -> None:
    world = start_world(timeout_minutes=2)
    results = {name: averaged(world, name, folder) for name in engine_names}
    torch.save(results, folder / f"rank{world.rank}.pt")
    stop_world(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","))
