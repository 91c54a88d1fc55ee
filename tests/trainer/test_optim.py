"""Groups and schedules: the multiplier of every parameter, groups that cover all, curves at their corners."""

import itertools

import pytest
import torch
from torch import nn

from model.build import build_mae, build_sam
from model.layers import LayerNorm2d
from trainer.config import Batch, Optim, Phase, Schedule
from trainer.optim import (
    base_lr,
    describe_groups,
    describe_rates,
    first_trained,
    layer_multiplier,
    lr_at,
    param_groups,
    phase_ends,
    steps_of,
)


def test_layer_decay_of_vit_h_is_the_published_one():
    def multiplier(name):
        return layer_multiplier(f"sam.{name}", 32, 0.8)

    assert multiplier("image_encoder.patch_embed.proj.weight") == pytest.approx(0.8**33)
    assert multiplier("image_encoder.pos_embed") == pytest.approx(0.8**33)
    assert multiplier("image_encoder.blocks.0.attn.qkv.weight") == pytest.approx(0.8**32)
    assert multiplier("image_encoder.blocks.31.mlp.lin1.bias") == pytest.approx(0.8)
    assert multiplier("image_encoder.neck.0.weight") == 1.0
    assert multiplier("mask_decoder.transformer.layers.0.norm1.weight") == 1.0
    assert multiplier("prompt_encoder.no_mask_embed.weight") == 1.0


def test_groups_hold_every_trained_parameter_once_and_are_few():
    sam = nn.ModuleDict({"sam": build_sam("vit_tiny", image_size=64)})
    optim = Optim(lr=1e-3, layer_decay=0.8, decay_bias_and_norm=False)
    phases = (Phase(name="a", steps=1, frozen=("image_encoder",)), Phase(name="b", steps=1))
    groups = param_groups(sam.named_parameters(), optim, 4, first_trained(phases))
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(name for name, _ in sam.named_parameters())
    # Six layers of the encoder and the rest, decayed or not; the encoder's top and the decoder join at other times.
    assert len(groups) <= 16
    for group in groups:
        assert len({name.split(".")[1] == "image_encoder" for name in group.names}) == 1, "other step counts"
        if group.weight_decay == 0:
            assert all(dict(sam.named_parameters())[name].ndim <= 1 or name.endswith("bias") for name in group.names)


LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
NORMS = (nn.LayerNorm, LayerNorm2d)


@pytest.mark.parametrize("build", [build_sam, build_mae])
@pytest.mark.parametrize("decay_bias_and_norm", [True, False])
def test_what_weight_decay_leaves_out_by_the_kind_of_module(build, decay_bias_and_norm):
    """All biases of layers and all of the norms, found through the modules and not by name; or nothing."""
    task = nn.ModuleDict({"network": build("vit_tiny", 64)})
    parts = [part for part in task.modules() if isinstance(part, LAYERS + NORMS)]
    exempt = {part.bias for part in parts if part.bias is not None}
    exempt |= {part.weight for part in parts if isinstance(part, NORMS)}
    assert {type(part) for part in parts} >= {nn.Linear, nn.Conv2d, nn.LayerNorm}
    optim = Optim(lr=1e-3, weight_decay=0.3, layer_decay=0.8, decay_bias_and_norm=decay_bias_and_norm)
    groups = param_groups(task.named_parameters(), optim, 4, {})
    found = {name: group.weight_decay for group in groups for name in group.names}
    trained = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert exempt <= set(trained.values())
    left_out = set() if decay_bias_and_norm else exempt
    assert found == {name: 0.0 if parameter in left_out else 0.3 for name, parameter in trained.items()}


@pytest.mark.parametrize(
    "name, depth, decay, groups", [("vit_b", 12, 0.6, 14), ("vit_l", 24, 0.8, 26), ("vit_h", 32, 0.8, 34)]
)
def test_rates_of_every_parameter_of_the_published_recipes(name, depth, decay, groups):
    """Independently: the exponent counts the blocks above a parameter, and the heads above them."""
    with torch.device("meta"):
        task = nn.ModuleDict({"sam": build_sam(name)})
    found = param_groups(task.named_parameters(), Optim(lr=8e-4, layer_decay=decay), depth, {})
    assert len(found) == groups
    scale = {parameter: group.lr_scale for group in found for parameter in group.names}
    assert scale.keys() == dict(task.named_parameters()).keys()
    for i in range(depth):
        block = {value for key, value in scale.items() if key.startswith(f"sam.image_encoder.blocks.{i}.")}
        assert list(block) == pytest.approx([decay ** (depth - i)])
    stem = {value for key, value in scale.items() if ".pos_embed" in key or ".patch_embed." in key}
    assert list(stem) == pytest.approx([decay ** (depth + 1)])
    rest = {v for k, v in scale.items() if not any(part in k for part in (".blocks.", ".pos_embed", ".patch_embed."))}
    assert rest == {1.0}
    lines = describe_groups(found, 8e-4)
    assert len(lines) == groups
    assert "image_encoder.pos_embed, image_encoder.patch_embed" in lines[0]
    assert f"rate {8e-4 * decay ** (depth + 1):.3g}" in lines[0]
    assert "mask_decoder.transformer" in lines[-1]
    assert "(x 1) decay 0.1" in lines[-1]
    rates = {name: (2.0 * group.lr_scale, group.weight_decay) for group in found for name in group.names}
    names = [name for name, _ in task.named_parameters()]
    table = describe_rates(rates, [*names, "sam.still"], lr=2.0, peak=8e-4).splitlines()
    assert len(table) == 2 + len(names)
    row = next(line for line in table if line.endswith(" image_encoder.pos_embed")).split()
    bottom = decay ** (depth + 1)
    assert [float(value) for value in row[:2]] == pytest.approx([8e-4 * bottom, bottom], rel=1e-3)
    assert table[-1].split() == ["frozen", "still"]


def test_frozen_parameters_are_in_no_group():
    net = nn.Linear(2, 2)
    net.weight.requires_grad_(False)
    groups = param_groups(net.named_parameters(), Optim(lr=1.0), 1, {})
    assert [group.names for group in groups] == [("bias",)]


def test_cosine_meets_its_warmup_and_ends_at_the_minimum():
    schedule = Schedule(kind="cosine", warmup_steps=10, min_lr=0.1)
    curve = [lr_at(step, schedule, 1.0, 10, 110) for step in range(111)]
    assert curve[0] == pytest.approx(0.1)
    assert curve[9] == curve[10] == 1.0
    assert curve[60] == pytest.approx(0.55)
    assert curve[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(curve[10:]))


def test_multistep_drops_at_the_published_milestones():
    schedule = Schedule(kind="multistep", warmup_steps=250, milestones=(60_000, 86_666))
    at = [lr_at(step, schedule, 8e-4, 250, 90_000) for step in (249, 59_999, 60_000, 86_666)]
    assert at == pytest.approx([8e-4, 8e-4, 8e-5, 8e-6])


def test_lengths_in_epochs_and_steps():
    assert steps_of(1600, 1_281_167, 4096) == 500_455
    phases = (Phase(name="a", steps=100), Phase(name="b", epochs=2))
    assert phase_ends(phases, num_samples=50, global_size=10) == [100, 110]
    assert base_lr(Optim(lr=1.5e-4, lr_per_256=True), Batch(global_size=4096, micro=32)) == pytest.approx(2.4e-3)
    assert first_trained((Phase(name="a", steps=1, frozen=("image_encoder",)), Phase(name="b", steps=1))) == {
        "image_encoder": 1
    }


def test_schedule_is_a_function_of_the_step_alone():
    schedule = Schedule(kind="constant", warmup_steps=4)
    assert [lr_at(step, schedule, 2.0, 4, 9) for step in (0, 3, 4, 8)] == [0.5, 2.0, 2.0, 2.0]
    assert torch.isfinite(torch.tensor(lr_at(0, Schedule(warmup_steps=0), 1.0, 0, 1)))
