"""One training step, timed as a whole and by part: `python -m bench.step launch/configs/sam_vith_paper.yaml`.

    python -m bench.step launch/configs/sam_vith.yaml launch/configs/sam_vith_paper.yaml --out steps.json
    python -m bench.step launch/configs/sam_vith_paper.yaml --compile loss.resolution=256
    python -m bench.step launch/configs/sam_finetune.yaml data.embeddings=null               # the encoder runs, frozen
    python -m bench.step launch/configs/sam_tiny.yaml --steps 2 model.image_size=64          # also on a CPU

Data: random pixels, ellipses as masks, prompts from them; made once, so the loader plays no part. One process, the
config's own engine settings, batch.micro images. Times are medians over --steps after one warm-up (two when compiled).
"Useful" FLOPs are those of the published model, three times its forward pass for what is trained, whatever a run
recomputes; their sources are beside the constants below.

Letters: B images, M masks an image, s target pixels.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from model.build import SIZES
from trainer.config import Config, MaeConfig, SamConfig, load_config
from trainer.data.batches import MaeBatch, SamBatch
from trainer.distributed import World, single_process
from trainer.flops import peak_flops
from trainer.optim import first_trained, param_groups
from trainer.parallel.engine import Engine, build_engine
from trainer.prompts import later_rounds_with_click
from trainer.stages import build_task, encoder_depth
from trainer.tracing import activities_of, table_of

# Forward pass of SAM's encoder on one image of 1024 pixels, and of a mask and round in the decoder: FLOPs as torch's
# FlopCounterMode counts the released modules (a multiply-add is two).
SAM_ENCODER_FLOPS = {"vit_b": 0.972e12, "vit_l": 2.986e12, "vit_h": 5.961e12}
SAM_ROUND_FLOPS = 3.7e9  # 3.62e9 in the first round, 3.81e9 in the last


def sam_batch(config: SamConfig, world: World) -> SamBatch:
    """A micro-batch of noise with ellipses as masks, every mask prompted as the config's mix says."""
    num_images, num_masks = config.batch.micro, config.data.max_masks
    size, target, rounds = config.model.image_size, config.loss.resolution, config.prompts.rounds
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(num_images, num_masks, 2, generator=generator) * 0.6 + 0.2  # x y, of the side
    radii = torch.rand(num_images, num_masks, 2, generator=generator) * 0.15 + 0.05
    line = (torch.arange(target) + 0.5) / target
    distance = ((line - centres[..., :1]) / radii[..., :1])[:, :, None, :] ** 2
    distance = distance + ((line - centres[..., 1:]) / radii[..., 1:])[..., None] ** 2
    labels = torch.full((num_images, num_masks, len(config.prompts.num_points)), -1)
    kind = torch.rand(num_images, num_masks, generator=generator)
    types = config.prompts.types
    has_box = (kind >= types.point) & (kind < types.point + types.box)
    num_asking = int(types.mask * num_masks)
    wants_mask = (torch.arange(num_masks) < num_asking).expand(num_images, -1)
    labels[..., 0] = torch.where(has_box & ~wants_mask, -1, 1)
    coords = torch.zeros(*labels.shape, 2)
    coords[..., 0, :] = centres * size
    side = size // 16
    channels = SIZES[config.model.size].prompt_dim
    embedding = (num_images, 0, 0, 0) if config.data.embeddings is None else (num_images, channels, side, side)
    clicks = [later_rounds_with_click(config.prompts, np.random.default_rng(i)) for i in range(num_images)]
    return SamBatch(
        positions=torch.arange(num_images),
        image_weight=torch.ones(num_images),
        keys=[""] * num_images,
        problems=[],
        num_images=float(num_images),
        num_masks=float(num_images * num_masks),
        images=torch.randint(0, 256, (num_images, 3, size, size), generator=generator, dtype=torch.uint8),
        image_sizes=torch.full((num_images, 2), size),
        color_factors=torch.ones(num_images, 3),
        masks=(distance <= 1).to(torch.uint8),
        mask_valid=torch.ones(num_images, num_masks, dtype=torch.bool),
        point_coords=coords,
        point_labels=labels,
        boxes=torch.cat([centres - radii, centres + radii], dim=-1) * size,
        has_box=has_box & ~wants_mask,
        wants_mask=wants_mask,
        num_mask_prompts=num_asking,
        click_uniforms=torch.rand(num_images, num_masks, rounds - 1, generator=generator),
        gets_click=torch.from_numpy(np.stack(clicks)),
        drop_path_uniforms=torch.rand(num_images, encoder_depth(config), 2, generator=generator),
        image_embeddings=torch.randn(embedding, generator=generator).half(),
    ).to(world.device)


def mae_batch(config: MaeConfig, world: World) -> MaeBatch:
    """A micro-batch of noise."""
    num_images, size = config.batch.micro, config.model.image_size
    return MaeBatch(
        positions=torch.arange(num_images),
        image_weight=torch.ones(num_images),
        keys=[""] * num_images,
        problems=[],
        num_images=float(num_images),
        num_masks=0.0,
        images=torch.randint(0, 256, (num_images, 3, size, size), dtype=torch.uint8),
        color_factors=torch.ones(num_images, 3),
        noise=torch.rand(num_images, (size // config.model.patch_size) ** 2),
    ).to(world.device)


def useful_flops(config: Config, frozen: tuple[str, ...]) -> float | None:
    """Of one micro-batch's step; None where no published count fits (vit_tiny, other sizes of the input)."""
    if config.model.size not in SAM_ENCODER_FLOPS:
        return None
    if isinstance(config, SamConfig):
        if config.model.image_size != 1024:
            return None
        passes = 0 if config.data.embeddings is not None else 1 if "image_encoder" in frozen else 3
        encoder = passes * SAM_ENCODER_FLOPS[config.model.size]
        rounds = 3 * SAM_ROUND_FLOPS * config.data.max_masks * config.prompts.rounds
        return config.batch.micro * (encoder + rounds)
    return config.batch.micro * 3 * mae_forward_flops(config)


def mae_forward_flops(config: MaeConfig) -> float:
    """Of one image: products of weights and tokens, and attention; 2 a multiply-add (MAE, arXiv 2111.06377, A.1)."""
    size, model = SIZES[config.model.size], config.model
    patches = (model.image_size // model.patch_size) ** 2
    visible = int(patches * (1 - model.mask_ratio)) + 1

    def blocks(depth: int, width: int, tokens: int) -> float:
        return depth * (12 * width**2 * tokens + 2 * width * tokens**2)

    pixels = 3 * model.patch_size**2
    count = blocks(size.depth, size.embed_dim, visible) + blocks(model.decoder_depth, model.decoder_dim, patches + 1)
    ends = patches * pixels * size.embed_dim + visible * size.embed_dim * model.decoder_dim
    return 2 * (count + ends + (patches + 1) * model.decoder_dim * pixels)


def seconds(action: Callable[[], object], device: torch.device, repeats: int, warm_up: int) -> float:
    """Median time: on a GPU by the clock, on a CPU the process's own, so that a busy machine matters less."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times = []
    for number in range(warm_up + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = clock()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= warm_up:
            times.append(clock() - started)
    return statistics.median(times)


def measure(
    config: Config, world: World, compiled: bool, repeats: int, by_part: bool = True, num_profiled: int | None = None
) -> dict[str, object]:
    """Time of a step of the config's last phase and of its parts, peak memory, share of peak."""
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"compile": compiled, "kind": "ddp"})})
    frozen = config.phases[-1].frozen
    with torch.device(world.device):  # where random numbers for 641 M weights take no time
        task = build_task(config, frozen, initial_weights=False)
    depth = encoder_depth(config) if isinstance(config, SamConfig) else 0
    groups = param_groups(task.named_parameters(), config.optim, depth, first_trained(config.phases))
    engine = build_engine(task.to(world.device), config, groups, world)
    engine.task.train()
    batch = sam_batch(config, world) if isinstance(config, SamConfig) else mae_batch(config, world)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        loss, _ = engine(batch)
        engine.backward(loss, last=True)
        engine.step()

    warm_up = 2 if compiled else 1
    whole = seconds(step, world.device, repeats, warm_up)
    row: dict[str, object] = {"config": config.run_dir.name, "compiled": compiled, "step_ms": round(1000 * whole, 1)}
    row["images"] = config.batch.micro
    if world.device.type == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if by_part:
        row |= {f"{name}_ms": round(1000 * value, 1) for name, value in parts(engine, batch, repeats).items()}
    if num_profiled:
        with torch.profiler.profile(activities=activities_of(world.device)) as profiler:
            step()
        print(table_of(profiler, world.device, num_profiled))
    flops = useful_flops(config, frozen)
    row["useful_tflop"] = None if flops is None else round(flops / 1e12, 2)
    peak = peak_flops(world.device, config.engine.precision)
    row["share_of_peak"] = None if flops is None or peak is None else round(flops / whole / peak, 4)
    engine.close()
    return row


def parts(engine: Engine, batch: SamBatch | MaeBatch, repeats: int) -> dict[str, float]:
    """Seconds of the forward pass alone, forward and backward, the optimizer; in stage 2 of the encoder alone too."""
    device = batch.images.device
    found = {}
    if isinstance(batch, SamBatch):

        def encode() -> None:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                engine.task.encode(batch)

        found["encoder_forward"] = seconds(encode, device, repeats, 1)

    def forward() -> None:
        with torch.no_grad():
            engine(batch)

    def both() -> None:
        loss, _ = engine(batch)
        engine.backward(loss, last=True)

    found["forward"] = seconds(forward, device, repeats, 1)
    found["forward_backward"] = seconds(both, device, repeats, 1)
    found["optimizer"] = seconds(engine.step, device, 1, 0)
    return found


def table(rows: list[dict[str, object]]) -> str:
    """Markdown, one line a row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="CONFIG|key=value", help="configs, then overrides for all")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile of each block")
    parser.add_argument("--whole", action="store_true", help="the whole step alone, not its parts")
    parser.add_argument("--profile", type=int, metavar="N", help="also the N operations that take most of the device")
    parser.add_argument("--out", type=Path, help="JSON file; written after every row")
    settings = parser.parse_args()
    world = single_process()
    rows: list[dict[str, object]] = []
    report = {
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "rows": rows,
    }
    overrides = [argument for argument in settings.arguments if "=" in argument]
    for path in [Path(argument) for argument in settings.arguments if "=" not in argument]:
        config = load_config(path, overrides, check_paths=False)
        for compiled in (False, True) if settings.compile else (False,):
            try:
                rows.append(measure(config, world, compiled, settings.steps, not settings.whole, settings.profile))
            except torch.cuda.OutOfMemoryError as error:
                rows.append({"config": path.stem, "compiled": compiled, "failed": str(error).split(". ")[0]})
            if settings.out:
                settings.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
