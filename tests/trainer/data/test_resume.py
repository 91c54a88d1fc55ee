"""What a restart trains on: for any ranks, workers, stop and micro-batch, through real loaders, the same numbers.

The reference is each sample alone, decoded in this process: no loader, no ranks, no batch.
"""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.trainer.tiny import mae_arguments, sam_arguments
from trainer.config import Config, load_config
from trainer.data.batches import Batch
from trainer.data.loader import build_batches
from trainer.distributed import single_process
from trainer.stages import Pipeline, build_pipeline

NUM_STEPS, GLOBAL_SIZE = 5, 7  # more than an epoch of 24 samples; a batch that few layouts divide
Sample = dict[str, Tensor | str]
SAM = [
    "data.scale_jitter=[0.8,1.2]",
    "data.horizontal_flip=0.5",
    "data.color_jitter=0.2",
    "prompts.box_noise=0.1",
    "prompts.rounds=3",
    "prompts.rounds_without_click=2",
    "data.holdout_images=3",
    "data.lanes=3",
    "data.window=4",
]
MAE = ["data.color_jitter=0.4", "data.lanes=3", "data.window=4"]


@pytest.fixture(scope="module")
def sam_case(scenes, tmp_path_factory):
    return open_case(sam_arguments(scenes, tmp_path_factory.mktemp("sam"), *SAM))


@pytest.fixture(scope="module")
def mae_case(scenes, tmp_path_factory):
    return open_case(mae_arguments(scenes, tmp_path_factory.mktemp("mae"), *MAE))


def open_case(arguments: list[str]) -> tuple[Config, Pipeline, dict[int, Sample]]:
    path, *overrides = arguments
    config = load_config(Path(path), [*overrides, f"batch.global_size={GLOBAL_SIZE}", "batch.micro=1"])
    pipeline = build_pipeline(config)
    alone = {}
    for position in range(NUM_STEPS * GLOBAL_SIZE):
        alone |= by_position(pipeline.dataset[[position]])
    return config, pipeline, alone


def by_position(batch: Batch) -> dict[int, Sample]:
    """Everything that a batch says of each of its samples."""
    assert not batch.problems
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)}
    of_the_batch = {"keys", "problems", "num_images", "num_masks", "num_mask_prompts", "stage_seconds"}
    assert {f.name for f in fields(batch)} - tensors.keys() <= of_the_batch, "a field that nobody compares"
    return {
        position: {name: tensor[i] for name, tensor in tensors.items()} | {"key": batch.keys[i]}
        for i, position in enumerate(batch.positions.tolist())
        if position >= 0
    }


def loaded(case: tuple, num_ranks: int, num_workers: int, micro: int, first: int, last: int) -> dict[int, Sample]:
    """What all ranks get from their loaders, each position once."""
    config, pipeline, _ = case
    config = config.model_copy(
        update={
            "batch": config.batch.model_copy(update={"micro": micro}),
            "data": config.data.model_copy(update={"workers": num_workers}),
        }
    )
    found: dict[int, Sample] = {}
    for rank in range(num_ranks):
        world = replace(single_process(), rank=rank, size=num_ranks)
        for batch in build_batches(pipeline.dataset, config, world, first, last):
            samples = by_position(batch)
            assert not samples.keys() & found.keys(), "a position on two ranks, or twice"
            found |= samples
    return found


def check(case: tuple, before: tuple[int, int, int], after: tuple[int, int, int], stop: int) -> None:
    """Stop after `stop` steps in one layout (ranks, workers, micro-batch), go on in another."""
    alone = case[2]
    found = loaded(case, *before, 0, stop)
    assert sorted(found) == list(range(stop * GLOBAL_SIZE))
    found |= loaded(case, *after, stop, NUM_STEPS)
    assert sorted(found) == sorted(alone)
    for position, sample in alone.items():
        assert found[position].keys() == sample.keys()
        for name, value in sample.items():
            same = (
                torch.equal(found[position][name], value)
                if isinstance(value, Tensor)
                else value == found[position][name]
            )
            assert same, (position, name)


layouts = st.tuples(st.integers(1, 7), st.integers(0, 3), st.integers(1, 7))
in_process = st.tuples(st.integers(1, 7), st.just(0), st.integers(1, 7))
stops = st.integers(0, NUM_STEPS)
quiet = {"suppress_health_check": list(HealthCheck)}  # workers take as long as the machine lets them


@settings(max_examples=10, **quiet)
@given(before=in_process, after=in_process, stop=stops)
def test_any_layout_gives_every_sample_as_it_is_alone(sam_case, mae_case, before, after, stop):
    check(sam_case, before, after, stop)
    check(mae_case, before, after, stop)


def test_worker_processes_give_every_sample_as_it_is_alone(sam_case, mae_case):
    check(sam_case, (2, 1, 3), (1, 2, 2), 2)
    check(mae_case, (1, 3, 2), (3, 1, 1), 3)


@pytest.mark.slow
@settings(max_examples=15, **quiet)
@given(before=layouts, after=layouts, stop=stops)
@example(before=(7, 3, 1), after=(1, 0, 7), stop=1)
@example(before=(1, 1, 7), after=(7, 3, 2), stop=4)
def test_any_layout_with_workers_gives_every_sample_as_it_is_alone(sam_case, mae_case, before, after, stop):
    check(sam_case, before, after, stop)
    check(mae_case, before, after, stop)


def test_the_comparison_sees_every_draw(sam_case, mae_case):
    """Two positions differ in every field that is drawn for each sample, so a shifted stream would show."""
    for case, drawn in (
        (sam_case, ("images", "masks", "color_factors", "click_uniforms", "drop_path_uniforms", "point_coords")),
        (mae_case, ("images", "color_factors", "noise")),
    ):
        first, second = case[2][0], case[2][1]
        for name in drawn:
            assert not torch.equal(first[name], second[name]), name
