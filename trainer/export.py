"""Write the weights of a run as a file that other packages load.

    python -m trainer.export runs/sam_vith --format segment_anything --out sam_vit_h.pth
    python -m trainer.export runs/sam_vith --format huggingface --out sam_vit_h_hf/      # a directory
    python -m trainer.export runs/sam_vith --format timm --out samvit_huge.pth           # the image encoder alone
    python -m trainer.export runs/sam_vith/checkpoints/step_00090000 --out sam_vit_h.pth

`segment_anything`: a plain `torch.save` state dict, fp32, with exactly the released key names; the package's
`sam_model_registry[...](checkpoint=...)` takes it. `huggingface`: what transformers' `SamModel.from_pretrained` and
`SamProcessor.from_pretrained` take. `timm`: the state dict of `timm.create_model("samvit_*_patch16", num_classes=0)`.
Averaged weights (optim.ema_decay) are what is written where the run has them. What was written is read back and
compared before it takes its name.
"""

import argparse
import re
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from model.build import SIZES, Size, build_sam
from model.weights import Weights, encoder_from_timm, encoder_to_timm, refuse_misfits, sam_to_huggingface
from trainer.outputs import check_place
from trainer.stages import read_weights, sam_size

FORMATS = ("segment_anything", "huggingface", "timm")


def export(run: Path, out: Path, file_format: str = "segment_anything") -> int:
    """Write the newest weights of `run` to `out`, whole or not at all; returns the number of tensors.

    Raises `ValueError` if they are not a whole SAM's, if `out` holds anything but an earlier export, or if the file
    does not hold what was written to it.
    """
    check_target(out, file_format)
    weights = {name: tensor.float().contiguous() for name, tensor in read_weights(run).items()}
    if "image_encoder.pos_embed" not in weights:
        raise ValueError(f"{run} holds no SAM weights; a run of stage 1 goes into stage 2 through model.init_from")
    size, image_size = sam_size(weights)
    with torch.device("meta"):
        target = build_sam(size, image_size=image_size).state_dict()
    refuse_misfits(misfits(weights, target), str(run))
    ours, temporary = weights, out.with_name(out.name + ".tmp")
    if file_format == "huggingface":
        weights = sam_to_huggingface(weights)
        write_huggingface(weights, temporary)
    else:
        weights = encoder_to_timm(weights) if file_format == "timm" else weights
        torch.save(weights, temporary)
    check_written(temporary, ours, file_format)
    if out.is_dir():
        shutil.rmtree(out)
    temporary.replace(out)
    if note := loading_note(size, image_size, file_format):
        print(f"{out}: {note}", file=sys.stderr)
    return len(weights)


def misfits(weights: Weights, target: Weights) -> list[str]:
    """What a strict load of `weights` into the network with the state dict `target` would complain of."""
    problems = [f"{name} is missing" for name in target if name not in weights]
    problems += [f"{name} has no place in SAM" for name in weights if name not in target]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, SAM needs {tuple(value.shape)}"
        for name, value in target.items()
        if name in weights and weights[name].shape != value.shape
    ]
    return problems


def check_written(path: Path, ours: Weights, file_format: str) -> None:
    """`ValueError` unless an export, read back and renamed, is what was exported. Needs none of the other packages."""
    found = read_weights(path / "model.safetensors" if file_format == "huggingface" else path)
    if file_format == "timm":
        found = {f"image_encoder.{name}": value for name, value in encoder_from_timm(found).items()}
        ours = {name: value for name, value in ours.items() if name in found or name.startswith("image_encoder.")}
    problems = misfits(found, ours)
    problems += [
        f"{name} has other values" for name in ours if not problems and not torch.equal(found[name], ours[name])
    ]
    if problems:
        raise ValueError(
            f"{path} does not hold what was written to it: {'; '.join(problems[:5])}; is the disk in order?"
        )


def loading_note(size: str, image_size: int, file_format: str) -> str:
    """What to know before loading a model that the other package does not build by itself; "" for nothing."""
    if file_format == "huggingface":  # its config.json says all
        return ""
    if size == "vit_tiny":
        return f"{size} is this project's own; no registry builds it, --format huggingface needs none"
    if image_size == 1024:
        return ""
    if file_format == "timm":
        return f"the input is {image_size} pixels: timm.create_model(..., num_classes=0, img_size={image_size})"
    return (
        f"the input is {image_size} pixels, and segment_anything's sam_model_registry builds {size} for 1024 alone: it "
        'refuses this file. The lines that load it: docs/weights.md, "Another size". --format huggingface needs none'
    )


def check_target(out: Path, file_format: str) -> None:
    """Raises `ValueError` where writing would destroy what is no export, or has no place."""
    check_place("--out", out)
    if file_format != "huggingface":
        if out.is_dir():
            raise ValueError(f"{out} is a directory; --format {file_format} writes a file")
        if out.suffix == ".safetensors":
            raise ValueError(f"{out}: --format {file_format} writes what torch.load reads; end it in .pth")
        if out.is_file() and not zipfile.is_zipfile(out):  # a file of torch.save is one
            raise ValueError(f"{out} is there and no export wrote it; give another --out")
    elif out.is_file():
        raise ValueError(f"{out} is a file; --format huggingface writes a directory")
    elif out.is_dir():
        others = sorted(path.name for path in out.iterdir() if path.is_dir() or not is_huggingface_file(path.name))
        if others:
            raise ValueError(f"{out} holds {others[0]!r}, which no export wrote; give another --out")


def is_huggingface_file(name: str) -> bool:
    """Whether `save_pretrained` of transformers writes a file of that name."""
    configs = {"config.json", "preprocessor_config.json", "processor_config.json", "model.safetensors.index.json"}
    return name in configs or re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name) is not None


def write_huggingface(weights: Weights, directory: Path) -> None:
    """A directory for `from_pretrained`: transformers itself loads the weights, strictly, and writes them."""
    # Here and not above: the import takes seconds, and only this format needs it.
    from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

    settings = huggingface_settings(weights)
    with torch.device("meta"):
        model = SamModel(SamConfig(**settings))
    model.load_state_dict(weights, strict=True, assign=True)
    model.save_pretrained(directory)
    side = settings["vision_config"]["image_size"]
    SamProcessor(
        SamImageProcessor(
            size={"longest_edge": side},
            pad_size={"height": side, "width": side},
            mask_size={"longest_edge": side // 4},
            mask_pad_size={"height": side // 4, "width": side // 4},
        )
    ).save_pretrained(directory)


def huggingface_settings(weights: Weights) -> dict[str, Any]:
    """transformers' three sections for weights in its names; sizes are read off the tensors."""
    _, grid, _, width = weights["vision_encoder.pos_embed"].shape
    size = size_of_width(width)
    return {
        "vision_config": {
            "hidden_size": width,
            "output_channels": size.prompt_dim,
            "num_hidden_layers": size.depth,
            "num_attention_heads": size.num_heads,
            "image_size": 16 * grid,
            "patch_size": 16,
            "window_size": size.window_size,
            "global_attn_indexes": list(size.global_attn_indexes),
            "mlp_dim": 4 * width,
            "num_pos_feats": size.prompt_dim // 2,
        },
        "prompt_encoder_config": {"hidden_size": size.prompt_dim, "image_size": 16 * grid, "patch_size": 16},
        # Their decoder's default is 1e-6; the released one has torch's own.
        "mask_decoder_config": {
            "hidden_size": size.prompt_dim,
            "mlp_dim": size.decoder_mlp_dim,
            "layer_norm_eps": 1e-5,
        },
    }


def size_of_width(width: int) -> Size:
    """The entry of SIZES whose encoder is that wide; no two are alike."""
    for size in SIZES.values():
        if size.embed_dim == width:
            return size
    raise ValueError(f"no model of model/build.py has an encoder of width {width}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", type=Path, help="run directory, one of its checkpoints, or a file of weights (.pth, .safetensors)"
    )
    parser.add_argument("--format", choices=FORMATS, default="segment_anything")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        count = export(options.run, options.out, options.format)
    except ValueError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    num_bytes = sum(file.stat().st_size for file in [options.out, *options.out.glob("*")] if file.is_file())
    print(f"{options.out}: {count} tensors, {num_bytes / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
