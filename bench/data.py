"""Claim: a sample costs little more than the decoding of its JPEG, and packing with every check is not slow.

    python -m bench.data                         # everything, about four minutes
    python -m bench.data sam mae --repeats 9     # parts: sam, mae, pack, memory, open
    python -m bench.data memory --long           # 10,000 samples instead of 2,000
    python -m bench.data --out data.json

Both sides run in turn in the same run, on one thread pinned to one core, from files in the page cache; the figures are
medians over `--repeats`, of the process's own CPU time (packing: of all its processes; wall time beside it).

sam     one sample = a 1024 x 1024 image, up to 64 masks as a 256 x 256 target, their first prompts. The peer decodes
        with Pillow, decodes the same number of masks with pycocotools and resizes the bitmaps, as the loaders of sam2
        ("bytes": one by one) and efficientvit ("floats": as one float stack) do; it draws no prompt. Augmented: scale
        0.8 to 1.2, crop or pad, flip.
mae     one sample = a random crop to 224 x 224 and a flip. The peer is torchvision over Pillow in a stock DataLoader,
        left in bytes as ours is ("bytes"), or normalised floats as in MAE's code ("floats").
pack    MB of source a second, against webdataset's ShardWriter, which checks nothing and syncs nothing to the disk.
memory  of a loader's worker process that reads on and on.
open    CPU seconds and memory of opening a fabricated data set of 1000 shards and 11,185,000 samples.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "launch" / "configs"
AUGMENTED = ["data.scale_jitter=[0.8,1.2]", "data.horizontal_flip=0.5"]
PLAIN = ["data.scale_jitter=null", "data.horizontal_flip=0"]
INPUT, TARGET, MAX_MASKS = 1024, 256, 64  # pixels, pixels, masks an image
CROP, MAE_BATCH = 224, 32  # pixels, images
PACK_COPIES, PACK_SHARD = 24, 24  # of the genuine files, samples a shard: enough shards for two workers
VERSIONS = ("numpy", "pillow", "simplejpeg", "numba", "torch", "torchvision", "pycocotools", "webdataset")
PACKERS = (  # name, workers, --jpeg-check
    ("peer, no checks", 0, ""),
    ("1 worker", 1, "decode"),
    ("1 worker, JPEGs by header", 1, "header"),
    ("2 workers", 2, "decode"),
)
PARTS = ("sam", "mae", "pack", "memory", "open")
OPEN_SHARDS, OPEN_SAMPLES = 1000, 11_185_000  # as SA-1B

Row = dict[str, Any]


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of one call, seconds: waiting for a core that others hold does not count."""
    start = time.process_time()
    work()
    return time.process_time() - start


def medians(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each, taken in turn so that a change of clock or load meets all alike; one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeats + 1):
        for name, work in works.items():
            seconds = cpu_seconds(work)
            if number:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def pack_quietly(*arguments: str) -> None:
    """`data_tools.pack`; its progress is shown only if it fails. Raises `RuntimeError`."""
    from data_tools import pack

    messages = io.StringIO()
    with contextlib.redirect_stderr(messages):
        status = pack.main(list(arguments))
    if status not in (0, None):
        raise RuntimeError(f"packing failed with status {status}:\n{messages.getvalue()}")


def open_dataset(stage: str, shards: Path, *overrides: str) -> Any:
    """The dataset that training with the full-size recipe reads, over `shards`."""
    return open_pipeline(stage, shards, *overrides)[1].dataset


def open_pipeline(stage: str, shards: Path, *overrides: str) -> tuple[Any, Any]:
    """Config and data pipeline of the full-size recipe over `shards`."""
    from trainer.config import load_config
    from trainer.stages import build_pipeline

    common = [f"data.shards={shards}", f"run_dir={shards}/run", *overrides]
    if stage == "sam":
        # The file asks for the weights of a run that is not here; the loader reads none.
        common += [
            "data.holdout_images=0",
            f"data.eval_shards={shards}",
            "model.init_from=null",
            f"data.max_masks={MAX_MASKS}",
        ]
    config = load_config(CONFIGS / f"{stage}_vith.yaml", common)
    return config, build_pipeline(config)


# ------------------------------------------------------------------------------------------------------------- sam


def peer_sam_sample(
    jpeg: Path, rng: np.random.Generator, augmented: bool, floats: bool = False
) -> tuple[np.ndarray, Any]:
    """Image (1024, 1024, 3) and targets (64, 256, 256), both uint8, by way of full bitmaps."""
    import torch
    from PIL import Image
    from pycocotools import mask as coco_mask
    from torchvision.transforms import functional

    with Image.open(jpeg) as file:
        image = file.convert("RGB")
    annotations = json.loads(jpeg.with_suffix(".json").read_bytes())["annotations"]
    chosen = rng.permutation(len(annotations))[:MAX_MASKS]
    scale, shift, flip = (rng.uniform(0.8, 1.2), rng.random(2), rng.random() < 0.5) if augmented else (1, (0, 0), False)
    factor = scale * INPUT / max(image.size)
    width, height = round(image.width * factor), round(image.height * factor)
    share = TARGET / INPUT
    size = [max(1, round(height * share)), max(1, round(width * share))]
    bitmaps = [torch.from_numpy(coco_mask.decode(annotations[number]["segmentation"])) for number in chosen]
    if floats:
        masks = (
            torch.nn.functional.interpolate(torch.stack(bitmaps)[:, None].float(), size, mode="bilinear")[:, 0] > 0.5
        )
    else:
        masks = torch.stack([functional.resize(bitmap[None], size)[0] for bitmap in bitmaps])
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    pixels = np.zeros((INPUT, INPUT, 3), np.uint8)
    targets = torch.zeros((len(masks), TARGET, TARGET), dtype=torch.uint8)
    y, x = int(shift[0] * max(0, height - INPUT)), int(shift[1] * max(0, width - INPUT))
    content = resized[y : y + INPUT, x : x + INPUT]
    pixels[: content.shape[0], : content.shape[1]] = content[:, ::-1] if flip else content
    y, x = int(y * share), int(x * share)
    stack = masks[:, y : y + TARGET, x : x + TARGET]
    targets[:, : stack.shape[1], : stack.shape[2]] = stack.flip(-1) if flip else stack
    return pixels, targets


def decode_floor(jpegs: Sequence[bytes], reduced: bool) -> None:
    """Decode to RGB and nothing else; reduced: to the smallest scale that libjpeg-turbo has and a 1024 input needs."""
    import simplejpeg

    for jpeg in jpegs:
        if reduced:
            height, width, *_ = simplejpeg.decode_jpeg_header(jpeg)
            factor = INPUT / max(height, width)
            simplejpeg.decode_jpeg(jpeg, "RGB", min_height=round(height * factor), min_width=round(width * factor))
        else:
            simplejpeg.decode_jpeg(jpeg, "RGB")


def sam_stages(dataset: Any, positions: range) -> dict[str, Callable[[], object]]:
    """The parts of a sample's way, each over all positions; "targets" includes "parse"."""
    from data_tools import rle
    from trainer.data.order import MASK_ORDER, SAMPLE_DRAWS, keyed_rng
    from trainer.data.sam_data import choose_masks, decode_placed, draw, place
    from trainer.prompts import first_prompt

    config, ready = dataset.config, []
    for position in positions:
        raw = dataset.reader.read(dataset.order.row(position))
        placement = place(raw.record.height, raw.record.width, INPUT, 1.0, (0.0, 0.0), False)
        order = keyed_rng(config.seed, MASK_ORDER, position).permutation(len(raw.record.annotations))
        draws = draw(keyed_rng(config.seed, SAMPLE_DRAWS, position), config, dataset.num_blocks)
        chosen, _ = choose_masks(raw.record, placement, order, config)
        ready.append((raw, placement, order, draws, chosen))

    def prompts() -> None:
        for _, placement, _, draws, chosen in ready:
            transform = placement.transform(INPUT, INPUT)
            for m, mask in enumerate(chosen):
                first_prompt(mask, placement.window, transform, draws.prompts[m], config.prompts)

    return {
        "read and JSON": lambda: [dataset.reader.read(dataset.order.row(p)) for p in positions],
        "image (JPEG, resize)": lambda: [
            decode_placed(raw.jpeg, raw.record.height, raw.record.width, placement) for raw, placement, *_ in ready
        ],
        "parse runs": lambda: [
            rle.parse(raw.record.annotations[i]["segmentation"]) for raw, _, order, *_ in ready for i in order[:64]
        ],
        "targets": lambda: [choose_masks(raw.record, placed, order, config) for raw, placed, order, *_ in ready],
        "prompts": prompts,
        "whole sample": lambda: [dataset[[p]] for p in positions],
    }


def bench_sam(options: argparse.Namespace, scratch: Path) -> list[Row]:
    source = options.data / "sa1b_genuine"
    jpegs = sorted(source.glob("*.jpg"))
    pack_quietly("sa1b", str(source), "--out", str(scratch / "sam"))
    number = len(jpegs)
    plain, augmented = (open_dataset("sam", scratch / "sam", *more) for more in (PLAIN, AUGMENTED))
    contents = [jpeg.read_bytes() for jpeg in jpegs]
    rng = np.random.default_rng(0)
    seconds = medians(
        {
            "ours": lambda: [plain[[p]] for p in range(number)],
            "ours, augmented": lambda: [augmented[[p]] for p in range(number)],
            "peer, bytes": lambda: [peer_sam_sample(jpeg, rng, False) for jpeg in jpegs],
            "peer, bytes, augmented": lambda: [peer_sam_sample(jpeg, rng, True) for jpeg in jpegs],
            "peer, floats": lambda: [peer_sam_sample(jpeg, rng, False, floats=True) for jpeg in jpegs],
            "JPEG floor, full size": lambda: decode_floor(contents, False),
            "JPEG floor, reduced": lambda: decode_floor(contents, True),
        },
        options.repeats,
    )
    stages = medians(sam_stages(plain, range(number)), options.repeats)
    rows = [
        {"what": f"sam: {name}", "ms": 1e3 * value / number, "samples_s": number / value}
        for name, value in seconds.items()
    ]
    rows += [{"what": f"sam stage: {name}", "ms": 1e3 * value / number} for name, value in stages.items()]
    for ours, other in (
        ("ours", "peer, bytes"),
        ("ours", "peer, floats"),
        ("ours", "JPEG floor, full size"),
        ("ours", "JPEG floor, reduced"),
        ("ours, augmented", "peer, bytes, augmented"),
        ("ours, augmented", "JPEG floor, full size"),
    ):
        rows.append({"what": f"sam: {other} / {ours}", "ratio": seconds[other] / seconds[ours]})
    return rows


# ------------------------------------------------------------------------------------------------------------- mae


def peer_mae_epoch(source: Path, floats: bool) -> Callable[[], None]:
    """Reads every image once, in a stock DataLoader without workers."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    steps: list[Any] = [transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip()]
    if floats:
        steps += [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    else:
        steps += [transforms.PILToTensor()]
    folder = datasets.ImageFolder(str(source), transforms.Compose(steps))
    loader = DataLoader(folder, batch_size=MAE_BATCH, shuffle=True, num_workers=0)

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch


def mae_epoch(dataset: Any) -> Callable[[], None]:
    number = dataset.order.num_samples

    def epoch() -> None:
        for start in range(0, number, MAE_BATCH):
            dataset[range(start, min(start + MAE_BATCH, number))]

    return epoch


def bench_mae(options: argparse.Namespace, scratch: Path) -> list[Row]:
    source = options.data / "photos"
    pack_quietly("images", str(source), "--out", str(scratch / "mae"))
    pack_quietly("images", str(source), "--out", str(scratch / "mae256"), "--resize-short-side", "256")
    full, small = open_dataset("mae", scratch / "mae"), open_dataset("mae", scratch / "mae256")
    number = full.order.num_samples
    jpegs = [full.reader.read(row).jpeg for row in range(number)]
    seconds = medians(
        {
            "ours": mae_epoch(full),
            "ours, shards of short side 256": mae_epoch(small),
            "peer, bytes": peer_mae_epoch(source, floats=False),
            "peer, floats": peer_mae_epoch(source, floats=True),
            "JPEG floor, full size": lambda: decode_floor(jpegs, False),
        },
        options.repeats,
    )
    rows = [
        {"what": f"mae: {name}", "ms": 1e3 * value / number, "samples_s": number / value}
        for name, value in seconds.items()
    ]
    for ours in ("ours", "ours, shards of short side 256"):
        for peer in ("peer, bytes", "peer, floats"):
            rows.append({"what": f"mae: {peer} / {ours}", "ratio": seconds[peer] / seconds[ours]})
    rows.append(
        {"what": "mae: JPEG floor, full size / ours", "ratio": seconds["JPEG floor, full size"] / seconds["ours"]}
    )
    return rows


# ------------------------------------------------------------------------------------------------------------ pack


def copy_samples(source: Path, target: Path) -> float:
    """Copies of the genuine samples under ids of their own; returns their size in MB (10^6 bytes)."""
    target.mkdir()
    size = 0
    for path in sorted(source.glob("*.json")):
        tree, jpeg = json.loads(path.read_bytes()), path.with_suffix(".jpg").read_bytes()
        for copy in range(PACK_COPIES):
            number = tree["image"]["image_id"] + copy * 10**7
            tree_copy = tree | {"image": tree["image"] | {"image_id": number, "file_name": f"sa_{number}.jpg"}}
            data = json.dumps(tree_copy, separators=(",", ":")).encode()
            (target / f"sa_{number}.json").write_bytes(data)
            (target / f"sa_{number}.jpg").write_bytes(jpeg)
            size += len(jpeg) + len(data)
    return size / 1e6


def peer_pack(source: Path, target: Path) -> None:
    """What anyone would write with webdataset: bytes in, bytes out."""
    from webdataset import ShardWriter

    target.mkdir()
    with ShardWriter(str(target / "shard-%06d.tar"), maxcount=PACK_SHARD, verbose=0) as writer:
        for path in sorted(source.glob("*.jpg")):
            writer.write(
                {"__key__": path.stem, "jpg": path.read_bytes(), "json": path.with_suffix(".json").read_bytes()}
            )


def bench_pack(options: argparse.Namespace, scratch: Path) -> list[Row]:
    """Two workers need two cores, so this part alone is not pinned."""
    source = scratch / "copies"
    size = copy_samples(options.data / "sa1b_genuine", source)
    os.sched_setaffinity(0, options.cores)
    times: dict[str, list[tuple[float, float]]] = {}
    for repeat in range(min(options.repeats, 3)):
        for name, workers, check in PACKERS:
            target = scratch / f"packed_{workers}_{check}_{repeat}"
            start, start_cpu = time.perf_counter(), sum(os.times()[:4])
            if workers == 0:
                peer_pack(source, target)
            else:
                pack_quietly("sa1b", str(source), "--out", str(target), "--shard-size", str(PACK_SHARD),
                             "--workers", str(workers), "--jpeg-check", check)  # fmt: skip
            # The first four: user and system time of this process and of those it waited for.
            times.setdefault(name, []).append((sum(os.times()[:4]) - start_cpu, time.perf_counter() - start))
            subprocess.run(["rm", "-r", str(target)], check=True)
    middle = {name: np.median(np.array(values), axis=0) for name, values in times.items()}
    rows: list[Row] = [
        {"what": f"pack: {name}", "MB_per_cpu_s": size / cpu, "MB_per_wall_s": size / wall}
        for name, (cpu, wall) in middle.items()
    ]
    peer = middle["peer, no checks"]
    for name, *_ in PACKERS[1:]:
        by_cpu, by_wall = peer / middle[name]
        rows.append({"what": f"pack: {name} / peer", "by_cpu": by_cpu, "by_wall": by_wall})
    return rows


# ---------------------------------------------------------------------------------------------------------- memory


def memory_mb(pid: int | str = "self") -> dict[str, float]:
    """Memory of a process, MB (10^6 bytes): resident (RSS), its fair share (PSS), and its own alone (USS)."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, kilobytes = line.split()[:2]
        fields[name.rstrip(":")] = int(kilobytes) * 1024 / 1e6
    return {"rss": fields["Rss"], "pss": fields["Pss"], "uss": fields["Private_Clean"] + fields["Private_Dirty"]}


def read_samples(stage: str, shards: Path, stops: Sequence[int]) -> None:
    """Take batches from a loader with one worker, as training does; print the worker's memory as JSON at each stop."""
    from trainer.data.loader import build_batches
    from trainer.distributed import single_process

    size = 1 if stage == "sam" else MAE_BATCH
    more = [f"batch.global_size={size}", f"batch.micro={size}", "data.workers=1"]
    config, pipeline = open_pipeline(stage, shards, *(AUGMENTED if stage == "sam" else []), *more)
    batches = build_batches(pipeline.dataset, config, single_process("cpu"), 0, -(-stops[-1] // size))
    done = 0
    for stop in [size, *stops]:
        while done < stop:
            next(batches)
            done += size
        (worker,) = multiprocessing.active_children()
        print(json.dumps({"samples": done, **memory_mb(worker.pid or 0)}), flush=True)
    batches.close()


def bench_memory(options: argparse.Namespace, scratch: Path) -> list[Row]:
    stops = [200, 2000, *([10_000] if options.long else [])]
    rows: list[Row] = []
    for stage, layout, folder in (("sam", "sa1b", "sa1b_genuine"), ("mae", "images", "photos")):
        shards = scratch / f"memory_{stage}"
        pack_quietly(layout, str(options.data / folder), "--out", str(shards))
        command = [sys.executable, "-m", "bench.data", "--read", stage, str(shards), *map(str, stops)]
        output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
        for line in map(json.loads, output.splitlines()):
            name = f"memory: {stage} worker after {line['samples']} samples"
            rows.append({"what": name} | {f"{kind}_mb": line[kind] for kind in ("rss", "pss", "uss")})
    return rows


# ------------------------------------------------------------------------------------------------------------ open


def fabricate(directory: Path) -> None:
    """Manifest and index of a data set of SA-1B's size, without its shards."""
    from data_tools.sample_format import INDEX_DIR, INDEX_DTYPE, Manifest, ShardInfo, save_manifest, shard_name

    per_shard = OPEN_SAMPLES // OPEN_SHARDS
    shards = tuple(
        ShardInfo(shard_name(i), per_shard, per_shard, 100 * per_shard, 10**10, "0" * 64) for i in range(OPEN_SHARDS)
    )
    save_manifest(directory, Manifest("sa1b", shards))
    (directory / INDEX_DIR).mkdir()
    for column in INDEX_DTYPE.names or ():
        values = np.arange(OPEN_SAMPLES) if column == "image_id" else np.full(OPEN_SAMPLES, 1000)
        np.save(directory / INDEX_DIR / f"{column}.npy", values.astype(INDEX_DTYPE[column]))


def open_once(shards: Path) -> None:
    """Open as a rank does, then as its worker does from the rank's pickle; print CPU seconds and memory as JSON."""
    import pickle

    from trainer.data.order import DataOrder
    from trainer.data.shards import ShardReader

    start, before = time.process_time(), memory_mb()
    reader = ShardReader(shards)
    opened = time.process_time() - start
    rows, _ = reader.split(2000)
    order = DataOrder(rows, 0, 64, 4096)
    ready, after = time.process_time() - start, memory_mb()
    data = pickle.dumps((reader, order))
    del reader, rows, order
    start, before_worker = time.process_time(), memory_mb()
    reader, order = pickle.loads(data)
    worker = time.process_time() - start
    for position in range(0, OPEN_SAMPLES, OPEN_SAMPLES // 1000):
        int(reader.columns["jpg_size"][order.row(position)])
    after_worker = memory_mb()
    rank = {"what": "open: a rank", "open_cpu_s": opened, "open_and_hold_out_cpu_s": ready}
    print(json.dumps(rank | {f"{kind}_mb": after[kind] - before[kind] for kind in ("rss", "uss")}))
    row = {"what": "open: its worker, with 1000 look-ups", "open_cpu_s": worker, "pickle_mb": len(data) / 1e6}
    print(json.dumps(row | {f"{kind}_mb": after_worker[kind] - before_worker[kind] for kind in ("rss", "uss")}))


def bench_open(options: argparse.Namespace, scratch: Path) -> list[Row]:
    """In a process of its own, after the imports: what the data set adds to it."""
    fabricate(scratch)
    command = [sys.executable, "-m", "bench.data", "--open", str(scratch)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return [json.loads(line) for line in output.splitlines()]


# ------------------------------------------------------------------------------------------------------------ main


def machine() -> dict[str, Any]:
    """Hardware, versions and how busy the machine is."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    } | versions


def show(rows: list[Row]) -> None:
    for row in rows:
        figures = "  ".join(f"{value:9.2f} {name}" for name, value in row.items() if name != "what")
        print(f"{row['what']:52} {figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="holds sa1b_genuine and photos")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--long", action="store_true", help="memory: 10,000 samples")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--read", nargs="+", help=argparse.SUPPRESS)  # STAGE SHARDS STOP...: the process looked at
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)  # fabricated data set: the same
    options = parser.parse_args()
    if options.open:
        open_once(options.open)
        return
    if options.read:
        stage, shards, *stops = options.read
        read_samples(stage, Path(shards), [int(stop) for stop in stops])
        return
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if not (options.data / "sa1b_genuine").is_dir():
        parser.error(f"no sa1b_genuine in {options.data}")
    if set(options.parts or PARTS) & {"sam", "mae"}:
        import torch  # not at the top: the packer's worker processes import this file too

        torch.set_num_threads(1)
    options.cores = os.sched_getaffinity(0)
    report: dict[str, Any] = {"machine": machine(), "rows": []}
    print(report["machine"])
    benches = {"sam": bench_sam, "mae": bench_mae, "pack": bench_pack, "memory": bench_memory}
    benches["open"] = bench_open
    for part in options.parts or PARTS:
        os.sched_setaffinity(0, {max(options.cores)})
        with tempfile.TemporaryDirectory() as scratch:
            rows = benches[part](options, Path(scratch))
        show(rows)
        report["rows"] += rows
    report["load_after"] = os.getloadavg()[0]
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
