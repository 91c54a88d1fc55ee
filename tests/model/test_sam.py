"""SAM against segment_anything: same weights, same answers, image by image and prompt by prompt."""

import pytest
import torch
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    TwoWayTransformer,
)
from segment_anything.modeling import Sam as ReleasedSam
from torch import Tensor

from model.build import SIZES, build_sam, init_weights
from model.prompt_encoder import Prompts
from model.sam import PIXEL_MEAN, PIXEL_STD, Sam
from tests.model.support import difference, gradients, randomize, spoil_gradient, worst_gradient


def released_sam(name: str, image_size: int) -> ReleasedSam:
    size, side = SIZES[name], image_size // 16
    norm = lambda width: torch.nn.LayerNorm(width, eps=1e-6)  # noqa: E731
    return ReleasedSam(
        ImageEncoderViT(
            img_size=image_size,
            embed_dim=size.embed_dim,
            depth=size.depth,
            num_heads=size.num_heads,
            out_chans=size.prompt_dim,
            norm_layer=norm,
            use_rel_pos=True,
            window_size=size.window_size,
            global_attn_indexes=size.global_attn_indexes,
        ),
        PromptEncoder(size.prompt_dim, (side, side), (image_size, image_size), 16),
        MaskDecoder(
            transformer_dim=size.prompt_dim,
            transformer=TwoWayTransformer(2, size.prompt_dim, 8, size.decoder_mlp_dim),
        ),
    )


def pair(name: str, image_size: int) -> tuple[Sam, ReleasedSam]:
    """Ours and the released one, with the same weights, loaded strictly in both directions."""
    ours, theirs = randomize(build_sam(name, image_size)).eval(), released_sam(name, image_size).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


# One mask each: (points with labels, box?, mask?)
MIXES = [
    ([1], False, False),
    ([1, 0, 1], False, False),
    ([], True, False),
    ([0, 1], True, False),
    ([1], False, True),
    ([1, 0], True, True),
    ([], False, True),
    ([], False, False),
]


def mixed_prompts(num_images: int, image_size: int, slots: int = 3, seed: int = 0) -> Prompts:
    """All of MIXES for every image; labelled points do not stand at the front of the slots only."""
    generator = torch.Generator().manual_seed(seed)
    shape, side = (num_images, len(MIXES)), image_size // 4
    labels = torch.full((*shape, slots), -1)
    for m, (points, _, _) in enumerate(MIXES):
        for i, label in enumerate(points):
            labels[:, m, slots - 1 - i if m % 2 else i] = label
    return Prompts(
        torch.rand(*shape, slots, 2, generator=generator) * image_size,
        labels,
        torch.rand(*shape, 4, generator=generator) * image_size,
        torch.tensor([box for _, box, _ in MIXES]).expand(shape),
        4 * torch.randn(*shape, side, side, generator=generator),
        torch.tensor([mask for _, _, mask in MIXES]).expand(shape),
    )


def released_answers(sam: ReleasedSam, embeddings: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """One call of the released decoder for every mask of every image; all four answers."""
    logits, scores = [], []
    for b in range(len(embeddings)):
        for m in range(prompts.has_box.shape[1]):
            used = prompts.point_labels[b, m] >= 0
            points = (prompts.point_coords[b, m][used][None], prompts.point_labels[b, m][used][None])
            sparse, dense = sam.prompt_encoder(
                points if used.any() else None,
                prompts.boxes[b, m][None] if prompts.has_box[b, m] else None,
                prompts.mask_logits[b, m][None, None] if prompts.has_mask[b, m] else None,
            )
            mask, iou = sam.mask_decoder.predict_masks(
                embeddings[b : b + 1], sam.prompt_encoder.get_dense_pe(), sparse, dense
            )
            logits.append(mask)
            scores.append(iou)
    shape = (len(embeddings), -1)
    return torch.cat(logits).unflatten(0, shape), torch.cat(scores).unflatten(0, shape)


def differences(ours: Sam, theirs: ReleasedSam, image_size: int, num_images: int) -> tuple[float, float, str]:
    """Of the answers, of all gradients, and where the latter differ most."""
    images = torch.randn(num_images, 3, image_size, image_size)
    prompts = mixed_prompts(num_images, image_size)
    embeddings = ours.encode_images(images)
    wanted_embeddings = torch.cat([theirs.image_encoder(image[None]) for image in images])
    output = ours.decode_masks(embeddings, prompts)
    wanted = released_answers(theirs, wanted_embeddings, prompts)
    answers = max(map(difference, (embeddings, *output), (wanted_embeddings, *wanted)))
    found_gradients, wanted_gradients = (
        gradients(logits.square().mean() + iou.square().mean(), sam)
        for sam, (logits, iou) in ((ours, output), (theirs, wanted))
    )
    assert found_gradients.keys() == dict(ours.named_parameters()).keys()
    return answers, *worst_gradient(found_gradients, wanted_gradients)


def assert_same_answers(name: str, image_size: int, num_images: int) -> None:
    answers, slopes, where = differences(*pair(name, image_size), image_size, num_images)
    # fp32 sums in another order: a few units of the last place, more of them on the way back.
    assert answers < 1e-5
    assert slopes < 1e-4, where


def test_tiny_equals_segment_anything():
    assert_same_answers("vit_tiny", 128, num_images=3)


def test_vit_b_equals_segment_anything_on_256_pixels():
    assert_same_answers("vit_b", 256, num_images=1)


@pytest.mark.slow  # minutes, and 10 GB for vit_h: two networks in fp32 with their gradients
@pytest.mark.parametrize("name", ["vit_l", "vit_h"])
def test_large_models_equal_segment_anything(name: str):
    assert_same_answers(name, 256, num_images=1)


@pytest.mark.slow
def test_full_size_equals_segment_anything():
    ours, theirs = pair("vit_b", 1024)
    images, prompts = torch.randn(1, 3, 1024, 1024), mixed_prompts(1, 1024)
    with torch.no_grad():
        wanted = theirs.image_encoder(images)
        found = ours(images, prompts)
        assert difference(ours.encode_images(images), wanted) < 1e-5
        logits, iou = released_answers(theirs, wanted, prompts)
        assert difference(found.low_res_logits, logits) < 1e-5
        assert difference(found.iou_predictions, iou) < 1e-5


def test_an_error_would_be_seen():
    """The same comparison fails for a lost half-pixel shift and for a second not-a-point token."""
    ours, theirs = pair("vit_tiny", 128)
    embeddings, prompts = torch.randn(1, 128, 8, 8), mixed_prompts(1, 128)
    with torch.no_grad():
        wanted, _ = released_answers(theirs, embeddings, prompts)
        assert difference(ours.decode_masks(embeddings, prompts).low_res_logits, wanted) < 1e-5
        shifted = prompts._replace(point_coords=prompts.point_coords - 0.5)
        assert difference(ours.decode_masks(embeddings, shifted).low_res_logits, wanted) > 1e-4
        embedded = ours.prompt_encoder(prompts)
        everything = embedded._replace(sparse_valid=torch.ones_like(embedded.sparse_valid))
        logits, _ = ours.mask_decoder(embeddings, ours.prompt_encoder.get_dense_pe(), everything)
        assert difference(logits, wanted) > 1e-3


@pytest.mark.parametrize(
    "part",
    [
        "image_encoder.blocks.1.attn",
        "image_encoder.neck.1",
        "prompt_encoder.mask_downscaling.3",
        "mask_decoder.transformer.layers.1.mlp",
        "mask_decoder.iou_prediction_head",
    ],
)
def test_an_error_of_a_gradient_would_be_seen(part: str):
    """The answers are the same, and what comes back through one part is 1 % too large."""
    ours, theirs = pair("vit_tiny", 128)
    spoil_gradient(ours.get_submodule(part))
    answers, slopes, _ = differences(ours, theirs, 128, num_images=1)
    assert answers < 1e-5  # as above
    assert slopes > 1e-3  # the error is 1e-2, the limit above 1e-4


@pytest.mark.parametrize("extra", range(13))
def test_padded_slots_change_nothing(extra: int):
    sam = randomize(build_sam("vit_tiny", 128)).eval()
    embeddings, prompts = torch.randn(2, 128, 8, 8), mixed_prompts(2, 128)
    shape = prompts.point_labels.shape[:2]
    padded = prompts._replace(
        point_coords=torch.cat([prompts.point_coords, torch.full((*shape, extra, 2), 1e4)], dim=2),
        point_labels=torch.cat([prompts.point_labels, torch.full((*shape, extra), -1)], dim=2),
    )
    with torch.no_grad():
        wanted, found = sam.decode_masks(embeddings, prompts), sam.decode_masks(embeddings, padded)
        assert difference(found.low_res_logits, wanted.low_res_logits) < 1e-5
        assert difference(found.iou_predictions, wanted.iou_predictions) < 1e-5
        marked = padded._replace(point_labels=padded.point_labels.clamp(min=0))
        assert difference(sam.decode_masks(embeddings, marked).low_res_logits, wanted.low_res_logits) > 1e-3


@pytest.mark.parametrize("slots", range(13))
def test_prompts_without_points_do_not_depend_on_the_number_of_slots(slots: int):
    """Boxes, masks or nothing; from no slot at all."""
    ours, theirs = pair("vit_tiny", 128)
    embeddings, prompts = torch.randn(1, 128, 8, 8), mixed_prompts(1, 128)
    empty = (torch.full((1, 8, slots, 2), 1e4), torch.full((1, 8, slots), -1))
    prompts = prompts._replace(point_coords=empty[0], point_labels=empty[1])
    with torch.no_grad():
        wanted, found = released_answers(theirs, embeddings, prompts), ours.decode_masks(embeddings, prompts)
    assert max(map(difference, found, wanted)) < 1e-5  # fp32 sums in another order


def test_every_parameter_is_in_every_graph():
    sam = build_sam("vit_tiny", 128)
    prompts = mixed_prompts(1, 128)
    nothing = prompts._replace(
        point_labels=torch.full_like(prompts.point_labels, -1),
        has_box=torch.zeros_like(prompts.has_box),
        has_mask=torch.zeros_like(prompts.has_mask),
        mask_logits=torch.full_like(prompts.mask_logits, torch.nan),  # never read
    )
    output = sam(torch.randn(1, 3, 128, 128), nothing)
    (output.low_res_logits.mean() + output.iou_predictions.mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in sam.parameters())


def test_positions_stay_exact_under_autocast():
    sam = build_sam("vit_tiny", 128)
    wanted = sam.prompt_encoder.get_dense_pe()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sam.prompt_encoder.get_dense_pe(), wanted)
        found = sam.prompt_encoder(mixed_prompts(1, 128)).sparse
    assert torch.equal(found, sam.prompt_encoder(mixed_prompts(1, 128)).sparse)


@pytest.mark.parametrize(
    "name, total, encoder, tensors",
    [
        ("vit_b", 93_735_472, 89_670_912, 314),
        ("vit_l", 312_342_832, 308_278_272, 482),
        ("vit_h", 641_090_608, 637_026_048, 594),
    ],
)
def test_parameter_counts_and_names(name: str, total: int, encoder: int, tensors: int):
    with torch.device("meta"):
        ours, theirs = build_sam(name), released_sam(name, 1024)
    assert sum(p.numel() for p in ours.parameters()) == total
    assert sum(p.numel() for p in ours.image_encoder.parameters()) == encoder
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    assert len(shapes) == tensors


def test_meta_construction_then_init_fills_everything():
    with torch.device("meta"):
        sam = build_sam("vit_tiny", 128)
    sam.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*sam.parameters(), *sam.buffers()]:
            tensor.fill_(torch.nan)
    init_weights(sam)
    assert all(tensor.isfinite().all() for tensor in [*sam.parameters(), *sam.buffers()])
    assert sam.pixel_mean.flatten().tolist() == pytest.approx(PIXEL_MEAN)
    assert sam.pixel_std.flatten().tolist() == pytest.approx(PIXEL_STD)


def test_normalisation_pads_with_zeros_as_released():
    ours, theirs = pair("vit_tiny", 128)
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    found = ours.normalize_images(images, torch.tensor([[100, 128], [128, 60]]))
    assert difference(found[:1], theirs.preprocess(images[0, :, :100].float())[None]) < 1e-6
    assert difference(found[1:], theirs.preprocess(images[1, :, :, :60].float())[None]) < 1e-6


def test_another_input_size_resizes_the_tables():
    encoder = randomize(build_sam("vit_tiny", 128)).image_encoder
    assert encoder(torch.randn(1, 3, 96, 160)).shape == (1, 128, 6, 10)
    with pytest.raises(ValueError, match="100x128 is not a multiple of the patch size 16"):
        encoder(torch.randn(1, 3, 100, 128))


def test_drop_path_follows_the_given_uniforms():
    encoder = randomize(build_sam("vit_tiny", 128, drop_path_rate=0.4)).image_encoder
    images, uniforms = torch.randn(4, 3, 128, 128), torch.rand(4, 4, 2)
    once = encoder(images, uniforms)
    encoder.activation_checkpointing = "block"
    assert torch.equal(encoder(images, uniforms), once)
    one_by_one = torch.cat([encoder(images[i : i + 1], uniforms[i : i + 1]) for i in range(4)])
    assert difference(one_by_one, once) < 1e-5
    assert difference(encoder(images, uniforms.flip(0)), once) > 1e-3
    assert [block.drop_path_rate for block in encoder.blocks] == pytest.approx([0, 0.4 / 3, 0.8 / 3, 0.4])
    encoder.eval()
    assert torch.equal(encoder(images, uniforms), encoder(images))
    with pytest.raises(ValueError, match=r"expected \(4, 4, 2\)"):
        encoder(images, uniforms[:, :3])


def test_drop_path_keeps_the_expectation():
    from model.layers import drop_path

    uniforms = (torch.arange(1000) + 0.5) / 1000
    kept = drop_path(torch.ones(1000, 2, 2), 0.3, uniforms)
    assert kept.mean().item() == pytest.approx(1.0, abs=1e-5)
    assert (kept[:, 0, 0] == 0).sum() == 300


def test_recomputation_gives_the_same_gradients():
    sam = randomize(build_sam("vit_tiny", 128))
    images = torch.randn(2, 3, 128, 128)
    wanted = gradients(sam.encode_images(images).square().mean(), sam)
    sam.image_encoder.activation_checkpointing = "block"
    found = gradients(sam.encode_images(images).square().mean(), sam)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_decoder_dropout_acts_in_training_only_and_has_no_names():
    sam, plain = build_sam("vit_tiny", 128, decoder_dropout=0.1), build_sam("vit_tiny", 128)
    assert sam.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(sam.state_dict())
    embeddings, prompts = torch.randn(1, 128, 8, 8), mixed_prompts(1, 128)
    first, second = (sam.decode_masks(embeddings, prompts).low_res_logits for _ in range(2))
    assert difference(first, second) > 1e-3
    sam.eval()
    wanted = plain.decode_masks(embeddings, prompts).low_res_logits
    assert torch.equal(sam.decode_masks(embeddings, prompts).low_res_logits, wanted)


def test_wrong_shapes_and_names_are_refused():
    sam, prompts = build_sam("vit_tiny", 128), mixed_prompts(1, 128)
    with pytest.raises(ValueError, match=r"prompts.mask_logits has shape \(1, 8, 16, 16\), expected \(1, 8, 32, 32\)"):
        sam.prompt_encoder(prompts._replace(mask_logits=prompts.mask_logits[..., :16, :16]))
    with pytest.raises(ValueError, match="unknown model 'vit_g'"):
        build_sam("vit_g")
    with pytest.raises(ValueError, match=r"decoder_dropout=1\.5"):
        build_sam("vit_tiny", 128, decoder_dropout=1.5)
    with pytest.raises(ValueError, match="img_size=130"):
        build_sam("vit_tiny", 130)
