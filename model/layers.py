"""Small layers that the networks share; attribute names follow the released weights.

Legend: B = batch, C = channels, N = tokens, H, W = pixels, h, w = token grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of (B, C, h, w), with float32 statistics."""

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.eps = eps

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (B, h, w, C): the normalised axis last, so that the fused kernel serves
        x = F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)  # (B, C, h, w)


class MLPBlock(nn.Module):
    """Two linear layers with an activation between them; (..., C) -> (..., C). SAM's names `lin1`, `lin2`."""

    def __init__(self, embedding_dim: int, mlp_dim: int, act: type[nn.Module] = nn.GELU, dropout: float = 0.0) -> None:
        super().__init__()
        self.lin1 = nn.Linear(embedding_dim, mlp_dim)
        self.lin2 = nn.Linear(mlp_dim, embedding_dim)
        self.act = act()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.lin2(self.act(self.lin1(x))), self.dropout, self.training)


class MLP(nn.Module):
    """`num_layers` linear layers with ReLU between them; (..., input_dim) -> (..., output_dim)."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(widths[i], widths[i + 1]) for i in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: (B, 3, H, W) -> (B, h, w, C)."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image size {height}x{width} is not a multiple of the patch size {self.patch_size}")
        return self.proj(images).permute(0, 2, 3, 1)  # (B, h, w, C)


def drop_path(branch: Tensor, rate: float, uniforms: Tensor | None) -> Tensor:
    """Stochastic depth (arXiv 1603.09382) for one residual branch (B, ...), with the draws given from outside.

    `uniforms` (B,) in [0, 1): a sample whose draw is below `rate` loses the branch, the others are scaled by
    1 / (1 - rate). The draws travel with the batch, so that a step does not depend on ranks or on recomputation.
    """
    if uniforms is None or rate == 0.0:
        return branch
    keep = (uniforms >= rate).to(branch.dtype) / (1.0 - rate)  # (B,)
    return branch * keep.view(-1, *[1] * (branch.dim() - 1))
