"""Released checkpoints: their names and shapes without the files, their numbers where a file is at hand.

    SAM_CHECKPOINT=sam_vit_b_01ec64.pth MAE_CHECKPOINT=mae_pretrain_vit_base.pth pytest tests/model/test_released.py

The key lists are written down here from the published files' structure, not taken from our modules.
"""

import os
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from model.build import build_mae, build_sam
from model.weights import mae_from_released, mae_to_released, mae_to_sam, resize_patch_kernel, sam_to_sam
from tests.model.support import difference
from tests.model.test_sam import mixed_prompts, released_answers, released_sam

SAM_FILE, MAE_FILE = os.environ.get("SAM_CHECKPOINT"), os.environ.get("MAE_CHECKPOINT")
# name: width, depth, patch of the released MAE encoders
MAE_SIZES = {"vit_b": (768, 12, 16), "vit_l": (1024, 24, 16), "vit_h": (1280, 32, 14)}


def pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """A layer's weight and its bias of as many values as it has outputs."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def block_shapes(prefix: str, width: int, fc1: str, fc2: str) -> dict[str, tuple[int, ...]]:
    return (
        pair(f"{prefix}.norm1", width)
        | pair(f"{prefix}.attn.qkv", 3 * width, width)
        | pair(f"{prefix}.attn.proj", width, width)
        | pair(f"{prefix}.norm2", width)
        | pair(f"{prefix}.mlp.{fc1}", 4 * width, width)
        | pair(f"{prefix}.mlp.{fc2}", width, 4 * width)
    )


def released_mae_shapes(name: str, decoder: bool) -> dict[str, tuple[int, ...]]:
    """`mae_pretrain_vit_*.pth` has the encoder alone, `mae_visualize_vit_*.pth` the decoder too."""
    width, depth, patch = MAE_SIZES[name]
    tokens = (224 // patch) ** 2 + 1
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, tokens, width)}
    shapes |= pair("patch_embed.proj", width, 3, patch, patch) | pair("norm", width)
    for i in range(depth):
        shapes |= block_shapes(f"blocks.{i}", width, "fc1", "fc2")
    if decoder:
        shapes |= {"mask_token": (1, 1, 512), "decoder_pos_embed": (1, tokens, 512)}
        shapes |= pair("decoder_embed", 512, width) | pair("decoder_norm", 512)
        shapes |= pair("decoder_pred", 3 * patch**2, 512)
        for i in range(8):
            shapes |= block_shapes(f"decoder_blocks.{i}", 512, "fc1", "fc2")
    return shapes


def released_sam_shapes(
    width: int, depth: int, heads: int, global_blocks: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """`sam_vit_{b,l,h}_*.pth`: 314, 482, 594 tensors."""
    shapes = {"image_encoder.pos_embed": (1, 64, 64, width)} | pair("image_encoder.patch_embed.proj", width, 3, 16, 16)
    for i in range(depth):
        block = f"image_encoder.blocks.{i}"
        shapes |= block_shapes(block, width, "lin1", "lin2")
        length = 127 if i in global_blocks else 27
        shapes |= {f"{block}.attn.rel_pos_{axis}": (length, width // heads) for axis in "hw"}
    shapes |= {"image_encoder.neck.0.weight": (256, width, 1, 1), "image_encoder.neck.2.weight": (256, 256, 3, 3)}
    shapes |= pair("image_encoder.neck.1", 256) | pair("image_encoder.neck.3", 256)
    encoder = "prompt_encoder"
    shapes[f"{encoder}.pe_layer.positional_encoding_gaussian_matrix"] = (2, 128)
    for name in (*(f"point_embeddings.{i}" for i in range(4)), "not_a_point_embed", "no_mask_embed"):
        shapes[f"{encoder}.{name}.weight"] = (1, 256)
    for number, shape in ((0, (4, 1, 2, 2)), (1, (4,)), (3, (16, 4, 2, 2)), (4, (16,)), (6, (256, 16, 1, 1))):
        shapes |= pair(f"{encoder}.mask_downscaling.{number}", *shape)
    decoder = "mask_decoder"
    shapes |= {f"{decoder}.iou_token.weight": (1, 256), f"{decoder}.mask_tokens.weight": (4, 256)}
    two_way = f"{decoder}.transformer"
    attentions = {f"{two_way}.final_attn_token_to_image": 128}
    for i in range(2):
        attentions[f"{two_way}.layers.{i}.self_attn"] = 256
        attentions |= {f"{two_way}.layers.{i}.cross_attn_{way}": 128 for way in ("token_to_image", "image_to_token")}
        for number in range(1, 5):
            shapes |= pair(f"{two_way}.layers.{i}.norm{number}", 256)
        shapes |= pair(f"{two_way}.layers.{i}.mlp.lin1", 2048, 256) | pair(f"{two_way}.layers.{i}.mlp.lin2", 256, 2048)
    for attention, inner in attentions.items():
        for part in "qkv":
            shapes |= pair(f"{attention}.{part}_proj", inner, 256)
        shapes |= pair(f"{attention}.out_proj", 256, inner)
    shapes |= pair(f"{two_way}.norm_final_attn", 256) | pair(f"{decoder}.output_upscaling.1", 64)
    for number, sizes in ((0, (256, 64)), (3, (64, 32))):
        shapes[f"{decoder}.output_upscaling.{number}.weight"] = (*sizes, 2, 2)
        shapes[f"{decoder}.output_upscaling.{number}.bias"] = sizes[1:]
    for mlp, outputs in (*((f"output_hypernetworks_mlps.{i}", 32) for i in range(4)), ("iou_prediction_head", 4)):
        for number in range(3):
            shapes |= pair(f"{decoder}.{mlp}.layers.{number}", outputs if number == 2 else 256, 256)
    return shapes


def shapes_of(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}


@pytest.mark.parametrize(
    "name, sizes, count",
    [
        ("vit_b", (768, 12, 12, (2, 5, 8, 11)), 314),
        ("vit_l", (1024, 24, 16, (5, 11, 17, 23)), 482),
        ("vit_h", (1280, 32, 16, (7, 15, 23, 31)), 594),
    ],
)
def test_names_and_shapes_of_the_released_sam(name, sizes, count):
    with torch.device("meta"):
        ours = build_sam(name)
    wanted = released_sam_shapes(*sizes)
    assert len(wanted) == count
    assert shapes_of(ours.state_dict()) == wanted
    wrong = wanted | {"mask_decoder.mask_tokens.weight": (3, 256)}
    assert shapes_of(ours.state_dict()) != wrong, "the test can fail"


@pytest.mark.parametrize("name", MAE_SIZES)
def test_names_and_shapes_of_the_released_mae(name):
    with torch.device("meta"):
        ours = build_mae(name, 224, patch_size=MAE_SIZES[name][2])
    assert shapes_of(mae_to_released(ours.state_dict())["model"]) == released_mae_shapes(name, decoder=True)


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("method", ["bicubic", "pseudo_inverse"])
def test_a_file_like_the_released_one_starts_sam(decoder, method):
    """ViT-B with kernels of 14 pixels, as only ViT-H has them, so that all that happens to a file happens here."""
    MAE_SIZES["test"] = (768, 12, 14)
    shapes = released_mae_shapes("test", decoder)
    del MAE_SIZES["test"]
    generator = torch.Generator().manual_seed(0)
    file = {"model": {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}}
    sam = build_sam("vit_b", 256)
    report = mae_to_sam(file, sam, patch_resize=method)
    assert set(report.names("dropped")) == {
        name.replace(".mlp.fc", ".mlp.lin")
        for name in shapes
        if name.startswith(("cls_token", "mask_token", "norm.", "decoder_"))
    }
    assert set(report.names("resized")) == {"image_encoder.patch_embed.proj.weight"}  # 16 x 16 patches are the grid
    kernel = resize_patch_kernel(file["model"]["patch_embed.proj.weight"], 16, method)
    assert torch.equal(sam.state_dict()["image_encoder.patch_embed.proj.weight"], kernel)
    carried = sam.state_dict()["image_encoder.pos_embed"].flatten(1, 2)
    assert torch.equal(carried, file["model"]["pos_embed"][:, 1:])


def test_sam_weights_fit_another_input_size():
    """The tables are resized as the network itself resizes them when it sees another size."""
    large, small = build_sam("vit_tiny", 256).eval(), build_sam("vit_tiny", 128).eval()
    with torch.no_grad():
        for parameter in large.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    report = sam_to_sam(large.state_dict(), small)
    assert {line.name for line in report.lines} == set(small.state_dict())
    assert "image_encoder.pos_embed" in report.names("resized")
    assert "image_encoder.neck.0.weight" in report.names("carried")
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert difference(small.encode_images(images), large.encode_images(images)) < 1e-5
    broken = dict(large.state_dict())
    broken["image_encoder.neck.0.weight"] = torch.zeros(3, 3, 1, 1)
    with pytest.raises(ValueError, match=r"sam\.pth will not go .*image_encoder\.neck\.0\.weight has shape"):
        sam_to_sam(broken, small, "sam.pth")
    with pytest.raises(ValueError, match=r"(\S+ is missing; ){5}and \d+ more$"):
        sam_to_sam({}, small)


@pytest.mark.skipif(SAM_FILE is None, reason="set SAM_CHECKPOINT to a released sam_vit_{b,l,h}_*.pth")
def test_numbers_of_a_released_sam():
    weights = torch.load(Path(str(SAM_FILE)), map_location="cpu", weights_only=True)
    width = weights["image_encoder.pos_embed"].shape[-1]
    name = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}[width]
    ours, theirs = build_sam(name).eval(), released_sam(name, 1024).eval()
    ours.load_state_dict(weights, strict=True)
    theirs.load_state_dict(weights, strict=True)
    image, prompts = torch.randn(1, 3, 1024, 1024), mixed_prompts(1, 1024)
    with torch.no_grad():
        embedding = theirs.image_encoder(image)
        assert difference(ours.encode_images(image), embedding) < 1e-4  # trained weights have larger activations
        logits, iou = released_answers(theirs, embedding, prompts)
        found = ours.decode_masks(embedding, prompts)
        assert difference(found.low_res_logits, logits) < 1e-4
        assert difference(found.iou_predictions, iou) < 1e-4


@pytest.mark.skipif(MAE_FILE is None, reason="set MAE_CHECKPOINT to a released mae_pretrain_vit_*.pth")
def test_numbers_of_a_released_mae():
    weights = torch.load(Path(str(MAE_FILE)), map_location="cpu", weights_only=True)["model"]
    width = weights["pos_embed"].shape[-1]
    name, peer_name = {
        768: ("vit_b", "vit_base_patch16_224"),
        1024: ("vit_l", "vit_large_patch16_224"),
        1280: ("vit_h", "vit_huge_patch14_224"),
    }[width]
    encoder = {key: value for key, value in weights.items() if not key.startswith(("decoder_", "mask_token"))}
    peer = timm.create_model(peer_name, pretrained=False, num_classes=0).eval()
    peer.load_state_dict(encoder, strict=True)
    mae = build_mae(name, 224, patch_size=MAE_SIZES[name][2]).eval()
    mae.load_state_dict(mae_from_released(weights), strict=False)
    images = torch.randn(1, 3, 224, 224)
    everything = torch.arange(mae.grid[0] * mae.grid[1])[None]
    with torch.no_grad():
        assert difference(mae.forward_encoder(images, everything), peer.forward_features(images)) < 1e-4
