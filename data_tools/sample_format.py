"""The contract between packer and trainer: what a shard, its index and the manifest look like.

A packed data set is one directory::

    shard-000000.tar          WebDataset: members KEY.jpg, KEY.json adjacent, in source order
    shard-000000.index.npy    one row a position of the shard, dtype INDEX_DTYPE
    shard-000000.info.json    counts, SHA-256, bad samples and warnings of the shard; its presence says: finished
    ...
    index/COLUMN.npy          the rows of all shards joined, one memory-mapped file a column
    quarantine.json           positions to train on with weight zero; absent if there are none
    manifest.json             counts, sizes and SHA-256 of every shard, in order; written last

A *position* is a place in the sorted source listing; a *sample* is a position whose source was valid. A source that
was not leaves a gap (`jpg_size == 0`), so one bad file never moves its neighbours. This file needs no torch: any
WebDataset reader reads the shards without it, and the trainer imports only this to read them by byte offset.
"""

import io
import json
import os
import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
INDEX_DIR = "index"
QUARANTINE_NAME = "quarantine.json"
MAX_SIDE = 65535  # pixels; the JPEG format's own limit

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
        ("crc32", "<u4"),  # of the JPEG's bytes followed by the JSON's: names the damaged sample of a damaged shard
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


def info_name(shard: str) -> str:
    """Name of a shard's own report: `shard-000042.tar` to `shard-000042.info.json`."""
    return shard.removesuffix(".tar") + ".info.json"


def parse_record(data: bytes) -> Record:
    """Decode a JSON member. Raises `ValueError` saying which part is missing or of the wrong type."""
    try:
        tree = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"JSON does not parse: {error}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("image"), dict):
        raise ValueError('JSON has no "image" object')
    image, annotations = tree["image"], tree.get("annotations", [])
    for field, kind in (("image_id", int), ("width", int), ("height", int), ("file_name", str)):
        if not isinstance(image.get(field), kind) or isinstance(image.get(field), bool):
            raise ValueError(f'"image.{field}" should be {kind.__name__}, is {image.get(field)!r}')
    if not 0 <= image["image_id"] < 2**63:
        raise ValueError(f'"image.image_id" should be a 63-bit number, is {image["image_id"]}')
    for field in ("width", "height"):
        if not 0 < image[field] <= MAX_SIDE:
            raise ValueError(f'"image.{field}" should be 1 to {MAX_SIDE}, is {image[field]}')
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


def tar_header(name: str, num_bytes: int) -> bytes:
    """A tar member's header; all metadata fixed, so equal samples give equal bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = num_bytes, 0o644, 0
    info.uname = info.gname = ""
    return info.tobuf(tarfile.USTAR_FORMAT if len(name.encode()) <= 100 else tarfile.PAX_FORMAT)


TAR_END = bytes(2 * tarfile.BLOCKSIZE)


def encode_sample(record: Record, jpeg: bytes, offset: int) -> tuple[tuple[bytes, ...], tuple[int, ...]]:
    """The two adjacent members of one sample, in pieces to be written one after the other (a megabyte of JPEG is not
    worth a copy), and its index row if they are written at `offset`."""
    data = encode_record(record)
    jpg_header, json_header = tar_header(record.key + ".jpg", len(jpeg)), tar_header(record.key + ".json", len(data))
    jpg_padding, json_padding = (bytes(-len(part) % tarfile.BLOCKSIZE) for part in (jpeg, data))
    jpg_offset = offset + len(jpg_header)
    json_offset = jpg_offset + len(jpeg) + len(jpg_padding) + len(json_header)
    row = (
        record.image_id,
        jpg_offset,
        len(jpeg),
        json_offset,
        len(data),
        len(record.annotations),
        record.height,
        record.width,
        zlib.crc32(data, zlib.crc32(jpeg)),
    )
    return (jpg_header, jpeg, jpg_padding, json_header, data, json_padding), row


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that, whenever the machine stops, it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
    publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, after its bytes are on the disk, not only in the cache."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself
    finally:
        os.close(directory)


def save_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json` whole or not at all."""
    tree = asdict(manifest)
    tree["totals"] = {
        "num_positions": manifest.num_positions,
        "num_samples": manifest.num_samples,
        "num_masks": manifest.num_masks,
        "num_bytes": manifest.num_bytes,
    }
    write_whole(Path(directory) / MANIFEST_NAME, (json.dumps(tree, indent=1) + "\n").encode())


def load_manifest(directory: Path) -> Manifest:
    """Read `manifest.json`. Raises `ValueError` naming the directory and what to do."""
    path = Path(directory) / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(f"{directory} holds no {MANIFEST_NAME}: pack it with `python -m data_tools.pack`")
    try:
        tree = json.loads(path.read_text())
        version = tree["version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} has format version {version}, this code reads {FORMAT_VERSION}")
        shards = tuple(ShardInfo(**shard) for shard in tree["shards"])
        for shard in shards:  # names become paths here and in a node's cache
            if Path(shard.name).name != shard.name or not shard.name.endswith(".tar"):
                raise ValueError(f"{path} names a shard {shard.name!r}, which is no file name of a tar")
        return Manifest(tree["kind"], shards, version)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not parse ({error}): `python -m data_tools.index {directory}` writes it anew"
        ) from error


def join_indexes(directory: Path, shards: Iterable[ShardInfo]) -> None:
    """Join the shards' own indexes, in order, into one memory-mappable file a column under `index/`."""
    directory, shards = Path(directory), list(shards)
    joined = np.empty(sum(shard.num_positions for shard in shards), INDEX_DTYPE)  # 52 bytes a row
    start = 0
    for shard in shards:
        rows = load_shard_index(directory, shard)
        joined[start : start + len(rows)] = rows
        start += len(rows)
    target = directory / INDEX_DIR
    target.mkdir(exist_ok=True)
    for column in INDEX_DTYPE.names or ():
        write_whole(target / f"{column}.npy", npy_bytes(np.ascontiguousarray(joined[column])))


def load_shard_index(directory: Path, shard: ShardInfo) -> np.ndarray:
    """A shard's own index. Raises `ValueError` if it is missing or is not what the manifest promises."""
    path = Path(directory) / index_name(shard.name)
    hint = f"`python -m data_tools.verify {directory} --repair SRC...` rebuilds it from the source"
    try:
        rows = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {hint}") from None
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); {hint}") from error
    if rows.dtype != INDEX_DTYPE:
        raise ValueError(f"{path} was written in another format; {hint}")
    if len(rows) != shard.num_positions:
        raise ValueError(f"{path} has {len(rows)} rows, the manifest says {shard.num_positions}; {hint}")
    return rows


def npy_bytes(array: np.ndarray) -> bytes:
    """The `.npy` file of an array, in memory."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def open_index(directory: Path) -> dict[str, np.ndarray]:
    """Column name to memory-mapped array over all positions of the data set; costs no reading."""
    columns = {}
    for column in INDEX_DTYPE.names or ():
        path = Path(directory) / INDEX_DIR / f"{column}.npy"
        if not path.is_file():
            raise ValueError(f"{path} is missing: `python -m data_tools.index {directory}` writes it anew")
        try:
            columns[column] = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): `python -m data_tools.index {directory}` writes it anew"
            ) from error
    return columns


@dataclass(frozen=True)
class Quarantined:
    """A position that is to be trained on with weight zero, which takes it out without renumbering anything."""

    position: int  # row of the joined index
    key: str  # as well as it can still be told
    reason: str


def save_quarantine(directory: Path, entries: Iterable[Quarantined]) -> None:
    """Write `quarantine.json`, sorted by position; the first reason of a position stays."""
    by_position: dict[int, Quarantined] = {}
    for entry in entries:
        by_position.setdefault(entry.position, entry)
    tree = {"version": FORMAT_VERSION, "positions": [asdict(by_position[p]) for p in sorted(by_position)]}
    write_whole(Path(directory) / QUARANTINE_NAME, (json.dumps(tree, indent=1) + "\n").encode())


def load_quarantine(directory: Path) -> list[Quarantined]:
    """What `quarantine.json` lists, sorted by position; nothing if there is no such file."""
    path = Path(directory) / QUARANTINE_NAME
    if not path.is_file():
        return []
    try:
        return [Quarantined(**entry) for entry in json.loads(path.read_text())["positions"]]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not parse ({error}): delete it and run verify --quarantine again") from error


def read_raw(
    directory: Path, manifest: Manifest, columns: dict[str, np.ndarray], position: int, part: Literal["jpg", "json"]
) -> bytes:
    """JPEG or JSON bytes of a position, empty for a gap; opens the shard anew, so for a few samples only.

    Raises `OSError` for a missing shard.
    """
    shard, _ = locate(manifest, position)
    with (Path(directory) / shard.name).open("rb") as file:
        file.seek(int(columns[f"{part}_offset"][position]))
        return file.read(int(columns[f"{part}_size"][position]))


def locate(manifest: Manifest, position: int) -> tuple[ShardInfo, int]:
    """The shard of a position and its row in it."""
    ends = list(accumulate(shard.num_positions for shard in manifest.shards))
    number = bisect_right(ends, position)
    info = manifest.shards[number]
    return info, position - ends[number] + info.num_positions
