"""Compute the embeddings of a frozen image encoder once, to train on them instead of on images.

    python -m trainer.embed launch/configs/sam_finetune.yaml               # into data.embeddings, beside the shards
    python -m trainer.embed launch/configs/sam_finetune.yaml data.embeddings=/scratch/embeddings

One process, on the GPU if there is one. An image of 1024 pixels takes 2 MiB (256 x 64 x 64 float16), so 10,000 images
take 20 GiB. Start it again after an interruption: rows that are there stay. Only images that the run trains on are
computed; evaluation encodes its images itself.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from trainer.config import ConfigError, SamConfig, load_config
from trainer.data.embeddings import STAMP_NAME, encoder_hash
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
    sam = build_sam_task(config, ("image_encoder",), initial_weights=True, check_embeddings=False).sam
    made_of = {
        "encoder": encoder_hash(sam.image_encoder),
        "data": reader.fingerprint(),
        "image_size": config.model.image_size,
        "precision": config.engine.precision,
    }
    sam = sam.to(world.device).eval()
    side = config.model.image_size // sam.image_encoder.patch_size
    shape = (reader.manifest.num_positions, sam.prompt_encoder.embed_dim, side, side)
    values, done = open_arrays(out, shape, made_of)
    waiting = rows[done[rows] == 0]
    started = time.perf_counter()
    for first in range(0, len(waiting), BATCH):
        part = waiting[first : first + BATCH]
        batch = evaluation_batch(reader, part, config).to(world.device)
        with autocast(config.engine.precision, world.device):
            images = sam.normalize_images(batch.images, batch.image_sizes)
            values[part] = sam.encode_images(images).to(torch.float16).cpu().numpy()
        done[part] = [bool(key) for key in batch.keys]  # not what could not be read
        if first % (64 * BATCH) == 0:
            speed = (first + len(part)) / (time.perf_counter() - started)
            print(f"{first + len(part)} of {len(waiting)} images, {speed:.1f} a second", flush=True)
    values.flush()
    done.flush()
    (out / STAMP_NAME).write_text(json.dumps(made_of, indent=1) + "\n")
    return len(waiting)


def open_arrays(out: Path, shape: tuple[int, ...], made_of: dict[str, object]) -> tuple[np.memmap, np.memmap]:
    """The two files of a store, kept if they were begun with the same encoder, data and size, else made anew."""
    out.mkdir(parents=True, exist_ok=True)
    (out / STAMP_NAME).unlink(missing_ok=True)
    begun = out / "begun.json"
    if begun.is_file() and json.loads(begun.read_text()) == made_of:
        return tuple(np.lib.format.open_memmap(out / name, mode="r+") for name in ("embeddings.npy", "done.npy"))
    begun.unlink(missing_ok=True)
    values = np.lib.format.open_memmap(out / "embeddings.npy", mode="w+", dtype=np.float16, shape=shape)
    done = np.lib.format.open_memmap(out / "done.npy", mode="w+", dtype=np.uint8, shape=shape[:1])
    begun.write_text(json.dumps(made_of))
    return values, done


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
