"""The document's three ablations, re-run small: every row a short training of the same network on the same data.

    python -m trainer.ablate --shards DIR --eval-shards DIR --out runs/ablate --steps 1500 --seeds 0 1 2
    python -m trainer.ablate ... --tables loss            # one of the three: loss, masks, prompts

Rows differ in the settings below and in nothing else; the data order and all draws depend on the seed alone. A row
that is in two tables is trained once. Started again, it goes on: finished trainings and scores are kept. Writes
OUT/table.md (with the mean and the spread over seeds), OUT/plot.png, OUT/results.json and OUT/hparams for TensorBoard.
What such a run can and cannot show: docs/ablations.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from torch.utils.tensorboard import SummaryWriter

from trainer.outputs import check_folder

matplotlib.use("Agg")

COLUMNS = ("box", "click_1", "click_3", "box_oracle", "click_1_oracle")
POINTS_ONLY = "prompts.types={point: 1.0, box: 0.0, mask: 0.0, none: 0.0}"
BOXES_ONLY = "prompts.types={point: 0.0, box: 1.0, mask: 0.0, none: 0.0}"


@dataclass(frozen=True)
class Row:
    """One training. `claimed` is what the document says of COCO for it, by our nearest column; of no known source."""

    label: str
    name: str  # of its run directory: rows of one name are one training
    settings: tuple[str, ...]
    claimed: dict[str, float]


WHOLE = ("whole", ())  # the document's recipe as it stands
TABLES: dict[str, list[Row]] = {
    "loss": [
        Row("focal alone", "focal", ("loss.dice=0", "loss.iou=0"), {"click_1": 42.3}),
        Row("dice alone", "dice", ("loss.focal=0", "loss.iou=0"), {"click_1": 44.7}),
        Row("focal + dice", "focal_dice", ("loss.iou=0",), {"click_1": 50.3}),
        Row("focal + dice + IoU", *WHOLE, {"click_1": 50.3}),
    ],
    "masks": [
        Row("one mask", "single", ("loss.multimask=single",), {"click_1": 46.2}),
        Row("three masks, all learn", "all", ("loss.multimask=all",), {"click_1": 48.9}),
        Row("three masks, the best learns", *WHOLE, {"click_1": 50.3}),
    ],
    "prompts": [
        Row("points alone", "points", (POINTS_ONLY,), {"click_1": 48.2, "box": 40.3}),
        Row("boxes alone", "boxes", (BOXES_ONLY,), {"click_1": 38.1, "box": 52.1}),
        Row("mixed", *WHOLE, {"click_1": 47.8, "box": 51.9}),
    ],
}
Scores = dict[str, dict[int, dict[str, float]]]  # by run name, seed, measure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("launch/configs/sam_tiny.yaml"))
    parser.add_argument("--shards", required=True, help="packed data set to train on")
    parser.add_argument("--eval-shards", required=True, help="packed data set to score on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500, help="of each training (default 1500)")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="settings of every row, after --")
    options = parser.parse_args(arguments)
    rows = {row.name: row for table in options.tables for row in TABLES[table]}
    shared = [
        f"data.shards={options.shards}",
        f"data.eval_shards={options.eval_shards}",
        f"phases=[{{name: joint, steps: {options.steps}}}]",
        f"schedule.warmup_steps={max(1, options.steps // 20)}",
        f"evaluate.every_steps={options.steps}",
        f"checkpoint.every_steps={options.steps}",
        *options.overrides,
    ]
    try:
        check_folder("--out", options.out)
    except ValueError as error:
        print(f"ablate: {error}", file=sys.stderr)
        return 2
    if not same_settings(options.out, {"config": str(options.config), "shared": shared}):
        print(f"ablate: {options.out} holds rows of other settings; give another --out", file=sys.stderr)
        return 2
    scores: Scores = {name: {} for name in rows}
    for seed in options.seeds:  # all rows of a seed before the next: a comparison is complete as soon as it can be
        for name, row in rows.items():
            try:
                scores[name][seed] = train_and_score(options, row, seed, [*shared, *row.settings])
            except subprocess.CalledProcessError as error:
                print(f"ablate: row {name}, seed {seed} ended with exit code {error.returncode}", file=sys.stderr)
                return 1
        write_results(options.out, options.tables, scores, options.steps)
    print((options.out / "table.md").read_text())
    return 0


def same_settings(out: Path, settings: dict[str, object]) -> bool:
    """Whether `out` holds no row yet or was made with these settings, which it then remembers.

    A row is there from its first checkpoint on: a command that was mistyped leaves nothing that binds the next.
    """
    out.mkdir(parents=True, exist_ok=True)
    stamp = out / "settings.json"
    if not stamp.exists() or not any(out.glob("runs/*/checkpoints/step_*")):
        stamp.write_text(json.dumps(settings))
    return json.loads(stamp.read_text()) == settings


def train_and_score(options: argparse.Namespace, row: Row, seed: int, settings: list[str]) -> dict[str, float]:
    """Train one row with one seed and evaluate it, unless that is done."""
    run = options.out / "runs" / f"{row.name}_{seed}"
    scores = run / "scores.json"
    if not scores.exists():
        execute("trainer.train", str(options.config), f"run_dir={run}", f"seed={seed}", *settings)
        execute("trainer.evaluate", str(run), "--out", str(scores))
    return json.loads(scores.read_text())


def execute(module: str, *arguments: str) -> None:
    print(f"\n$ python -m {module} {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def write_results(out: Path, tables: list[str], scores: Scores, steps: int) -> None:
    """Table, plot, numbers and hparams of the seeds that are complete."""
    (out / "results.json").write_text(json.dumps(scores, indent=1) + "\n")
    (out / "table.md").write_text("\n\n".join(markdown(table, scores) for table in tables) + "\n")
    plot(out / "plot.png", tables, scores)
    write_hparams(out / "hparams", tables, scores, steps)


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the deviation of one value is not a number."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def markdown(table: str, scores: Scores) -> str:
    """One table: mIoU in percent, mean and standard deviation over seeds, and the document's figures as its claims."""
    lines = [f"### {table}", "", f"| | {' | '.join(COLUMNS)} | document, COCO |"]
    lines.append("|---|" + "--:|" * (len(COLUMNS) + 1))
    for row in TABLES[table]:
        by_seed = list(scores[row.name].values())
        cells = []
        for column in COLUMNS:
            values = [100 * score[column] for score in by_seed if column in score]
            cells.append(percent(*spread(values)) if values else "")
        claimed = ", ".join(f"{column} {value}" for column, value in row.claimed.items())
        lines.append(f"| {row.label} | {' | '.join(cells)} | {claimed} |")
    return "\n".join(lines)


def percent(mean: float, deviation: float) -> str:
    return f"{mean:.1f}" if deviation != deviation else f"{mean:.1f} ± {deviation:.1f}"


def plot(path: Path, tables: list[str], scores: Scores) -> None:
    """Every seed a dot, every row's mean a bar, for a box and for one click."""
    figure, axes = plt.subplots(len(tables), 2, figsize=(9, 2.6 * len(tables)), squeeze=False)
    for r, table in enumerate(tables):
        for c, column in enumerate(("box", "click_1")):
            axis, rows = axes[r][c], TABLES[table]
            for y, row in enumerate(rows):
                values = [100 * score[column] for score in scores[row.name].values()]
                axis.barh(y, statistics.fmean(values), color="#9ab8d8")
                axis.plot(values, [y] * len(values), "k.", markersize=5)
            axis.set_yticks(range(len(rows)), [row.label for row in rows])
            axis.invert_yaxis()
            axis.set_title(f"{table}: mIoU (%), {column}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_hparams(folder: Path, tables: list[str], scores: Scores, steps: int) -> None:
    """One hparams entry a training, for TensorBoard's table and parallel coordinates."""
    rows = {row.name: row for table in tables for row in TABLES[table]}
    for name, by_seed in scores.items():
        for seed, score in by_seed.items():
            with SummaryWriter(str(folder)) as writer:
                settings = "; ".join(rows[name].settings) or "as the document"
                metrics = {f"miou/{column}": score[column] for column in COLUMNS if column in score}
                hparams = {"row": name, "seed": seed, "steps": steps, "settings": settings}
                writer.add_hparams(hparams, metrics, run_name=f"{name}_{seed}")


if __name__ == "__main__":
    sys.exit(main())
