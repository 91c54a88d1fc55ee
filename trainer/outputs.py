"""Where a command was told to write: looked at before hours of work, not after."""

import os
from pathlib import Path


def check_place(option: str, path: Path) -> None:
    """Raises `ValueError` if nothing can be made or replaced at `path`, which `option` names."""
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option}: {path.parent} is no folder: make it first")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ValueError(f"{option}: no permission to write {path}")


def check_file(option: str, path: Path) -> None:
    """The same for a file."""
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder: name a file")
    check_place(option, path)


def check_folder(option: str, path: Path) -> None:
    """The same for a folder, which is made with its parents where it is not."""
    there = nearest_existing(path)
    if not there.is_dir():
        raise ValueError(f"{option}: {there} is a file: name a folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{option}: no permission to write {there}")


def nearest_existing(path: Path) -> Path:
    """`path`, or the first folder above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())
