"""The two-way transformer of SAM's mask decoder: tokens attend to the image, and the image attends to the tokens.

Source: SAM (arXiv 2304.02643), appendix A "Lightweight mask decoder" and figure 14; names as in the released weights.
Legend: G = prompt groups (images x masks), T = tokens, N = image tokens, C = embedding width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import masked_attention
from model.layers import MLPBlock


class Attention(nn.Module):
    """Multi-head attention in a narrower width: (G, Tq, C), (G, Tk, C), (G, Tk, C) -> (G, Tq, C).

    `dropout` acts on the result, before the residual sum ("a dropout of 0.1 at training"), and has no state.
    """

    def __init__(self, embedding_dim: int, num_heads: int, downsample_rate: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        internal_dim = embedding_dim // downsample_rate
        if internal_dim % num_heads:
            raise ValueError(f"attention width {internal_dim} is not a multiple of num_heads={num_heads}")
        self.num_heads, self.dropout = num_heads, dropout
        self.q_proj = nn.Linear(embedding_dim, internal_dim)
        self.k_proj = nn.Linear(embedding_dim, internal_dim)
        self.v_proj = nn.Linear(embedding_dim, internal_dim)
        self.out_proj = nn.Linear(internal_dim, embedding_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """`key_mask` (G, 1, 1, Tk) bool: keys marked False are not attended to."""
        q, k, v = (self._heads(x) for x in (self.q_proj(q), self.k_proj(k), self.v_proj(v)))
        out = masked_attention(q, k, v, key_mask)  # (G, heads, Tq, D)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return F.dropout(out, self.dropout, self.training)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (G, heads, T, D)


class TwoWayAttentionBlock(nn.Module):
    """Self-attention of tokens, tokens to image, MLP on tokens, image to tokens; each with a norm behind it."""

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int,
        attention_downsample_rate: int,
        skip_first_layer_pe: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(embedding_dim, num_heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(embedding_dim)
        self.cross_attn_token_to_image = Attention(embedding_dim, num_heads, attention_downsample_rate, dropout)
        self.norm2 = nn.LayerNorm(embedding_dim)
        self.mlp = MLPBlock(embedding_dim, mlp_dim, nn.ReLU, dropout)
        self.norm3 = nn.LayerNorm(embedding_dim)
        self.norm4 = nn.LayerNorm(embedding_dim)
        self.cross_attn_image_to_token = Attention(embedding_dim, num_heads, attention_downsample_rate, dropout)
        self.skip_first_layer_pe = skip_first_layer_pe

    def forward(
        self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor, token_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """queries, query_pe (G, T, C); keys (G, N, C); key_pe (1, N, C); token_mask (G, 1, 1, T)."""
        if self.skip_first_layer_pe:
            # As released: in the first layer the queries are the position encoding, and there is no residual sum.
            queries = self.self_attn(queries, queries, queries, token_mask)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries, token_mask)
        queries = self.norm1(queries)
        placed_keys = keys + key_pe
        queries = self.norm2(queries + self.cross_attn_token_to_image(queries + query_pe, placed_keys, keys))
        queries = self.norm3(queries + self.mlp(queries))
        keys = keys + self.cross_attn_image_to_token(placed_keys, queries + query_pe, queries, token_mask)
        return queries, self.norm4(keys)


class TwoWayTransformer(nn.Module):
    """`depth` two-way blocks and a last attention of the tokens to the image."""

    def __init__(
        self,
        *,
        depth: int,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int,
        dropout: float,
        attention_downsample_rate: int = 2,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayAttentionBlock(
                embedding_dim,
                num_heads,
                mlp_dim,
                attention_downsample_rate,
                skip_first_layer_pe=i == 0,
                dropout=dropout,
            )
            for i in range(depth)
        )
        self.final_attn_token_to_image = Attention(embedding_dim, num_heads, attention_downsample_rate, dropout)
        self.norm_final_attn = nn.LayerNorm(embedding_dim)

    def forward(
        self, image_tokens: Tensor, image_pe: Tensor, tokens: Tensor, token_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """image_tokens (G, N, C), image_pe (1, N, C), tokens (G, T, C), token_mask (G, 1, 1, T) bool or None.

        Returns the processed tokens (G, T, C) and image tokens (G, N, C). What comes out at a masked token means
        nothing.
        """
        queries, keys = tokens, image_tokens
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, image_pe, token_mask)
        attended = self.final_attn_token_to_image(queries + tokens, keys + image_pe, keys)
        return self.norm_final_attn(queries + attended), keys
