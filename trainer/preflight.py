"""Is this place fit for this run? Asked before training, answered in under a minute with a table and an exit code.

    python -m trainer.preflight launch/configs/sam_vith.yaml                    # this process alone
    torchrun --standalone --nproc-per-node 8 -m trainer.preflight launch/configs/sam_vith.yaml

Under Slurm (launch/train_job.sh) every process writes a report into `--reports DIR`, and one shell reads them with
`--judge DIR`: a node that is so broken that it cannot report is then known as well. Exit codes: 0 fit, 1 some nodes are
not (their names go to `--bad-nodes FILE`) or the processes did not meet, 2 settings, paths or data: no node would do.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_tools.sample_format import load_manifest, open_index
from trainer.checkpoint_files import step_directories, step_of
from trainer.config import Config, ConfigError, SamConfig, is_remote, load_config

# torch and what needs it is imported where it is used: reading reports must not take its ten seconds.

SLOW = 1.5  # times the median of all processes; below that, clocks and neighbours differ anyway
MEET_MINUTES = 0.5
PACKAGES = ("torch", "torchvision", "deepspeed", "numpy", "opencv-python-headless", "simplejpeg", "numba")
GPUS_SEEN = "GPUs seen"
Scope = Literal["node", "run", "meeting"]  # whose fault a failure is: this node, the settings, or the network between


@dataclass(frozen=True)
class Row:
    """One line of the table. `advice` says what to do if it is not `ok`."""

    check: str
    ok: bool
    found: str
    advice: str = ""
    scope: Scope = "node"


@dataclass
class Report:
    """What one process found. Numbers that only mean something beside the other processes' are in `measured`."""

    rank: int
    node: str
    rows: list[Row] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)  # name with unit -> number

    def write(self, directory: Path) -> None:
        """By a rename: a reader sees all or nothing."""
        partial = directory / f"rank{self.rank}.tmp"
        partial.write_text(json.dumps(asdict(self)))
        partial.rename(directory / f"rank{self.rank}.json")

    @classmethod
    def read(cls, path: Path) -> "Report":
        tree = json.loads(path.read_text())
        return cls(**{**tree, "rows": [Row(**row) for row in tree["rows"]]})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    parser.add_argument("--reports", type=Path, help="write this process's report here and judge nothing")
    parser.add_argument("--judge", type=Path, help="read the reports in this directory and check nothing")
    parser.add_argument("--nodes", default="", help="with --judge: names of the nodes that should have reported, a,b,c")
    parser.add_argument("--tasks-per-node", type=int, default=1, help="with --judge: reports expected of each")
    parser.add_argument("--bad-nodes", type=Path, help="with --judge: names of unfit nodes are written here")
    parser.add_argument("--print-step", action="store_true", help="only print the newest checkpoint's step, or -1")
    parser.add_argument("--print-run-dir", action="store_true", help="only print where the run goes")
    options = parser.parse_intermixed_args(arguments)
    if options.judge:
        return judge(options.judge, options.nodes.split(","), options.tasks_per_node, options.bad_nodes)
    try:
        config = load_config(
            options.config, options.overrides, check_paths=not (options.print_step or options.print_run_dir)
        )
    except ConfigError as error:
        print(f"{options.config} cannot be run:\n{error}", file=sys.stderr)
        if options.reports:
            row = Row("config", False, str(error), "mend the settings above", "run")
            Report(int(os.environ.get("SLURM_PROCID", "0")), node_name(), [row]).write(options.reports)
        return 2
    if options.print_step or options.print_run_dir:
        print(newest_step(config.run_dir) if options.print_step else config.run_dir)
        return 0
    return check_here(config, options.reports)


def newest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint that was written to its end, -1 without one."""
    complete = [path for path in step_directories(run_dir / "checkpoints") if (path / "COMPLETE").exists()]
    return step_of(complete[-1]) if complete else -1


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


# ----------------------------------------------------------------------------------------------- one process's checks


def check_here(config: Config, reports: Path | None) -> int:
    """All checks of this process. With `reports`: write them down; else gather them, and rank 0 shows the table."""
    from trainer.distributed import gather_objects, read_place, start_world, stop_world, sum_on_host

    place = read_place(os.environ)
    rank, local_rank = (place[0], place[2]) if place else (0, 0)
    report = Report(rank, node_name())
    report.rows.append(Row("config", True, f"stage {config.stage}, {config.model.size}, engine {config.engine.kind}"))
    report.rows += check_paths(config, first_of_node=local_rank == 0, rank=rank)
    report.versions = versions()
    if reports:
        report.write(reports)  # before anything that may hang
    world = None
    try:
        world = start_world(MEET_MINUTES)
        report.rows.append(Row("processes meet", True, f"{world.size} on {world.num_nodes} nodes", scope="meeting"))
        device_works = attempt("device", check_device, config, report, world)
        if reports:
            report.write(reports)
        attempt("loader", check_loader, config, report, world)
        if reports:
            report.write(reports)
        if not sum_on_host([not device_works], world)[0]:  # else its neighbours would wait for it
            measure_network(report, world)
        if reports:
            report.write(reports)
            return 0
        gathered = gather_objects(report, world)
        return show(judge_reports(gathered, [], 0), None) if world.is_main else 0
    except ValueError as error:  # what this process was told does not suit this machine
        report.rows.append(Row("processes", False, str(error), "a GPU is missing here, or the launcher's numbers are"))
        if reports:
            report.write(reports)
            return 1
        return show(judge_reports([report], [], 0), None)
    except RuntimeError as error:  # what torch.distributed raises when others are missing or cannot be reached
        advice = "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the interface between the nodes; is the port free?"
        report.rows.append(Row("processes meet", False, str(error).splitlines()[0][:200], advice, "meeting"))
        if reports:
            report.write(reports)
            return 1
        return show(judge_reports([report], [], 0), None)
    finally:
        if world is not None:
            stop_world(world)


def attempt(name: str, check: Callable[..., None], config: Config, report: Report, world: Any) -> bool:
    """Run a check; if it cannot be made, that is its result, and the other checks go on. Whether it was made."""
    try:
        check(config, report, world)
    except (RuntimeError, OSError, ValueError) as error:
        advice = "see the failures above, and this process's log; if only this node has it, ask the operators"
        report.rows.append(Row(name, False, (str(error) or repr(error)).splitlines()[0][:300], advice))
        return False
    return True


def check_paths(config: Config, first_of_node: bool, rank: int) -> list[Row]:
    """Run directory and shards as this node sees them; sizes and free space once."""
    if not first_of_node:
        return []
    rows = [check_writable(config.run_dir)]
    if rank == 0:
        rows.append(check_space(config))
    sources = [("data.shards", config.data.shards)]
    if isinstance(config, SamConfig) and config.data.eval_shards:
        sources.append(("data.eval_shards", config.data.eval_shards))
    return rows + [check_shards(name, source) for name, source in sources]


def check_writable(run_dir: Path) -> Row:
    probe = run_dir / f".preflight-{socket.gethostname()}-{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        return Row("run_dir", False, str(error), "mount the shared storage here, or mend its permissions")
    return Row("run_dir", True, f"{run_dir} can be written")


def check_space(config: Config) -> Row:
    """Free space against the checkpoints to come: those that will be kept and the one being written."""
    size = checkpoint_bytes(config)
    existing = len(list((config.run_dir / "checkpoints").glob("step_*")))
    needed = size * max(checkpoints_kept(config) + 1 - existing, 1)
    free = shutil.disk_usage(config.run_dir).free if config.run_dir.exists() else 0
    found = f"{free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB to come ({size / 1e9:.2f} GB a checkpoint)"
    return Row("disk", free > needed, found, "free space, move run_dir, or keep fewer checkpoints", "run")


def checkpoints_kept(config: Config) -> int:
    """At the end of the run: the last, every so-manieth, the best."""
    from trainer.optim import phase_ends, steps_of
    from trainer.plan.timing import num_samples_of

    checkpoint, size = config.checkpoint, config.batch.global_size
    kept = checkpoint.keep_last + checkpoint.keep_best
    if checkpoint.keep_every:
        try:
            num_samples = load_manifest(Path(config.data.shards)).num_samples
        except (OSError, ValueError):  # remote, or another row says what is wrong with it
            num_samples = num_samples_of(config)
        interval = checkpoint.every_steps or steps_of(checkpoint.every_epochs or 0, num_samples, size)
        kept += phase_ends(config.phases, num_samples, size)[-1] // (interval * checkpoint.keep_every)
    return kept


def checkpoint_bytes(config: Config) -> int:
    """Of one checkpoint, as the plan says."""
    from trainer.plan import memory

    return memory.checkpoint_bytes(config)


def check_shards(name: str, source: str) -> Row:
    """Manifest, and every shard's size and the index against it; no byte of a shard is read."""
    if is_remote(source):
        return Row(name, True, f"{source} is remote, its shards are checked when they are fetched")
    directory = Path(source)
    hint = f"`python -m data_tools.verify {source}` says more and repairs; or the storage is not mounted here"
    try:
        manifest = load_manifest(directory)
    except (OSError, ValueError) as error:
        return Row(name, False, str(error), hint)
    wrong = []
    for shard in manifest.shards:
        path = directory / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.num_bytes:
            wrong.append(f"{shard.name} " + ("missing" if size is None else f"has {size} bytes, not {shard.num_bytes}"))
    try:
        rows, positions = len(open_index(directory)["image_id"]), sum(shard.num_positions for shard in manifest.shards)
        if rows != positions:
            wrong.append(f"the index has {rows} rows, not {positions}: `python -m data_tools.index {source}`")
    except (OSError, ValueError) as error:
        wrong.append(str(error))
    total = sum(shard.num_bytes for shard in manifest.shards)
    found = f"{len(manifest.shards)} shards, {total / 1e9:.1f} GB, {manifest.num_samples} samples"
    return Row(name, not wrong, "; ".join(wrong[:3]) + f" ({len(wrong)} wrong)" if wrong else found, hint)


def versions() -> dict[str, str]:
    """What must be equal on all nodes."""
    import torch

    found = {"python": platform.python_version(), GPUS_SEEN: str(torch.cuda.device_count())}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            words = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()
            found["driver"] = words[0] if words else "none"
        except subprocess.TimeoutExpired:  # as it is with a GPU that fell off its bus
            found["driver"] = "hangs"
    return found


def check_device(config: Config, report: Report, world: Any) -> None:
    """Speed of arithmetic and of copies here, and on a GPU its memory against the plan."""
    import torch

    device = world.device
    on_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = timed(lambda: a @ a, device)
    report.measured["matmul TFLOP/s"] = 2 * size**3 / seconds / 1e12
    source = torch.randn(16 << 20).pin_memory() if on_gpu else torch.randn(4 << 20)
    target = torch.empty_like(source, device=device)
    report.measured["copy GB/s"] = source.numel() * 4 / timed(lambda: target.copy_(source), device) / 1e9
    if not on_gpu:
        report.rows.append(Row("GPU", True, "none: this process would train on the CPU"))
        return
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    report.measured["free GPU GiB"] = free / 2**30
    if world.is_main:
        from trainer.plan import memory

        needed = memory.estimate(config, world.size, world.local_size).total
        report.rows.append(memory_row(needed, free, total, memory.not_counted(config)))


def memory_row(needed: float, free: float, total: float, not_counted: list[str]) -> Row:
    """A plan that leaves settings out may be too high, so it only warns."""
    fits = needed < 0.95 * free
    found = f"plan needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} of {total / 2**30:.1f} are free"
    if not_counted:
        found += f"{'' if fits else ': WARNING, it may not fit'}; not counted: {', '.join(not_counted)}"
    advice = "`python -m trainer.plan` names settings that fit; or another process holds the GPU (nvidia-smi)"
    ok = fits or bool(not_counted)
    return Row("GPU memory", ok, found, advice, "node" if free < 0.8 * total else "run")


def timed(function: Callable[[], Any], device: Any, repeats: int = 5) -> float:
    """Least seconds of a few calls: the others waited for something."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    times = []
    for _ in range(repeats + 1):
        wait()
        started = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def check_loader(config: Config, report: Report, world: Any) -> None:
    """Images a second of one worker here, on the first process of each node, against what the GPUs will take."""
    if world.local_rank != 0:
        return
    import torch

    from trainer.plan.hardware import gpu_named
    from trainer.plan.timing import images_per_second
    from trainer.stages import build_pipeline

    pipeline = build_pipeline(config)
    pipeline.dataset[[0]]  # compiles, opens
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 3.0:
        pipeline.dataset[[count % pipeline.order.num_samples]]
        count += 1
    speed = count / (time.perf_counter() - started)
    report.measured["loader images/s a worker"] = speed
    gpu = gpu_named(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
    here = speed * max(config.data.workers, 1)
    if gpu is None:
        found = f"{here:.1f} images/s a process with {config.data.workers} workers; no known GPU to compare with"
        report.rows.append(Row("loader", True, found))
        return
    needed = images_per_second(config, gpu)
    found = f"{here:.1f} images/s a process with {config.data.workers} workers, the GPU may take {needed:.1f}"
    cores = len(os.sched_getaffinity(0))
    advice = f"raise data.workers to {needed / speed:.0f} (this process may use {cores} cores), or pack smaller images"
    report.rows.append(Row("loader", here > needed, found, advice, "run"))


def measure_network(report: Report, world: Any) -> None:
    """All-reduce over all processes; and a ring from node to node, whose times differ by node."""
    if world.size == 1:
        return
    import torch
    import torch.distributed as dist

    on_gpu = world.device.type == "cuda"
    tensor = torch.ones((64 << 20) if on_gpu else (1 << 20), device=world.device)
    seconds = timed(lambda: dist.all_reduce(tensor), world.device)
    num_bytes = tensor.numel() * 4
    report.measured["all-reduce GB/s"] = 2 * (world.size - 1) / world.size * num_bytes / seconds / 1e9
    if world.num_nodes == 1:
        return
    # Neighbours in the ring are the same local rank of the next node. One at a time waits for no third.
    after, before = (world.rank + world.local_size) % world.size, (world.rank - world.local_size) % world.size
    received = torch.empty_like(tensor)

    def exchange() -> None:
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, tensor, after), dist.P2POp(dist.irecv, received, before)]
        )
        for work in works:
            work.wait()

    report.measured["ring GB/s"] = num_bytes / timed(exchange, world.device) / 1e9


# ----------------------------------------------------------------------------------------------- reading the reports


@dataclass
class Verdict:
    rows: list[tuple[str, Row]]  # where (node, rank), what
    bad_nodes: dict[str, str]  # name -> why
    code: int


def judge(directory: Path, nodes: list[str], tasks_per_node: int, bad_nodes: Path | None) -> int:
    """Read all reports of `directory`, print the table, write the names of bad nodes, return the exit code."""
    reports = [Report.read(path) for path in sorted(directory.glob("rank*.json"))]
    return show(judge_reports(reports, [node for node in nodes if node], tasks_per_node), bad_nodes)


def judge_reports(reports: list[Report], nodes: list[str], tasks_per_node: int) -> Verdict:
    """Compare the processes with each other: silent nodes, other versions, slow ones; then whose fault it is."""
    rows = [(f"{report.node} rank {report.rank}", row) for report in reports for row in report.rows]
    bad = {report.node: row.check for report in reports for row in report.rows if not row.ok and row.scope == "node"}
    counts = Counter(report.node for report in reports)
    for node in nodes:
        if counts[node] < tasks_per_node:
            found = f"{counts[node]} of {tasks_per_node} processes reported"
            rows.append((node, Row("report", False, found, "the node is dead or python does not start there: its log")))
            bad[node] = "no report"
    for name, report, row in [*other_versions(reports), *slow_ones(reports)]:
        rows.append((f"{report.node} rank {report.rank}", row))
        bad.setdefault(report.node, name)
    rows += [("all", row) for row in spread(reports)]
    failed = [row for _, row in rows if not row.ok]
    all_nodes = set(nodes) | set(counts)
    if any(row.scope == "run" for row in failed):
        return Verdict(rows, {}, 2)
    if len(bad) > max(1, len(all_nodes) // 4) or (bad and len(bad) == len(all_nodes)):
        # Many nodes do not break at once: storage that is not mounted, a wrong environment. Blame none.
        return Verdict(rows, {}, 2)
    # Where a node is bad, that the others did not meet it is a consequence.
    return Verdict(rows, bad, 1 if failed else 0)


def other_versions(reports: Iterable[Report]) -> list[tuple[str, Report, Row]]:
    """Processes whose versions are not the majority's."""
    found = []
    for name in sorted({name for report in reports for name in report.versions}):
        having = Counter(report.versions[name] for report in reports if name in report.versions)
        usual = having.most_common(1)[0][0]
        for report in reports:
            if report.versions.get(name, usual) != usual:
                text = f"{name} {report.versions[name]}, elsewhere {usual}"
                advice = "install the same environment"
                if name == GPUS_SEEN or report.versions[name] == "hangs":
                    advice = "a GPU or its driver does not answer: see nvidia-smi there"
                found.append(("versions", report, Row("versions", False, text, advice)))
    return found


def slow_ones(reports: list[Report]) -> list[tuple[str, Report, Row]]:
    """Processes below the median of all by the factor SLOW, in what each does by itself or with a neighbour."""
    found = []
    for name in ("matmul TFLOP/s", "copy GB/s", "ring GB/s", "free GPU GiB"):
        values = [report.measured[name] for report in reports if name in report.measured]
        if len(values) < 3 and name != "free GPU GiB":
            continue  # of two, nobody can say which is the slow one
        median = statistics.median(values) if values else 0.0
        for report in reports:
            if name in report.measured and report.measured[name] * SLOW < median:
                text = f"{name} {report.measured[name]:.3g}, median {median:.3g}"
                advice = "another job on the node? clocks, cooling, cable: ask the operators"
                found.append((name, report, Row("slow", False, text, advice)))
    return found


def spread(reports: list[Report]) -> list[Row]:
    """What was measured, over all processes."""
    rows = []
    for name in sorted({name for report in reports for name in report.measured}):
        values = [report.measured[name] for report in reports if name in report.measured]
        text = f"least {min(values):.3g}, median {statistics.median(values):.3g}, most {max(values):.3g}"
        rows.append(Row(name, True, text))
    return rows


def show(verdict: Verdict, bad_nodes: Path | None) -> int:
    """Print failures in full and what is fine once a check; return the exit code."""
    lines, shown = [], set()
    for where, row in verdict.rows:
        if row.ok and row.check in shown:
            continue
        shown.add(row.check)
        lines.append(f"{'ok  ' if row.ok else 'FAIL'}  {row.check:<24} {where:<18} {row.found}")
        if not row.ok:
            lines.append(f"      {'':<24} {'':<18} -> {row.advice}")
    print("\n".join(lines))
    if bad_nodes is not None and verdict.bad_nodes:
        bad_nodes.write_text("".join(f"{node}\n" for node in verdict.bad_nodes))
    for node, reason in verdict.bad_nodes.items():
        print(f"bad node {node}: {reason}")
    print({0: "fit to run", 1: "not fit: nodes", 2: "not fit: settings, data or the whole cluster"}[verdict.code])
    return verdict.code


if __name__ == "__main__":
    sys.exit(main())
