"""Sizes and builders: `build_sam("vit_h")`, `build_mae("vit_h")`.

Sources: SAM (arXiv 2304.02643), appendix A; MAE (arXiv 2111.06377), appendix A.1; `vit_tiny` is this project's own, for
tests and for a CPU.
"""

from dataclasses import dataclass

from torch import nn

from model.image_encoder import ImageEncoderViT
from model.mae import MaskedAutoencoder
from model.mask_decoder import MaskDecoder
from model.prompt_encoder import PromptEncoder
from model.sam import Sam
from model.two_way_transformer import TwoWayTransformer


@dataclass(frozen=True)
class Size:
    """Widths and depths of one model; counts are plain numbers, `window_size` is in tokens."""

    embed_dim: int
    depth: int
    num_heads: int
    global_attn_indexes: tuple[int, ...]
    window_size: int = 14
    prompt_dim: int = 256
    decoder_mlp_dim: int = 2048
    mae_decoder_dim: int = 512
    mae_decoder_depth: int = 8
    mae_decoder_heads: int = 16


SIZES: dict[str, Size] = {
    # Windows of 5 on a grid of 8: the padding of windows is exercised as in the large models.
    "vit_tiny": Size(192, 4, 3, (1, 3), 5, 128, 512, 96, 2, 3),
    "vit_b": Size(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": Size(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": Size(1280, 32, 16, (7, 15, 23, 31)),
}


def size_of(name: str) -> Size:
    """The entry of SIZES, or a ValueError that lists the names."""
    if name not in SIZES:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(SIZES)}")
    return SIZES[name]


def build_sam(
    name: str,
    image_size: int = 1024,
    patch_size: int = 16,
    drop_path_rate: float = 0.0,
    decoder_dropout: float = 0.0,
) -> Sam:
    """A freshly initialised SAM for square inputs of `image_size` pixels, in training mode.

    `drop_path_rate` is the last block's (linear from 0), `decoder_dropout` that of each attention and MLP of the mask
    decoder; neither changes the state dict.
    """
    size = size_of(name)
    if not 0.0 <= decoder_dropout < 1.0:
        raise ValueError(f"decoder_dropout={decoder_dropout} is outside [0, 1)")
    side = image_size // patch_size
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=image_size,
            patch_size=patch_size,
            in_chans=3,
            embed_dim=size.embed_dim,
            depth=size.depth,
            num_heads=size.num_heads,
            mlp_ratio=4.0,
            out_chans=size.prompt_dim,
            use_rel_pos=True,
            window_size=size.window_size,
            global_attn_indexes=size.global_attn_indexes,
            drop_path_rate=drop_path_rate,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=size.prompt_dim,
            image_embedding_size=(side, side),
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=size.prompt_dim,
            transformer=TwoWayTransformer(
                depth=2,
                embedding_dim=size.prompt_dim,
                num_heads=8,
                mlp_dim=size.decoder_mlp_dim,
                dropout=decoder_dropout,
            ),
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
    )
    init_weights(sam)
    return sam


def build_mae(
    name: str,
    image_size: int = 224,
    patch_size: int = 16,
    decoder_dim: int | None = None,
    decoder_depth: int | None = None,
    decoder_heads: int | None = None,
    mask_ratio: float = 0.75,
    norm_pix: bool = True,
) -> MaskedAutoencoder:
    """A freshly initialised masked autoencoder whose encoder is that of `build_sam(name)` without windows.

    Decoder sizes default to those of SIZES (MAE's own: 512 wide, 8 blocks, 16 heads).
    """
    size = size_of(name)
    return MaskedAutoencoder(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=3,
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        decoder_dim=size.mae_decoder_dim if decoder_dim is None else decoder_dim,
        decoder_depth=size.mae_decoder_depth if decoder_depth is None else decoder_depth,
        decoder_num_heads=size.mae_decoder_heads if decoder_heads is None else decoder_heads,
        mlp_ratio=4.0,
        mask_ratio=mask_ratio,
        norm_pix=norm_pix,
    )


def init_weights(module: nn.Module) -> None:
    """Initialise all parameters and buffers in place, e.g. after construction on the meta device and `to_empty`.

    First every layer's own `reset_parameters` (torch's defaults, LayerNorm 1 and 0, embeddings N(0, 1)), then what a
    network says of its whole self in `init_weights` (the encoder's truncated normals, the MAE's Xavier).
    """
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    for part in module.modules():
        if isinstance(part, ImageEncoderViT | MaskedAutoencoder):
            part.init_weights()
