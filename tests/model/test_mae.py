"""The masked autoencoder against transformers' ViTMAEForPreTraining, and its parts."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from model.build import build_mae, init_weights
from model.mae import MaskedAutoencoder, normalize_patches, patchify, random_masking, unpatchify
from tests.model.support import difference, gradients, randomize, spoil_gradient, worst_gradient

NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "vit.layernorm.": "norm.",
    "vit.layers.": "blocks.",
    "decoder.decoder_layers.": "decoder_blocks.",
    "decoder.": "",
    "vit.": "",
    "attention.o_proj.": "attn.proj.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "mlp.fc1.": "mlp.lin1.",
    "mlp.fc2.": "mlp.lin2.",
}


def peer_of(mae: MaskedAutoencoder, norm_pix: bool) -> ViTMAEForPreTraining:
    """transformers' MAE with the sizes and the weights of our vit_tiny."""
    config = ViTMAEConfig(
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=64,
        decoder_hidden_size=96,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=384,
        layer_norm_eps=1e-6,
        norm_pix_loss=norm_pix,
    )
    peer = ViTMAEForPreTraining(config).eval()
    peer.load_state_dict(in_their_names(mae.state_dict(), peer.state_dict()), strict=True)
    return peer


def in_their_names(ours: dict[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """Our weights, or their gradients, under transformers' names `keys`; they keep query, key and value apart."""
    found = {}
    for key in keys:
        name = key
        for old, new in NAMES.items():
            name = name.replace(old, new)
        if ".attention." in name:
            part = "qkv".index(name.split(".")[-2][0])
            start, kind = name.split(".attention.")[0], name.split(".")[-1]
            found[key] = ours[f"{start}.attn.qkv.{kind}"].chunk(3)[part]
        else:
            found[key] = ours[name]
    return found


@pytest.mark.parametrize("norm_pix", [True, False])
def test_equals_transformers(norm_pix: bool):
    mae = randomize(build_mae("vit_tiny", 64, norm_pix=norm_pix)).eval()
    peer = peer_of(mae, norm_pix)
    images, noise = torch.randn(3, 3, 64, 64), torch.rand(3, 16)
    prediction, mask = mae(images, noise)
    wanted = peer(images, noise=noise)
    loss = mae.forward_loss(images, prediction, mask)
    assert torch.equal(mask, wanted.mask)
    assert difference(prediction, wanted.logits) < 1e-5
    # Every image hides equally many patches, so their mean over the batch is the mean over images.
    assert loss.mean().item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    theirs, found = gradients(wanted.loss, peer), gradients(loss.mean(), mae)
    assert found.keys() == {name for name, p in mae.named_parameters() if p.requires_grad}
    # All of them but the position tables, which are fixed on both sides; fp32 through six blocks.
    worst, where = worst_gradient(in_their_names(found, theirs), theirs)
    assert worst < 1e-4, where
    assert theirs.keys() == {name for name, p in peer.named_parameters() if p.requires_grad}
    # The measure sees an error: another mask.
    assert difference(mae(images, noise.flip(1))[0], wanted.logits) > 1e-3


@pytest.mark.parametrize("part", ["patch_embed", "blocks.2.mlp", "decoder_blocks.0.attn.qkv", "decoder_pred"])
def test_an_error_of_a_gradient_would_be_seen(part: str):
    """The loss is the same, and what comes back through one part is 1 % too large."""
    mae = randomize(build_mae("vit_tiny", 64)).eval()
    peer = peer_of(mae, norm_pix=True)
    spoil_gradient(mae.get_submodule(part))
    images, noise = torch.randn(3, 3, 64, 64), torch.rand(3, 16)
    loss, wanted = mae.forward_loss(images, *mae(images, noise)).mean(), peer(images, noise=noise).loss
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    theirs = gradients(wanted, peer)
    assert worst_gradient(in_their_names(gradients(loss, mae), theirs), theirs)[0] > 1e-3


def test_position_tables_are_the_published_ones():
    mae = build_mae("vit_tiny", 64)
    peer = peer_of(mae, norm_pix=True)
    peer.init_weights()  # fills their tables anew
    for ours, theirs in (
        (mae.pos_embed, peer.vit.embeddings.position_embeddings),
        (mae.decoder_pos_embed, peer.decoder.decoder_pos_embed),
    ):
        assert difference(ours, theirs) < 1e-6
        assert not ours.requires_grad


def test_patches_go_and_come_back():
    images = torch.arange(2 * 3 * 32 * 48, dtype=torch.float32).view(2, 3, 32, 48)
    patches = patchify(images, 16)
    assert patches.shape == (2, 6, 768)
    assert torch.equal(unpatchify(patches, 16, (2, 3)), images)
    assert torch.equal(patches[0, 1, :3], images[0, :, 0, 16])  # second patch to the right, channels innermost
    normal = normalize_patches(patches)
    assert normal.mean(-1).abs().max() < 1e-4
    assert normal.std(-1).sub(1).abs().max() < 1e-4


def test_masking_keeps_the_smallest_noise():
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.2, 0.2, 0.1, 0.2]])
    ids_keep, ids_restore, mask = random_masking(noise, 0.5)
    assert ids_keep.tolist() == [[1, 3], [2, 0]]  # ties in order of place
    assert mask.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert ids_restore.tolist() == [[3, 0, 2, 1], [1, 2, 0, 3]]


def hidden_only(mae: MaskedAutoencoder, images: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
    return mae.forward_loss(images, prediction + (1 - mask)[..., None], mask)


def test_visible_patches_do_not_count():
    mae = build_mae("vit_tiny", 64)
    images = torch.randn(2, 3, 64, 64)
    prediction, mask = mae(images, torch.rand(2, 16))
    assert mask.sum(1).tolist() == [12, 12]
    assert torch.equal(hidden_only(mae, images, prediction, mask), mae.forward_loss(images, prediction, mask))


def test_published_sizes():
    with torch.device("meta"):
        mae = build_mae("vit_h", 224, patch_size=14)
    trained = {name: p.numel() for name, p in mae.named_parameters() if p.requires_grad}
    encoder = [count for name, count in trained.items() if not name.startswith(("decoder_", "mask_"))]
    assert sum(encoder) == pytest.approx(630.44e6, abs=1e4)
    assert len(mae.shard_units()) == 40


def test_recomputation_and_meta_construction():
    mae = build_mae("vit_tiny", 64)
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    wanted = mae(images, noise)[0]
    mae.activation_checkpointing = "block"
    prediction, mask = mae(images, noise)
    assert torch.equal(prediction, wanted)
    mae.forward_loss(images, prediction, mask).sum().backward()
    assert all(p.grad is not None for p in mae.parameters() if p.requires_grad)
    with torch.device("meta"):
        fresh = build_mae("vit_tiny", 64)
    fresh.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*fresh.parameters(), *fresh.buffers()]:
            tensor.fill_(torch.nan)
    init_weights(fresh)
    assert all(tensor.isfinite().all() for tensor in [*fresh.parameters(), *fresh.buffers()])
    assert torch.equal(fresh.pos_embed, mae.pos_embed)


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match=r"mask_ratio=1\.0"):
        build_mae("vit_tiny", 64, mask_ratio=1.0)
    with pytest.raises(ValueError, match=r"noise has shape \(1, 15\), expected \(1, 16\)"):
        build_mae("vit_tiny", 64)(torch.randn(1, 3, 64, 64), torch.rand(1, 15))
