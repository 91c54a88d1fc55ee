"""Which positions go into which shard: fixed by the listings and these settings before any sample is read.

Shard numbers of source `i` start at `i * shard_stride`, however many shards the sources before it have. So a job array
can pack one source a task, in any order and on any machines, and no task needs to know the others' sources.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from data_tools.sample_format import shard_name, write_whole
from data_tools.sources.listing import Entry, Source
from data_tools.sources.samples import Conversion

PLAN_DIR = "sources"


@dataclass(frozen=True)
class Plan:
    """How one source is cut into shards. Kept as `sources/source-000000.json` in the packed data set."""

    source: str  # name of the folder or tar, without its directory
    source_index: int
    num_sources: int
    num_positions: int
    listing_sha256: str
    shard_size: int  # positions
    shard_stride: int  # shard numbers set aside for one source
    conversion: Conversion

    @property
    def shards(self) -> list[str]:
        """Names of the source's shards."""
        first = self.source_index * self.shard_stride
        return [shard_name(first + i) for i in range(-(-self.num_positions // self.shard_size))]


@dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    directory: Path
    name: str
    entries: tuple[Entry, ...]
    conversion: Conversion


def make_plan(source: Source, index: int, num_sources: int, size: int, stride: int, conversion: Conversion) -> Plan:
    """Raises `ValueError` if the source needs more shards than are set aside for it."""
    plan = Plan(source.path.name, index, num_sources, len(source.entries), source.digest, size, stride, conversion)
    if num_sources > 1 and len(plan.shards) > stride:
        raise ValueError(
            f"{source.path} makes {len(plan.shards)} shards, {stride} numbers are set aside for each source: "
            f"give --shard-stride {len(plan.shards)} or more, the same for all sources"
        )
    return plan


def shard_tasks(plan: Plan, source: Source, directory: Path) -> Iterator[ShardTask]:
    for number, name in enumerate(plan.shards):
        start = number * plan.shard_size
        yield ShardTask(directory, name, source.entries[start : start + plan.shard_size], plan.conversion)


def save_plan(directory: Path, plan: Plan) -> None:
    """Raises `ValueError` if the directory was begun with another source or other settings."""
    path = directory / PLAN_DIR / f"source-{plan.source_index:06d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        before, now = asdict(_load_plan(path)), asdict(plan)
        changed = [f"{field} was {before[field]!r}, is {now[field]!r}" for field in now if before[field] != now[field]]
        if changed:
            raise ValueError(f"{directory} was begun otherwise, choose another --out: {'; '.join(changed)}")
        return
    write_whole(path, (json.dumps(asdict(plan), indent=1) + "\n").encode())


def load_plans(directory: Path) -> list[Plan]:
    """The plans of all sources in order; none if the directory was not written by the packer.

    Raises `ValueError` if a source of the whole is not packed yet, or if plans contradict each other.
    """
    plans = [_load_plan(path) for path in sorted((Path(directory) / PLAN_DIR).glob("source-*.json"))]
    if not plans:
        return []
    settings = {(plan.num_sources, plan.shard_size, plan.shard_stride, plan.conversion) for plan in plans}
    if len(settings) > 1:
        raise ValueError(f"the sources of {directory} were packed with different settings, see {PLAN_DIR}/")
    missing = sorted(set(range(plans[0].num_sources)) - {plan.source_index for plan in plans})
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise ValueError(
            f"{len(missing)} of {plans[0].num_sources} sources of {directory} are not packed yet: "
            f"--source-index {shown}"
        )
    return plans


def _load_plan(path: Path) -> Plan:
    try:
        tree = json.loads(path.read_text())
        return Plan(**{**tree, "conversion": Conversion(**tree["conversion"])})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not parse ({error}): delete it and pack again") from error
