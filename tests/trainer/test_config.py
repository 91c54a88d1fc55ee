"""Bad settings: every problem at once, each with its place and a way out, before anything starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import trainer.train
from tests.trainer.tiny import CONFIGS
from trainer.config import ConfigError, SamConfig, load_config

ROOT = Path(__file__).parents[2]
TINY = ROOT / "launch" / "configs" / "sam_tiny.yaml"


@pytest.fixture
def good(tmp_path) -> list[str]:
    """Overrides that make the tiny config loadable."""
    (tmp_path / "manifest.json").touch()
    return [f"data.shards={tmp_path}", f"data.eval_shards={tmp_path}", f"run_dir={tmp_path / 'run'}"]


def problems(overrides: list[str], path: Path = TINY) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_overrides_reach_sections_lists_and_nulls(good):
    config = load_config(
        TINY, [*good, "optim.lr=4e-4", "phases.1.steps=700", "data.max_mask_area=0.9", "prompts.rounds=3"]
    )
    assert config.optim.lr == 4e-4  # PyYAML alone reads 4e-4 as text
    assert config.phases[1].steps == 700
    assert config.data.max_mask_area == 0.9
    assert config.prompts.rounds == 3


def test_settings_never_change_after_loading(good):
    config = load_config(TINY, good)
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("optim.weight_decai", "weight_decay"),
        ("prompts.types.points", "point"),
        ("phases.0.step", "steps"),
        ("modle", "model"),
        ("optimizer.lr", "optim"),
    ],
)
def test_unknown_key_is_told_the_nearest_name(good, key, nearest):
    shown = problems([*good, f"{key}=1"])
    assert f"did you mean {nearest}?" in shown
    assert shown.startswith(key.removesuffix(".lr"))


def test_unknown_key_like_none_gets_the_list(good):
    assert "data.xyzzy: no such key; valid: color_jitter" in problems([*good, "data.xyzzy=1"])


def test_key_of_the_other_stage_is_an_error(good):
    assert "model.mask_ratio: no such key" in problems([*good, "model.mask_ratio=0.5"])


@pytest.mark.parametrize(
    "override, place",
    [
        ("optim.lr=fast", "optim.lr: "),
        ("optim.lr=-1", "optim.lr: "),
        ("batch.micro=1.5", "batch.micro: "),
        ("engine.kind=fsdp", "engine.kind: "),
        ("data.horizontal_flip=2", "data.horizontal_flip: "),
        ("phases=[]", "phases: "),
        ("optim.lr=.nan", "optim.lr: "),
    ],
)
def test_wrong_type_or_range(good, override, place):
    shown = problems([*good, override])
    assert shown.startswith(place)
    assert "(is " in shown


@pytest.mark.parametrize(
    "overrides, part",
    [
        (["prompts.types.point=0.9"], "prompts.types: probabilities sum to 1.4, not 1"),
        (["prompts.rounds=1", "prompts.rounds_without_click=1"], "rounds_without_click=1 needs more rounds than 1"),
        (["schedule.warmup_epochs=1"], "schedule: give exactly one of warmup_steps and warmup_epochs"),
        (["schedule.kind=multistep"], "kind=multistep needs milestones"),
        (["schedule.milestones=[5]"], "milestones belong to kind=multistep"),
        (["schedule.kind=multistep", "schedule.milestones=[5, 3]"], "milestones must ascend, they are [5, 3]"),
        (
            ["schedule.kind=multistep", "schedule.milestones=[3, 9]", "phases=[{name: all, steps: 9}]"],
            "schedule.milestones [9] lie beyond the last of 9 steps",
        ),
        (
            ["schedule.warmup_steps=10", "phases=[{name: a, steps: 4}, {name: b, steps: 5}]"],
            "schedule.warmup_steps=10 is longer than the run, 9 steps",
        ),
        (["guard.hang_minutes=5", "engine.timeout_minutes=5"], "guard.hang_minutes=5.0 must be below"),
        (["model.drop_path=1.0"], "model.drop_path"),
        (["schedule.min_lr=1"], "schedule.min_lr=1.0 is above the peak"),
        (
            ["schedule.min_lr=1e-4", "optim.lr_per_256=true", "batch.global_size=8", "optim.lr=1e-3"],
            "schedule.min_lr=0.0001 is above the peak 3.125e-05, optim.lr times batch.global_size / 256",
        ),
        (["schedule.kind=constant", "schedule.min_lr=1e-9"], "min_lr belongs to kind=cosine, kind is constant"),
        (["data.color_jitter=1.5"], "data.color_jitter"),
        (["loss.resolution=7", "model.image_size=64"], "loss.resolution=7 leaves logits unread"),
        (
            ["loss.multimask_when=single_prompt", "prompts.rounds=1", "prompts.num_points=[1]"],
            "loss.multimask_when=single_prompt trains the single-mask token on later rounds",
        ),
        (
            [
                "loss.multimask_when=single_prompt",
                "loss.box_is_single_prompt=false",
                "prompts.types={point: 0, box: 1, mask: 0, none: 0}",
            ],
            "with boxes alone never trains the three hypotheses",
        ),
        (["loss.multimask=single", "diagnostics.every_steps=5"], "diagnostics.every_steps looks at the three"),
        (["data.max_mask_area=0"], "data.max_mask_area"),
        (["loss.dice_smooth=0"], "loss.dice_smooth"),
        (["model.image_size=100"], "model.image_size=100 is no multiple"),
        (["loss.focal=0", "loss.dice=0"], "the masks would learn nothing"),
        (["phases.0.frozen=[image_encoder, prompt_encoder, mask_decoder]"], "freezes everything"),
        (["phases.1.frozen=[mask_decoder]"], "phase joint freezes mask_decoder, which freeze_encoder trained"),
        (["phases.0.epochs=1"], "phases.0: give exactly one of steps and epochs"),
        (["engine.shard_group_size=2"], "shard_group_size belongs to kind=hsdp, kind is ddp"),
        (["engine.zero_stage=3"], "zero_stage=3 belongs to kind=deepspeed, kind is ddp"),
        (["engine.kind=fsdp2", "engine.zero_stage=0"], "zero_stage=0 belongs to kind=deepspeed, kind is fsdp2"),
        (["engine.offload_optimizer=true"], "offload_optimizer needs kind=deepspeed and zero_stage 1, 2 or 3"),
        (["engine.kind=deepspeed", "engine.zero_stage=0", "engine.offload_optimizer=true"], "offload_optimizer needs"),
        (["engine.precision=deepspeed_fp16"], "precision=deepspeed_fp16 needs kind=deepspeed and zero_stage 1, 2 or 3"),
        (["engine.kind=deepspeed", "engine.zero_stage=0", "engine.precision=deepspeed_fp16"], "deepspeed_fp16 needs"),
        (
            ["engine.precision=bf16", "engine.reduce_dtype=fp16"],
            "reduce_dtype=fp16 needs the loss scale of fp16: with precision=bf16",
        ),
        (["engine.kind=deepspeed", "engine.zero_stage=3", "engine.compile=true"], "compile does not work with zero_st"),
        (
            ["optim.ema_decay=0.9", "engine.kind=deepspeed", "engine.precision=deepspeed_fp16"],
            "optim.ema_decay averages",
        ),
        (
            ["optim.ema_decay=0.9", "engine.kind=deepspeed", "engine.zero_stage=3"],
            "optim.ema_decay needs whole weights",
        ),
    ],
)
def test_impossible_combination(good, overrides, part):
    assert part in problems([*good, *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        ["schedule.warmup_steps=9", "phases=[{name: all, steps: 9}]"],
        ["schedule.warmup_steps=9", "phases=[{name: a, steps: 1}, {name: b, epochs: 2}]"],  # nobody knows yet
        ["guard.hang_minutes=null", "engine.timeout_minutes=1"],
    ],
)
def test_possible_combination(good, overrides):
    assert isinstance(load_config(TINY, [*good, *overrides]), SamConfig)


def test_nothing_to_evaluate_on(good, tmp_path):
    assert "data.eval_shards or data.holdout_images" in problems([*good, "data.eval_shards=null"])


def test_missing_paths_are_named_together(good, tmp_path):
    shown = problems([*good, f"data.shards={tmp_path}/no", "model.init_from=nowhere.pth"]).splitlines()
    assert shown == [f"data.shards: {tmp_path}/no does not exist", "model.init_from: nowhere.pth does not exist"]


def test_all_problems_come_at_once(good):
    shown = problems([*good, "optim.lr=fast", "optim.momentum=0.9", "model.image_size=-3", "engine", "batch.micro.x=1"])
    lines = shown.splitlines()
    assert len(lines) == 5
    for start in ("engine: an override has the form", "batch.micro: is not a section", "optim.lr: ", "optim.momentum: ",
                  "model.image_size: "):  # fmt: skip
        assert sum(line.startswith(start) for line in lines) == 1, shown


def test_a_phase_with_a_bad_item_still_shows_its_contradiction(good):
    shown = problems([*good, "phases=[{name: a, steps: 1, epochs: 3, frozen: [image_encodr]}, {name: b, steps: 1}]"])
    assert "phases.0.frozen.0: " in shown
    assert "phases.0: give exactly one of steps and epochs" in shown


def test_a_run_directory_that_cannot_be(good, tmp_path):
    (tmp_path / "file").touch()
    assert f"run_dir: {tmp_path}/file/run cannot be a directory" in problems([*good, f"run_dir={tmp_path}/file/run"])


def test_paths_and_combinations_come_with_the_rest(good, tmp_path):
    shown = problems([*good, "optim.lrr=1", f"data.shards={tmp_path}/no", "loss.focal=0", "loss.dice=0"])
    assert "optim.lrr" in shown
    assert "data.shards: " in shown
    assert "learn nothing" in shown


def test_contradictions_of_sections_do_not_hide_those_of_the_whole(good):
    wrong = ["model.image_size=65", "schedule.warmup_epochs=1", "phases.0.epochs=1", "phases.1.steps=many"]
    lines = problems([*good, *wrong, "checkpoint.every_epochs=2", "prompts.types.point=0.9"]).splitlines()
    starts = ["model.image_size=65 is no multiple", "schedule: give exactly", "phases.0: give exactly"]
    starts += ["phases.1.steps: ", "checkpoint: give exactly", "prompts.types: probabilities sum"]
    assert [sum(line.startswith(start) for line in lines) for start in starts] == [1] * 6, lines
    assert len(lines) == 6, lines


def test_required_keys_are_named(good, tmp_path):
    tree = yaml.safe_load(TINY.read_text())
    del tree["optim"], tree["data"]["shards"]
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump(tree))
    shown = problems([], path).splitlines()
    assert {"optim: is required", "data.shards: is required"} <= set(shown)


def test_files_that_are_no_config(tmp_path):
    path = tmp_path / "x.yaml"
    assert "does not exist" in problems([], path)
    path.write_text("stage: [")
    assert "is not YAML" in problems([], path)
    path.write_text("- 1")
    assert "mapping" in problems([], path)
    path.write_text("stage: sma")
    assert "stage: should be mae or sam, is 'sma'" in problems([], path)


def test_trainer_refuses_before_any_process_group(monkeypatch, capsys, good):
    monkeypatch.setattr(trainer.train, "start_world", lambda *_: pytest.fail("a process group was started"))
    assert trainer.train.main([str(TINY), *good, "optim.lrr=1", "batch.micro=0"]) == 2
    shown = capsys.readouterr().err
    assert "optim.lrr: no such key; did you mean lr?" in shown
    assert "batch.micro: " in shown


def test_command_ends_with_code_2_and_no_traceback(tmp_path):
    """As one of two ranks whose peer never comes: joining a group would wait far longer than this test."""
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "trainer.train", str(TINY), f"data.shards={tmp_path}/no", "seeed=1"],
        cwd=ROOT,
        env={**os.environ, **place},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "seeed: no such key; did you mean seed?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "override, part",
    [
        ("optim.layer_decay=0.5", "optim.layer_decay belongs to stage sam"),
        ("model.mask_ratio=0.999", "leaves no patch to see"),
        ("model.mask_ratio=1", "model.mask_ratio"),
        ("model.decoder_heads=5", "must be a multiple of 4"),
        ("model.decoder_dim=98", "must be a multiple of 4"),
    ],
)
def test_what_the_autoencoder_cannot_do(override, part):
    path = CONFIGS / "mae_tiny.yaml"
    with pytest.raises(ConfigError, match=part):
        load_config(path, [override], check_paths=False)
