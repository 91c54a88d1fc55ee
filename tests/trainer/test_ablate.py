"""The three tables as one command, each row a few steps of the real training."""

import json
import subprocess

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.tiny import CONFIGS
from trainer import ablate, evaluate, train
from trainer.config import load_config

TINY = ["data.workers=0", "data.max_masks=3", "model.image_size=64", "loss.resolution=16", "engine.precision=fp32"]
TINY += ["batch.global_size=3", "batch.micro=3", "evaluate.num_images=2", "evaluate.boundary=false"]


@pytest.mark.parametrize("table", ablate.TABLES)
def test_every_row_is_a_valid_setting_and_differs_from_the_others(table, tmp_path):
    rows = ablate.TABLES[table]
    configs = [
        load_config(CONFIGS / "sam_tiny.yaml", [f"run_dir={tmp_path}", *row.settings], check_paths=False)
        for row in rows
    ]
    assert len({config.model_dump_json() for config in configs}) == len(rows)


def test_rows_of_one_name_have_the_same_settings():
    by_name = {}
    for rows in ablate.TABLES.values():
        for row in rows:
            assert by_name.setdefault(row.name, row.settings) == row.settings


def test_the_table_has_mean_and_spread():
    score = {"box": 0.5, "click_1": 0.4, "click_3": 0.45, "box_oracle": 0.6, "click_1_oracle": 0.5}
    scores = {name: {0: score, 1: score | {"box": 0.6}} for name in ("focal", "dice", "focal_dice", "whole")}
    text = ablate.markdown("loss", scores)
    assert "| focal alone | 55.0 ± 7.1 | 40.0 ± 0.0 |" in text
    assert "click_1 42.3" in text
    one = {name: {0: score} for name in scores}
    assert "| dice alone | 50.0 | 40.0 |" in ablate.markdown("loss", one), "one seed has no spread"
    del score["box_oracle"]
    assert "| 45.0 |  | 50.0 |" in ablate.markdown("loss", {name: {0: score} for name in scores})


def test_the_command_trains_scores_writes_and_goes_on(scenes, tmp_path, monkeypatch):
    """Its commands run in this process, where PyTorch is loaded already."""
    commands = []

    def execute(module, *arguments):
        commands.append(module)
        assert {"trainer.train": train.main, "trainer.evaluate": evaluate.main}[module](list(arguments)) == 0

    monkeypatch.setattr(ablate, "execute", execute)
    out = tmp_path / "ablate"
    arguments = ["--shards", str(scenes["train"]), "--eval-shards", str(scenes["eval"]), "--out", str(out)]
    arguments += ["--tables", "masks", "--steps", "2", "--seeds", "0", "1", "--", *TINY]

    def fail(module, *arguments):
        raise subprocess.CalledProcessError(2, module)

    with monkeypatch.context() as patch:
        patch.setattr(ablate, "execute", fail)
        assert ablate.main([*arguments, "seed=mistyped"]) == 1, "no row was made, so its settings bind nothing"
    assert ablate.main(arguments) == 0
    results = json.loads((out / "results.json").read_text())
    assert {name: sorted(by_seed) for name, by_seed in results.items()} == {
        name: ["0", "1"] for name in ("single", "all", "whole")
    }
    table = (out / "table.md").read_text()
    assert "three masks, the best learns" in table
    assert "±" in table
    assert Image.open(out / "plot.png").size[0] > 500
    hparams = EventAccumulator(str(out / "hparams" / "whole_1"))
    hparams.Reload()
    assert hparams.Scalars("miou/box")[0].value == pytest.approx(results["whole"]["1"]["box"])
    assert commands == 6 * ["trainer.train", "trainer.evaluate"]
    assert ablate.main(arguments) == 0
    assert len(commands) == 12, "again: nothing to be done"
    arguments[arguments.index("--steps") + 1] = "3"
    assert ablate.main(arguments) == 2, "other settings need another folder"
