"""The training step: which token learns from what, rounds, and that the cut of the batch does not matter."""

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from model.prompt_encoder import Prompts
from model.sam import SamOutput
from tests.trainer.test_losses import reference_dice, reference_focal, reference_iou
from tests.trainer.tiny import sam_arguments
from trainer.config import load_config
from trainer.data.eval_data import evaluation_batch, evaluation_rows
from trainer.interactive import best_predicted
from trainer.prompts import content_mask
from trainer.sam_task import num_prompts
from trainer.stages import build_pipeline, build_task

# Boxes alone in one round are refused: the single token would stay untrained. A point in a million is none.
ONLY_BOXES = "prompts.types={point: 0.000001, box: 0.999999, mask: 0, none: 0}"


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
    task, data = make(scenes, tmp_path, f"loss.iou_on={iou_on}", ONLY_BOXES, "data.max_masks=1", "loss.iou=3")
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
    published = ["loss.multimask_when=single_prompt", ONLY_BOXES]
    task, data = make(scenes, tmp_path, *published)
    batch = data[[0, 1]].counted(2, 6)
    task(batch)[0].backward()
    single = task.sam.mask_decoder.output_hypernetworks_mlps[0].layers[2].weight
    assert single.grad.abs().max() == 0, "a box alone is ambiguous"
    task, data = make(scenes, tmp_path, *published, "prompts.rounds=2")
    task(data[[0, 1]].counted(2, 6))[0].backward()
    assert task.sam.mask_decoder.output_hypernetworks_mlps[0].layers[2].weight.grad.abs().max() > 0


def numpy_round(loss, logits, ious, prompts, masks) -> dict[str, np.ndarray]:
    """Loss of every mask and what is reported of it, (B, M) each, mask by mask from the formulas in float64.

    loss: the settings; logits (B, M, 4, s, s), ious (B, M, 4): the network's four answers; masks (B, M, s, s).
    """
    results = {name: np.zeros(masks.shape[:2]) for name in ("loss", "focal", "dice", "iou_error", "iou")}
    for b, m in np.ndindex(*masks.shape[:2]):
        truth = np.broadcast_to(masks[b, m], logits[b, m].shape)
        focal = reference_focal(logits[b, m], truth, loss.focal_alpha, loss.focal_gamma)
        dice = reference_dice(logits[b, m], truth, loss.dice_smooth)
        iou = reference_iou(logits[b, m], truth)
        iou_error = (ious[b, m] - iou) ** 2
        mask_part, iou_part = loss.focal * focal + loss.dice * dice, loss.iou * iou_error
        total = mask_part + iou_part
        num_points = (prompts.point_labels[b, m] >= 0).sum()
        ambiguous = num_points + prompts.has_box[b, m] + prompts.has_mask[b, m] <= 1
        best = 1 + int(np.argmin(mask_part[1:] if loss.select_by == "mask" else total[1:]))
        if loss.multimask == "all":
            three = total[1:].mean()
        elif loss.iou_on == "all":
            three = mask_part[best] + iou_part[1:].mean()
        else:
            three = total[best]
        if loss.multimask == "single":
            value, shown = total[0], 0
        elif loss.multimask_when == "always":
            value, shown = (three if ambiguous else three + total[0]), best
        else:
            value, shown = (three, best) if ambiguous else (total[0], 0)
        for name, found in (("focal", focal), ("dice", dice), ("iou_error", iou_error), ("iou", iou)):
            results[name][b, m] = found[shown]
        results["loss"][b, m] = value
    return results


def numpy_mean(normalize: str, values: np.ndarray, valid: np.ndarray) -> float:
    """Over the masks of each image and then over the images, or over all masks at once."""
    rows = [row[keep] for row, keep in zip(values, valid, strict=True) if keep.any()]
    return float(np.mean([row.mean() for row in rows] if normalize == "image_mean" else np.concatenate(rows)))


def record_decoder(task, monkeypatch) -> list[tuple[Prompts, SamOutput]]:
    """What the mask decoder is asked from now on and what it answers, with noise: a fresh one ranks all masks alike."""
    calls, decode, generator = [], task.sam.decode_masks, torch.Generator().manual_seed(0)

    def record(embeddings, prompts):
        noisy = (x + torch.randn(x.shape, generator=generator) for x in decode(embeddings, prompts))
        calls.append((prompts, SamOutput(*noisy)))
        return calls[-1][1]

    monkeypatch.setattr(task.sam, "decode_masks", record)
    return calls


STRATEGIES = list(itertools.product(["best", "all", "single"], ["always", "single_prompt"]))
# All of select_by x iou_on; normalize, which comes after them, with each of either.
CHOICES = [
    ("total", "selected", "image_mean"),
    ("total", "all", "mask_mean"),
    ("mask", "selected", "mask_mean"),
    ("mask", "all", "image_mean"),
]


@pytest.mark.parametrize("multimask, when", STRATEGIES)
@pytest.mark.parametrize("select_by, iou_on, normalize", CHOICES)
def test_the_loss_equals_its_formulas_in_numpy(
    scenes, tmp_path, monkeypatch, multimask, when, select_by, iou_on, normalize
):
    task, data = make(
        scenes,
        tmp_path,
        f"loss.multimask={multimask}",
        f"loss.multimask_when={when}",
        f"loss.select_by={select_by}",
        f"loss.iou_on={iou_on}",
        f"loss.normalize={normalize}",
        "loss.iou=3",  # weighs as much as the mask, so that the two selections differ
        "data.max_masks=8",  # more than the images have
        "prompts.types={point: 0.4, box: 0.4, mask: 0.1, none: 0.1}",
        "prompts.rounds=2",
    )
    batch = data[[0, 1, 2, -1]]
    batch = batch.counted(*batch.local_counts())
    valid = batch.mask_valid.numpy()
    assert len(set(valid.sum(axis=1))) > 2, "padded masks, a padded image, and images of unequal weight"
    calls = record_decoder(task, monkeypatch)
    loss, metrics = task(batch)

    def expected(settings) -> dict[str, float]:
        values = {"loss": 0.0}
        for number, (prompts, output) in enumerate(calls[1:]):  # the first made the mask prompts
            answers = (x.detach().double().numpy() for x in output)
            values_of = numpy_round(settings, *answers, Prompts(*(x.numpy() for x in prompts)), batch.masks.numpy())
            means = {name: numpy_mean(normalize, value, valid) for name, value in values_of.items()}
            values["loss"] += means.pop("loss")
            values |= {f"round_{number + 1}/{name}": value for name, value in means.items()}
        return values

    wanted = expected(task.config.loss)
    assert wanted.keys() == metrics.keys()
    # fp32 against float64: sums of a thousand terms of relative error 6e-8.
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(wanted, rel=1e-5)
    assert loss.item() == pytest.approx(wanted["loss"], rel=1e-5)
    if multimask == "best":  # the test can fail: another choice is another number
        for change in ({"select_by": "mask" if select_by == "total" else "total"}, {"multimask": "all"}):
            other = expected(task.config.loss.model_copy(update=change))
            assert other["loss"] != pytest.approx(wanted["loss"], rel=1e-3)


MASKS_TOO = "prompts.types={point: 0.3, box: 0.3, mask: 0.3, none: 0.1}"


@pytest.mark.parametrize("multimask, when", STRATEGIES)
def test_what_the_network_would_show_becomes_the_next_mask_prompt_without_a_gradient(
    scenes, tmp_path, monkeypatch, multimask, when
):
    """Of three the one of highest predicted IoU where they were trained for the prompt, else the single token's."""
    overrides = [f"loss.multimask={multimask}", f"loss.multimask_when={when}", MASKS_TOO, "prompts.rounds=3"]
    task, data = make(scenes, tmp_path, *overrides)
    batch = data[[0, 1, 2, 3]].counted(4, 12)
    calls = record_decoder(task, monkeypatch)
    task(batch)[0].backward()
    asking = batch.num_mask_prompts
    assert 0 < asking < batch.wants_mask.shape[1]
    assert len(calls) == 4, "one point for those who want a mask, then three rounds"
    seen = set()
    for number, ((prompts, output), (following, _)) in enumerate(itertools.pairwise(calls)):
        assert following.mask_logits.grad_fn is None
        assert not following.mask_logits.requires_grad
        count = (prompts.point_labels >= 0).sum(-1) + prompts.has_box.int() + prompts.has_mask.int()
        wanting = torch.where(batch.wants_mask[:, :asking]) if number == 0 else torch.where(batch.mask_valid)
        for b, m in zip(*wanting, strict=True):
            three = multimask != "single" and (when == "always" or count[b, m] <= 1)
            token = 1 + int(output.iou_predictions[b, m, 1:].argmax()) if three else 0
            assert torch.equal(following.mask_logits[b, m], output.low_res_logits[b, m, token].detach())
            seen.add(token)
    hypotheses = set() if multimask == "single" else {1, 2, 3}
    assert seen == hypotheses | ({0} if multimask == "single" or when == "single_prompt" else set())


@pytest.mark.parametrize("resolution", [16, 64, 128])
def test_a_click_lies_at_the_centre_of_its_cell(scenes, tmp_path, resolution):
    """One cell of the target is missed. The cell covers [x, x + 1) times 64 / resolution of the input, whose integers
    are centres of pixels: half a pixel from their edges."""
    task, data = make(scenes, tmp_path, "prompts.rounds=2", f"loss.resolution={resolution}")
    batch = data[[0]].counted(1, 3)
    batch.masks[:] = 0
    x, y = 5, 9
    batch.masks[..., y, x] = 1
    prompts = task.first_prompts(torch.zeros(1, 128, 4, 4), batch)
    content = content_mask(batch.image_sizes, batch.images.shape[-1], resolution)
    clicked = task.add_click(prompts, torch.full((1, 3, 16, 16), -1.0), content, batch, 0)
    cell = 64 / resolution
    assert clicked.point_coords[0, :, -1].tolist() == [[(x + 0.5) * cell - 0.5, (y + 0.5) * cell - 0.5]] * 3
    assert clicked.point_labels[0, :, -1].tolist() == [1] * 3
    assert clicked.point_coords[0, :, :-1].equal(prompts.point_coords[0, :, :-1])


def test_clicks_stay_on_the_image_and_reach_its_last_row_and_column(scenes, tmp_path, monkeypatch):
    """Everything counts as object, also the padding, and nothing is: of cells of 4 pixels those with their centre on
    the image may be clicked."""
    task, data = make(scenes, tmp_path, "prompts.rounds=3", ONLY_BOXES)
    batch = data[[0, 1, 2]].counted(3, 9)
    batch.masks[:] = 0
    batch.image_sizes[:] = torch.tensor([[41, 64], [64, 23], [30, 30]])
    batch.click_uniforms[..., 0], batch.click_uniforms[..., 1] = 0.0, 1.0 - 1e-6
    asked, decode = [], task.sam.decode_masks

    def everything(embeddings, prompts):
        asked.append(prompts)
        output = decode(embeddings, prompts)
        return output._replace(low_res_logits=output.low_res_logits.abs() + 1)

    monkeypatch.setattr(task.sam, "decode_masks", everything)
    task(batch)
    first, last = asked[-1].point_coords[:, :, -2:].unbind(2)
    assert (first == 1.5).all(), "the first cell"
    # Centres lie at 2, 6, ..., 62: the last ones below 41, 23 and 30 are 38, 22 and 26, less half a pixel.
    wanted = torch.tensor([[61.5, 37.5], [21.5, 61.5], [25.5, 25.5]])
    assert last.equal(wanted[:, None].expand(3, 3, 2))


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


PUBLISHED = [
    "prompts.types={point: 0.5, box: 0.5, mask: 0, none: 0}",
    "prompts.num_points=[1.0]",
    "prompts.random_background=false",
    "prompts.rounds=11",
    "prompts.rounds_without_click=2",
    "loss.multimask_when=single_prompt",
    "loss.select_by=mask",
    "loss.normalize=mask_mean",
]


def test_the_eleven_published_rounds(scenes, tmp_path, monkeypatch):
    """What the decoder is asked in each round: points, boxes, masks; and which tokens the loss sees."""
    task, data = make(scenes, tmp_path, *PUBLISHED)
    asked, decode = [], task.sam.decode_masks

    def record(embeddings, prompts):
        asked.append(prompts)
        return decode(embeddings, prompts)

    monkeypatch.setattr(task.sam, "decode_masks", record)
    batch = data[[0, 1, 2]].counted(3, 9)
    loss, metrics = task(batch)
    loss.backward()
    assert len(asked) == 11
    first = (asked[0].point_labels != -1).sum(-1)
    valid = batch.mask_valid
    assert ((first == 1) ^ asked[0].has_box)[valid].all(), "one point or one box"
    assert not asked[0].has_mask.any()
    for number, prompts in enumerate(asked[1:]):
        assert prompts.has_mask.all()
        assert prompts.has_box.equal(batch.has_box)
        clicks = (prompts.point_labels != -1).sum(-1) - first
        assert clicks.equal(batch.gets_click[:, : number + 1].sum(1, keepdim=True).expand_as(clicks))
    assert clicks.eq(8).all()
    assert asked[-1].point_labels.equal(asked[-2].point_labels), "the last round has no new point"
    assert len(metrics) == 1 + 4 * 11
    assert loss.item() == pytest.approx(
        sum(
            (20 * metrics[f"round_{r}/focal"] + metrics[f"round_{r}/dice"] + metrics[f"round_{r}/iou_error"]).item()
            for r in range(1, 12)
        ),
        rel=1e-5,  # fp32 sums in another order
    )


def test_rounds_that_need_one_token_score_it_as_if_all_four_were_scored(scenes, tmp_path, monkeypatch):
    task, data = make(scenes, tmp_path, *PUBLISHED, "prompts.rounds=3", "prompts.rounds_without_click=1")
    batch = data[[0, 1]].counted(2, 6)
    short, _ = task(batch)
    monkeypatch.setattr(type(task), "single_token_only", lambda self, number: False)
    long, _ = task(batch)
    assert short.item() == pytest.approx(long.item(), rel=1e-6)
    monkeypatch.setattr(type(task), "single_token_only", lambda self, number: True)
    assert task(batch)[0].item() != pytest.approx(long.item(), rel=1e-3), "the test can fail"


def test_a_box_is_one_prompt_or_two(scenes, tmp_path):
    single = "loss.multimask_when=single_prompt"
    for is_single in (True, False):
        task, data = make(scenes, tmp_path, ONLY_BOXES, single, f"loss.box_is_single_prompt={is_single}")
        task(data[[0]].counted(1, 3))[0].backward()
        heads = task.sam.mask_decoder.output_hypernetworks_mlps
        learns = [bool(mlp.layers[2].weight.grad.abs().max() > 0) for mlp in heads]
        assert learns[0] is not is_single
        assert any(learns[1:]) is is_single
        reader, rows = evaluation_rows(task.config)
        asked = evaluation_batch(reader, rows[:1], task.config)
        assert asked.single_token_for_boxes is not is_single, "evaluation asks the token that was trained"


@pytest.mark.parametrize("subset", ["focal=0", "dice=0", "iou=0", "sampled_points=40", "resolution=64"])
def test_every_part_of_the_loss_can_be_left_out_and_every_resolution_taken(scenes, tmp_path, subset):
    task, data = make(scenes, tmp_path, f"loss.{subset}")
    batch = data[[0, 1]].counted(2, 6)
    loss, _ = task(batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in task.parameters())
    head = task.sam.mask_decoder.iou_prediction_head.layers[0].weight.grad
    assert (head.abs().max() == 0) == (subset == "iou=0")
    if subset == "resolution=64":
        assert batch.masks.shape[-1] == 64


def test_nothing_valid_gives_a_finite_zero(scenes, tmp_path):
    task, data = make(scenes, tmp_path)
    loss, _ = task(data[[-1, -1]].counted(0, 0))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.abs().max() == 0 for p in task.parameters())


@pytest.mark.slow
def test_compiled_parts_are_whole_graphs_and_compute_the_same(scenes, tmp_path, monkeypatch):
    """No part falls back to eager in its middle, and rounds share their graphs: 2 kinds of block, with and without
    gradient, two sizes of prompts."""
    aot = {"backend": "aot_eager"}  # needs no C++ compiler
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, **aot))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, **aot))
    task, data = make(scenes, tmp_path, "prompts.rounds=5", "model.decoder_dropout=0")
    batch = data[[0, 1]].counted(2, 6)
    eager = task(batch)[0].item()
    torch._dynamo.reset()
    counters.clear()
    task.compile_parts()
    assert task(batch)[0].item() == pytest.approx(eager, rel=1e-6)  # fp32
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 10
