"""Compute the embeddings of a frozen image encoder once, to train on them instead of on images.

    python -m trainer.embed launch/configs/sam_finetune.yaml               # into data.embeddings, beside the shards
    python -m trainer.embed launch/configs/sam_finetune.yaml data.embeddings=/scratch/embeddings

One process, on the GPU if there is one. An image of 1024 pixels takes 2 MiB (256 x 64 x 64 float16), so 10,000 images
take 20 GiB. Start it again after an interruption: rows that are there stay. A directory of another encoder or other
data is refused. Only images that the run trains on are computed; evaluation encodes its images itself.
"""

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

from trainer.config import ConfigError, SamConfig, load_config
from trainer.data.embeddings import COMPUTED, STAMP_NAME, UNREADABLE, encoder_hash, read_made_of
from trainer.data.eval_data import evaluation_batch
from trainer.data.shards import open_shards
from trainer.distributed import single_process
from trainer.parallel.precision import autocast
from trainer.stages import build_sam_task

BATCH = 4  # images at once: more gain nothing at 1024 pixels


@torch.no_grad()
def embed(config: SamConfig, out: Path) -> int:
    """Write the embeddings of all training images to `out`; returns how many were computed now."""
    world = single_process()
    reader = open_shards(config.data.shards, config.data.remote)
    trained, _ = reader.split(config.data.holdout_images)
    rows = np.concatenate([shard.rows() for shard in trained])
    if rows.size == 0:
        raise ValueError(f"data.holdout_images={config.data.holdout_images} leaves no image to train on")
    sam = build_sam_task(config, ("image_encoder",), initial_weights=True).sam
    made_of = {
        "encoder": encoder_hash(sam.image_encoder.state_dict()),
        "data": reader.fingerprint(),
        "image_size": config.model.image_size,
        "precision": config.engine.precision,
    }
    sam = sam.to(world.device).eval()
    side = config.model.image_size // sam.image_encoder.patch_size
    shape = (reader.manifest.num_positions, sam.prompt_encoder.embed_dim, side, side)
    values, done = open_arrays(out, shape, made_of)
    waiting = rows[done[rows] != COMPUTED]
    check_space(out, len(waiting), shape)
    (out / STAMP_NAME).unlink(missing_ok=True)
    started = time.perf_counter()
    for first in range(0, len(waiting), BATCH):
        part = waiting[first : first + BATCH]
        batch = evaluation_batch(reader, part, config).to(world.device)
        with autocast(config.engine.precision, world.device):
            images = sam.normalize_images(batch.images, batch.image_sizes)
            values[part] = sam.encode_images(images).to(torch.float16).cpu().numpy()
        done[part] = [COMPUTED if key else UNREADABLE for key in batch.keys]
        if first % (64 * BATCH) == 0:
            speed = (first + len(part)) / (time.perf_counter() - started)
            print(f"{first + len(part)} of {len(waiting)} images, {speed:.1f} a second", flush=True)
    values.flush()
    done.flush()
    (out / STAMP_NAME).write_text(json.dumps(made_of, indent=1) + "\n")
    return len(waiting)


def open_arrays(out: Path, shape: tuple[int, ...], made_of: dict[str, object]) -> tuple[np.memmap, np.memmap]:
    """The two files of a store: those that are there, or new ones. `ValueError` if they were made of anything else."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"data.embeddings: {out} is a file; name a directory")
    out.mkdir(parents=True, exist_ok=True)
    begun = out / "begun.json"
    for said in (begun, out / STAMP_NAME):
        there = read_made_of(said) if said.is_file() else made_of
        if others := [key for key in made_of if there.get(key) != made_of[key]]:
            raise ValueError(
                f"data.embeddings: {out} holds embeddings of another {' and '.join(others)}; name another directory, "
                "or remove this one if no run needs it any more"
            )
    files = (out / "embeddings.npy", out / "done.npy")
    if begun.is_file() and all(file.is_file() for file in files):
        return tuple(np.lib.format.open_memmap(file, mode="r+") for file in files)
    begun.unlink(missing_ok=True)
    values = np.lib.format.open_memmap(files[0], mode="w+", dtype=np.float16, shape=shape)
    done = np.lib.format.open_memmap(files[1], mode="w+", dtype=np.uint8, shape=shape[:1])
    begun.write_text(json.dumps(made_of))
    return values, done


def check_space(out: Path, num_images: int, shape: tuple[int, ...]) -> None:
    """`ValueError` unless that many rows fit on the disk: a full one would end the process without a word."""
    needed = num_images * math.prod(shape[1:]) * np.dtype(np.float16).itemsize
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(
            f"data.embeddings: {num_images} images take {needed / 2**30:.1f} GiB ({shape[1:]} float16 each), and on "
            f"the disk of {out} {free / 2**30:.1f} GiB are free; make room or name a directory elsewhere"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        if not isinstance(config, SamConfig) or config.data.embeddings is None:
            raise ValueError("embeddings need stage sam and data.embeddings, the directory to write")
        count = embed(config, config.data.embeddings)
    except (ConfigError, ValueError) as error:
        print(f"embed: {error}", file=sys.stderr)
        return 2
    print(f"{config.data.embeddings}: {count} images computed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
