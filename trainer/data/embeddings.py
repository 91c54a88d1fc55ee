"""Image embeddings of a frozen encoder, computed once and read instead of images.

    DIR/
        embeddings.npy    float16 (rows, C, h, w), memory-mapped; a row for each position of the packed data set
        done.npy          uint8 (rows,), 1 where the row was computed
        embeddings.json   what they were made of, written last

`python -m trainer.embed` writes them. They hold for one encoder, one data set, one input size and no augmentation: the
first three are checked when they are opened, the last in the config.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from torch import nn

STAMP_NAME = "embeddings.json"


class EmbeddingStore:
    """Read access by row. Cheap to create; each loader worker maps the file itself."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        stamp = self.directory / STAMP_NAME
        if not stamp.is_file():
            raise ValueError(
                f"data.embeddings: {directory} is not there or not finished; `python -m trainer.embed CONFIG` makes it"
            )
        self.made_of = json.loads(stamp.read_text())
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

    def check_encoder(self, encoder: nn.Module) -> None:
        """`ValueError` if another encoder made them."""
        if self.made_of["encoder"] != encoder_hash(encoder):
            raise ValueError(
                f"data.embeddings: {self.directory} comes from another image encoder than model.init_from has; "
                "remove it and run `python -m trainer.embed CONFIG` again"
            )

    def __reduce__(self) -> tuple:
        return EmbeddingStore, (self.directory,)


def encoder_hash(encoder: nn.Module) -> str:
    """SHA-256 over names and values of all weights, the same on any machine."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
