"""A step replayed against what the run wrote down while it trained."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.tiny import mae_arguments, sam_arguments, samples
from trainer import replay, stages, train
from trainer.config import load_config


@pytest.fixture(scope="module")
def run_dir(scenes, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "sam"
    assert train.main(sam_arguments(scenes, path, "phases=[{name: all, steps: 3}]")) == 0
    return path


def replayed(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_the_samples_are_those_the_run_trained_on(run_dir, tmp_path, capsys):
    assert replay.main([str(run_dir), "--step", "2", "--out", str(tmp_path)]) == 0
    found = replayed(tmp_path)
    trained = sorted((position, key) for step, position, key in samples(run_dir) if step == 1)  # there from 0
    assert [(one["position"], one["key"]) for one in found] == trained
    assert trained[0][1] in capsys.readouterr().out
    assert trained != sorted((p, k) for step, p, k in samples(run_dir) if step == 2), "other steps have others"


def test_the_prompts_are_those_of_the_loader_and_the_pictures_show_them(run_dir, tmp_path):
    assert replay.main([str(run_dir), "--step", "1", "--out", str(tmp_path), "--num-images", "2"]) == 0
    config = load_config(run_dir / "config.yaml")
    batch = stages.build_pipeline(config).dataset[[0, 1]]
    for i, one in enumerate(replayed(tmp_path)):
        valid = torch.nonzero(batch.mask_valid[i]).flatten().tolist()
        assert len(one["masks"]) == len(valid)
        for m, mask in zip(valid, one["masks"], strict=True):
            np.testing.assert_allclose(mask["points"], batch.point_coords[i, m])
            assert mask["labels"] == batch.point_labels[i, m].tolist()
        image = Image.open(tmp_path / f"{i:012d}.png")
        assert image.size[0] == (1 + len(valid)) * (192 + 4) - 4


def test_stage_one_shows_input_and_what_is_hidden(scenes, tmp_path):
    run = tmp_path / "mae"
    assert train.main(mae_arguments(scenes, run, "phases=[{name: pretrain, steps: 1}]", "schedule.warmup_steps=1")) == 0
    assert replay.main([str(run), "--step", "1"]) == 0
    image = np.asarray(Image.open(run / "replay" / "step_00000001" / f"{0:012d}.png"))
    assert image.shape == (64, 132, 3)
    assert (image[:, 68:] == 127).all(axis=-1).mean() == pytest.approx(0.75, abs=0.01)


def test_a_step_before_a_change_of_settings_is_shown_as_it_was(scenes, run_dir, tmp_path, capsys):
    """Another batch size, flips and prompts from step 4 on; then step 5 once more, with yet another batch size."""
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    assert replay.main([str(run), "--step", "2", "--out", str(tmp_path / "before")]) == 0
    for number, (steps, size) in enumerate(((5, 2), (6, 4))):
        more = [f"phases=[{{name: all, steps: {steps}}}]", f"batch.global_size={size}", "data.horizontal_flip=0.9"]
        more += ["prompts.num_points=[0, 0, 0, 1]", "resume.allow_change=[phases, batch, data, prompts]"]
        if number:  # as after a rollback to step 4
            shutil.rmtree(run / "checkpoints" / "step_00000005")
        else:
            more.append("checkpoint.every_steps=4")
        assert train.main(sam_arguments(scenes, run, *more)) == 0
    assert replay.main([str(run), "--step", "2", "--out", str(tmp_path / "after")]) == 0
    assert replayed(tmp_path / "after") == replayed(tmp_path / "before")
    trained = samples(run)
    for step in (4, 5, 6):
        assert replay.main([str(run), "--step", str(step), "--out", str(tmp_path / str(step))]) == 0
        last_time = [(p, k) for s, p, k in trained if s == step - 1][-(2 if step == 4 else 4) :]
        assert [(one["position"], one["key"]) for one in replayed(tmp_path / str(step))] == sorted(last_time)
    (run / "starts.jsonl").unlink()
    assert replay.main([str(run), "--step", "2"]) == 2
    assert "starts.jsonl does not say what step 2 was trained with" in capsys.readouterr().err


def test_other_data_are_refused(run_dir, tmp_path, scenes, capsys):
    """Replaying other shards than the run's would show samples that it never saw."""
    config = (run_dir / "config.yaml").read_text()
    other = tmp_path / "run"
    other.mkdir()
    shutil.copy(run_dir / "starts.jsonl", other)
    (other / "config.yaml").write_text(config.replace(str(scenes["train"]), str(scenes["eval"])))
    assert replay.main([str(other), "--step", "1"]) == 2
    assert "another recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--step", "0"], "--step counts from 1, is 0"),
        (["--step", "4"], "--step 4 lies after the run's last step, 3"),
        (["--step", "1", "--num-images", "0"], "--num-images counts from 1, is 0"),
        (["--step", "1", "--num-images", "-1"], "--num-images counts from 1, is -1"),
    ],
)
def test_what_the_run_does_not_have_is_refused(run_dir, capsys, arguments, said):
    assert replay.main([str(run_dir), *arguments]) == 2
    assert said in capsys.readouterr().err
