"""Does it learn, and which recipe more? The same small network, the same steps, both recipes, several seeds.

    python -m bench.recipes --out recipes_synthetic                                  # synthetic scenes
    python -m bench.recipes --out recipes_coco --data FOLDER                         # SA-1B layout, a fifth held out
    python -m bench.recipes --out smoke --steps 4 --seeds 0 --images 12              # a look at whether it runs

For every seed one MAE run, then stage 2 from its encoder once a recipe:

* `document`: one round, the mix of points, boxes, masks and nothing; frozen encoder for 5 of 95 parts of the steps;
  cosine; augmentation.
* `published`: 11 rounds, a point or a noisy box; steps at 2/3 and 0.963 of the length; layer decay 0.8, drop path 0.4,
  decoder dropout 0.1; no augmentation.
* `document_11_rounds` (on request): the document's with the published rounds, prompts and tokens.

The rate, the batch, the number of steps and the data are the same. Scores are mIoU on held-out images at the original
resolution (trainer/interactive.py). Start it again to go on. Results: OUT/results.json and OUT/table.md, mean and
standard deviation over seeds; "gain" is 5 clicks less 1.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

PUBLISHED_ROUNDS = [
    "prompts.types={point: 0.5, box: 0.5, mask: 0, none: 0}",
    "prompts.num_points=[1.0]",
    "prompts.random_background=false",
    "prompts.box_noise=0.1",
    "prompts.box_noise_kind=normal",
    "prompts.rounds=11",
    "prompts.rounds_without_click=2",
    "loss.multimask_when=single_prompt",
    "loss.select_by=mask",
]
PROTOCOLS = ("box", "click_1", "click_3", "click_5")


def recipe(name: str, steps: int) -> list[str]:
    """Overrides of launch/configs/sam_tiny.yaml."""
    frozen = max(1, steps * 5 // 95)
    warm_up = f"schedule.warmup_steps={max(1, min(100, steps // 20))}"
    document = [
        warm_up,
        f"phases=[{{name: freeze_encoder, steps: {frozen}, frozen: [image_encoder]}}, "
        f"{{name: joint, steps: {max(1, steps - frozen)}}}]",
        "data.scale_jitter=[0.8, 1.2]",
        "data.horizontal_flip=0.5",
        "data.color_jitter=0.2",
        "prompts.rounds=1",
    ]
    if name == "document":
        return document
    if name == "document_11_rounds":
        return [*document, *PUBLISHED_ROUNDS]
    return [
        warm_up,
        *PUBLISHED_ROUNDS,
        f"phases=[{{name: joint, steps: {steps}}}]",
        "schedule.kind=multistep",
        f"schedule.milestones=[{max(1, steps * 2 // 3)}, {min(steps - 1, max(2, round(steps * 0.963)))}]",
        "loss.normalize=mask_mean",
        "optim.layer_decay=0.8",
        "model.drop_path=0.4",
        "model.decoder_dropout=0.1",
        "data.max_mask_area=0.9",
        "data.horizontal_flip=0",
        "data.color_jitter=0",
    ]


def run(module: str, *arguments: str) -> None:
    print("$ python -m", module, *arguments, flush=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, env=environment)


def pack(settings: argparse.Namespace) -> tuple[Path, list[str]]:
    """Shards to train on, and the overrides that say what is held out."""
    shards = settings.out / "shards" / "train"
    if settings.data is not None:
        if not (shards / "manifest.json").exists():
            run("data_tools.pack", "sa1b", str(settings.data), "--out", str(shards), "--allow-bad", "1000000")
        samples = json.loads((shards / "manifest.json").read_text())["totals"]["num_samples"]
        return shards, [f"data.holdout_images={max(1, samples // 5)}", "data.eval_shards=null"]
    for name, count, seed in (("train", settings.images, 0), ("eval", max(4, settings.images // 8), 10_000)):
        out = settings.out / "shards" / name
        if not (out / "manifest.json").exists():
            raw = settings.out / "raw" / name
            run("data_tools.synthesize", "--out", str(raw), "--num-images", str(count), "--seed", str(seed))
            run("data_tools.pack", "sa1b", str(raw), "--out", str(out))
    return shards, [f"data.eval_shards={settings.out / 'shards' / 'eval'}"]


def train_one(
    settings: argparse.Namespace, name: str, seed: int, shards: Path, held_out: list[str]
) -> dict[str, float]:
    """Scores of one recipe and seed; read back where they are there already."""
    scores = settings.out / f"{name}_seed{seed}.json"
    if scores.exists():
        return json.loads(scores.read_text())
    mae_run, sam_run = settings.out / f"mae_seed{seed}", settings.out / f"{name}_seed{seed}"
    shared = [f"seed={seed}", f"data.shards={shards}"]
    in_stage_1 = [setting for setting in held_out if setting.startswith("data.holdout_images")]
    mae_steps = max(1, settings.steps // 4)
    run(
        "trainer.train",
        "launch/configs/mae_tiny.yaml",
        f"run_dir={mae_run}",
        f"phases.0.steps={mae_steps}",
        f"schedule.warmup_steps={max(1, mae_steps // 15)}",
        *shared,
        *in_stage_1,
    )
    never = settings.steps + 1
    run(
        "trainer.train",
        "launch/configs/sam_tiny.yaml",
        f"run_dir={sam_run}",
        f"model.init_from={mae_run}",
        f"evaluate.every_steps={never}",
        "evaluate.num_images=1",
        *shared,
        *held_out,
        *recipe(name, settings.steps),
        *settings.override,
    )
    run("trainer.evaluate", str(sam_run), "--out", str(scores))
    return json.loads(scores.read_text())


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a line a recipe, mean and standard deviation over seeds."""
    lines = ["| recipe | seeds | box | 1 click | 3 clicks | 5 clicks | gain |", "|---|--:|--:|--:|--:|--:|--:|"]
    for name, scores in results.items():
        columns = [[score[protocol] for score in scores] for protocol in PROTOCOLS]
        columns.append([score["click_5"] - score["click_1"] for score in scores])
        cells = [f"{statistics.mean(c):.3f} ± {statistics.stdev(c) if len(c) > 1 else 0:.3f}" for c in columns]
        lines.append(f"| {name} | {len(scores)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of sa_N.jpg + sa_N.json; default: synthetic scenes")
    parser.add_argument("--images", type=int, default=1000, help="synthetic training scenes")
    parser.add_argument("--steps", type=int, default=2000, help="of stage 2; stage 1 takes a quarter of them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=["document", "published"])
    parser.add_argument("--override", nargs="*", default=[], metavar="key=value", help="for every run of stage 2")
    settings = parser.parse_args()
    settings.out.mkdir(parents=True, exist_ok=True)
    shards, held_out = pack(settings)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in settings.recipes}
    for seed in settings.seeds:
        for name in settings.recipes:
            results[name].append(train_one(settings, name, seed, shards, held_out))
            (settings.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            done = {key: value for key, value in results.items() if value}
            (settings.out / "table.md").write_text(table(done))
    print(table(results))


if __name__ == "__main__":
    main()
