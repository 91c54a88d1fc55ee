"""Masked autoencoder: hide most patches, encode the rest, reconstruct the pixels of the hidden ones.

Source: MAE (arXiv 2111.06377), section 3 and appendix A.1. Names as in the released weights, but for the two layers
of an MLP, which are `lin1`, `lin2` as in SAM (`model/weights.py` renames).
Legend: B = images, H, W = pixels, L = patches, V = visible patches, p = patch size, C and D = width of encoder
and decoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.image_encoder import NORM_EPS, Block
from model.layers import PatchEmbed
from model.pos_embed import sincos_table
from model.sam import set_pixel_statistics


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, 3, H, W) -> (B, L, p*p*3): patches row by row; within a patch row, column, channel."""
    batch, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"image size {height}x{width} is not a multiple of the patch size {patch_size}")
    x = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch_size * patch_size * channels)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """(B, L, p*p*3) -> (B, 3, H, W) for a grid (h, w) of patches."""
    h, w = grid
    x = patches.reshape(len(patches), h, w, patch_size, patch_size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, h * patch_size, w * patch_size)


def normalize_patches(patches: Tensor) -> Tensor:
    """Each patch (..., p*p*3) to zero mean and unit (unbiased) variance: MAE's better target, section 4.1."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) * (variance + 1e-6).rsqrt()


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the patches of smallest noise (B, L).

    Returns ids_keep (B, V) in the order of the noise, ids_restore (B, L), and mask (B, L), 1 where hidden.
    """
    num_patches = noise.shape[1]
    num_visible = int(num_patches * (1 - mask_ratio))
    order = noise.argsort(dim=1, stable=True)
    ids_restore = order.argsort(dim=1)
    mask = (ids_restore >= num_visible).to(torch.float32)
    return order[:, :num_visible], ids_restore, mask


class MaskedAutoencoder(nn.Module):
    """ViT encoder over the visible patches, light ViT decoder over all. Set `activation_checkpointing` to recompute."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        decoder_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        mlp_ratio: float,
        mask_ratio: float,
        norm_pix: bool,
    ) -> None:
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size={img_size} is not a multiple of patch_size={patch_size}")
        if not 0.0 < mask_ratio < 1.0:
            raise ValueError(f"mask_ratio={mask_ratio} is outside (0, 1)")
        self.patch_size, self.grid = patch_size, (img_size // patch_size, img_size // patch_size)
        self.mask_ratio, self.norm_pix = mask_ratio, norm_pix
        self.activation_checkpointing = "none"
        num_patches = self.grid[0] * self.grid[1]

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        # Fixed tables, but parameters all the same: so the released weights name them, and they appear in checkpoints.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)

        self.decoder_embed = nn.Linear(embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, decoder_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_num_heads, mlp_ratio) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size * patch_size * in_chans)
        self.register_buffer("pixel_mean", torch.empty(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.empty(3, 1, 1), persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Appendix A.1: Xavier-uniform linear layers; the released code's normal(0.02) for the two tokens."""
        set_pixel_statistics(self.pixel_mean, self.pixel_std)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_table(self.pos_embed.shape[-1], self.grid, cls_token=True))
            self.decoder_pos_embed.copy_(sincos_table(self.decoder_pos_embed.shape[-1], self.grid, cls_token=True))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.patch_embed.proj.weight  # (C, 3, p, p), initialised as the linear layer that it is
        bound = (6.0 / (projection.shape[0] + projection[0].numel())) ** 0.5
        nn.init.uniform_(projection, -bound, bound)

    def shard_units(self) -> list[nn.Module]:
        """Modules at whose borders parameters may be sharded: each is called once, by its own forward."""
        return [*self.blocks, *self.decoder_blocks]

    def normalize_images(self, images: Tensor) -> Tensor:
        """Pixels 0..255 (B, 3, H, W) to zero mean and unit variance, float32."""
        return (images.float() - self.pixel_mean.float()) / self.pixel_std.float()

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, 3, H, W), noise (B, L) -> predicted patches (B, L, p*p*3), mask (B, L), 1 = hidden."""
        num_patches = self.grid[0] * self.grid[1]
        if tuple(noise.shape) != (len(images), num_patches):
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {(len(images), num_patches)}")
        ids_keep, ids_restore, mask = random_masking(noise, self.mask_ratio)
        latent = self.forward_encoder(images, ids_keep)
        return self.forward_decoder(latent, ids_restore), mask

    def forward_encoder(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """Visible patches to latents (B, 1 + V, C), class token first."""
        x = self.patch_embed(images).flatten(1, 2) + self.pos_embed[:, 1:]  # (B, L, C)
        x = x.gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[-1]))  # (B, V, C)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token.to(x.dtype), x], dim=1)
        return self.norm(self._run(self.blocks, x))

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Latents (B, 1 + V, C) and the places of all patches (B, L) to pixels (B, L, p*p*3)."""
        x = self.decoder_embed(latent)  # (B, 1 + V, D)
        num_hidden = ids_restore.shape[1] + 1 - x.shape[1]
        hidden = self.mask_token.to(x.dtype).expand(len(x), num_hidden, -1)
        patches = torch.cat([x[:, 1:], hidden], dim=1)
        patches = patches.gather(1, ids_restore[:, :, None].expand(-1, -1, x.shape[-1]))  # (B, L, D) in image order
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        x = self.decoder_norm(self._run(self.decoder_blocks, x))
        return self.decoder_pred(x)[:, 1:]

    def forward_loss(self, images: Tensor, predictions: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over the hidden patches of each image: (B,). Targets as `norm_pix` says."""
        target = patchify(images.float(), self.patch_size)
        if self.norm_pix:
            target = normalize_patches(target)
        error = F.mse_loss(predictions.float(), target, reduction="none").mean(dim=-1)  # (B, L)
        return (error * mask).sum(dim=1) / mask.sum(dim=1)

    def _run(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        x = x[:, None]  # (B, 1, N, C): a sequence is a grid of one row
        for block in blocks:
            x = block(x, recompute=self.activation_checkpointing if self.training else "none")
        return x[:, 0]
