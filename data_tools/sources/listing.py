"""Where the samples of a source are: a sorted list of positions, each a byte range of some file.

A source is one folder or one tar. Its listing is made from names alone, before anything is read, so it does not
depend on which samples turn out to be good. Folder, tar and tar of tars all end as byte ranges of plain files, so the
packer reads them by one function and in any order.
"""

import gzip
import hashlib
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Layout = Literal["sa1b", "images", "coco"]

JPEG_SUFFIXES = (".jpg", ".jpeg")
# Re-encoded as JPEG on request only; without it a file of these formats is reported, never silently left out.
IMAGE_SUFFIXES = (*JPEG_SUFFIXES, ".png", ".webp", ".bmp", ".tif", ".tiff")
GZIP_MAGIC = b"\x1f\x8b"
COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class Location:
    """A byte range of a file; `size` -1 is the whole file. `name` is what a report calls it."""

    path: Path
    name: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """Raises `OSError` if the disk does, `ValueError` if the file has become shorter since it was listed."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if 0 <= self.size != len(data):
            raise ValueError(f"{self.name}: only {len(data)} of {self.size} bytes are there")
        return data


@dataclass(frozen=True)
class Entry:
    """One position of a source. Either part may be missing: the packer then reports it and leaves a gap."""

    key: str  # name of the sample in the shard
    image: Location | None
    annotations: Location | bytes | None  # bytes: already cut from a larger file (COCO)
    problem: str = ""  # found while listing, e.g. a key that an earlier position has taken


@dataclass(frozen=True)
class Source:
    """The listing of one folder or tar, sorted by key."""

    path: Path
    entries: tuple[Entry, ...]
    num_bytes: int  # of its files, for the progress bar
    unpacked: Path | None = None  # the decompressed copy its entries point into; whoever listed it deletes it

    @property
    def digest(self) -> str:
        """SHA-256 of the sorted keys: tells the same source apart from others, wherever it is stored."""
        return hashlib.sha256("\n".join(entry.key for entry in self.entries).encode()).hexdigest()


def list_source(path: Path, layout: Layout, scratch: Path) -> Source:
    """List a folder or a tar (gzip-compressed ones are unpacked to `scratch` first, for they have no byte offsets).

    Raises `ValueError` for a source that is neither, cannot be read as a tar or holds no sample.
    """
    plain = path if path.is_dir() else _unpack_gzip(path, scratch)
    walk = _walk_folder(path, layout) if path.is_dir() else _walk_tar(plain, layout, path)
    files = sorted(walk, key=lambda file: file[0])
    entries = _pair_sa1b(files) if layout == "sa1b" else _name_images(files)
    if not entries:
        wanted = "sa_N.jpg with sa_N.json" if layout == "sa1b" else "image"
        hint = ""
        if path.is_dir() and _has_folders(path):
            hint = f"; give its subfolders one by one: {path}/*"
        elif path.is_dir() and any(path.glob("*.tar")):
            hint = f"; give its tars one by one: {path}/*.tar"
        raise ValueError(f"{path} holds no {wanted}{hint}")
    return Source(path, tuple(entries), sum(size for _, _, size in files), plain if plain != path else None)


def sorted_sources(paths: list[Path]) -> list[Path]:
    """The order that numbers the sources: by name, then by folder. Raises `ValueError` for a missing or double one."""
    for path in paths:
        if not path.exists():
            raise ValueError(f"source {path} does not exist")
        if not path.is_dir() and not path.is_file():
            raise ValueError(f"source {path} is neither a folder nor a file")
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"a source is given twice: {', '.join(sorted(map(str, paths)))}")
    return sorted(paths, key=lambda path: (path.resolve().name, str(path.resolve())))


# A walked file: its name inside the source, where it is, its size in bytes. Sorting goes by name.
WalkedFile = tuple[str, Location, int]


def _walk_folder(folder: Path, layout: Layout) -> Iterator[WalkedFile]:
    """SA-1B folders are flat. Image folders are flat or hold one folder a class, however deep."""
    for directory, subfolders, names in os.walk(folder, followlinks=True):
        if layout == "sa1b":
            subfolders.clear()
        for name in names:
            path = Path(directory) / name
            inside = path.relative_to(folder).as_posix()
            if not name.startswith("."):
                yield inside, Location(path, inside), path.stat().st_size


def _walk_tar(plain: Path, layout: Layout, path: Path) -> Iterator[WalkedFile]:
    """Files of a tar, and for images of the tars inside it (ImageNet's layout: n01440764.tar is a class).

    `plain` is read; `path`, of which it may be a decompressed copy, is what reports call it.
    """
    for name, offset, size in tar_members(plain, 0, path):
        if layout == "images" and name.endswith(".tar"):
            for inner, inner_offset, inner_size in tar_members(plain, offset, path):
                full = f"{name.removesuffix('.tar')}/{inner}"
                yield full, Location(plain, f"{path.name}:{full}", inner_offset, inner_size), inner_size
        else:
            yield name, Location(plain, f"{path.name}:{name}", offset, size), size


def tar_members(path: Path, start: int, source: Path) -> Iterator[tuple[str, int, int]]:
    """Name, absolute offset and size of each file of the tar that begins at byte `start` of a file.

    Raises `ValueError`, calling it `source`, for a tar that is damaged or cut short.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            # tarfile counts offsets as the file does, so those of an inner tar are absolute already.
            with tarfile.open(fileobj=file, mode="r:") as tar:
                found: dict[str, tarfile.TarInfo] = {}
                for member in tar:
                    # A hard link is a second name of a file before it.
                    content = found.get(member.linkname, member) if member.islnk() else member
                    found[member.name] = content
                    if content.isfile() and not Path(member.name).name.startswith("."):
                        yield Path(member.name).as_posix(), content.offset_data, content.size
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes this for an end, too
                    raise tarfile.ReadError("no end marker")
    except tarfile.TarError as error:
        raise ValueError(f"{source} is not a whole tar ({error}): download it again") from error


def _unpack_gzip(path: Path, scratch: Path) -> Path:
    """The tar itself, or its decompressed copy in `scratch` where the file is gzip, whatever its suffix says.

    JPEG hardly compresses, so the copy is about as large as the file.
    """
    with path.open("rb") as file:
        if file.read(2) != GZIP_MAGIC:
            return path
    scratch.mkdir(parents=True, exist_ok=True)
    tag = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]  # two folders may hold equal names
    target = scratch / f"{path.name}.{tag}.unpacked"
    if not target.is_file():
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            with gzip.open(path) as packed, temporary.open("wb") as plain:
                shutil.copyfileobj(packed, plain, COPY_BYTES)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            temporary.unlink()
            raise ValueError(f"{path} is not a whole gzip file ({error}): download it again") from error
        temporary.replace(target)
    return target


def _pair_sa1b(files: list[WalkedFile]) -> list[Entry]:
    """Positions of an SA-1B source: every stem that has a JPEG or a JSON, or both."""
    parts: dict[str, dict[str, Location]] = {}
    problems: dict[str, str] = {}
    for inside, location, _ in files:
        name = Path(inside)
        suffix = name.suffix.lower()
        if suffix == ".json" or suffix in JPEG_SUFFIXES:
            found, kind = parts.setdefault(name.stem, {}), "json" if suffix == ".json" else "jpg"
            if kind in found:
                problems[name.stem] = f"{found[kind].name} and {location.name} have one name"
            found[kind] = location
    return [
        Entry(key, found.get("jpg"), found.get("json"), problems.get(key, "")) for key, found in sorted(parts.items())
    ]


def _name_images(files: list[WalkedFile]) -> list[Entry]:
    """Positions of an image source; a key is the path inside it: `n01440764/n01440764_10026.JPEG` to
    `n01440764__n01440764_10026`.

    WebDataset ends a key at the first dot and `Record.key` at the last slash, so a key has neither.
    """
    entries, taken = [], {}
    for inside, location, _ in files:
        if Path(inside).suffix.lower() not in IMAGE_SUFFIXES:
            continue
        key = str(Path(inside).with_suffix("")).replace("/", "__").replace(".", "_")
        problem = f"its key {key} is that of {taken[key]} already" if key in taken else ""
        taken.setdefault(key, location.name)
        entries.append(Entry(key, location, None, problem))
    return sorted(entries, key=lambda entry: entry.key)


def _has_folders(path: Path) -> bool:
    return any(child.is_dir() for child in path.iterdir())
