"""Every shipped config loads, and every setting does something."""

import ast
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
