"""Weights in and out: MAE into SAM with a report of every parameter, and the names that other packages use.

* `sam_to_sam`: start from SAM's own weights, at any input size.
* `mae_to_sam`: start SAM's image encoder from a masked autoencoder (ViTDet, arXiv 2203.16527, A.2; SAM, appendix A).
* `mae_from_released`, `mae_to_released`: files of the MAE authors' format.
* `sam_from_huggingface`, `sam_to_huggingface`: transformers' `SamModel`.
* `encoder_from_timm`, `encoder_to_timm`: timm's `samvit_*` image encoders.

segment_anything needs no map: its files are our state dicts. All functions take and give plain dictionaries of tensors.

Legend: h, w = token grid, p = patch size, C = embedding width.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.pos_embed import resize_pos_embed, resize_rel_pos
from model.sam import Sam

Weights = dict[str, Tensor]
PatchResize = Literal["bicubic", "pseudo_inverse"]

MAE_ONLY = ("cls_token", "mask_token", "norm.", "decoder_")


@dataclass(frozen=True)
class TransferLine:
    """What became of one parameter."""

    name: str
    action: Literal["carried", "resized", "new", "dropped"]
    note: str


@dataclass(frozen=True)
class TransferReport:
    """One line for every parameter of the target, then one for every parameter of the source that was left behind."""

    source: Literal["MAE", "SAM"]
    lines: tuple[TransferLine, ...]

    def names(self, action: str) -> list[str]:
        return [line.name for line in self.lines if line.action == action]

    def summary(self) -> str:
        """Counts, and every line that is not a plain copy."""
        counts = {action: len(self.names(action)) for action in ("carried", "resized", "new", "dropped")}
        head = f"{self.source} to SAM: " + ", ".join(f"{count} {action}" for action, count in counts.items())
        return "\n".join([head, *(str_line(line) for line in self.lines if line.action == "resized")])

    def __str__(self) -> str:
        return "\n".join(str_line(line) for line in self.lines)


def str_line(line: TransferLine) -> str:
    return f"{line.action:8} {line.name}  {line.note}"


def refuse_misfits(problems: list[str], source: str) -> None:
    """`ValueError` with the first few of `problems`, if there are any; of another model's file all names are wrong."""
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{source} will not go into this SAM: {'; '.join(problems[:5])}{more}")


def mae_to_sam(
    mae_weights: Weights, sam: Sam, patch_resize: PatchResize, source_name: str = "the weights"
) -> TransferReport:
    """Copy a masked autoencoder's encoder (our names or the released ones) into `sam`, in place.

    The position table is resized bicubically to SAM's grid, a patch kernel of another size by `patch_resize`:
    "bicubic" as ViTDet says, "pseudo_inverse" so that a resized patch gives the same token (see `resize_patch_kernel`).
    Relative positions become zero, so that each block starts as the function it was; all else of SAM stays.
    Raises `ValueError`, naming `source_name`, if anything does not fit.
    """
    source = mae_from_released(mae_weights)
    target = sam.state_dict()
    lines: list[TransferLine] = []
    problems: list[str] = []
    for name, current in target.items():
        key = name.removeprefix("image_encoder.")
        if not name.startswith("image_encoder.") or key.startswith("neck."):
            lines.append(TransferLine(name, "new", f"{tuple(current.shape)} keeps its initial value"))
        elif ".rel_pos_" in key:
            target[name] = torch.zeros_like(current)
            lines.append(TransferLine(name, "new", f"{tuple(current.shape)} zero"))
        elif key not in source:
            problems.append(f"{key} is missing")
        else:
            value, note = fit(key, source[key], current.shape, patch_resize)
            if value.shape != current.shape:
                problems.append(f"{key} has shape {tuple(value.shape)}, SAM needs {tuple(current.shape)}")
            target[name] = value
            lines.append(TransferLine(name, "resized" if note else "carried", note or str(tuple(current.shape))))
    used = {name.removeprefix("image_encoder.") for name in target}
    for key in source:
        if key.startswith(MAE_ONLY):
            lines.append(TransferLine(key, "dropped", "the autoencoder's own"))
        elif key not in used:
            problems.append(f"{key} has no place in SAM")
    refuse_misfits(problems, source_name)
    sam.load_state_dict(target, strict=True)
    return TransferReport("MAE", tuple(lines))


def fit(key: str, value: Tensor, shape: torch.Size, patch_resize: PatchResize) -> tuple[Tensor, str]:
    """An encoder tensor in SAM's form, and what was done to it ("" for nothing but a copy)."""
    value = value.float()
    if key == "pos_embed":
        side = math.isqrt(value.shape[1] - 1)
        if side * side != value.shape[1] - 1:
            raise ValueError(f"pos_embed of shape {tuple(value.shape)} is not a class token and a square grid")
        grid = value[:, 1:].reshape(1, side, side, -1)  # without the class token: (1, h, w, C)
        if tuple(grid.shape[1:3]) == tuple(shape[1:3]):
            return grid, ""
        return resize_pos_embed(grid, (shape[1], shape[2])), f"grid {side}x{side} -> {shape[1]}x{shape[2]}, bicubic"
    if key == "patch_embed.proj.weight" and value.shape[-1] != shape[-1]:
        resized = resize_patch_kernel(value, shape[-1], patch_resize)
        return resized, f"kernel {value.shape[-1]} -> {shape[-1]}, {patch_resize}"
    return value, ""


def sam_to_sam(weights: Weights, sam: Sam, source_name: str = "the weights") -> TransferReport:
    """Copy all SAM weights (our names, which are segment_anything's) into `sam`, in place.

    Another input size changes the position table, resized bicubically, and the relative tables of global blocks,
    resized linearly as the network itself would do. Raises `ValueError`, naming `source_name`, if anything else
    does not fit.
    """
    target = sam.state_dict()
    lines: list[TransferLine] = []
    problems: list[str] = []
    for name, current in target.items():
        if name not in weights:
            problems.append(f"{name} is missing")
            continue
        value, note = fit_table(name, weights[name], current.shape)
        if value.shape != current.shape:
            problems.append(f"{name} has shape {tuple(value.shape)}, SAM needs {tuple(current.shape)}")
        lines.append(TransferLine(name, "resized" if note else "carried", note or str(tuple(current.shape))))
        target[name] = value
    problems += [f"{name} has no place in SAM" for name in weights if name not in target]
    refuse_misfits(problems, source_name)
    sam.load_state_dict(target, strict=True)
    return TransferReport("SAM", tuple(lines))


def fit_table(name: str, value: Tensor, shape: torch.Size) -> tuple[Tensor, str]:
    """A SAM's tensor with its table of positions, if it is one, at another size; and what was done ("" for nothing)."""
    if value.shape == shape or value.dim() != len(shape) or value.shape[-1] != shape[-1]:
        return value, ""
    if name == "image_encoder.pos_embed":
        note = f"grid {value.shape[1]}x{value.shape[2]} -> {shape[1]}x{shape[2]}, bicubic"
        return resize_pos_embed(value, (shape[1], shape[2])), note
    if ".rel_pos_" in name:
        return resize_rel_pos(value, (shape[0] + 1) // 2), f"{value.shape[0]} -> {shape[0]} offsets, linear"
    return value, ""


def resize_patch_kernel(kernel: Tensor, size: int, method: PatchResize) -> Tensor:
    """(C, 3, p, p) -> (C, 3, size, size).

    "bicubic" interpolates the kernel like an image; its tokens grow by about (size / p)^2. "pseudo_inverse" is
    FlexiViT's resizing (arXiv 2212.08013, section 3.4): the kernel whose answer to an image enlarged from p to `size`
    is closest to the old kernel's answer to the image.
    """
    if method == "bicubic":
        return F.interpolate(kernel.float(), size=(size, size), mode="bicubic", align_corners=False)
    if method != "pseudo_inverse":
        raise ValueError(f"patch_resize={method!r}; choose bicubic or pseudo_inverse")
    old = kernel.shape[-1]
    pixels = torch.eye(old * old, dtype=torch.float64).reshape(old * old, 1, old, old)
    enlarge = F.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    enlarge = enlarge.reshape(old * old, size * size)  # a small image's row vector times this is the enlarged image
    solution = kernel.double().flatten(2) @ torch.linalg.pinv(enlarge).T  # (C, 3, size * size)
    return solution.reshape(*kernel.shape[:2], size, size).float()


def mae_from_released(weights: Weights | dict[str, Weights]) -> Weights:
    """The MAE authors' checkpoint (or its "model" entry) in our names; the encoder-only files have no decoder.

    Our own weights pass unchanged.
    """
    entry = weights.get("model", weights)
    return {re.sub(r"\.mlp\.fc([12])\.", r".mlp.lin\1.", key): value for key, value in entry.items()}


def mae_to_released(weights: Weights) -> dict[str, Weights]:
    """Our MaskedAutoencoder's state dict as a checkpoint in the MAE authors' format."""
    return {"model": {re.sub(r"\.mlp\.lin([12])\.", r".mlp.fc\1.", key): value for key, value in weights.items()}}


def encoder_from_timm(weights: Weights) -> Weights:
    """timm's `samvit_*` -> the state dict of our ImageEncoderViT. A classification head has no place in it."""
    return {re.sub(r"\.mlp\.fc([12])\.", r".mlp.lin\1.", key): value for key, value in weights.items()}


def encoder_to_timm(weights: Weights) -> Weights:
    """The state dict of our ImageEncoderViT, or of a whole SAM, -> timm's `samvit_*` (built with num_classes=0)."""
    prefix = "image_encoder."
    if any(key.startswith(prefix) for key in weights):
        weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    return {re.sub(r"\.mlp\.lin([12])\.", r".mlp.fc\1.", key): value for key, value in weights.items()}


GAUSSIAN = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
HF_GAUSSIANS = ("prompt_encoder.shared_embedding.positional_embedding", "shared_image_embedding.positional_embedding")

# (ours, theirs), each a literal piece of a name; "^" anchors it at the start. The first that fits counts.
HF_PIECES: tuple[tuple[str, str], ...] = (
    ("^image_encoder.patch_embed.proj.", "^vision_encoder.patch_embed.projection."),
    ("^image_encoder.neck.0.", "^vision_encoder.neck.conv1."),
    ("^image_encoder.neck.1.", "^vision_encoder.neck.layer_norm1."),
    ("^image_encoder.neck.2.", "^vision_encoder.neck.conv2."),
    ("^image_encoder.neck.3.", "^vision_encoder.neck.layer_norm2."),
    ("^image_encoder.blocks.", "^vision_encoder.layers."),
    ("^image_encoder.", "^vision_encoder."),
    ("^prompt_encoder.mask_downscaling.0.", "^prompt_encoder.mask_embed.conv1."),
    ("^prompt_encoder.mask_downscaling.1.", "^prompt_encoder.mask_embed.layer_norm1."),
    ("^prompt_encoder.mask_downscaling.3.", "^prompt_encoder.mask_embed.conv2."),
    ("^prompt_encoder.mask_downscaling.4.", "^prompt_encoder.mask_embed.layer_norm2."),
    ("^prompt_encoder.mask_downscaling.6.", "^prompt_encoder.mask_embed.conv3."),
    ("^prompt_encoder.point_embeddings.", "^prompt_encoder.point_embed."),
    ("^mask_decoder.output_upscaling.0.", "^mask_decoder.upscale_conv1."),
    ("^mask_decoder.output_upscaling.1.", "^mask_decoder.upscale_layer_norm."),
    ("^mask_decoder.output_upscaling.3.", "^mask_decoder.upscale_conv2."),
    (".norm_final_attn.", ".layer_norm_final_attn."),
)
HF_NORM = (re.compile(r"\.norm(\d)\."), re.compile(r"\.layer_norm(\d)\."))
# The three layers of the small MLPs: ours are one list, theirs a first, a list of the middle ones, and a last.
HF_MLP = re.compile(r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.(.+)\.(weight|bias)$")
HF_MLP_LAYERS = (("layers.0", "proj_in"), ("layers.1", "layers.0"), ("layers.2", "proj_out"))


def sam_to_huggingface(weights: Weights) -> Weights:
    """Our SAM state dict (= segment_anything's) in the names of transformers' SamModel."""
    renamed: Weights = {}
    for key, value in weights.items():
        if key == GAUSSIAN:
            renamed |= dict.fromkeys(HF_GAUSSIANS, value)  # one matrix under two names
        else:
            renamed[HF_NORM[0].sub(r".layer_norm\1.", rename(key, ours=0, theirs=1))] = value
    return renamed


def sam_from_huggingface(weights: Weights) -> Weights:
    """transformers' SamModel state dict in our names (= segment_anything's)."""
    renamed: Weights = {}
    for key, value in weights.items():
        if key in HF_GAUSSIANS:  # one matrix under two names, of which a file may hold either
            renamed[GAUSSIAN] = value
        elif ".neck." in key or "mask_embed" in key:
            renamed[rename(key, ours=1, theirs=0)] = value  # their layer_norm1 is no norm1 here
        else:
            renamed[HF_NORM[1].sub(r".norm\1.", rename(key, ours=1, theirs=0))] = value
    return renamed


def rename(key: str, ours: int, theirs: int) -> str:
    """Exchange the first piece of HF_PIECES that `key` holds, and the layer of a small MLP, from side to side."""
    found = HF_MLP.match(key)
    if found:
        layer = {pair[ours]: pair[theirs] for pair in HF_MLP_LAYERS}
        if found[2] not in layer:
            raise ValueError(f"unknown layer name {key}")
        return f"{found[1]}.{layer[found[2]]}.{found[3]}"
    for pair in HF_PIECES:
        old, new = pair[ours], pair[theirs]
        anchored = old.startswith("^")
        old, new = old.removeprefix("^"), new.removeprefix("^")
        if key.startswith(old) if anchored else old in key:
            key = key.replace(old, new, 1)
            break
    return key
