"""SAM's image encoder: a plain ViT with windowed and global attention, and a convolutional neck.

Sources: SAM (arXiv 2304.02643), appendix A "Image encoder"; ViTDet (arXiv 2203.16527), section 3.
Legend: B = images, H, W = input pixels, h, w = token grid, C = embedding width.
"""

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.layers import LayerNorm2d, MLPBlock, PatchEmbed, drop_path
from model.pos_embed import resize_pos_embed
from model.recompute import recomputed

NORM_EPS = 1e-6


class Block(nn.Module):
    """Pre-norm transformer block on a token grid: (B, h, w, C) -> (B, h, w, C).

    `window_size` 0 means global attention. The MAE uses it too, with its sequence as a grid of one row.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        use_rel_pos: bool = False,
        grid: tuple[int, int] = (1, 1),
        window_size: int = 0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads, use_rel_pos, grid, window_size)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = MLPBlock(dim, int(dim * mlp_ratio))
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor, drop_path_uniforms: Tensor | None = None, recompute: str = "none") -> Tensor:
        """`drop_path_uniforms` (B, 2): one draw for each residual branch; used in training only.

        `recompute` "block" drops the activations and recomputes them in the backward pass; "selective" keeps those
        that cost the most to compute (`recompute.py`). It acts inside the block, so that a wrapper which shards the
        block stays outside.
        """
        uniforms = drop_path_uniforms if self.training else None
        if recompute != "none" and torch.is_grad_enabled():
            return recomputed(self._residual_branches, x, uniforms, selective=recompute == "selective")
        return self._residual_branches(x, uniforms)

    def _residual_branches(self, x: Tensor, uniforms: Tensor | None) -> Tensor:
        first, second = (None, None) if uniforms is None else uniforms.unbind(-1)
        x = x + drop_path(self.attn(self.norm1(x)), self.drop_path_rate, first)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path_rate, second)


class ImageEncoderViT(nn.Module):
    """Images to embeddings: (B, 3, H, W) -> (B, out_chans, h, w), with h = H / patch_size.

    Set `activation_checkpointing` to "block" or "selective" to recompute in the backward pass while training.
    """

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        out_chans: int,
        use_rel_pos: bool,
        window_size: int,
        global_attn_indexes: tuple[int, ...],
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size={img_size} is not a multiple of patch_size={patch_size}")
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate={drop_path_rate} is outside [0, 1)")
        if any(not 0 <= index < depth for index in global_attn_indexes):
            raise ValueError(f"global_attn_indexes={tuple(global_attn_indexes)}: the encoder has {depth} blocks")
        self.img_size, self.patch_size, self.embed_dim = img_size, patch_size, embed_dim
        self.activation_checkpointing = "none"
        side = img_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                use_rel_pos=use_rel_pos,
                grid=(side, side),
                window_size=0 if i in global_attn_indexes else window_size,
                drop_path_rate=drop_path_rate * i / max(depth - 1, 1),  # linear rule of arXiv 1603.09382
            )
            for i in range(depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(embed_dim, out_chans, kernel_size=1, bias=False),
            LayerNorm2d(out_chans),
            nn.Conv2d(out_chans, out_chans, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out_chans),
        )

    def init_weights(self) -> None:
        """ViTDet's initialisation; the convolutions keep torch's own. Relative positions start at zero."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, drop_path_uniforms: Tensor | None = None) -> Tensor:
        """`images` (B, 3, H, W) normalised; `drop_path_uniforms` (B, depth, 2) in [0, 1), None drops nothing."""
        if drop_path_uniforms is not None and drop_path_uniforms.shape != (len(images), len(self.blocks), 2):
            raise ValueError(
                f"drop_path_uniforms has shape {tuple(drop_path_uniforms.shape)}, "
                f"expected {(len(images), len(self.blocks), 2)}"
            )
        x = self.patch_embed(images)  # (B, h, w, C)
        x = x + resize_pos_embed(self.pos_embed, (x.shape[1], x.shape[2]))
        recompute = self.activation_checkpointing if self.training else "none"
        for i, block in enumerate(self.blocks):
            x = block(x, None if drop_path_uniforms is None else drop_path_uniforms[:, i], recompute)
        return self.neck(x.permute(0, 3, 1, 2))  # (B, out_chans, h, w)
