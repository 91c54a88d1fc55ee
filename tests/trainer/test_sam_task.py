"""The training step: which token learns from what, rounds, and that the cut of the batch does not matter."""

from pathlib import Path

import pytest
import torch

from model.sam import SamOutput
from tests.trainer.tiny import sam_arguments
from trainer.config import load_config
from trainer.interactive import best_predicted
from trainer.sam_task import num_prompts
from trainer.stages import build_pipeline, build_task


def make(scenes, tmp_path, *more: str):
    path, *overrides = sam_arguments(scenes, tmp_path, *more)
    config = load_config(Path(path), overrides)
    task = build_task(config, (), initial_weights=False)
    data = build_pipeline(config).dataset
    return task.train(), data


def gradients(task, batches) -> torch.Tensor:
    task.zero_grad()
    counts = [batch.local_counts() for batch in batches]
    images, masks = (sum(column) for column in zip(*counts, strict=True))
    for batch in batches:
        task(batch.counted(images, masks))[0].backward()
    return torch.cat([p.grad.flatten() for p in task.parameters()])


@pytest.mark.parametrize("normalize", ["image_mean", "mask_mean"])
@pytest.mark.parametrize("rounds", [[], ["prompts.rounds=3", "engine.checkpoint_rounds=true"]])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(scenes, tmp_path, normalize, rounds):
    task, data = make(scenes, tmp_path, f"loss.normalize={normalize}", *rounds)
    whole = gradients(task, [data[[0, 1, 2, 3]]])
    cut = gradients(task, [data[[0, 1]], data[[2, -1]], data[[3]]])
    # fp32 sums in another order.
    assert (whole - cut).norm() < 1e-4 * whole.norm()
    assert (gradients(task, [data[[0, 1]], data[[2]]]) - whole).norm() > 1e-2 * whole.norm(), "the test can fail"


@pytest.mark.parametrize("multimask", ["best", "all", "single"])
@pytest.mark.parametrize("when", ["always", "single_prompt"])
def test_every_strategy_trains_and_every_parameter_takes_part(scenes, tmp_path, multimask, when):
    task, data = make(
        scenes, tmp_path, f"loss.multimask={multimask}", f"loss.multimask_when={when}", "prompts.rounds=2"
    )
    loss, metrics = task(data[[0, 1]].counted(2, 6))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in task.parameters())
    assert {"loss", "round_1/iou", "round_2/focal"} <= metrics.keys()


@pytest.mark.parametrize("iou_on", ["selected", "all"])
def test_the_iou_head_learns_on_the_selected_mask_or_on_all(scenes, tmp_path, iou_on):
    """Which of the head's four outputs get a gradient, for a single prompt."""
    only_boxes = "prompts.types={point: 0, box: 1, mask: 0, none: 0}"
    task, data = make(scenes, tmp_path, f"loss.iou_on={iou_on}", only_boxes, "data.max_masks=1", "loss.iou=3")
    batch = data[[0]].counted(1, 1)
    loss, metrics = task(batch)
    loss.backward()
    learns = task.sam.mask_decoder.iou_prediction_head.layers[-1].bias.grad.abs() > 0
    assert learns.tolist()[0] is False
    assert learns.sum() == (1 if iou_on == "selected" else 3)
    if iou_on == "selected":  # else the mean of three errors stands in its place
        parts = 20 * metrics["focal"] + metrics["dice"] + 3 * metrics["iou_error"]
        assert loss.item() == pytest.approx(parts.item(), rel=1e-5)  # fp32 sums in another order


def test_the_single_token_learns_from_later_rounds_only_as_published(scenes, tmp_path):
    only_boxes = "prompts.types={point: 0, box: 1, mask: 0, none: 0}"
    published = ["loss.multimask_when=single_prompt", only_boxes]
    task, data = make(scenes, tmp_path, *published)
    batch = data[[0, 1]].counted(2, 6)
    task(batch)[0].backward()
    single = task.sam.mask_decoder.output_hypernetworks_mlps[0].layers[2].weight
    assert single.grad.abs().max() == 0, "a box alone is ambiguous"
    task, data = make(scenes, tmp_path, *published, "prompts.rounds=2")
    task(data[[0, 1]].counted(2, 6))[0].backward()
    assert task.sam.mask_decoder.output_hypernetworks_mlps[0].layers[2].weight.grad.abs().max() > 0


def test_a_mask_prompt_replaces_its_point_by_the_networks_own_answer(scenes, tmp_path):
    task, data = make(scenes, tmp_path, "prompts.types={point: 0, box: 0, mask: 1, none: 0}")
    batch = data[[0, 1]].counted(2, 6)
    prompts = task.first_prompts(task.encode(batch), batch)
    wanted = batch.wants_mask
    assert wanted.equal(batch.mask_valid)
    assert (prompts.point_labels[wanted] == -1).all()
    assert prompts.has_mask.equal(wanted)
    assert prompts.mask_logits[wanted].abs().amax(dim=(-1, -2)).min() > 0
    assert num_prompts(prompts)[wanted].eq(1).all()


def test_best_predicted_takes_one_of_the_three():
    logits = torch.arange(4.0)[None, None, :, None, None].expand(1, 1, 4, 2, 2)
    output = SamOutput(logits, torch.tensor([[[9.0, 0.1, 0.3, 0.2]]]))
    assert best_predicted(output).unique().tolist() == [2.0]


def test_a_frozen_encoder_has_no_graph(scenes, tmp_path):
    path, *overrides = sam_arguments(scenes, tmp_path)
    config = load_config(Path(path), overrides)
    task = build_task(config, ("image_encoder",), initial_weights=False).train()
    batch = build_pipeline(config).dataset[[0]].counted(1, 3)
    assert not task.encode(batch).requires_grad
    assert not task.sam.image_encoder.training
    loss, _ = task(batch)
    loss.backward()
    assert all(p.grad is None for p in task.sam.image_encoder.parameters())
