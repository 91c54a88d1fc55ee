"""Segment Anything: encode images once, then decode any number of prompted masks.

Source: SAM (arXiv 2304.02643), section 3. Legend: B = images, M = masks of an image, K = 4 answers to a prompt,
H, W = input pixels, C = embedding width, h, w = embedding grid.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.image_encoder import ImageEncoderViT
from model.mask_decoder import MaskDecoder
from model.prompt_encoder import PromptEncoder, Prompts

# ImageNet's mean and standard deviation for pixel values 0..255, as the released models use them.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


class SamOutput(NamedTuple):
    """Answer 0 is for an unambiguous prompt, 1 to 3 are the hypotheses for an ambiguous one."""

    low_res_logits: Tensor  # (B, M, K, 4h, 4w)
    iou_predictions: Tensor  # (B, M, K), not bounded to [0, 1]


class Sam(nn.Module):
    """The three parts and the pixel statistics; `load_state_dict` takes released weights as they are."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, image_encoder: ImageEncoderViT, prompt_encoder: PromptEncoder, mask_decoder: MaskDecoder
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.register_buffer("pixel_mean", torch.empty(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.empty(3, 1, 1), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        set_pixel_statistics(self.pixel_mean, self.pixel_std)

    def shard_units(self) -> list[nn.Module]:
        """Modules at whose borders parameters may be sharded: each is called once, by its own forward."""
        return list(self.image_encoder.blocks)

    def normalize_images(self, images: Tensor, valid_sizes: Tensor | None = None) -> Tensor:
        """Pixels 0..255 (B, 3, H, W) to zero mean and unit variance, float32.

        `valid_sizes` (B, 2): height and width of the picture; the padding right of it and below it becomes zero after
        the normalisation, as in SAM.
        """
        images = (images.float() - self.pixel_mean.float()) / self.pixel_std.float()
        if valid_sizes is None:
            return images
        rows = torch.arange(images.shape[-2], device=images.device)
        columns = torch.arange(images.shape[-1], device=images.device)
        inside = (rows < valid_sizes[:, :1])[:, :, None] & (columns < valid_sizes[:, 1:])[:, None]  # (B, H, W)
        return torch.where(inside[:, None], images, 0.0)

    def encode_images(self, images: Tensor, drop_path_uniforms: Tensor | None = None) -> Tensor:
        """Normalised images (B, 3, H, W), uniforms (B, depth, 2) or None -> embeddings (B, C, h, w)."""
        return self.image_encoder(images, drop_path_uniforms)

    def decode_masks(self, image_embeddings: Tensor, prompts: Prompts) -> SamOutput:
        """Embeddings (B, C, h, w) and the prompts of M masks of each image -> four answers to each."""
        embedded = self.prompt_encoder(prompts)
        return SamOutput(*self.mask_decoder(image_embeddings, self.prompt_encoder.get_dense_pe(), embedded))

    def forward(self, images: Tensor, prompts: Prompts) -> SamOutput:
        """Normalised images (B, 3, H, W) and prompts to masks."""
        return self.decode_masks(self.encode_images(images), prompts)


def set_pixel_statistics(mean: Tensor, std: Tensor) -> None:
    """Fill the buffers (3, 1, 1) in place; a no-op on the meta device, repeated by `init_weights`."""
    with torch.no_grad():
        mean.copy_(torch.tensor(PIXEL_MEAN, device="cpu").view(3, 1, 1))
        std.copy_(torch.tensor(PIXEL_STD, device="cpu").view(3, 1, 1))
