"""The average of the weights and every parameter's rate, under every engine on two ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch_ranks import launch_ranks
from tests.trainer.parallel.averaged_ranks import DECAY, STEPS
from tests.trainer.parallel.drive import different_keys, make_engine
from tests.trainer.parallel.toy import ToyTask, toy_groups
from trainer.distributed import single_process
from trainer.optim import check_rates
from trainer.parallel.averaged import AveragedEngine

ENGINES = ["ddp", "fsdp2", "zero2"]
pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("averaged")
    launch_ranks("tests.trainer.parallel.averaged_ranks", [str(folder), ",".join(ENGINES)], num_ranks=2)
    return torch.load(folder / "rank0.pt", weights_only=False)


@pytest.mark.parametrize("name", ENGINES)
def test_the_average_is_the_formula(results, name):
    states = results[name]["states"]
    trained = [key.removeprefix("ema.") for key in states[0] if key.startswith("ema.")]
    assert trained
    average = {key: states[0][f"model.{key}"].double() for key in trained}
    for state in states[1:]:
        average = {key: DECAY * average[key] + (1 - DECAY) * state[f"model.{key}"].double() for key in trained}
    for key in trained:
        # fp32 against float64 over three steps.
        torch.testing.assert_close(states[-1][f"ema.{key}"].double(), average[key], rtol=1e-5, atol=1e-7)
    moved = [key for key in trained if not states[-1][f"ema.{key}"].equal(states[-1][f"model.{key}"])]
    assert moved, "the test can fail: the average lags behind"


@pytest.mark.parametrize("name", ENGINES)
def test_evaluation_runs_on_it_and_leaves_training_alone(results, name):
    found = results[name]
    for step in range(STEPS):
        assert different_keys(found["states"][step + 1], found[f"unchanged {step}"]) == []
    assert found[f"evaluated {STEPS - 1}"] == pytest.approx(found["evaluated alone"], rel=1e-6)


@pytest.mark.parametrize("name", ENGINES)
def test_checkpoints_hold_it_and_weights_are_read_from_it(results, name):
    found = results[name]
    last = found["states"][-1]
    assert different_keys(found["loaded"], last) == []
    assert (
        different_keys(found["plain"], {key: value for key, value in last.items() if not key.startswith("ema.")}) == []
    )
    for key, value in found["exported"].items():
        assert value.equal(last.get(f"ema.{key}", last[f"model.{key}"]))


@pytest.mark.parametrize("name", ENGINES)
def test_every_parameter_has_its_groups_rate_inside_the_engine(results, name):
    groups = toy_groups(ToyTask())
    check_rates(results[name]["rates"], groups, 0.01)
    wrong = dict(results[name]["rates"])
    first = next(iter(wrong))
    wrong[first] = (wrong[first][0] * 2, wrong[first][1])
    with pytest.raises(ValueError, match=first):
        check_rates(wrong, groups, 0.01)
    del wrong[first]
    with pytest.raises(ValueError, match=first):
        check_rates(wrong, groups, 0.01)


def test_a_parameter_first_trained_now_starts_its_average_at_its_weights():
    engine = make_engine(single_process("cpu"), "ddp")
    averaged = AveragedEngine(engine, toy_groups(engine.task), 0.9)
    state = {key: value.clone() for key, value in engine.state_dict().items()}
    state = {key: value + 1 if key.startswith("model.") else value for key, value in state.items()}
    averaged.load_state_dict(state)
    found = averaged.state_dict()
    assert all(
        value.equal(state[key.replace("ema.", "model.", 1)]) for key, value in found.items() if key[:4] == "ema."
    )
