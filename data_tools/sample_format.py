"""The contract between packer and trainer: what a shard, its index and the manifest look like.

A packed data set is one directory::

    shard-000000.tar          WebDataset: members KEY.jpg, KEY.json adjacent, in source order
    shard-000000.index.npy    one row a position of the shard, dtype INDEX_DTYPE
    ...
    index/COLUMN.npy          the rows of all shards joined, one memory-mapped file a column
    manifest.json             counts, sizes and SHA-256 of every shard, in order; written last

A *position* is a place in the sorted source listing; a *sample* is a position whose source was valid. A source that
was not leaves a gap (`jpg_size == 0`), so one bad file never moves its neighbours. This file needs no torch: any
WebDataset reader reads the shards without it, and the trainer imports only this to read them by byte offset.
"""

import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
INDEX_DIR = "index"

INDEX_DTYPE = np.dtype(
    [
        ("image_id", "<i8"),  # the source's id; for plain images a 63-bit hash of the key
        ("jpg_offset", "<i8"),  # of the JPEG's first byte within the tar
        ("jpg_size", "<u4"),  # bytes; 0 marks a gap
        ("json_offset", "<i8"),
        ("json_size", "<u4"),  # bytes; 0 where the shard holds no JSON
        ("num_masks", "<u4"),
        ("height", "<u4"),  # of the stored JPEG, in pixels
        ("width", "<u4"),
    ]
)


@dataclass(frozen=True)
class Record:
    """The JSON member of a sample: SA-1B's own layout, `{"image": {...}, "annotations": [...]}`.

    Each annotation keeps SA-1B's fields; `segmentation` is COCO compressed RLE `{"size": [h, w], "counts": str}`.
    Plain images (stage 1) have no annotations.
    """

    image_id: int
    width: int
    height: int
    file_name: str
    annotations: list[dict[str, Any]]

    @property
    def key(self) -> str:
        """Name of the sample everywhere: in the tar, in logs, in replays."""
        return Path(self.file_name).stem


@dataclass(frozen=True)
class ShardInfo:
    """One shard in the manifest."""

    name: str  # shard-000000.tar
    num_positions: int  # rows of its index, gaps included
    num_samples: int
    num_masks: int
    num_bytes: int  # size of the tar
    sha256: str  # of the tar


@dataclass(frozen=True)
class Manifest:
    """What a packed data set consists of. `kind` says which stage can train on it."""

    kind: Literal["sa1b", "images"]
    shards: tuple[ShardInfo, ...]
    version: int = FORMAT_VERSION

    @property
    def num_positions(self) -> int:
        return sum(shard.num_positions for shard in self.shards)

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_masks(self) -> int:
        return sum(shard.num_masks for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)


def shard_name(number: int) -> str:
    """`shard-000042.tar`"""
    return f"shard-{number:06d}.tar"


def index_name(shard: str) -> str:
    """Name of a shard's own index: `shard-000042.tar` to `shard-000042.index.npy`."""
    return shard.removesuffix(".tar") + ".index.npy"


def parse_record(data: bytes) -> Record:
    """Decode a JSON member. Raises `ValueError` saying which part is missing or of the wrong type."""
    try:
        tree = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"JSON does not parse: {error}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("image"), dict):
        raise ValueError('JSON has no "image" object')
    image, annotations = tree["image"], tree.get("annotations", [])
    for field, kind in (("image_id", int), ("width", int), ("height", int), ("file_name", str)):
        if not isinstance(image.get(field), kind) or isinstance(image.get(field), bool):
            raise ValueError(f'"image.{field}" should be {kind.__name__}, is {image.get(field)!r}')
    if not isinstance(annotations, list):
        raise ValueError('"annotations" should be a list')
    for number, annotation in enumerate(annotations):
        segmentation = annotation.get("segmentation") if isinstance(annotation, dict) else None
        if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
            raise ValueError(f'"annotations[{number}].segmentation" should be RLE with "size" and "counts"')
    return Record(image["image_id"], image["width"], image["height"], image["file_name"], annotations)


def encode_record(record: Record) -> bytes:
    """The JSON member's bytes: compact, key order fixed, so equal records give equal bytes."""
    image = {
        "image_id": record.image_id,
        "width": record.width,
        "height": record.height,
        "file_name": record.file_name,
    }
    return json.dumps({"image": image, "annotations": record.annotations}, separators=(",", ":")).encode()


def tar_member(name: str, data: bytes) -> bytes:
    """A tar member's header and padded data; all metadata fixed, so equal samples give equal bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o644, 0
    info.uname = info.gname = ""
    header = info.tobuf(tarfile.USTAR_FORMAT if len(name.encode()) <= 100 else tarfile.PAX_FORMAT)
    return header + data + bytes(-len(data) % tarfile.BLOCKSIZE)


TAR_END = bytes(2 * tarfile.BLOCKSIZE)


def encode_sample(record: Record, jpeg: bytes, offset: int) -> tuple[bytes, tuple[int, ...]]:
    """Bytes of the two adjacent members of one sample, and its index row if they are written at `offset`."""
    data = encode_record(record)
    jpg_member = tar_member(record.key + ".jpg", jpeg)
    json_member = tar_member(record.key + ".json", data)
    jpg_header = len(jpg_member) - len(jpeg) - (-len(jpeg) % tarfile.BLOCKSIZE)
    json_header = len(json_member) - len(data) - (-len(data) % tarfile.BLOCKSIZE)
    row = (
        record.image_id,
        offset + jpg_header,
        len(jpeg),
        offset + len(jpg_member) + json_header,
        len(data),
        len(record.annotations),
        record.height,
        record.width,
    )
    return jpg_member + json_member, row


def save_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json` whole or not at all."""
    tree = asdict(manifest)
    tree["totals"] = {
        "num_positions": manifest.num_positions,
        "num_samples": manifest.num_samples,
        "num_masks": manifest.num_masks,
        "num_bytes": manifest.num_bytes,
    }
    temporary = directory / (MANIFEST_NAME + ".tmp")
    temporary.write_text(json.dumps(tree, indent=1) + "\n")
    temporary.replace(directory / MANIFEST_NAME)


def load_manifest(directory: Path) -> Manifest:
    """Read `manifest.json`. Raises `ValueError` naming the directory and what to do."""
    path = Path(directory) / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(f"{directory} holds no {MANIFEST_NAME}: pack it with `python -m data_tools.pack`")
    try:
        tree = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} does not parse ({error}): pack the data set again") from error
    if tree.get("version") != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {tree.get('version')}, this code reads {FORMAT_VERSION}")
    return Manifest(tree["kind"], tuple(ShardInfo(**shard) for shard in tree["shards"]), tree["version"])


def join_indexes(directory: Path, shards: Iterable[ShardInfo]) -> None:
    """Join the shards' own indexes, in order, into one memory-mappable file a column under `index/`."""
    rows = [np.load(directory / index_name(shard.name)) for shard in shards]
    joined = np.concatenate(rows) if rows else np.empty(0, INDEX_DTYPE)
    target = directory / INDEX_DIR
    target.mkdir(exist_ok=True)
    for column in INDEX_DTYPE.names or ():
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(joined[column]))
        temporary = target / f"{column}.npy.tmp"
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(target / f"{column}.npy")


def open_index(directory: Path) -> dict[str, np.ndarray]:
    """Column name to memory-mapped array over all positions of the data set; costs no reading."""
    columns = {}
    for column in INDEX_DTYPE.names or ():
        path = Path(directory) / INDEX_DIR / f"{column}.npy"
        if not path.is_file():
            raise ValueError(f"{path} is missing: `python -m data_tools.index {directory}` writes it anew")
        columns[column] = np.load(path, mmap_mode="r")
    return columns
