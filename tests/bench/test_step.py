"""The step bench: its FLOP counts against torch's counter, its batches against the task, its scripts to the end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.recipes import recipe, table
from bench.step import SAM_ENCODER_FLOPS, SAM_ROUND_FLOPS, mae_forward_flops, measure, useful_flops
from model.build import build_mae
from tests.model.test_sam import released_sam
from trainer.config import load_config
from trainer.distributed import single_process

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "launch" / "configs"


@pytest.mark.parametrize("name", ["vit_b", "vit_h"])
def test_flops_of_the_released_sam(name):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        sam = released_sam(name, 1024)
        embedding = sam.image_encoder(torch.zeros(1, 3, 1024, 1024))
        encoder = counter.get_total_flops()
        sparse, dense = torch.zeros(1, 6, 256), torch.zeros(1, 256, 64, 64)  # five clicks
        sam.mask_decoder.predict_masks(embedding, torch.zeros(1, 256, 64, 64), sparse, dense)
        one_round = counter.get_total_flops() - encoder
    assert encoder == pytest.approx(SAM_ENCODER_FLOPS[name], rel=2e-3)  # four digits are given
    assert one_round == pytest.approx(SAM_ROUND_FLOPS, rel=0.03)  # between the first round and the last


@pytest.mark.parametrize(
    "name, published", [("mae_vith_paper", 97.1e9), ("mae_vith", 74.5e9), ("mae_vitl_paper", 41.5e9)]
)
def test_flops_of_mae(name, published):
    config = load_config(CONFIGS / f"{name}.yaml", check_paths=False)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        mae = build_mae(config.model.size, 224, patch_size=config.model.patch_size)
        mae(torch.zeros(1, 3, 224, 224), torch.zeros(1, mae.grid[0] * mae.grid[1]))
    assert mae_forward_flops(config) == pytest.approx(counter.get_total_flops(), rel=1e-2)
    assert mae_forward_flops(config) == pytest.approx(published, rel=1e-2)


def test_useful_flops_of_the_recipes():
    def tera(name: str, frozen: tuple[str, ...] = ()) -> float:
        return useful_flops(load_config(CONFIGS / f"{name}.yaml", check_paths=False), frozen) / 1e12

    assert tera("sam_vith_paper") == pytest.approx(25.7, abs=0.1)
    assert tera("sam_vith") == pytest.approx(18.6, abs=0.1)
    assert tera("sam_vith", ("image_encoder",)) == pytest.approx(6.7, abs=0.1)


@pytest.mark.parametrize("name, more", [("sam_tiny", ["data.max_masks=2", "prompts.rounds=2"]), ("mae_tiny", [])])
def test_a_step_is_measured(name, more):
    config = load_config(CONFIGS / f"{name}.yaml", ["model.image_size=64", "batch.micro=1", *more], check_paths=False)
    row = measure(config, single_process("cpu"), compiled=False, repeats=1)
    assert row["step_ms"] > 0
    assert row["forward_backward_ms"] > 0
    assert row["useful_tflop"] is None


def test_the_gpu_script_ends_without_a_gpu_and_says_so(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(["bash", "bench/gpu.sh", str(tmp_path / "out")], cwd=ROOT, env=environment, check=True)
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "skipped gpu tests, attention, steps: no CUDA device" in summary


def test_the_gpu_script_says_which_package_is_missing(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('not here')\n")
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    subprocess.run(["bash", "bench/gpu.sh", str(tmp_path / "out")], cwd=ROOT, env=environment, check=True)
    assert "skipped everything: torch (ImportError: not here)" in (tmp_path / "out" / "summary.txt").read_text()


@pytest.mark.parametrize("name", ["document", "document_11_rounds", "published"])
@pytest.mark.parametrize("steps", [4, 2000])
def test_the_recipes_that_are_compared_are_valid_and_equally_long(name, steps):
    config = load_config(CONFIGS / "sam_tiny.yaml", recipe(name, steps), check_paths=False)
    assert sum(phase.steps for phase in config.phases) == steps
    assert config.prompts.rounds == (1 if name == "document" else 11)


def test_the_table_of_recipes():
    score = {"box": 0.5, "click_1": 0.25, "click_3": 0.3, "click_5": 0.5}
    text = table({"document": [score, score | {"click_5": 0.7}]})
    assert "| document | 2 | 0.500 ± 0.000 | 0.250 ± 0.000 | 0.300 ± 0.000 | 0.600 ± 0.141 | 0.350 ± 0.141 |" in text
