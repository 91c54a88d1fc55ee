"""Every setting of section `model` arrives in the network that training builds, and does there what it says."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from model.attention import Attention
from model.build import build_mae
from model.layers import MLPBlock
from model.two_way_transformer import Attention as DecoderAttention
from model.weights import resize_patch_kernel
from tests.model.support import difference, randomize
from tests.trainer.tiny import mae_arguments, sam_arguments
from trainer.config import Config, MaeModel, SamModel, load_config
from trainer.stages import build_pipeline, build_task

ARGUMENTS = {"sam": sam_arguments, "mae": mae_arguments}


def configured(scenes: dict[str, Path], tmp_path: Path, stage: str, *more: str) -> Config:
    path, *overrides = ARGUMENTS[stage](scenes, tmp_path, *more)
    return load_config(Path(path), overrides)


def heads(blocks: nn.ModuleList) -> set[int]:
    return {part.num_heads for block in blocks for part in block.modules() if isinstance(part, Attention)}


# stage, setting, value, what it must have become
SHAPES: list[tuple[str, str, object, Callable[[nn.Module], bool]]] = [
    ("sam", "size", "vit_b", lambda task: task.sam.image_encoder.neck[0].weight.shape == (256, 768, 1, 1)),
    ("sam", "image_size", 96, lambda task: task.sam.image_encoder.pos_embed.shape[1:3] == (6, 6)),
    ("sam", "image_size", 96, lambda task: task.sam.prompt_encoder.input_image_size == (96, 96)),
    ("sam", "image_size", 96, lambda task: task.sam.prompt_encoder.image_embedding_size == (6, 6)),
    ("sam", "drop_path", 0.3, lambda task: rates(task.sam) == pytest.approx([0, 0.1, 0.2, 0.3])),
    ("mae", "size", "vit_b", lambda task: task.mae.norm.weight.shape == (768,)),
    ("mae", "image_size", 96, lambda task: task.mae.pos_embed.shape[1] == 1 + 6**2),
    ("mae", "patch_size", 8, lambda task: task.mae.patch_embed.proj.weight.shape[2:] == (8, 8)),
    ("mae", "decoder_dim", 48, lambda task: task.mae.decoder_norm.weight.shape == (48,)),
    ("mae", "decoder_depth", 5, lambda task: len(task.mae.decoder_blocks) == 5),
    ("mae", "decoder_heads", 2, lambda task: heads(task.mae.decoder_blocks) == {2}),
]


def rates(sam: nn.Module) -> list[float]:
    return [block.drop_path_rate for block in sam.image_encoder.blocks]


@pytest.mark.parametrize("stage, setting, value, arrived", SHAPES)
def test_every_size_arrives(scenes, tmp_path, stage, setting, value, arrived):
    for override, wanted in (f"model.{setting}={value}", True), ("log.every_steps=1", False):
        # Without numbers vit_b costs nothing either.
        config = configured(scenes, tmp_path, stage, "engine.meta_init=true", override)
        assert arrived(build_task(config, (), initial_weights=False, has_numbers=False)) is wanted


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_drop_path_takes_the_uniforms_of_the_batch(scenes, tmp_path, rate):
    config = configured(scenes, tmp_path, "sam", f"model.drop_path={rate}", "data.color_jitter=0")
    task = randomize(build_task(config, (), initial_weights=False)).train()
    batch = build_pipeline(config).dataset[[0, 1]]
    batch.drop_path_uniforms[0] = 0.999  # the first image keeps all branches
    batch.drop_path_uniforms[1] = 0.0  # the second loses those that have a rate
    with torch.no_grad():
        found = task.encode(batch)
        images = task.sam.normalize_images(batch.images, batch.image_sizes)
        wanted = []
        for image, kept in ((images[:1], 1.0), (images[1:], 0.0)):
            x = task.sam.image_encoder.patch_embed(image) + task.sam.image_encoder.pos_embed
            for i, block in enumerate(task.sam.image_encoder.blocks):
                share = kept / (1 - rate * i / 3) if rate * i else 1.0
                x = x + share * block.attn(block.norm1(x))
                x = x + share * block.mlp(block.norm2(x))
            wanted.append(task.sam.image_encoder.neck(x.permute(0, 3, 1, 2)))
    # fp32, one image at a time instead of two.
    assert difference(found, torch.cat(wanted)) < 1e-5


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_decoder_dropout_acts_on_every_attention_and_mlp_of_the_decoder(scenes, tmp_path, rate):
    config = configured(scenes, tmp_path, "sam", f"model.decoder_dropout={rate}")
    sam = build_task(config, (), initial_weights=False).train().sam
    parts = [part for part in sam.mask_decoder.modules() if isinstance(part, DecoderAttention | MLPBlock)]
    assert len(parts) == 2 * 4 + 1
    x = torch.randn(1, 200, 128)
    for part in parts:
        out = part(x) if isinstance(part, MLPBlock) else part(x, x, x)
        # Of 25600 numbers; the deviation of the share is 0.003.
        assert (out == 0).float().mean().item() == pytest.approx(rate, abs=0.02 if rate else 0.0)
    assert all(part.dropout == 0.0 for part in sam.image_encoder.modules() if isinstance(part, MLPBlock))


@pytest.mark.parametrize("method", ["bicubic", "pseudo_inverse"])
def test_a_patch_kernel_of_another_size_is_resized_as_configured(scenes, tmp_path, method):
    mae = randomize(build_mae("vit_tiny", 56, patch_size=14))
    torch.save(mae.state_dict(), tmp_path / "mae.pth")
    settings = [f"model.init_from={tmp_path / 'mae.pth'}", f"model.patch_resize={method}"]
    task = build_task(configured(scenes, tmp_path, "sam", *settings), (), initial_weights=True)
    wanted = resize_patch_kernel(mae.patch_embed.proj.weight.detach(), 16, method)
    assert torch.equal(task.sam.image_encoder.patch_embed.proj.weight, wanted)
    assert torch.equal(task.sam.image_encoder.blocks[2].mlp.lin1.weight, mae.blocks[2].mlp.lin1.weight)


@pytest.mark.parametrize("ratio", [0.5, 0.75])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_mask_ratio_and_target_of_the_autoencoder(scenes, tmp_path, ratio, norm_pix):
    settings = [f"model.mask_ratio={ratio}", f"model.norm_pix_loss={norm_pix}"]
    mae = build_task(configured(scenes, tmp_path, "mae", *settings), (), initial_weights=False).mae
    images = torch.randn(1, 3, 64, 64) + 10.0
    with torch.no_grad():
        prediction, hidden = mae(images, torch.rand(1, 16))
        loss = mae.forward_loss(images, torch.zeros_like(prediction), hidden)
    assert hidden.mean().item() == ratio
    assert (loss.item() < 2.0) is norm_pix, "of variance 1 after the normalisation, of mean square 101 before"


def test_no_setting_is_left_out():
    tested = {("sam", "decoder_dropout"), ("sam", "init_from"), ("sam", "patch_resize")}
    tested |= {("mae", "mask_ratio"), ("mae", "norm_pix_loss")} | {(stage, setting) for stage, setting, *_ in SHAPES}
    assert tested == {("sam", name) for name in SamModel.model_fields} | {
        ("mae", name) for name in MaeModel.model_fields
    }
