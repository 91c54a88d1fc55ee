"""Scores against plain numpy, every mask counted once, the command line as a user runs it."""

import json
import math
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import rle
from model.build import build_sam
from model.prompt_encoder import Prompts
from model.sam import Sam, SamOutput
from tests.launch_ranks import launch_ranks
from tests.trainer.tiny import sam_arguments
from trainer import evaluate, export, predict, train
from trainer.config import load_config
from trainer.data.eval_data import evaluation_batch, evaluation_batches, evaluation_rows
from trainer.distributed import single_process
from trainer.evaluate import summarize
from trainer.guard import Guard
from trainer.interactive import center_click, deepest, interact, random_click, upsample_to_original
from trainer.stages import build_sam_task


@pytest.fixture(scope="module")
def run_dir(scenes, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "sam"
    assert train.main(sam_arguments(scenes, path, "phases=[{name: joint, steps: 2}]")) == 0
    return path


def test_clicks_are_the_deepest_pixels_of_the_larger_error():
    truth = np.zeros((12, 12), bool)
    truth[1:8, 2:9] = True
    assert deepest(truth) == (4.0, (5.0, 4.0))
    assert center_click(np.zeros_like(truth), truth) == (5.0, 4.0, 1)
    too_much = truth | (np.arange(12)[:, None] >= 8)
    assert center_click(too_much, truth)[2] == 0
    assert center_click(truth, truth) == (5.0, 4.0, 1), "a perfect answer gets another click inside"
    border = np.ones((5, 9), bool)
    assert deepest(border)[1][1] == 2.0, "the image's border counts as outside"


def test_the_deepest_pixel_is_the_same_every_time():
    """Shapes that are there three times, so equally deep: OpenCV's distances differ in their last digits by call."""
    rng = np.random.default_rng(0)
    ys, xs = np.indices((40, 120))
    kept = []  # so that OpenCV's results lie at other addresses, which is what its last digits depend on
    for _ in range(10):
        region = np.zeros((40, 120), bool)
        for x, y, radius in rng.uniform(8, 32, (3, 3)).round():
            for shift in (0, 41, 79):
                region |= (xs - x - shift) ** 2 + (ys - y) ** 2 <= (radius / 2) ** 2
        padded = np.pad(region, 1)
        inside, outside = np.argwhere(padded), np.argwhere(~padded)
        squared = ((inside[:, None] - outside) ** 2).sum(axis=-1).min(axis=1)  # whole numbers
        y, x = inside[squared.argmax()] - 1
        for _ in range(50):
            kept.append(np.empty(16 * rng.integers(1, 4000), np.uint8))
            depth, at = deepest(region.copy())
            assert at == (x, y)
            assert depth == math.sqrt(squared.max())


def test_upsampling_goes_through_the_input_and_drops_the_padding():
    logits = torch.full((1, 4, 4), -1.0)
    logits[..., :3, :2] = 1.0
    bitmap = upsample_to_original(logits, 16, (8, 16), (80, 160))
    assert bitmap.shape == (1, 80, 160)
    assert bitmap[0, :, :70].all()
    assert not bitmap[0, :, 90:].any()


@torch.no_grad()
def test_the_oracle_takes_the_best_of_three_and_the_answer_the_one_predicted_best(scenes, run_dir):
    """Against the network called by hand, its three hypotheses compared in plain numpy."""
    config = load_config(run_dir / "config.yaml")
    reader, rows = evaluation_rows(config)
    batch = evaluation_batch(reader, rows[:1], config)
    sam = build_sam_task(config, (), False).sam.eval()
    scores = interact(sam, batch)
    embeddings = sam.encode_images(sam.normalize_images(batch.images, batch.image_sizes))
    differ = 0
    for score, mask in zip(scores, batch.truths[0], strict=True):
        truth = rle.to_bitmap(mask).astype(bool)
        x, y, _ = score.clicks[0]
        none = torch.zeros(1, 1, dtype=torch.bool)
        prompts = Prompts(
            torch.tensor([[[[x, y]]]]),
            torch.ones(1, 1, 1),
            torch.zeros(1, 1, 4),
            none,
            torch.zeros(1, 1, 16, 16),
            none,
        )
        output = sam.decode_masks(embeddings, prompts)
        logits = torch.nn.functional.interpolate(output.low_res_logits[0], 64, mode="bilinear")[0, 1:].numpy()
        ious = [((one > 0) & truth).sum() / ((one > 0) | truth).sum() for one in logits]
        assert score.iou["click_1_oracle"] == pytest.approx(max(ious), abs=1e-12)
        chosen = ious[int(output.iou_predictions[0, 0, 1:].argmax())]
        assert score.iou["click_1"] == pytest.approx(chosen, abs=1e-12)
        differ += chosen < max(ious)
    assert differ, "the two protocols must not be the same everywhere, else this shows nothing"


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_mask_is_evaluated_once_on_any_number_of_ranks(scenes, run_dir, num_ranks):
    config = load_config(run_dir / "config.yaml")
    reader, rows = evaluation_rows(config)
    shares = [list(evaluation_batches(reader, rows, config, rank, num_ranks)) for rank in range(num_ranks)]
    assert len({len(batches) for batches in shares}) == 1, "the forward pass is collective"
    keys = [
        key
        for batches in shares
        for _, batch in batches
        for key, truths in zip(batch.keys, batch.truths, strict=True)
        if truths
    ]
    assert sorted(keys) == sorted(evaluation_batch(reader, rows, config).keys)


@pytest.mark.dist
@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_scores_are_the_same_on_any_number_of_processes(run_dir, tmp_path, num_ranks):
    """To the last digit; three ranks share four images, so two of them see a blank one."""
    outs = tmp_path / "alone.json", tmp_path / "together.json"
    assert evaluate.main([str(run_dir), "--out", str(outs[0])]) == 0
    launch_ranks("trainer.evaluate", [str(run_dir), "--out", str(outs[1])], num_ranks=num_ranks)
    assert json.loads(outs[0].read_text()) == json.loads(outs[1].read_text())


def test_a_network_that_heeds_its_prompt_gets_the_same_scores_again(run_dir, monkeypatch):
    """The run's network of two steps answers nearly the same to any click; this one with a disk around each."""
    rng = np.random.default_rng(0)
    exact = cv2.distanceTransform

    def rounded_otherwise(region, kind, size):
        distance = exact(region, kind, size)
        if kind != cv2.DIST_L2:
            return distance
        return distance * rng.uniform(1 - 2e-7, 1 + 2e-7, distance.shape).astype(np.float32)

    def disks(sam, embeddings, prompts):
        at = torch.stack(torch.meshgrid(torch.arange(16), torch.arange(16), indexing="xy"), dim=-1) * 4 + 1.5
        distance = (at - prompts.point_coords[:, :, :, None, None]).norm(dim=-1)
        shown = (prompts.point_labels == 1)[..., None, None]
        logits = torch.where(shown, 4 - distance, -1e4).amax(dim=2)[:, :, None].expand(-1, -1, 4, -1, -1)
        return SamOutput(logits, torch.full(logits.shape[:3], 0.5))

    config = load_config(run_dir / "config.yaml")
    reader, rows = evaluation_rows(config)
    engine = evaluate._PlainEngine(build_sam_task(config, (), False))
    monkeypatch.setattr(Sam, "decode_masks", disks)
    once = evaluate.evaluate(engine, reader, rows, config, single_process())
    assert once["click_1"] < once["click_3"] < once["click_5"]
    monkeypatch.setattr(cv2, "distanceTransform", rounded_otherwise)
    for _ in range(3):
        assert evaluate.evaluate(engine, reader, rows, config, single_process()) == once


def test_an_evaluation_leaves_when_it_is_told_to(run_dir):
    config = load_config(run_dir / "config.yaml")
    reader, rows = evaluation_rows(config)
    engine = evaluate._PlainEngine(build_sam_task(config, (), False))
    asked = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) == 2

    assert evaluate.evaluate(engine, reader, rows, config, single_process(), stop) is None
    assert len(asked) == 2 < len(rows), "after the second image, not after all"


def test_a_preemption_during_evaluation_is_obeyed(scenes, tmp_path, monkeypatch):
    """Asked to stop while evaluating at step 2 of 6: saved one step later, and gone on from there."""
    arguments = sam_arguments(scenes, tmp_path / "run", "evaluate.every_steps=2", "phases=[{name: all, steps: 6}]")
    config = load_config(Path(arguments[0]), arguments[1:])
    guard = Guard()
    score_image = evaluate.score_image

    def ask_to_stop(*args):
        guard.stop_requested = True
        return score_image(*args)

    monkeypatch.setattr(evaluate, "score_image", ask_to_stop)
    assert not train.run(config, single_process(), guard), "not finished"
    assert (tmp_path / "run" / "checkpoints" / "LATEST").read_text() == "step_00000003\n"
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not any("eval/miou" in line for line in logged), "half an evaluation is none"


@torch.no_grad()
def test_random_clicks_are_the_same_every_time_and_start_inside_the_mask(run_dir):
    config = load_config(run_dir / "config.yaml", ["evaluate.random_clicks=true"])
    reader, rows = evaluation_rows(config)
    sam = build_sam_task(config, (), False).sam.eval()
    batch = evaluation_batch(reader, rows[:1], config)
    first, again = interact(sam, batch), interact(sam, batch)
    assert [score.iou for score in first] == [score.iou for score in again]
    assert {"random_1", "random_3", "random_5"} <= first[0].iou.keys()
    assert any(score.iou["random_5"] != score.iou["click_5"] for score in first)
    truth = rle.to_bitmap(batch.truths[0][0]).astype(bool)
    for u in np.linspace(0, 0.999, 50):
        x, y, label = random_click(np.zeros_like(truth), truth, float(u))
        assert truth[int(y), int(x)]
        assert label == 1
        x, y, label = random_click(np.ones_like(truth), truth, float(u))
        assert not truth[int(y), int(x)]
        assert label == 0
    assert random_click(truth, truth, 0.5)[2] == 1, "no error: another click inside"


def test_bare_weights_are_scored_like_the_run_they_came_from(run_dir, scenes, tmp_path, capsys):
    out, weights = tmp_path / "scores.json", tmp_path / "sam.pth"
    assert export.main([str(run_dir), "--out", str(weights)]) == 0
    assert evaluate.main([str(weights), "--shards", str(scenes["eval"]), "--out", str(out)]) == 0
    scores = json.loads(out.read_text())
    assert evaluate.main([str(run_dir), "--out", str(out)]) == 0
    assert scores["box"] == json.loads(out.read_text())["box"]
    assert "click_9" in scores
    assert evaluate.main([str(weights)]) == 2
    assert "give --shards" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    not {"SAM_WEIGHTS", "COCO_SHARDS"} <= os.environ.keys(),
    reason="needs SAM_WEIGHTS, a released sam_vit_h file, and COCO_SHARDS, val2017 packed: docs/evaluation.md",
)
def test_released_weights_reach_the_published_figure_on_coco(tmp_path):
    """Truth boxes, best of three by predicted IoU: 77.4 (EfficientViT-SAM, table 3)."""
    out = tmp_path / "scores.json"
    arguments = [os.environ["SAM_WEIGHTS"], "--shards", os.environ["COCO_SHARDS"], "--out", str(out)]
    assert evaluate.main(arguments) == 0
    assert json.loads(out.read_text())["box"] == pytest.approx(0.774, abs=0.005)


def test_the_command_prints_writes_and_draws(run_dir, tmp_path, capsys):
    out, picture = tmp_path / "scores.json", tmp_path / "masks.png"
    assert evaluate.main([str(run_dir), "--out", str(out), "--picture", str(picture)]) == 0
    scores = json.loads(out.read_text())
    by_prompt = {"box", "box_oracle", "click_1", "click_1_oracle", "click_3", "click_5"}
    assert by_prompt | {"filled_box", "num_masks", "miou"} == {name for name in scores if "/" not in name}
    assert scores["miou"] == pytest.approx(np.mean([scores[n] for n in ("box", "click_1", "click_3", "click_5")]))
    assert {"boundary_iou/box", "boundary_f/click_5", "calibration/click_1_ece", "box/ap", "box/ar"} <= set(scores)
    assert scores["box_oracle"] >= scores["box"]
    assert scores["click_1_oracle"] >= scores["click_1"]
    assert 0.3 < scores["filled_box"] < 0.8
    assert f"{scores['box']:.4f}" in capsys.readouterr().out
    assert Image.open(picture).size[0] > 600


def test_where_the_scores_go_is_checked_before_they_are_made(run_dir, tmp_path, capsys, monkeypatch):
    def too_late(*arguments):
        raise AssertionError("evaluated")

    monkeypatch.setattr(evaluate, "evaluate", too_late)
    for option in ("--out", "--picture"):
        assert evaluate.main([str(run_dir), option, str(tmp_path / "none" / "s.json")]) == 2
        assert f"{option}: {tmp_path / 'none'} is no folder: make it first" in capsys.readouterr().err
        assert evaluate.main([str(run_dir), option, str(tmp_path)]) == 2
        assert f"{option}: {tmp_path} is a folder: name a file" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-1"])
def test_numbers_of_images_below_one_are_refused(run_dir, capsys, number):
    assert evaluate.main([str(run_dir), "--num-images", number]) == 2
    assert f"--num-images counts from 1, is {number}" in capsys.readouterr().err


def test_the_scores_are_written_although_nobody_reads_them(run_dir, tmp_path, monkeypatch):
    def nobody_reads(text: str) -> None:  # as with `| head`
        raise BrokenPipeError

    monkeypatch.setattr(evaluate, "print", nobody_reads, raising=False)
    with pytest.raises(BrokenPipeError):
        evaluate.main([str(run_dir), "--num-images", "1", "--out", str(tmp_path / "scores.json")])
    assert "box" in json.loads((tmp_path / "scores.json").read_text())


def test_any_checkpoint_is_scored_by_its_path_or_by_the_file_that_names_it(scenes, tmp_path, capsys, monkeypatch):
    run = tmp_path / "checkpoints" / "run"  # a folder of runs may have any name
    more = ["phases=[{name: joint, steps: 4}]", "checkpoint.every_steps=2", "schedule.warmup_steps=0", "optim.lr=1e-2"]
    assert train.main(sam_arguments(scenes, run, *more)) == 0
    checkpoints = run / "checkpoints"
    (checkpoints / "BEST").write_text("step_00000002\n")
    scores = {}
    for name in (
        "",
        "checkpoints/step_00000002",
        "checkpoints/step_00000004",
        "checkpoints/BEST",
        "checkpoints/LATEST",
    ):
        assert evaluate.main([str(run / name), "--num-images", "1", "--out", str(tmp_path / "scores.json")]) == 0
        scores[name.rpartition("/")[2]] = json.loads((tmp_path / "scores.json").read_text())
    assert scores["BEST"] == scores["step_00000002"] != scores["step_00000004"]
    assert scores[""] == scores["LATEST"] == scores["step_00000004"]
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64)).save(image)
    assert predict.main([str(checkpoints / "BEST"), str(image), "--point", "3,4", "--out", str(tmp_path / "x")]) == 0
    with monkeypatch.context() as patch:
        patch.chdir(checkpoints)
        assert evaluate.main(["BEST", "--num-images", "1"]) == 0
    (checkpoints / "step_00000002" / ".metadata").unlink()
    capsys.readouterr()
    for command, more in ((evaluate, []), (predict, [str(image), "--point", "3,4"])):
        assert command.main([str(checkpoints / "BEST"), *more]) == 2
        assert "step_00000002 is damaged: .metadata is missing" in capsys.readouterr().err


def test_a_run_without_checkpoints_says_so(run_dir, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    assert evaluate.main([str(tmp_path)]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err


def test_no_mask_is_an_error():
    with pytest.raises(ValueError, match="no mask"):
        summarize([])


def test_the_export_holds_exactly_the_networks_names_and_loads(run_dir, tmp_path):
    out = tmp_path / "sam.pth"
    assert export.main([str(run_dir), "--out", str(out)]) == 0
    weights = torch.load(out, weights_only=True)
    sam = build_sam("vit_tiny", image_size=64)
    sam.load_state_dict(weights, strict=True)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert export.main([str(tmp_path), "--out", str(out)]) == 2
