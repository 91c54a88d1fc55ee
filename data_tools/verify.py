"""Is a packed data set what its manifest says? Find, repair or set aside what is not.

    python -m data_tools.verify DIR                            # fast: manifest, indexes, file sizes
    python -m data_tools.verify DIR --deep --workers 16        # also SHA-256, and every sample decodes
    python -m data_tools.verify DIR --deep --repair SRC...     # rebuild damaged shards from their sources
    python -m data_tools.verify DIR --deep --quarantine        # no source any more: train on the rest

--repair packs only the damaged shards again and accepts them only with the manifest's checksum; without --deep it sees
missing and cut files only. SRC are the sources as given to pack (for `pack coco`: the annotations file, then the folder
of images); those not needed are not read.
--quarantine writes quarantine.json: positions that train with weight zero, so that no other sample moves.

Exit status: 0 sound, or all damage repaired or quarantined; 1 damage is left; 2 nothing could be checked.
"""

import argparse
import hashlib
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from tqdm import tqdm

from data_tools.index import CHUNK_BYTES, is_double
from data_tools.pack import SCRATCH_DIR, build_shard, publish_shard
from data_tools.pool import run_in_pool
from data_tools.sample_format import (
    INDEX_DTYPE,
    QUARANTINE_NAME,
    Manifest,
    Quarantined,
    ShardInfo,
    join_indexes,
    load_manifest,
    load_quarantine,
    load_shard_index,
    locate,
    open_index,
    parse_record,
    save_quarantine,
)
from data_tools.sources.checks import check_jpeg, check_record
from data_tools.sources.coco import list_coco
from data_tools.sources.listing import Source, list_source, sorted_sources
from data_tools.sources.plan import Plan, ShardTask, load_plans, shard_tasks

TAR_HEADER = 512  # bytes before a member's data
SHOWN = 50  # problems printed; the rest is counted


@dataclass(frozen=True)
class Problem:
    """Something that is not as the manifest says, and what it costs."""

    shard: str  # "" for the joined index
    reason: str
    loses: Literal["shard", "sample", "nothing"] = "nothing"  # what cannot be trained on
    row: int = -1  # of the shard, if a sample is lost
    key: str = ""

    def __str__(self) -> str:
        place = f"{self.shard}[{self.row}] {self.key}" if self.loses == "sample" else self.shard or "index/"
        return f"{place}: {self.reason}"


@dataclass(frozen=True)
class DeepTask:
    directory: Path
    kind: str
    info: ShardInfo


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--deep", action="store_true", help="read every byte")
    parser.add_argument("--workers", type=int, default=1, help="processes for --deep")
    parser.add_argument("--repair", type=Path, nargs="+", metavar="SRC", help="sources to rebuild damaged shards from")
    parser.add_argument("--quarantine", action="store_true", help="list what stays damaged in quarantine.json")
    options = parser.parse_args(arguments)
    try:
        return verify(options.directory, options.deep, options.workers, options.repair, options.quarantine)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def verify(directory: Path, deep: bool, num_workers: int, sources: list[Path] | None, quarantine: bool) -> int:
    """Check, then repair, then quarantine; returns the exit status."""
    manifest = load_manifest(directory)
    problems = check_files(directory, manifest)
    if deep:
        unreadable = {problem.shard for problem in problems}
        problems += check_bytes(directory, manifest, unreadable, num_workers)
    if sources and problems:
        show("found", problems)
        damaged = {problem.shard for problem in problems}
        problems = repair(directory, manifest, problems, sources)
        release(directory, manifest, damaged - {problem.shard for problem in problems})
    known = known_positions(directory)
    if quarantine:
        known |= set_aside(directory, manifest, problems)
    left = []
    for problem in problems:
        lost = lost_positions(directory, manifest, problem)
        if not lost or lost - known:
            left.append(problem)
    show("damaged", left)
    show("quarantined", [problem for problem in problems if problem not in left])
    if left and not sources:
        again = "--deep --repair" if deep else "--repair"
        print(f"to repair: python -m data_tools.verify {directory} {again} SRC...", file=sys.stderr)
    if not left:
        sound = "are sound" if deep else "are there in full (--deep reads them too)"
        print(f"{directory}: {manifest.num_samples:,} samples in {len(manifest.shards):,} shards {sound}"
              + (f", but for {len(known):,} quarantined" if known else ""))  # fmt: skip
    return 1 if left else 0


def show(word: str, problems: list[Problem]) -> None:
    for problem in problems[:SHOWN]:
        print(f"{word}: {problem}", file=sys.stderr)
    if len(problems) > SHOWN:
        print(f"{word}: ... and {len(problems) - SHOWN:,} more", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------- checking


def check_files(directory: Path, manifest: Manifest) -> list[Problem]:
    """What shows without reading a shard."""
    problems, rows = [], []
    for info in manifest.shards:
        path = directory / info.name
        if not path.is_file():
            problems.append(Problem(info.name, "is missing", "shard"))
        elif path.stat().st_size != info.num_bytes:
            reason = f"has {path.stat().st_size} bytes, the manifest says {info.num_bytes}"
            problems.append(Problem(info.name, reason, "shard"))
        try:
            rows.append(load_shard_index(directory, info))
            problems += [Problem(info.name, reason) for reason in compare_counts(info, rows[-1])]
        except ValueError as error:
            problems.append(Problem(info.name, str(error)))
    listed = {info.name for info in manifest.shards}
    strays = sorted(path.name for path in directory.glob("shard-*.tar") if path.name not in listed)
    problems += [Problem(name, "is not in the manifest: join again, or delete it") for name in strays]
    if len(rows) == len(manifest.shards):
        problems += compare_columns(directory, rows)
    return problems


def compare_counts(info: ShardInfo, rows: np.ndarray) -> Iterator[str]:
    """Reasons why a shard's index cannot be that of the manifest's shard."""
    num_samples, num_masks = int((rows["jpg_size"] > 0).sum()), int(rows["num_masks"].sum())
    if num_samples != info.num_samples or num_masks != info.num_masks:
        yield (
            f"its index has {num_samples} samples and {num_masks} masks, "
            f"the manifest says {info.num_samples} and {info.num_masks}"
        )
    for part in ("jpg", "json"):
        ends = rows[f"{part}_offset"] + rows[f"{part}_size"]
        if len(rows) and (int(ends.max()) > info.num_bytes or int(rows[f"{part}_offset"].min()) < 0):
            yield f"its index points outside the shard ({part}_offset)"


def compare_columns(directory: Path, rows: list[np.ndarray]) -> Iterator[Problem]:
    """The joined index against the shards' own."""
    try:
        columns = open_index(directory)
    except (ValueError, EOFError, OSError) as error:
        yield Problem("", str(error))
        return
    joined = np.concatenate(rows) if rows else np.empty(0, INDEX_DTYPE)
    for name, column in columns.items():
        if not np.array_equal(column, joined[name]):
            hint = f"`python -m data_tools.index {directory}` writes it anew"
            yield Problem("", f"{name}.npy differs from the shards' own indexes; {hint}")


def check_bytes(directory: Path, manifest: Manifest, skip: set[str], num_workers: int) -> list[Problem]:
    """Read every shard but those already known to be damaged."""
    tasks = [DeepTask(directory, manifest.kind, info) for info in manifest.shards if info.name not in skip]
    found: dict[str, list[Problem]] = {}
    with tqdm(total=sum(task.info.num_bytes for task in tasks), unit="B", unit_scale=True) as bar:
        for task, problems in run_in_pool(check_shard, iter(tasks), num_workers):
            found[task.info.name] = problems
            bar.update(task.info.num_bytes)
    return [problem for task in tasks for problem in found[task.info.name]]


def check_shard(task: DeepTask) -> list[Problem]:
    """Checksum of the shard, then each sample by the index. The index's CRC-32 tells which samples the damage hit."""
    info, problems = task.info, []
    rows = load_shard_index(task.directory, info)
    with (task.directory / info.name).open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
        for number, row in enumerate(rows):
            if row["jpg_size"] == 0:
                continue
            try:
                check_sample(file, row, task.kind)
            except ValueError as error:
                key = key_of(file, row) or f"{info.name}[{number}]"
                problems.append(Problem(info.name, str(error), "sample", number, key))
    if digest.hexdigest() != info.sha256 and not problems:
        problems.append(Problem(info.name, "its SHA-256 is not the manifest's, though no sample is hit"))
    return problems


def check_sample(file: BinaryIO, row: np.void, kind: str) -> None:
    """Raises `ValueError` unless the bytes are those that were packed and make a valid sample."""
    jpeg = read_range(file, row["jpg_offset"], row["jpg_size"])
    data = read_range(file, row["json_offset"], row["json_size"])
    if zlib.crc32(data, zlib.crc32(jpeg)) != row["crc32"]:
        raise ValueError("its bytes have changed (CRC-32)")
    size = check_jpeg(jpeg)
    if size != (row["height"], row["width"]):
        raise ValueError(f"the JPEG is {size[1]} x {size[0]}, the index says {row['width']} x {row['height']}")
    if row["json_size"] == 0:
        return
    record = parse_record(data)
    if (record.image_id, len(record.annotations)) != (row["image_id"], row["num_masks"]):
        raise ValueError("its JSON is of another image than the index says")
    if kind == "sa1b":
        check_record(record, *size)


def read_range(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(int(offset))
    return file.read(int(size))


def key_of(file: BinaryIO, row: np.void) -> str:
    """The key from the tar header before the JPEG, "" if that is damaged too."""
    name = read_range(file, max(0, row["jpg_offset"] - TAR_HEADER), 100).rstrip(b"\0")
    return name.decode("ascii", "replace").rpartition(".")[0] if name.isascii() else ""


# ----------------------------------------------------------------------------------------------------- repairing


def repair(directory: Path, manifest: Manifest, problems: list[Problem], sources: list[Path]) -> list[Problem]:
    """Rebuild the damaged shards and the joined index; returns the problems that stay."""
    plans = load_plans(directory)
    if not plans:
        raise ValueError(f"{directory} was not packed here (no sources/): copy its damaged shards again")
    infos = {info.name: info for info in manifest.shards}
    damaged = {problem.shard for problem in problems} & infos.keys()
    failures: dict[str, str] = {}
    for plan in plans:
        wanted = damaged.intersection(plan.shards)
        if not wanted:
            continue
        source = find_source(plan, sources, directory / SCRATCH_DIR / "repair")
        for task in shard_tasks(plan, source, directory) if source else ():
            if task.name in wanted and not rebuild(directory, infos[task.name], task):
                failures[task.name] = f"packing {plan.source} again gives other bytes: the source has changed"
        if source is None:
            failures |= dict.fromkeys(wanted, f"its source {plan.source} is not among those given")
    shutil.rmtree(directory / SCRATCH_DIR, ignore_errors=True)
    print(f"{len(damaged) - len(failures)} shards rebuilt, each with the manifest's checksum")
    for name, reason in sorted(failures.items()):
        print(f"not repaired: {name}: {reason}", file=sys.stderr)
    if not failures:
        join_indexes(directory, manifest.shards)
    # What stays: shards that failed, tars that are not in the manifest, and the joined index if it could not be made.
    return [
        problem
        for problem in problems
        if problem.shard in failures or (problem.shard not in infos and (problem.shard or failures))
    ]


def find_source(plan: Plan, sources: list[Path], scratch: Path) -> Source | None:
    """The source whose listing is the one that was packed; its name says where to look first."""
    if plan.conversion.layout == "coco":
        if len(sources) != 2:
            raise ValueError("a data set packed from COCO is repaired with: --repair ANNOTATIONS IMAGES")
        candidates = [list_coco(*sources)]
        return next((source for source in candidates if source.digest == plan.listing_sha256), None)
    for path in sorted(sorted_sources(sources), key=lambda path: path.name != plan.source):
        source = list_source(path, plan.conversion.layout, scratch)
        if source.digest == plan.listing_sha256:
            return source
    return None


def rebuild(directory: Path, info: ShardInfo, task: ShardTask) -> bool:
    """Pack one shard again; it takes its place only with the manifest's checksum."""
    temporary = directory / f".{info.name}.{time.time_ns()}.tmp"
    report, rows = build_shard(task, temporary)
    if report.info != info:
        temporary.unlink()
        return False
    publish_shard(directory, temporary, report, rows)
    return True


# --------------------------------------------------------------------------------------------------- quarantine


def known_positions(directory: Path) -> set[int]:
    return {entry.position for entry in load_quarantine(directory)}


def lost_positions(directory: Path, manifest: Manifest, problem: Problem) -> set[int]:
    """Rows of the joined index that a problem makes useless; gaps are none."""
    if problem.loses == "nothing":
        return set()
    start = 0
    for info in manifest.shards:
        if info.name == problem.shard:
            break
        start += info.num_positions
    if problem.loses == "sample":
        return {start + problem.row}
    sizes = open_index(directory)["jpg_size"][start : start + info.num_positions]
    return {start + int(row) for row in np.flatnonzero(sizes)}


def release(directory: Path, manifest: Manifest, rebuilt: set[str]) -> None:
    """Take the samples of rebuilt shards out of quarantine.json; doubles stay, for they are whole and still doubles."""
    entries = load_quarantine(directory)
    kept = [e for e in entries if is_double(e) or locate(manifest, e.position)[0].name not in rebuilt]
    if len(kept) < len(entries):
        save_quarantine(directory, kept)
        print(f"{len(entries) - len(kept)} positions are in quarantine no longer")


def set_aside(directory: Path, manifest: Manifest, problems: list[Problem]) -> set[int]:
    """Add what the problems lose to quarantine.json; returns the positions it then lists."""
    entries = load_quarantine(directory)
    for problem in problems:
        for position in sorted(lost_positions(directory, manifest, problem)):
            entries.append(Quarantined(position, problem.key or problem.shard, problem.reason))
    if entries:
        save_quarantine(directory, entries)
        print(f"{directory / QUARANTINE_NAME} lists {len({entry.position for entry in entries}):,} positions")
    return {entry.position for entry in entries}


if __name__ == "__main__":
    sys.exit(main())
