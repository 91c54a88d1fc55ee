"""Every shipped config loads, and every setting does something."""

import ast
import re
import typing
from pathlib import Path

import pytest
import yaml

from trainer import config as settings
from trainer.config import Config, MaeConfig, SamConfig, Section, dump_config, load_config
from trainer.optim import base_lr, phase_ends

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "launch" / "configs").rglob("*.yaml"))
SA1B_IMAGES, IMAGENET_IMAGES = 11_185_362, 1_281_167


def load(path: Path, directory: Path, *overrides: str) -> Config:
    """The config, with every input path it names replaced by a directory that passes for a data set."""
    (directory / "manifest.json").touch()
    tree = yaml.safe_load(path.read_text())
    paths = {"data": ("shards", "eval_shards"), "model": ("init_from",)}
    present = [
        f"{section}.{key}={directory}" for section, keys in paths.items() for key in keys if tree[section].get(key)
    ]
    return load_config(path, [*present, *overrides])


def test_there_are_configs():
    assert len(CONFIGS) >= 4


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_and_its_dump_loads_back_equal(path, tmp_path):
    config = load(path, tmp_path)
    dumped = tmp_path / "config.yaml"
    dumped.write_text(dump_config(config))
    assert load_config(dumped) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_has_the_command(path):
    header = path.read_text().split("stage:")[0]
    assert str(path.relative_to(ROOT)) in header or f"launch/{path.stem}.slurm" in header


@pytest.mark.parametrize("path", [path for path in CONFIGS if "sbatch" in path.read_text()], ids=lambda path: path.name)
def test_the_batch_job_in_the_header_has_an_image_for_every_gpu(path):
    header = next(line for line in path.read_text().splitlines() if "sbatch" in line)
    script = (ROOT / re.search(r"launch/\w+\.slurm", header)[0]).read_text()
    nodes, per_node = (
        int(re.search(rf"--{option}=(\d+)", text)[1])
        for option, text in (("nodes", header if "--nodes" in header else script), ("ntasks-per-node", script))
    )
    assert load_config(path, check_paths=False).batch.global_size >= nodes * per_node


def test_mae_recipe_adds_up(tmp_path):
    config = load(ROOT / "launch/configs/mae_vith.yaml", tmp_path)
    assert base_lr(config.optim, config.batch) == pytest.approx(2.4e-3)
    assert phase_ends(config.phases, IMAGENET_IMAGES, config.batch.global_size) == [500_455]
    assert config.batch.global_size == 16 * 8 * config.batch.micro


def test_sam_recipe_adds_up(tmp_path):
    config = load(ROOT / "launch/configs/sam_vith.yaml", tmp_path)
    num_samples = SA1B_IMAGES - config.data.holdout_images
    assert phase_ends(config.phases, num_samples, config.batch.global_size) == [218_425, 4_150_075]
    assert config.batch.global_size == 32 * 8 * config.batch.micro
    published = load(
        ROOT / "launch/configs/sam_vith.yaml", tmp_path, "phases.0.epochs=0.1", "phases.1.epochs=1.96"
    )  # as the header says
    assert phase_ends(published.phases, num_samples, 256)[-1] == pytest.approx(90_000, rel=0.01)


@pytest.mark.parametrize(
    "name, size, steps, batch, lr, decay, drop_path, milestones",
    [
        ("sam_vith_paper", "vit_h", 90_000, 256, 8e-4, 0.8, 0.4, (60_000, 86_666)),
        ("sam_vitl_paper", "vit_l", 180_000, 128, 4e-4, 0.8, 0.4, (120_000, 173_332)),
        ("sam_vitb_paper", "vit_b", 180_000, 128, 8e-4, 0.6, 0.6, (120_000, 173_332)),
    ],
)
def test_published_sam_recipes(tmp_path, name, size, steps, batch, lr, decay, drop_path, milestones):
    """Against the figures of SAM's appendix A, typed in here."""
    config = load(ROOT / f"launch/configs/{name}.yaml", tmp_path)
    assert (config.model.size, config.model.drop_path, config.model.decoder_dropout) == (size, drop_path, 0.1)
    assert [(phase.steps, phase.frozen) for phase in config.phases] == [(steps, ())]
    assert (config.batch.global_size, config.optim.lr, config.optim.layer_decay) == (batch, lr, decay)
    assert (config.optim.weight_decay, config.optim.betas) == (0.1, (0.9, 0.999))
    schedule = config.schedule
    assert (schedule.kind, schedule.warmup_steps, schedule.milestones) == ("multistep", 250, milestones)
    prompts = config.prompts
    assert (prompts.rounds, prompts.rounds_without_click, prompts.box_noise, prompts.box_noise_pixels) == (
        11,
        2,
        0.1,
        20,
    )
    assert (prompts.types.point, prompts.types.box, prompts.num_points) == (0.5, 0.5, (1.0,))
    loss = config.loss
    assert (loss.focal, loss.dice, loss.iou, loss.multimask_when) == (20, 1, 1, "single_prompt")
    data = config.data
    assert (data.max_masks * config.batch.micro, data.max_mask_area) == (64, 0.9)
    assert (data.scale_jitter, data.horizontal_flip, data.color_jitter) == (None, 0, 0)
    epochs = steps * batch / SA1B_IMAGES
    assert epochs == pytest.approx(2.06, abs=0.005)


def test_published_mae_recipes(tmp_path):
    for name, patch in (("vith", 14), ("vitl", 16), ("vitb", 16)):
        config = load(ROOT / f"launch/configs/mae_{name}_paper.yaml", tmp_path)
        assert base_lr(config.optim, config.batch) == pytest.approx(2.4e-3)
        assert (config.model.patch_size, config.model.norm_pix_loss, config.data.crop_scale) == (
            patch,
            True,
            (0.2, 1.0),
        )
        assert (config.data.color_jitter, config.optim.decay_bias_and_norm) == (0.0, False)
        assert load(ROOT / f"launch/configs/sam_{name}_paper.yaml", tmp_path).model.size == config.model.size


# ------------------------------------------------------------------------------------------------- dead settings


def sections() -> dict[type[Section], set[str]]:
    """Every section of both stages, with the names it is reached by."""
    found: dict[type[Section], set[str]] = {MaeConfig: {"config"}, SamConfig: {"config"}}
    waiting = [MaeConfig, SamConfig]
    while waiting:
        for name, field in waiting.pop().model_fields.items():
            for part in (field.annotation, *typing.get_args(field.annotation)):
                if isinstance(part, type) and issubclass(part, Section):
                    if part not in found:
                        found[part] = set()
                        waiting.append(part)
                    found[part] |= {name, name.removesuffix("s")}  # `phases` are read one `phase` at a time
    return found


def reads() -> set[tuple[str, str]]:
    """(holder, attribute) of every `holder.attribute` and `x.holder.attribute` outside config.py."""
    found = set()
    for package in ("trainer", "model", "data_tools"):
        for path in (ROOT / package).rglob("*.py"):
            if path == Path(settings.__file__):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Attribute):
                    continue
                holder = node.value
                if isinstance(holder, ast.BoolOp):
                    holder = holder.values[0]
                if isinstance(holder, ast.Subscript):  # config.phases[i].name
                    holder = holder.value
                name = holder.attr if isinstance(holder, ast.Attribute) else getattr(holder, "id", "")
                found.add((name, node.attr))
    return found


def test_every_setting_is_read_somewhere():
    """A dead knob is a lie: `optim.lr` counts as read where the code has `optim.lr` or `settings.lr`."""
    used = reads()
    assert ("optim", "lr") in used
    dead = [
        f"{section.__name__}.{field}"
        for section, names in sections().items()
        for field in section.model_fields
        if not any((holder, field) in used for holder in (*names, "settings"))
    ]
    assert not dead


def test_all_sections_are_walked():
    classes = {c for c in vars(settings).values() if isinstance(c, type) and issubclass(c, Section)}
    assert classes - {Section, settings.Run} == set(sections())
