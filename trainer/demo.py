"""The main job in miniature, as a user would run it: every step is a command, printed before it runs.

    make demo                      # synthetic scenes with exact masks; must learn
    DATA=folder make demo          # your own folder of sa_N.jpg + sa_N.json; reports only
    SEED=1 make demo

Synthesize -> pack -> MAE -> carry the encoder over -> SAM -> evaluate on held-out images -> export. Started again, it
goes on where it was; with other settings it starts anew. GPUs are used if there are any, one process each, else two
processes over gloo.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from trainer.outputs import check_folder

TRAIN_IMAGES, EVAL_IMAGES = 4000, 100
EVAL_SEED_OFFSET = 1000  # scenes of seeds that training never sees
MIN_OVER_FILLED_BOX, MIN_OVER_ONE_CLICK = 0.10, 0.03  # what "it learns" means
CLICKS = (1, 3, 5)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--data", type=Path, help="folder in the SA-1B format; default: synthetic scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: does it run?")
    options = parser.parse_args(arguments)
    out: Path = options.out
    try:
        check_folder("--out", out)
        if options.data and not options.data.is_dir():
            raise ValueError(f"DATA={options.data} is no folder")
    except ValueError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    prepare(
        out,
        {"data": listing(options.data), "seed": options.seed, "quick": options.quick},
    )
    started = time.monotonic()
    try:
        train_shards, sam_data = pack_data(out, options.data, options.seed, options.quick)
        sam_run = train_both(out, train_shards, sam_data, options.seed, options.quick)
        trained = evaluate(sam_run, out / "scores.json", ["--picture", str(out / "masks.png")])
        untrained = evaluate(sam_run, out / "scores_untrained.json", ["--untrained"])
        run("trainer.export", str(sam_run), "--format", "segment_anything", "--out", str(out / "sam_tiny.pth"))
    except subprocess.CalledProcessError as error:
        print(f"demo: stopped, since the command above ended with exit code {error.returncode}", file=sys.stderr)
        return 1
    table = score_table(trained, untrained)
    (out / "table.md").write_text(table)
    print(f"\n{table}\n{time.monotonic() - started:.0f} s. Pictures: {out}/masks.png; curves: make tensorboard")
    if options.data or options.quick:
        return 0
    return judge(trained)


def listing(data: Path | None) -> list[object] | None:
    """What a folder is and holds, so that one with other files starts anew."""
    if data is None:
        return None
    files = sorted((path.name, path.stat().st_size) for path in data.iterdir())
    return [str(data.resolve()), hashlib.sha256(json.dumps(files).encode()).hexdigest()]


def prepare(out: Path, settings: dict[str, object]) -> None:
    """Go on in `out` if it was made with the same settings, else start anew."""
    stamp = out / "settings.json"
    if out.exists() and (not stamp.is_file() or json.loads(stamp.read_text()) != settings):
        if any(out.iterdir()) and not stamp.is_file():
            raise SystemExit(f"demo: {out} exists and is not from a demo; remove it or give another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps(settings))


def pack_data(out: Path, data: Path | None, seed: int, quick: bool) -> tuple[Path, list[str]]:
    """Shards to train on, and the SAM settings that say where evaluation reads."""
    shards = out / "shards" / "train"
    if data is not None:
        run("data_tools.pack", "sa1b", str(data), "--out", str(shards), "--workers", "2", "--allow-bad", "1000000")
        num_samples = json.loads((shards / "manifest.json").read_text())["totals"]["num_samples"]
        # A fifth is held out, by hash of the image id.
        return shards, [f"data.holdout_images={max(1, num_samples // 5)}", "data.eval_shards=null"]
    eval_shards = out / "shards" / "eval"
    counts = (64, 8) if quick else (TRAIN_IMAGES, EVAL_IMAGES)
    for name, scenes_seed, count in (("train", seed, counts[0]), ("eval", EVAL_SEED_OFFSET + seed, counts[1])):
        raw = out / "raw" / name
        done = raw / "done"
        if not done.exists():
            scenes = ["--num-images", str(count), "--seed", str(scenes_seed), "--workers", "2"]
            run("data_tools.synthesize", "--out", str(raw), *scenes)
            done.touch()
        run("data_tools.pack", "sa1b", str(raw), "--out", str(out / "shards" / name), "--workers", "2")
    return shards, [f"data.eval_shards={eval_shards}"]


def train_both(out: Path, shards: Path, sam_data: list[str], seed: int, quick: bool) -> Path:
    """Stage 1, then stage 2 from its encoder. Returns the run directory of stage 2."""
    mae_run, sam_run = out / "runs" / "mae_tiny", out / "runs" / "sam_tiny"
    shared = [f"seed={seed}", f"data.shards={shards}"]
    short_mae = ["phases.0.steps=4", "schedule.warmup_steps=1"] if quick else []
    short_sam = ["phases.0.steps=2", "phases.1.steps=4", "schedule.warmup_steps=1"] if quick else []
    unseen = [setting for setting in sam_data if setting.startswith("data.holdout_images")]  # by stage 1 too
    train("launch/configs/mae_tiny.yaml", f"run_dir={mae_run}", *shared, *unseen, *short_mae)
    train(
        "launch/configs/sam_tiny.yaml",
        f"run_dir={sam_run}",
        f"model.init_from={mae_run}",
        *shared,
        *sam_data,
        *short_sam,
    )
    return sam_run


def train(config: str, *overrides: str) -> None:
    """Train on all visible GPUs, else with two processes on the CPU."""
    num_processes = torch.cuda.device_count() or 2
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    execute([sys.executable, *command, "-m", "trainer.train", config, *overrides])


def evaluate(sam_run: Path, out: Path, extra: list[str]) -> dict[str, float]:
    run("trainer.evaluate", str(sam_run), "--out", str(out), *extra)
    return json.loads(out.read_text())


def run(module: str, *arguments: str) -> None:
    execute([sys.executable, "-m", module, *arguments])


def execute(command: list[str]) -> None:
    print("\n$ " + " ".join(["python", *command[1:]]), flush=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    subprocess.run(command, check=True, env=environment)


def score_table(trained: dict[str, float], untrained: dict[str, float]) -> str:
    """mIoU by prompt, trained beside the two baselines, as Markdown."""
    rows = [("box", "box"), *((f"{n} click{'s' if n > 1 else ''}", f"click_{n}") for n in CLICKS)]
    lines = [
        f"mIoU over {trained['num_masks']:.0f} held-out masks",
        "",
        "| prompt | trained | untrained | filled box |",
    ]
    lines.append("|---|--:|--:|--:|")
    for label, name in rows:
        filled = f"{trained['filled_box']:.3f}" if name == "box" else ""
        lines.append(f"| {label} | {trained[name]:.3f} | {untrained[name]:.3f} | {filled} |")
    return "\n".join(lines) + "\n"


def judge(scores: dict[str, float]) -> int:
    """Exit code 1 if the network did not learn what the demo promises."""
    over_box = scores["box"] - scores["filled_box"]
    over_click = scores["click_3"] - scores["click_1"]
    learned = over_box >= MIN_OVER_FILLED_BOX and over_click >= MIN_OVER_ONE_CLICK
    print(
        f"box over filled box {over_box:+.3f} (at least {MIN_OVER_FILLED_BOX}), 3 clicks over 1 {over_click:+.3f} "
        f"(at least {MIN_OVER_ONE_CLICK}): {'it learns' if learned else 'it did NOT learn what it should'}"
    )
    return 0 if learned else 1


if __name__ == "__main__":
    sys.exit(main())
