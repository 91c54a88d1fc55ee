"""What differs between the two stages: a task module and a data pipeline. Everything else is shared."""

import pickle
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.utils.data import Dataset

from model.build import SIZES, build_mae, build_sam, init_weights
from model.weights import mae_to_sam, sam_from_huggingface, sam_to_sam
from trainer.checkpoint import Checkpointer, load_weights
from trainer.checkpoint_files import check_files
from trainer.config import Config, SamConfig
from trainer.data.embeddings import EmbeddingStore
from trainer.data.mae_data import MaeDataset
from trainer.data.order import DataOrder
from trainer.data.remote import AheadOrder
from trainer.data.sam_data import SamDataset
from trainer.data.shards import open_shards
from trainer.distributed import single_process
from trainer.mae_task import MaeTask
from trainer.parallel.initial import check_filled, fill_with_nan
from trainer.sam_task import SamTask

Network = TypeVar("Network", bound=nn.Module)

# What torch.load raises for files that are cut, empty, damaged, text or anything else: the file is read as a program.
NOT_WEIGHTS = (
    pickle.UnpicklingError, struct.error, EOFError, RuntimeError, LookupError, ValueError, TypeError, AssertionError,
)  # fmt: skip


@dataclass(frozen=True)
class Pipeline:
    """The data of a run: its order and the dataset that turns positions into micro-batches."""

    order: DataOrder
    dataset: Dataset
    fingerprint: str


def build_pipeline(config: Config) -> Pipeline:
    """Open the packed data set and fix its order. Raises `ValueError` if it is not of the kind the stage needs."""
    reader = open_shards(config.data.shards, config.data.remote)
    if isinstance(config, SamConfig) and reader.manifest.kind != "sa1b":
        raise ValueError(f"data.shards: {config.data.shards} holds {reader.manifest.kind}, stage sam needs masks")
    rows, _ = reader.split(config.data.holdout_images)
    settings = (rows, config.seed, config.data.lanes, config.data.window)
    order = AheadOrder(*settings, reader.cache, reader.manifest.shards) if reader.cache else DataOrder(*settings)
    dataset: Dataset
    if isinstance(config, SamConfig):
        embeddings = None
        if config.data.embeddings is not None:
            embeddings = EmbeddingStore(config.data.embeddings)
            embeddings.check(reader.fingerprint(), config.model.image_size)
            embeddings.check_complete(rows)
        dataset = SamDataset(reader, order, config, encoder_depth(config), embeddings)
    else:
        num_patches = (config.model.image_size // config.model.patch_size) ** 2
        dataset = MaeDataset(reader, order, config.data, config.seed, config.model.image_size, num_patches)
    return Pipeline(order, dataset, reader.fingerprint())


def build_task(config: Config, frozen: tuple[str, ...], initial_weights: bool, has_numbers: bool = True) -> nn.Module:
    """The task module of the run's stage on the CPU, seeded; `initial_weights`: also read `model.init_from`.

    Without `has_numbers` the task lies on the meta device and costs nothing: for ranks that get another's weights.
    """
    if isinstance(config, SamConfig):
        return build_sam_task(config, frozen, initial_weights, has_numbers)
    model = config.model
    build = partial(
        build_mae,
        model.size,
        image_size=model.image_size,
        patch_size=model.patch_size,
        mask_ratio=model.mask_ratio,
        norm_pix=model.norm_pix_loss,
        decoder_dim=model.decoder_dim,
        decoder_depth=model.decoder_depth,
        decoder_heads=model.decoder_heads,
    )
    return MaeTask(build_network(build, config, has_numbers), config)


def build_network(build: Callable[[], Network], config: Config, has_numbers: bool) -> Network:
    """A seeded network. With `engine.meta_init` it is laid out first and filled after, from NaN.

    A parameter or buffer that no initialisation reaches is then an error and not a random number. The draws differ
    from those without `meta_init`, where constructors draw too.
    """
    if not config.engine.meta_init:
        torch.manual_seed(config.seed)
        return build()
    with torch.device("meta"):
        network = build()
    if has_numbers:
        network.to_empty(device="cpu")
        fill_with_nan(network)
        torch.manual_seed(config.seed)
        init_weights(network)
        check_filled(network)
    return network


def build_sam_task(
    config: SamConfig, frozen: tuple[str, ...], initial_weights: bool, has_numbers: bool = True
) -> SamTask:
    """Stage 2's task. `model.init_from`: MAE weights, or SAM weights under any of the names in model/weights.py."""
    initial_weights &= has_numbers
    model = config.model
    build = partial(
        build_sam,
        model.size,
        image_size=model.image_size,
        drop_path_rate=model.drop_path,
        decoder_dropout=model.decoder_dropout,
    )
    sam = build_network(build, config, has_numbers)
    report = None
    if initial_weights and model.init_from is not None:
        weights = read_weights(model.init_from)
        found = encoder_size(weights)
        if found not in (None, model.size):
            raise ValueError(
                f"model.init_from: {model.init_from} is a {found}, model.size is {model.size}: set model.size={found}, "
                f"or name weights of a {model.size}"
            )
        name = f"model.init_from: {model.init_from}"
        if any(name.startswith("decoder_blocks.") or name == "cls_token" for name in weights):
            report = mae_to_sam(weights, sam, model.patch_resize, name)
        else:
            report = sam_to_sam(weights, sam, name)
    task = SamTask(sam, config, frozen)
    task.weight_report = report
    return task


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Network weights from a run directory, one of its checkpoints (also by the file BEST or LATEST that names it), a
    file (`.pth`, `.safetensors`) or a directory of transformers.

    Names are the network's own: the task's prefix is removed, transformers' names of a SAM become ours. Where a
    checkpoint holds averaged weights (optim.ema_decay) they are what is read. Raises `ValueError` if nothing is found,
    or if any value is not finite.
    """
    path = pointed_at(path)
    if (path / "model.safetensors").is_file():  # a directory of transformers
        path = path / "model.safetensors"
    if path.is_file():
        weights = read_weights_file(path)
        if any(name.startswith("vision_encoder.") for name in weights):
            weights = sam_from_huggingface(weights)
    else:
        path = checkpoint_of(path)
        weights = {name.split(".", 1)[1]: value for name, value in load_weights(path).items()}
    if bad := [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(f"{path} holds values that are not finite (NaN or infinite) in {', '.join(bad[:5])}{more}")
    return weights


def pointed_at(path: Path) -> Path:
    """The checkpoint that a run's file BEST or LATEST names; any other path as it is."""
    if path.name not in ("BEST", "LATEST") or not path.is_file():
        return path
    return path.with_name(path.read_text(errors="replace").strip())


def checkpoint_of(path: Path) -> Path:
    """The newest checkpoint of a run directory; a checkpoint itself. `ValueError` if it is neither, or damaged."""
    checkpoints = path / "checkpoints"
    if checkpoints.is_dir() or (path / "config.yaml").is_file():
        newest = Checkpointer(checkpoints, 1, single_process()).newest()
        if newest is None:
            raise ValueError(f"{checkpoints} holds no complete checkpoint")
        return newest
    if not (path / "COMPLETE").is_file():
        raise ValueError(f"{path} is neither a run, a complete checkpoint nor a file of weights")
    if problems := check_files(path, read=False):
        raise ValueError(f"checkpoint {path} is damaged: {'; '.join(problems)}")
    return path


def read_weights_file(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name of a `.safetensors` or `.pth` file, there also under "model" or "state_dict", and without the
    "module." of a DDP wrapper. Raises `ValueError`.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError  # here and not above: files of this kind alone need it
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole file of safetensors: {error}") from error
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except NOT_WEIGHTS as error:
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        reason = f": it holds objects of {found[1]}" if found else ""  # other texts are of the unpickler's insides
        raise ValueError(f"{path} is no whole file of weights alone that torch.save wrote{reason}") from error
    weights = tree.get("model", tree.get("state_dict", tree)) if isinstance(tree, dict) else tree
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds no tensors by name, neither at the top nor under 'model' or 'state_dict'")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def sam_size(weights: Mapping[str, torch.Tensor]) -> tuple[str, int]:
    """Size and input pixels a side, from a SAM's weights. Raises `ValueError` if they are of no known size."""
    if "image_encoder.pos_embed" not in weights:
        raise ValueError("these are no weights of a SAM: image_encoder.pos_embed is not among them")
    size = encoder_size(weights)
    if size is None:
        raise ValueError(f"the image encoder's width and number of blocks are those of none of {', '.join(SIZES)}")
    return size, 16 * weights["image_encoder.pos_embed"].shape[1]


def encoder_size(weights: Mapping[str, torch.Tensor]) -> str | None:
    """Which of SIZES a SAM or a masked autoencoder has, by its encoder's width and depth; None if none of them."""
    table = weights.get("image_encoder.pos_embed", weights.get("pos_embed"))
    blocks = {found[1] for name in weights if (found := re.match(r"(?:image_encoder\.)?blocks\.(\d+)\.", name))}
    if table is None or table.dim() == 0:
        return None
    width, depth = table.shape[-1], len(blocks)
    return next((name for name, size in SIZES.items() if (size.embed_dim, size.depth) == (width, depth)), None)


def encoder_depth(config: SamConfig) -> int:
    """Blocks of the image encoder: how many drop-path draws a sample needs, how many layers the rate decays over."""
    return SIZES[config.model.size].depth
