"""Multi-head attention on a token grid with decomposed relative position, through a fused kernel in both directions.

The score of query token i and key token j on a grid is (MViTv2, arXiv 2112.01526, equation 4; SAM's image encoder)

    q_i . k_j / sqrt(D)  +  q_i . R_h[row(i) - row(j)]  +  q_i . R_w[col(i) - col(j)]

The two last terms depend on j only through its row and its column. So they are the dot product of
(rel_h[i, :], rel_w[i, :]) with the one-hot row and column of j: widening query and key by h + w channels puts the
whole score into one dot product, and no N x N bias is ever made, stored, or differentiated.

Legend: B = batch (images or windows), n = heads, h, w = grid, N = h*w tokens, D = width of one head, C = n*D.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.pos_embed import resize_rel_pos

# Kernels want a head width that is a multiple of 8 (16-byte rows in bf16).
WIDTH_MULTIPLE = 8
# Up to this many tokens a CPU is as fast with the explicit bias in fp32, and about twice as fast in bf16.
# Measured by bench/attention.py.
MAX_PLAIN_TOKENS_ON_CPU = 1024


def relative_terms(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Score terms of each query with every key row (B, n, N, h) and every key column (B, n, N, w).

    `q` (B, n, N, D) unscaled; tables (2*h - 1, D), (2*w - 1, D), of other lengths resized.
    """
    h, w = grid
    rows, columns = torch.arange(h, device=q.device), torch.arange(w, device=q.device)
    table_h = resize_rel_pos(rel_pos_h, h)[rows[:, None] - rows + h - 1]  # (h, h, D): query row, key row
    table_w = resize_rel_pos(rel_pos_w, w)[columns[:, None] - columns + w - 1]  # (w, w, D)
    on_grid = q.unflatten(2, (h, w))  # (B, n, h, w, D)
    rel_h = torch.einsum("bnhwd,hkd->bnhwk", on_grid, table_h)
    rel_w = torch.einsum("bnhwd,wkd->bnhwk", on_grid, table_w)
    return rel_h.flatten(2, 3), rel_w.flatten(2, 3)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, grid: tuple[int, int]
) -> Tensor:
    """The score written out with its N x N bias: (B, n, N, D) -> (B, n, N, D). The reference for the tests."""
    rel_h, rel_w = relative_terms(q, rel_pos_h, rel_pos_w, grid)
    bias = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(3)  # (B, n, N, h, w) -> (B, n, N, N)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    return scores.softmax(dim=-1).to(v.dtype) @ v


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, grid: tuple[int, int]
) -> Tensor:
    """The same function through scaled_dot_product_attention on widened queries and keys; same shapes."""
    h, w = grid
    width = q.shape[-1]
    rel_h, rel_w = relative_terms(q, rel_pos_h, rel_pos_w, grid)
    spare = -(width + h + w) % WIDTH_MULTIPLE
    token = torch.arange(h * w, device=q.device)
    row = F.one_hot(token // w, h).to(k.dtype)  # (N, h)
    column = F.one_hot(token % w, w + spare).to(k.dtype)  # (N, w + spare): the spare channels stay zero
    position = torch.cat([row, column], dim=1).expand(*k.shape[:2], -1, -1)  # (B, n, N, h + w + spare)
    wide_q = torch.cat([q * width**-0.5, rel_h, F.pad(rel_w, (0, spare))], dim=-1)
    wide_k = torch.cat([k, position], dim=-1)
    wide_v = F.pad(v, (0, h + w + spare))  # flash kernels take one width for query, key and value
    return F.scaled_dot_product_attention(wide_q, wide_k, wide_v, scale=1.0)[..., :width]


def attend(q: Tensor, k: Tensor, v: Tensor, rel_pos: tuple[Tensor, Tensor] | None, grid: tuple[int, int]) -> Tensor:
    """Attention of (B, n, N, D), with relative position if tables are given, by the faster exact formulation.

    The rule: the fused one, except on a CPU with few tokens, where a small bias costs less than wider heads.
    """
    if rel_pos is None:
        return F.scaled_dot_product_attention(q, k, v)
    plain = q.device.type == "cpu" and q.shape[2] <= MAX_PLAIN_TOKENS_ON_CPU
    return (plain_attention if plain else fused_attention)(q, k, v, *rel_pos, grid)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Attention (B, n, Nq, D), (B, n, Nk, D) twice -> (B, n, Nq, D) without positions.

    `key_mask` (B, 1, 1, Nk) bool: keys marked False are not attended to; each query must have one that is.
    The rule: the library's kernel, except in bf16 on a CPU, where it took 2 to 8 times as long as two plain
    products (bench/attention.py).
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask, -torch.inf)
    return scores.softmax(dim=-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Self-attention of a token grid (B, h, w, C), inside windows or over the whole grid.

    Windows as in SAM's image encoder: the grid is padded right and bottom to whole windows, and padded tokens are
    keys like any other. They enter as zeros, so their query, key and value are the bias alone; only real tokens are
    projected, and only real tokens go through the output projection.
    """

    def __init__(
        self, dim: int, num_heads: int, use_rel_pos: bool, grid: tuple[int, int], window_size: int = 0
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim={dim} is not a multiple of num_heads={num_heads}")
        self.num_heads, self.window_size = num_heads, window_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h: nn.Parameter | None = None
        self.rel_pos_w: nn.Parameter | None = None
        if use_rel_pos:
            h, w = (window_size, window_size) if window_size else grid
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * h - 1, dim // num_heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * w - 1, dim // num_heads))

    def reset_parameters(self) -> None:
        if self.rel_pos_h is not None and self.rel_pos_w is not None:
            nn.init.zeros_(self.rel_pos_h)
            nn.init.zeros_(self.rel_pos_w)

    def forward(self, x: Tensor) -> Tensor:
        batch, h, w, dim = x.shape
        qkv = self.qkv(x)  # (B, h, w, 3C)
        size_h, size_w = (self.window_size, self.window_size) if self.window_size else (h, w)
        if h % size_h or w % size_w:
            # A zero token through the layer, rather than its bias, so that sharding hooks on the layer see the call.
            qkv = pad_grid(qkv, self.qkv(x.new_zeros(1, 1, 1, dim)), -h % size_h, -w % size_w)
        num_h, num_w = qkv.shape[1] // size_h, qkv.shape[2] // size_w
        qkv = qkv.reshape(batch, num_h, size_h, num_w, size_w, 3, self.num_heads, -1)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)  # (3, B, num_h, num_w, n, size_h, size_w, D)
        q, k, v = qkv.flatten(5, 6).flatten(1, 3).unbind(0)  # (B * windows, n, N, D) each
        rel_pos = None
        if self.rel_pos_h is not None and self.rel_pos_w is not None:
            rel_pos = (self.rel_pos_h, self.rel_pos_w)
        x = attend(q, k, v, rel_pos, (size_h, size_w))
        x = x.reshape(batch, num_h, num_w, self.num_heads, size_h, size_w, -1)
        x = x.permute(0, 1, 4, 2, 5, 3, 6)  # (B, num_h, size_h, num_w, size_w, n, D)
        x = x.reshape(batch, num_h * size_h, num_w * size_w, dim)[:, :h, :w]
        return self.proj(x)


def pad_grid(x: Tensor, value: Tensor, pad_h: int, pad_w: int) -> Tensor:
    """Pad a grid (B, h, w, C) at the bottom and the right with the token `value` (1, 1, 1, C)."""
    batch, h, w, _ = x.shape
    if pad_w:
        x = torch.cat([x, value.expand(batch, h, pad_w, -1)], dim=2)
    if pad_h:
        x = torch.cat([x, value.expand(batch, pad_h, w + pad_w, -1)], dim=1)
    return x
