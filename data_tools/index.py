"""Index shards that already exist, or join the indexes of packed ones anew.

    python -m data_tools.index DIR                 # timm's imagenet-1k-wds, img2dataset's output, SA-1B's own tars
    python -m data_tools.index DIR --workers 16

Reads each `.tar` of DIR once, checks every sample, and writes beside it `NAME.index.npy` and `NAME.info.json`, then
`index/`, `report.txt` and `manifest.json`. No tar is changed or copied, so DIR must be writable and the tars not be
compressed. Shards of SA-1B pairs make a data set of kind "sa1b", images with or without labels one of kind "images".
Interrupted, it goes on where it was. Exit status: 0 all samples are good, 1 some are bad (they are gaps in the index)
and more than --allow-bad, 2 nothing could be done.
"""

import argparse
import hashlib
import json
import sys
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from data_tools.pool import run_in_pool
from data_tools.sample_format import (
    INDEX_DIR,
    INDEX_DTYPE,
    QUARANTINE_NAME,
    Manifest,
    Quarantined,
    ShardInfo,
    index_name,
    info_name,
    join_indexes,
    load_manifest,
    load_quarantine,
    load_shard_index,
    locate,
    npy_bytes,
    parse_record,
    save_manifest,
    save_quarantine,
    write_whole,
)
from data_tools.sources.checks import check_jpeg, check_record
from data_tools.sources.listing import GZIP_MAGIC, JPEG_SUFFIXES, tar_members
from data_tools.sources.plan import load_plans
from data_tools.sources.samples import image_id_of

Kind = Literal["sa1b", "images"]
REASON_DOUBLE = "occurs in an earlier shard"
WARN_DOUBLE = "image key occurs in an earlier shard"
CHUNK_BYTES = 1 << 22
LISTED_BAD = 1000  # lines of report.txt; report.json has them all


@dataclass(frozen=True)
class BadSample:
    """A source that was left out."""

    row: int  # of its shard
    key: str
    file: str
    reason: str


@dataclass(frozen=True)
class ShardReport:
    """What `shard-NNNNNN.info.json` holds. The file is written last: with it, the shard is finished."""

    kind: Kind
    info: ShardInfo
    bad: tuple[BadSample, ...]
    warnings: dict[str, int]


def save_shard_report(directory: Path, report: ShardReport) -> None:
    write_whole(directory / info_name(report.info.name), (json.dumps(asdict(report), indent=1) + "\n").encode())


def load_shard_report(directory: Path, shard: str) -> ShardReport | None:
    """The report of a finished shard whose tar and index are there in full size, else None."""
    try:
        tree = json.loads((directory / info_name(shard)).read_text())
        report = ShardReport(
            tree["kind"], ShardInfo(**tree["info"]), tuple(BadSample(**bad) for bad in tree["bad"]), tree["warnings"]
        )
        load_shard_index(directory, report.info)
        is_whole = (directory / shard).stat().st_size == report.info.num_bytes
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # missing or damaged alike: the shard is to be done again
    return report if is_whole else None


# ---------------------------------------------------------------------------------------------------- joining


def join_packed(directory: Path) -> int:
    """Join a data set whose sources are all packed; returns the number of bad samples.

    Raises `ValueError` naming the first source or shard that is not finished.
    """
    plans = load_plans(directory)
    if not plans:
        raise ValueError(f"{directory} was not written by `python -m data_tools.pack`")
    reports = []
    for plan in plans:
        for name in plan.shards:
            report = load_shard_report(directory, name)
            if report is None:
                raise ValueError(f"{name} of source {plan.source} is not finished: pack --source-index "
                                 f"{plan.source_index} again")  # fmt: skip
            reports.append(report)
    return join(directory, reports)


def join(directory: Path, reports: list[ShardReport]) -> int:
    """Write `index/`, the reports and, last, the manifest. Returns the number of bad samples."""
    kinds = {report.kind for report in reports}
    if len(kinds) != 1:
        raise ValueError(f"{directory} holds shards of SA-1B pairs and of plain images: index them separately")
    kind = kinds.pop()
    manifest = Manifest(kind, tuple(report.info for report in reports))
    kept = still_set_aside(directory, manifest)
    join_indexes(directory, manifest.shards)

    warnings = Counter[str]()
    for report in reports:
        warnings.update(report.warnings)
    double = find_doubles(directory, manifest)
    if kind == "sa1b":
        kept += double
    if kept or (directory / QUARANTINE_NAME).is_file():
        save_quarantine(directory, kept)
    if kind == "images" and double:
        warnings[WARN_DOUBLE] += len(double)  # equal names in different sources are not equal images
        double = []
    num_bad = write_report(directory, manifest, reports, double, warnings)
    save_manifest(directory, manifest)
    return num_bad


def still_set_aside(directory: Path, manifest: Manifest) -> list[Quarantined]:
    """What quarantine.json lists for other reasons than doubles, which are looked for anew. Where shards came or went
    since, at the positions that the samples now have; a shard that is gone takes its entries with it."""
    entries = [entry for entry in load_quarantine(directory) if not is_double(entry)]
    if not entries:
        return []
    try:
        old = load_manifest(directory)
    except ValueError:  # lost or damaged, which is what this mends
        old = manifest
    sizes = [shard.num_positions for shard in manifest.shards]
    starts = dict(zip((shard.name for shard in manifest.shards), accumulate(sizes, initial=0), strict=False))
    kept = []
    for entry in entries:
        if entry.position < old.num_positions:
            shard, row = locate(old, entry.position)
            if shard.name in starts:
                kept.append(replace(entry, position=starts[shard.name] + row))
    return kept


def is_double(entry: Quarantined) -> bool:
    return entry.reason.endswith(REASON_DOUBLE)


def find_doubles(directory: Path, manifest: Manifest) -> list[Quarantined]:
    """Samples whose image id an earlier shard has. Shards are packed independently, so this shows only now, when they
    can no longer be left out: quarantined, they train with weight zero."""
    image_ids = np.load(directory / INDEX_DIR / "image_id.npy")
    rows = np.flatnonzero(np.load(directory / INDEX_DIR / "jpg_size.npy", mmap_mode="r"))
    order = np.argsort(image_ids[rows], kind="stable")
    repeated = np.diff(image_ids[rows][order]) == 0
    doubles = []
    for position in np.sort(rows[order[1:][repeated]]).tolist():
        shard, row = locate(manifest, position)
        reason = f"image_id {image_ids[position]} {REASON_DOUBLE}"
        doubles.append(Quarantined(position, f"{shard.name}[{row}]", reason))
    return doubles


def write_report(
    directory: Path, manifest: Manifest, reports: list[ShardReport], double: list[Quarantined], warnings: Counter[str]
) -> int:
    """`report.json` for programs, `report.txt` for people. Returns the number of bad samples."""
    bad, start = [], 0
    for report in reports:
        bad += [{"position": start + each.row, "shard": report.info.name, **asdict(each)} for each in report.bad]
        start += report.info.num_positions
    quarantined = [asdict(each) for each in double]
    counts = {
        "num_positions": manifest.num_positions,
        "num_samples": manifest.num_samples,
        "num_masks": manifest.num_masks,
        "num_bytes": manifest.num_bytes,
        "num_shards": len(manifest.shards),
        "num_bad": len(bad) + len(quarantined),
    }
    tree = {"kind": manifest.kind, **counts, "bad": bad, "quarantined": quarantined, "warnings": dict(warnings)}
    write_whole(directory / "report.json", (json.dumps(tree, indent=1, sort_keys=True) + "\n").encode())

    lines = [f"kind {manifest.kind}", *(f"{name} {value:,}" for name, value in counts.items()), ""]
    lines += [f"warning: {kind}: {count:,}" for kind, count in sorted(warnings.items())]
    lines += [f"bad: {each['file']}: {each['reason']} (gap at {each['shard']}[{each['row']}])" for each in bad]
    lines += [f"bad: {each['key']}: {each['reason']} (quarantined)" for each in quarantined]
    if len(lines) > LISTED_BAD:
        lines = [*lines[:LISTED_BAD], f"... and {len(lines) - LISTED_BAD:,} lines more, see report.json"]
    write_whole(directory / "report.txt", ("\n".join(lines) + "\n").encode())
    return counts["num_bad"]


# ----------------------------------------------------------------------------------- shards written by others


@dataclass(frozen=True)
class ScanTask:
    path: Path  # of a tar


@dataclass
class Group:
    """The members of one WebDataset sample: (offset, size) of the parts we know."""

    jpg: tuple[int, int] | None = None
    json: tuple[int, int] | None = None


def index_shard(task: ScanTask) -> ShardReport:
    """Check and index one tar that someone else wrote."""
    path = task.path
    groups = list_groups(path)
    rows = np.zeros(len(groups), INDEX_DTYPE)
    bad, warnings = [], Counter[str]()
    with path.open("rb") as file:

        def read(part: tuple[int, int] | None) -> bytes:
            if part is None:
                return b""
            file.seek(part[0])
            return file.read(part[1])

        is_sa1b = any(group.json and looks_like_sa1b(read(group.json)) for group in list(groups.values())[:10])
        for row, (key, group) in enumerate(groups.items()):
            try:
                rows[row], more = index_row(key, group, read(group.jpg), read(group.json), is_sa1b)
                warnings += more
            except ValueError as error:
                bad.append(BadSample(row, key, f"{path.name}:{key}", str(error)))
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    num_samples, num_masks = int((rows["jpg_size"] > 0).sum()), int(rows["num_masks"].sum())
    info = ShardInfo(path.name, len(rows), num_samples, num_masks, path.stat().st_size, sha256)
    report = ShardReport("sa1b" if is_sa1b else "images", info, tuple(bad), dict(warnings))
    write_whole(path.with_name(index_name(path.name)), npy_bytes(rows))
    save_shard_report(path.parent, report)
    return report


def list_groups(path: Path) -> dict[str, Group]:
    """WebDataset's samples of a tar, in order: members whose names agree up to the first dot of the last part."""
    with path.open("rb") as file:
        if file.read(2) == GZIP_MAGIC:
            raise ValueError(f"{path} is compressed, which leaves no byte offsets: unpack it, or pack it anew")
    groups: dict[str, Group] = {}
    for member, offset, size in tar_members(path, 0, path):
        folder, _, name = member.rpartition("/")
        stem, _, extension = name.partition(".")
        group = groups.setdefault(f"{folder}/{stem}".lstrip("/"), Group())
        if f".{extension.lower()}" in JPEG_SUFFIXES:
            group.jpg = (offset, size)
        elif extension.lower() == "json":
            group.json = (offset, size)
    return groups


def looks_like_sa1b(data: bytes) -> bool:
    """SA-1B's JSON, as opposed to a crawler's metadata."""
    try:
        parse_record(data)
    except ValueError:
        return False
    return b'"annotations"' in data


def index_row(key: str, group: Group, jpeg: bytes, json_data: bytes, is_sa1b: bool) -> tuple[tuple, Counter[str]]:
    """The index row of a sample and its warnings. Raises `ValueError` with the reason if it is bad."""
    if group.jpg is None:
        raise ValueError("sample without JPEG")
    height, width = check_jpeg(jpeg)
    if not is_sa1b:
        crc32 = zlib.crc32(jpeg)
        return (image_id_of(key), *group.jpg, 0, 0, 0, height, width, crc32), Counter()
    if group.json is None:
        raise ValueError("JPEG without JSON")
    record = parse_record(json_data)
    warnings = check_record(record, height, width)
    crc32 = zlib.crc32(json_data, zlib.crc32(jpeg))
    num_masks = len(record.annotations)
    return (record.image_id, *group.jpg, *group.json, num_masks, height, width, crc32), warnings


def index_foreign(directory: Path, num_workers: int) -> int:
    """Index every tar of a directory and join; returns the number of bad samples."""
    paths = sorted(path for path in directory.glob("*.tar") if not path.name.startswith("."))
    if not paths:
        raise ValueError(f"{directory} holds no .tar")
    reports = {path.name: load_shard_report(directory, path.name) for path in paths}
    tasks = [ScanTask(path) for path in paths if reports[path.name] is None]
    with tqdm(total=sum(task.path.stat().st_size for task in tasks), unit="B", unit_scale=True) as bar:
        for task, report in run_in_pool(index_shard, iter(tasks), num_workers):
            reports[task.path.name] = report
            bar.update(report.info.num_bytes)
    return join(directory, [report for report in reports.values() if report is not None])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--workers", type=int, default=1, help="processes; the result does not depend on it")
    parser.add_argument("--allow-bad", type=int, default=0, help="bad samples that do not count as a failure")
    options = parser.parse_args(arguments)
    try:
        if not options.directory.is_dir():
            raise ValueError(f"{options.directory} is not a directory")
        is_packed = bool(load_plans(options.directory))
        num_bad = join_packed(options.directory) if is_packed else index_foreign(options.directory, options.workers)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return judge_bad(options.directory, num_bad, options.allow_bad)


def judge_bad(directory: Path, num_bad: int, allowed: int) -> int:
    """Exit status for a number of bad samples, with a line that says where they are listed."""
    if num_bad:
        print(
            f"{num_bad} bad samples left out, see {directory / 'report.txt'}; to take mended ones in, delete the "
            ".info.json of their shard and run the same command again",
            file=sys.stderr,
        )
    if num_bad > allowed:
        print(f"more than --allow-bad {allowed}: everything is written, but look at them", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
