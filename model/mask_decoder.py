"""SAM's mask decoder, batched over images and masks.

Source: SAM (arXiv 2304.02643), appendix A "Lightweight mask decoder"; names as in the released weights.
Legend: B = images, M = masks of an image, G = B*M, T = sparse tokens, C = width, h, w = grid, N = h*w, K = mask tokens.
"""

import torch
from torch import Tensor, nn

from model.layers import MLP, LayerNorm2d
from model.prompt_encoder import PromptEmbeddings
from model.two_way_transformer import TwoWayTransformer


class MaskDecoder(nn.Module):
    """Image embedding and prompts to K = 4 masks with predicted IoUs.

    Mask 0 answers an unambiguous prompt, masks 1 to 3 are the three hypotheses for an ambiguous one. All four are
    always returned: which of them counts is the caller's decision.
    """

    def __init__(
        self,
        *,
        transformer_dim: int,
        transformer: TwoWayTransformer,
        num_multimask_outputs: int,
        iou_head_depth: int,
        iou_head_hidden_dim: int,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.num_mask_tokens = num_multimask_outputs + 1
        self.iou_token = nn.Embedding(1, transformer_dim)
        self.mask_tokens = nn.Embedding(self.num_mask_tokens, transformer_dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(transformer_dim, transformer_dim // 4, kernel_size=2, stride=2),
            LayerNorm2d(transformer_dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(transformer_dim // 4, transformer_dim // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(transformer_dim, transformer_dim, transformer_dim // 8, 3) for _ in range(self.num_mask_tokens)
        )
        self.iou_prediction_head = MLP(transformer_dim, iou_head_hidden_dim, self.num_mask_tokens, iou_head_depth)

    def forward(self, image_embeddings: Tensor, image_pe: Tensor, prompts: PromptEmbeddings) -> tuple[Tensor, Tensor]:
        """image_embeddings (B, C, h, w), image_pe (1, C, h, w) -> logits (B, M, K, 4h, 4w), IoUs (B, M, K)."""
        num_images, num_masks, num_sparse, dim = prompts.sparse.shape
        groups, (h, w) = num_images * num_masks, image_embeddings.shape[-2:]

        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])  # (1 + K, C)
        output_tokens = output_tokens.expand(groups, -1, -1)
        tokens = torch.cat([output_tokens, prompts.sparse.reshape(groups, num_sparse, dim)], dim=1)
        always = prompts.sparse_valid.new_ones(groups, 1 + self.num_mask_tokens)
        token_mask = torch.cat([always, prompts.sparse_valid.reshape(groups, num_sparse)], dim=1)[:, None, None]

        image_tokens = image_embeddings[:, None] + prompts.dense  # (B, M, C, h, w)
        image_tokens = image_tokens.reshape(groups, dim, h * w).transpose(1, 2)  # (G, N, C)
        image_pe = image_pe.flatten(2).transpose(1, 2)  # (1, N, C)
        tokens, image_tokens = self.transformer(image_tokens, image_pe, tokens, token_mask)

        upscaled = self.output_upscaling(image_tokens.transpose(1, 2).reshape(groups, dim, h, w))  # (G, C/8, 4h, 4w)
        weights = torch.stack(
            [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1
        )  # (G, K, C/8)
        logits = weights @ upscaled.flatten(2)
        iou_predictions = self.iou_prediction_head(tokens[:, 0])
        shape = (num_images, num_masks, self.num_mask_tokens)
        return logits.reshape(*shape, 4 * h, 4 * w), iou_predictions.reshape(shape)
