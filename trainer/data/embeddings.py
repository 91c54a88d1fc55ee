"""Image embeddings of a frozen encoder, computed once and read instead of images.

    DIR/
        embeddings.npy    float16 (rows, C, h, w), memory-mapped; a row for each position of the packed data set
        done.npy          uint8 (rows,): NOT_YET, COMPUTED, or UNREADABLE where the image is broken
        embeddings.json   what they were made of, written last

`python -m trainer.embed` writes them. They hold for one encoder, one data set, one input size and no augmentation: the
last is checked in the config, the encoder when training starts or goes on, the others when they are opened.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from trainer.data.order import ShardRows

STAMP_NAME = "embeddings.json"
NOT_YET, COMPUTED, UNREADABLE = 0, 1, 2


class EmbeddingStore:
    """Read access by row. Cheap to create; each loader worker maps the file itself."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        stamp = self.directory / STAMP_NAME
        if not stamp.is_file():
            raise ValueError(
                f"data.embeddings: {directory} is not there or not finished; `python -m trainer.embed CONFIG` makes it"
            )
        self.made_of = read_made_of(stamp)
        self.values = np.load(self.directory / "embeddings.npy", mmap_mode="r")
        self.done = np.load(self.directory / "done.npy")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one image."""
        return self.values.shape[1:]

    def check(self, data: str, image_size: int) -> None:
        """`ValueError` if they were made of other data (a manifest's fingerprint) or at another input size."""
        for name, wanted in (("data", data), ("image_size", image_size)):
            if self.made_of[name] != wanted:
                raise ValueError(
                    f"data.embeddings: {self.directory} was made with {name} {self.made_of[name]}, "
                    f"the run has {wanted}; remove it and run `python -m trainer.embed CONFIG` again"
                )

    def check_complete(self, shards: Sequence[ShardRows]) -> None:
        """`ValueError` if training would ask for rows that were left out, say by another hold-out."""
        missing = sum(int((self.done[shard.rows()] == NOT_YET).sum()) for shard in shards)
        if missing:
            raise ValueError(
                f"data.embeddings: {self.directory} has none for {missing} training images, held out when it was made; "
                "run `python -m trainer.embed CONFIG` with this run's settings: it adds them"
            )

    def check_encoder(self, encoder: str) -> None:
        """`ValueError` if another encoder than that of this `encoder_hash` made them."""
        if self.made_of["encoder"] != encoder:
            raise ValueError(
                f"data.embeddings: {self.directory} comes from another image encoder than this run has (its newest "
                "checkpoint's; at the start, that of model.init_from); name the directory that was made with that "
                "encoder, or a new one for `python -m trainer.embed CONFIG` to fill"
            )

    def __reduce__(self) -> tuple:
        return EmbeddingStore, (self.directory,)


def read_made_of(path: Path) -> dict[str, Any]:
    """What a store was made of, from the file that says so. `ValueError` if that is damaged."""
    try:
        made_of = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path} is damaged ({error}); remove {path.parent} and run trainer.embed again") from error
    if not isinstance(made_of, dict) or not made_of.keys() >= {"encoder", "data", "image_size"}:
        raise ValueError(f"{path} does not say what was embedded; remove {path.parent} and run trainer.embed again")
    return made_of


def encoder_hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values of an image encoder's state dict, the same on any machine."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
