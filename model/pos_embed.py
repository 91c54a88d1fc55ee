"""Position tables: fixed 2-D sine-cosine, and resizing of absolute and relative tables.

Legend: h, w = token grid, C = embedding width, L = table length, D = width of one head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_table(dim: int, grid: tuple[int, int], cls_token: bool = False) -> Tensor:
    """Fixed 2-D sine-cosine position table (1, h*w, C), or (1, 1 + h*w, C) with a zero row for the class token.

    MAE (arXiv 2111.06377, section 3) as released: the first half of the channels encodes the column, the second half
    the row; each half is sines, then cosines, of frequencies 10000^(-2i/(C/2)). Computed in float64.
    """
    if dim % 4 != 0:
        raise ValueError(f"dim={dim}: a 2-D sine-cosine table needs a width divisible by 4")
    h, w = grid
    quarter = dim // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    rows = torch.arange(h, dtype=torch.float64, device="cpu")[:, None] * frequency  # (h, C/4)
    columns = torch.arange(w, dtype=torch.float64, device="cpu")[:, None] * frequency  # (w, C/4)
    by_row = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(h, w, 2 * quarter)
    by_column = torch.cat([columns.sin(), columns.cos()], dim=1)[None].expand(h, w, 2 * quarter)
    table = torch.cat([by_column, by_row], dim=2).reshape(1, h * w, dim)
    if cls_token:
        table = torch.cat([table.new_zeros(1, 1, dim), table], dim=1)
    return table.float()


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Absolute table (1, h, w, C) -> (1, *grid, C) by bicubic interpolation (ViTDet, arXiv 2203.16527, A.2)."""
    if tuple(pos_embed.shape[1:3]) == tuple(grid):
        return pos_embed
    table = pos_embed.permute(0, 3, 1, 2).float()  # (1, C, h, w)
    table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
    return table.permute(0, 2, 3, 1).to(pos_embed.dtype)


def resize_rel_pos(rel_pos: Tensor, size: int) -> Tensor:
    """Relative table (L, D) -> (2*size - 1, D) for a grid side of `size` tokens, linearly as segment-anything does."""
    length = 2 * size - 1
    if rel_pos.shape[0] == length:
        return rel_pos
    return F.interpolate(rel_pos.float().T[None], size=length, mode="linear")[0].T.to(rel_pos.dtype)
