"""Raw data to shards: checked, byte for byte reproducible, in parallel, restartable at any moment.

    python -m data_tools.pack sa1b SRC... --out DIR --workers 16     # folders of sa_N.jpg + sa_N.json, or official tars
    python -m data_tools.pack images SRC --out DIR                   # ImageFolder, flat folder, or ImageNet's tar
    python -m data_tools.pack coco --annotations instances.json --images FOLDER --out DIR

    # A job array, one source a task; then, once, the join. With all tars at hand:
    python -m data_tools.pack sa1b /raw/*.tar --out DIR --source-index $SLURM_ARRAY_TASK_ID
    # or with only one of them on the disk:
    python -m data_tools.pack sa1b /raw/sa_000123.tar --out DIR --source-index 123 --num-sources 1000
    python -m data_tools.pack join DIR

Run the same command again after an interruption: finished shards stay, nothing half-written ever has a shard's name.
JPEGs are stored byte for byte unless --resize-long-side, --resize-short-side or --reencode says otherwise. A bad sample
leaves a gap and is listed in report.txt. Exit status: 0 all samples are good, 1 more are bad than --allow-bad (but
everything is written), 2 nothing could be done.
"""

import argparse
import contextlib
import hashlib
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_tools.index import BadSample, ShardReport, join_packed, judge_bad, load_shard_report, save_shard_report
from data_tools.pool import run_in_pool
from data_tools.sample_format import (
    INDEX_DTYPE,
    TAR_END,
    ShardInfo,
    encode_sample,
    index_name,
    npy_bytes,
    publish,
    write_whole,
)
from data_tools.sources.checks import WARN_SHARED_ID
from data_tools.sources.coco import list_coco
from data_tools.sources.listing import Source, list_source, sorted_sources
from data_tools.sources.plan import Plan, ShardTask, make_plan, save_plan, shard_tasks
from data_tools.sources.samples import Conversion, Sample, read_sample

SCRATCH_DIR = ".scratch"  # unpacked copies of gzip-compressed tars, removed when their shards are done


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    try:
        if options.layout == "join":
            return judge_bad(options.out, join_packed(options.out), options.allow_bad)
        return pack(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def pack(options: argparse.Namespace) -> int:
    """Pack the sources and, if they are all of them, join; returns the exit status."""
    conversion = conversion_of(options)
    numbered, num_sources = number_sources(options)
    options.out.mkdir(parents=True, exist_ok=True)
    progress, copies = Progress(numbered), UnpackedCopies()
    tasks = unfinished_tasks(options, numbered, num_sources, conversion, progress, copies)
    for task, report in run_in_pool(pack_shard, tasks, options.workers):
        progress.finished(task, report)
        copies.release(task.name)
    progress.close()
    shutil.rmtree(scratch_dir(options), ignore_errors=True)  # what a killed run left
    with contextlib.suppress(OSError):  # other tasks of the array have theirs in it still, or there is none
        (options.out / SCRATCH_DIR).rmdir()

    if len(numbered) == num_sources:
        num_bad = join_packed(options.out)
        print(f"{progress.summary()}; {options.out / 'manifest.json'} is written", file=sys.stderr)
    else:
        num_bad = progress.num_bad
        print(f"{progress.summary()}; when all sources are: python -m data_tools.pack join {options.out}",
              file=sys.stderr)  # fmt: skip
    return judge_bad(options.out, num_bad, options.allow_bad)


# ---------------------------------------------------------------------------------------------------- sources


def number_sources(options: argparse.Namespace) -> tuple[list[tuple[int, Path]], int]:
    """The sources to pack now, each with its number, and how many there are in all."""
    paths = [options.annotations] if options.layout == "coco" else sorted_sources(options.sources)
    index, total = options.source_index, options.num_sources
    if total is None:
        total = len(paths)
        chosen = list(enumerate(paths))
        if index is not None:
            if not 0 <= index < total:
                raise ValueError(f"--source-index {index}: there are {total} sources, numbered from 0")
            chosen = [chosen[index]]
        return chosen, total
    if index is None or len(paths) != 1 or not 0 <= index < total:
        raise ValueError("--num-sources N goes with one SRC and its --source-index, 0 to N - 1")
    return [(index, paths[0])], total


def open_source(options: argparse.Namespace, path: Path) -> Source:
    if options.layout == "coco":
        return list_coco(path, options.images)
    return list_source(path, options.layout, scratch_dir(options))


def scratch_dir(options: argparse.Namespace) -> Path:
    """One for each task of a job array, so that a finished task may clear its own."""
    return options.out / SCRATCH_DIR / ("all" if options.source_index is None else str(options.source_index))


def unfinished_tasks(
    options: argparse.Namespace,
    numbered: list[tuple[int, Path]],
    num_sources: int,
    conversion: Conversion,
    progress: "Progress",
    copies: "UnpackedCopies",
) -> Iterator[ShardTask]:
    """List source after source, while shards of earlier ones are being packed, and yield what is left to do."""
    for index, path in numbered:
        source = open_source(options, path)
        plan = make_plan(source, index, num_sources, options.shard_size, options.shard_stride, conversion)
        save_plan(options.out, plan)
        progress.listed(source, plan)
        unfinished = []
        for task in shard_tasks(plan, source, options.out):
            report = load_shard_report(options.out, task.name)
            if report is None:
                unfinished.append(task)
            else:
                progress.found(task, report)
        copies.hold(source, [task.name for task in unfinished])
        yield from unfinished


class UnpackedCopies:
    """Deletes the decompressed copy of a source as its last shard is done, so that few are on the disk at a time."""

    def __init__(self) -> None:
        self.copy_of: dict[str, Path] = {}  # by shard
        self.num_users: Counter[Path] = Counter()

    def hold(self, source: Source, shards: list[str]) -> None:
        if source.unpacked is None:
            return
        if not shards:
            source.unpacked.unlink()
        self.copy_of |= dict.fromkeys(shards, source.unpacked)
        self.num_users[source.unpacked] = len(shards)

    def release(self, shard: str) -> None:
        copy = self.copy_of.pop(shard, None)
        if copy is not None:
            self.num_users[copy] -= 1
            if self.num_users[copy] == 0:
                copy.unlink()


# ------------------------------------------------------------------------------------------------------ shards


def pack_shard(task: ShardTask) -> ShardReport:
    """Write one shard, its index and, last, its report."""
    for leftover in task.directory.glob(f".{Path(task.name).stem}.*.tmp"):
        leftover.unlink()  # of a process that was killed here
    temporary = task.directory / f".{task.name}.{time.time_ns()}.tmp"
    report, rows = build_shard(task, temporary)
    publish_shard(task.directory, temporary, report, rows)
    return report


def publish_shard(directory: Path, temporary: Path, report: ShardReport, rows: np.ndarray) -> None:
    """Tar, index, report, in this order: the report's presence vouches for the other two."""
    name = report.info.name
    publish(temporary, directory / name)
    write_whole(directory / index_name(name), npy_bytes(rows))
    save_shard_report(directory, report)


def build_shard(task: ShardTask, path: Path) -> tuple[ShardReport, np.ndarray]:
    """Write the tar to `path`; returns its report and index. The bytes depend on the sources alone."""
    rows = np.zeros(len(task.entries), INDEX_DTYPE)
    bad, warnings, ids = [], Counter[str](), SeenIds(set(), set())
    digest, offset = hashlib.sha256(), 0
    with path.open("wb") as file:
        for row, entry in enumerate(task.entries):
            try:
                sample = read_sample(entry, task.conversion)
                warnings += sample.warnings + ids.add(sample)
            except ValueError as error:
                location = entry.image or entry.annotations
                name = entry.key if location is None or isinstance(location, bytes) else location.name
                bad.append(BadSample(row, entry.key, name, str(error)))
                continue
            pieces, rows[row] = encode_sample(sample.record, sample.jpeg, offset)
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                offset += len(piece)
        file.write(TAR_END)
        digest.update(TAR_END)
    num_masks = int(rows["num_masks"].sum())
    info = ShardInfo(task.name, len(rows), len(rows) - len(bad), num_masks, offset + len(TAR_END), digest.hexdigest())
    kind = "images" if task.conversion.layout == "images" else "sa1b"
    return ShardReport(kind, info, tuple(bad), dict(sorted(warnings.items()))), rows


@dataclass
class SeenIds:
    """Ids met in the shard so far."""

    images: set[int]
    annotations: set[int]

    def add(self, sample: Sample) -> Counter[str]:
        """Raises `ValueError` for an image id met before; returns annotation ids met before as a warning.

        Training tells masks apart within an image only, so the latter is no reason to lose the image.
        """
        record = sample.record
        if record.image_id in self.images:
            raise ValueError(f"image_id {record.image_id} occurs in an earlier sample of the shard")
        self.images.add(record.image_id)
        ids = {annotation["id"] for annotation in record.annotations}
        num_shared = len(ids & self.annotations)
        self.annotations |= ids
        return +Counter({WARN_SHARED_ID: num_shared})


# ---------------------------------------------------------------------------------------------------- progress


class Progress:
    """A bar over the bytes of all sources, with images/s; shards found finished count as done, not as speed."""

    def __init__(self, numbered: list[tuple[int, Path]]) -> None:
        # A folder's size shows only when it is listed, a tar's is known.
        self.guess = {index: path.stat().st_size if path.is_file() else 0 for index, path in numbered}
        self.bar = tqdm(total=sum(self.guess.values()), unit="B", unit_scale=True, smoothing=0.1)
        self.start_s = time.monotonic()
        self.bytes_per_entry: dict[str, float] = {}  # of the source a shard comes from
        self.num_images = self.num_found = self.num_shards = self.num_bad = 0

    def listed(self, source: Source, plan: Plan) -> None:
        self.bar.total += source.num_bytes - self.guess[plan.source_index]
        self.bytes_per_entry.update(dict.fromkeys(plan.shards, source.num_bytes / plan.num_positions))
        self.bar.refresh()

    def found(self, task: ShardTask, report: ShardReport) -> None:
        size = round(self.bytes_per_entry[task.name] * len(task.entries))
        self.bar.initial += size
        self.bar.n += size
        self.num_found += 1
        self.num_bad += len(report.bad)

    def finished(self, task: ShardTask, report: ShardReport) -> None:
        self.num_shards += 1
        self.num_images += report.info.num_samples
        self.num_bad += len(report.bad)
        self.bar.set_postfix_str(f"{self.num_images / self.seconds:.0f} images/s", refresh=False)
        self.bar.update(round(self.bytes_per_entry[task.name] * len(task.entries)))

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.start_s, 1e-6)

    def close(self) -> None:
        self.bar.n = self.bar.total  # a few bytes off by rounding
        self.bar.close()

    def summary(self) -> str:
        rate = (self.bar.n - self.bar.initial) / self.seconds / 1e6
        return (
            f"{self.num_shards} shards packed, {self.num_found} found finished; "
            f"{self.num_images / self.seconds:.0f} images/s, {rate:.0f} MB/s"
        )


# ----------------------------------------------------------------------------------------------------- options


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="layout", required=True)
    for layout, sources_help in (
        ("sa1b", "folders or tars with sa_N.jpg and sa_N.json"),
        ("images", "folders or tars of images or of class folders, or a tar of class tars"),
    ):
        command = commands.add_parser(layout, help=sources_help)
        command.add_argument("sources", type=Path, nargs="+", metavar="SRC", help=sources_help)
        add_pack_options(command)
    coco = commands.add_parser("coco", help="a COCO instances file and its images")
    coco.add_argument("--annotations", type=Path, required=True, help="instances.json")
    coco.add_argument("--images", type=Path, required=True, help="folder that its file names are relative to")
    coco.add_argument("--no-crowds", action="store_true", help="drop iscrowd regions")
    add_pack_options(coco)
    join = commands.add_parser("join", help="join what the tasks of a job array packed")
    join.add_argument("out", type=Path, metavar="DIR")
    join.add_argument("--allow-bad", type=int, default=0, metavar="N")
    return parser.parse_args(arguments)


def add_pack_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.add_argument("--workers", type=int, default=1, help="processes; the bytes do not depend on it")
    command.add_argument("--shard-size", type=int, default=1000, help="positions a shard (SA-1B: 1000 is about 1 GB)")
    command.add_argument("--allow-bad", type=int, default=0, metavar="N", help="bad samples that are not a failure")
    command.add_argument("--source-index", type=int, metavar="I", help="pack this source only, for a job array")
    command.add_argument("--num-sources", type=int, metavar="N", help="how many there are, if only one SRC is given")
    command.add_argument("--shard-stride", type=int, default=100, help="shard numbers set aside for each source")
    command.add_argument("--resize-long-side", type=int, default=0, metavar="PIXELS", help="re-encode larger images")
    command.add_argument("--resize-short-side", type=int, default=0, metavar="PIXELS", help="re-encode larger images")
    command.add_argument("--jpeg-quality", type=int, default=95, help="of images that are re-encoded")
    command.add_argument("--jpeg-check", choices=("decode", "header"), default="decode",
                         help="header: a third of the time; finds cut files, not torn ones")  # fmt: skip
    command.add_argument("--reencode", action="store_true", help="accept PNG, WebP, TIFF, BMP, stored as JPEG")


def conversion_of(options: argparse.Namespace) -> Conversion:
    """Raises `ValueError` for numbers that make no sense."""
    for name, low, high in (
        ("shard_size", 1, 10**6),
        ("shard_stride", 1, 10**6),
        ("resize_long_side", 0, 65535),
        ("resize_short_side", 0, 65535),
        ("jpeg_quality", 1, 100),
        ("allow_bad", 0, sys.maxsize),
    ):
        value = getattr(options, name)
        if not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} should be {low} to {high}, is {value}")
    return Conversion(
        options.layout,
        options.resize_long_side,
        options.resize_short_side,
        options.jpeg_quality,
        options.reencode,
        not getattr(options, "no_crowds", False),
        options.jpeg_check,
    )


if __name__ == "__main__":
    sys.exit(main())
