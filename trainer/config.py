"""Every knob of a run: its type, its one default, its unit and where the value comes from.

A YAML file and dotted overrides (`optim.lr=4e-4`) become a frozen tree. Unknown keys, wrong types and combinations
that cannot work are all reported at once, before any process group or GPU is touched. `stage` picks the root model,
so a key of the other stage is an error and not a silent no-op.

Sources: "doc" is the user's document, "SAM" Kirillov et al. 2023 (App. A), "MAE" He et al. 2021 (App. A).
"""

import copy
import difflib
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainer.outputs import nearest_existing

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1, strict=True)]
CountOrZero = Annotated[int, Field(ge=0, strict=True)]


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("the lower end comes first")
    return value


def _at_most_whole(value: tuple[float, float]) -> tuple[float, float]:
    if value[1] > 1.0:
        raise ValueError("a crop is at most the whole image: 1.0")
    return value


Range = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]  # lower and upper end
CropScale = Annotated[Range, AfterValidator(_at_most_whole)]


REMOTE_SCHEMES = ("http", "https", "s3", "gs")  # through fsspec; the last two need s3fs or gcsfs
PIPE, PIPE_SLOT = "pipe:", "{}"  # a command that writes a file to its output, and where in it the file's name goes


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _or_raise(config: Any, problems: list[str]) -> Any:
    if problems:
        raise ValueError("; ".join(problems))
    return config


class SamModel(Section):
    size: Literal["vit_tiny", "vit_b", "vit_l", "vit_h"]
    image_size: Count = 1024  # pixels of the square input; a multiple of the patch size 16
    drop_path: BelowOne = 0.0  # last block's rate, linear from 0 (SAM 0.4; doc none)
    decoder_dropout: BelowOne = 0.0  # SAM 0.1; doc none
    init_from: Path | None = None  # MAE run, checkpoint or file, or SAM weights; none = random
    patch_resize: Literal["bicubic", "pseudo_inverse"] = "pseudo_inverse"  # for a 14-pixel MAE patch kernel


class MaeModel(Section):
    size: Literal["vit_tiny", "vit_b", "vit_l", "vit_h"]
    image_size: Count = 224  # pixels
    patch_size: Count = 16  # pixels; MAE's own ViT-H has 14, SAM's 16
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.75  # MAE 4.1
    norm_pix_loss: bool = False  # doc: original pixels; MAE's released models: true
    decoder_dim: Count = 512
    decoder_depth: Count = 8
    decoder_heads: Count = 16


class Remote(Section):
    """Reading shards from a URL or a command. Directories are read in place and need none of this."""

    cache_dir: Path | None = None  # on a disk of the node; none = shard_cache_UID under $TMPDIR
    cache_gb: Positive = 500.0  # 10^9 bytes of shards a node keeps; docs/decisions/0008 says how much a run needs
    timeout_seconds: Positive = 60.0  # without a byte, then a try is given up
    retries: CountOrZero = 5  # of a file, after waits of 1, 2, 4, ... seconds; then the run stops


class SamData(Section):
    shards: str  # a packed data set: a directory, a URL of http, https, s3 or gs, or `pipe:COMMAND {}`
    eval_shards: str | None = None  # a packed data set of its own; none = the hold-out of `shards`
    embeddings: Path | None = None  # of a frozen encoder, made by trainer.embed; read instead of images
    holdout_images: CountOrZero = 0  # left out of training by hash of the image id, about this many
    max_masks: Count = 64  # per image and step (SAM App. A)
    max_mask_area: Share | None = None  # leave out masks over this share of the image (SAM 0.9; doc none)
    scale_jitter: Range | None = None  # of the long side, then crop or pad (doc 0.8, 1.2)
    horizontal_flip: Probability = 0.0
    color_jitter: Probability = 0.0  # brightness, contrast, saturation each by a factor in 1 -+ this
    lanes: Count = 64  # fixed streams of shards that a global batch draws from evenly
    window: Count = 4096  # samples of a lane that are shuffled together
    workers: CountOrZero = 4  # loader processes per rank
    prefetch: Count = 4  # micro-batches ready per worker
    max_bad_samples: CountOrZero = 1000  # over all ranks, since start or change of phase; without quarantined
    remote: Remote = Remote()


class MaeData(Section):
    shards: str
    holdout_images: CountOrZero = 0  # as in stage 2, so that its held-out images are unseen here too
    crop_scale: CropScale = (0.2, 1.0)  # area share of the random crop (MAE code; doc 0.08)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"  # doc silent (torchvision's default: bilinear)
    horizontal_flip: Probability = 0.5
    color_jitter: Probability = 0.0  # doc 0.4; MAE A.1 uses none
    lanes: Count = 64
    window: Count = 4096
    workers: CountOrZero = 8
    prefetch: Count = 4
    max_bad_samples: CountOrZero = 1000
    remote: Remote = Remote()


class TypeProbabilities(Section):
    """What the first round of a mask is prompted with. `mask` is the network's own answer to one point."""

    point: Probability = 0.5
    box: Probability = 0.3
    mask: Probability = 0.15
    none: Probability = 0.05

    @model_validator(mode="after")
    def _sums_to_one(self) -> "TypeProbabilities":
        total = self.point + self.box + self.mask + self.none
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            raise ValueError(f"probabilities sum to {total:g}, not 1")
        return self


class Prompts(Section):
    types: TypeProbabilities = TypeProbabilities()
    num_points: tuple[Probability, ...] = (0.4, 0.3, 0.15, 0.1, 0.05)  # chance of 1, 2, 3, ... points (doc)
    random_background: bool = True  # of n points 1..n are foreground, the rest background (doc); else all foreground
    box_noise: NonNegative = 0.0  # of a box's side; at most `box_noise_pixels` (SAM 0.1; doc none)
    box_noise_pixels: NonNegative = 20.0  # input pixels
    # What box_noise is: the largest shift, all equally likely (sam2), or a standard deviation, cut at the limit (SAM).
    box_noise_kind: Literal["uniform", "normal"] = "uniform"
    rounds: Count = 1  # doc 1; SAM 11
    rounds_without_click: CountOrZero = 0  # of the later rounds: the last, and others at random (SAM 2)

    @model_validator(mode="after")
    def _consistent(self) -> "Prompts":
        if not math.isclose(sum(self.num_points), 1.0, abs_tol=1e-6):
            raise ValueError(f"num_points sums to {sum(self.num_points):g}, not 1")
        if self.rounds_without_click >= self.rounds:
            raise ValueError(f"rounds_without_click={self.rounds_without_click} needs more rounds than {self.rounds}")
        return self


class SamLoss(Section):
    focal: NonNegative = 20.0
    dice: NonNegative = 1.0
    iou: NonNegative = 1.0
    focal_alpha: Probability = 0.25
    focal_gamma: NonNegative = 2.0
    dice_smooth: Positive = 1.0  # 0 would be 0 / 0 for an empty mask predicted empty
    # Pixels a side of the target, at least half as many as the logits have, which are resampled to it without
    # smoothing: below that, some would be read by nobody (sam2 1024; SAM, doc silent).
    resolution: Count = 256
    sampled_points: Count | None = None  # focal and dice on this many points a mask, not all pixels (sam3 12544)
    multimask: Literal["best", "all", "single"] = "best"  # three masks by least loss, all three, token 0 alone
    multimask_when: Literal["always", "single_prompt"] = "always"  # doc: always (and token 0 too); SAM: one prompt
    box_is_single_prompt: bool = True  # SAM's text: a box alone is one prompt; sam2's code counts its two corners
    select_by: Literal["total", "mask"] = "total"  # least loss with the IoU part (doc) or without (sam2)
    iou_on: Literal["selected", "all"] = "selected"  # the IoU head learns on the chosen mask (SAM) or all three (sam2)
    normalize: Literal["image_mean", "mask_mean"] = "image_mean"  # doc; paper recipe: one count over the batch

    @property
    def single_token_for_boxes(self) -> bool:
        """Whether the single-mask token answers a box alone, since training shows it to no other."""
        return self.multimask_when == "single_prompt" and not self.box_is_single_prompt


class Optim(Section):
    lr: Positive
    lr_per_256: bool = False  # multiply by global batch / 256 (MAE A.1)
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    decay_bias_and_norm: bool = True  # MAE: false; doc silent
    layer_decay: Share = 1.0  # of the encoder, stage sam only (SAM 0.8; doc none)
    grad_clip: Positive | None = None  # global norm; neither recipe clips
    ema_decay: BelowOne | None = None  # average the weights, 0.9999 say; evaluation and export then use the average


class Schedule(Section):
    kind: Literal["cosine", "multistep", "constant"] = "cosine"
    warmup_steps: CountOrZero | None = None  # linear from 0, once, at step 0
    warmup_epochs: NonNegative | None = None
    min_lr: NonNegative = 0.0  # kind=cosine: where it ends
    milestones: tuple[Count, ...] = ()  # kind=multistep: steps at which it multiplies by gamma
    gamma: Positive = 0.1

    @model_validator(mode="after")
    def _consistent(self) -> "Schedule":
        if (self.warmup_steps is None) == (self.warmup_epochs is None):
            raise ValueError("give exactly one of warmup_steps and warmup_epochs")
        if self.milestones and self.kind != "multistep":
            raise ValueError(f"milestones belong to kind=multistep, kind is {self.kind}")
        if self.min_lr and self.kind != "cosine":
            raise ValueError(f"min_lr belongs to kind=cosine, kind is {self.kind}")
        if self.kind == "multistep" and not self.milestones:
            raise ValueError("kind=multistep needs milestones")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must ascend, they are {list(self.milestones)}")
        return self


class Phase(Section):
    """A stretch of training with one set of trained parts. The next phase goes on through the resume path."""

    name: str
    steps: Count | None = None
    epochs: Positive | None = None
    frozen: tuple[Literal["image_encoder", "prompt_encoder", "mask_decoder"], ...] = ()

    @model_validator(mode="after")
    def _one_length(self) -> "Phase":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class Batch(Section):
    global_size: Count  # images a step over all ranks
    micro: Count  # images a rank and forward pass; accumulation follows from the two


class Engine(Section):
    kind: Literal["ddp", "fsdp2", "hsdp", "deepspeed"] = "ddp"  # ddp with one process is the plain module
    zero_stage: Literal[0, 1, 2, 3] = (
        2  # kind=deepspeed only: what is sharded (nothing, moments, + gradients, + weights)
    )
    shard_group_size: Count | None = None  # kind=hsdp only: ranks that share one copy; none = the ranks of a node
    offload_optimizer: bool = False  # kind=deepspeed, zero_stage 1 to 3: fp32 weights, moments and AdamW on the CPU
    # fp32, bf16, fp16: autocast over fp32 weights. deepspeed_fp16: DeepSpeed's own `fp16`, half-precision weights with
    # fp32 masters; buffers stay fp32.
    precision: Literal["fp32", "bf16", "fp16", "deepspeed_fp16"] = "bf16"
    reduce_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # in which gradients travel between ranks
    initial_loss_scale: Positive = 65536.0  # fp16 only
    loss_scale_growth_steps: Count = 2000  # fp16 only: good steps before the scale doubles
    # Of encoder blocks, in the backward pass recompute: nothing, all, or all but matrix products and attention.
    activation_checkpointing: Literal["none", "block", "selective"] = "none"
    checkpoint_rounds: bool = False  # recompute each prompt round in the backward pass
    compile: bool = False  # torch.compile of each block, of prompt encoder and mask decoder, of the losses
    meta_init: bool = False  # build on rank 0 alone and hand out: saves the host a copy a rank
    deterministic: bool = False  # the same bits on the same hardware and ranks, slower
    timeout_minutes: Positive = 30.0  # of a collective

    @model_validator(mode="after")
    def _possible(self) -> "Engine":
        problems = []
        # The default's value passes anywhere: RUN/config.yaml writes every setting, whether it was given or not.
        if self.kind != "deepspeed" and self.zero_stage != type(self).model_fields["zero_stage"].default:
            problems.append(f"zero_stage={self.zero_stage} belongs to kind=deepspeed, kind is {self.kind}")
        if self.shard_group_size and self.kind != "hsdp":
            problems.append(f"shard_group_size belongs to kind=hsdp, kind is {self.kind}")
        if self.offload_optimizer and (self.kind != "deepspeed" or self.zero_stage == 0):
            problems.append("offload_optimizer needs kind=deepspeed and zero_stage 1, 2 or 3: nothing else moves it")
        if self.precision == "deepspeed_fp16" and (self.kind != "deepspeed" or self.zero_stage == 0):
            problems.append("precision=deepspeed_fp16 needs kind=deepspeed and zero_stage 1, 2 or 3; else use fp16")
        if self.reduce_dtype == "fp16" and self.precision not in ("fp16", "deepspeed_fp16"):
            problems.append(
                f"reduce_dtype=fp16 needs the loss scale of fp16: with precision={self.precision} small gradients "
                "would become 0"
            )
        if self.compile and self.kind == "deepspeed" and self.zero_stage == 3:
            problems.append("compile does not work with zero_stage=3: its hooks change the weights inside a block")
        return _or_raise(self, problems)


class Checkpoint(Section):
    every_steps: Count | None = None
    every_epochs: Positive | None = None
    keep_last: Count = 3
    keep_every: Count | None = None  # also keep every so-manieth save for good
    keep_best: bool = False  # also keep the best by the evaluation's mIoU; stage sam only

    @model_validator(mode="after")
    def _one_interval(self) -> "Checkpoint":
        if (self.every_steps is None) == (self.every_epochs is None):
            raise ValueError("give exactly one of every_steps and every_epochs")
        return self


class Resume(Section):
    """A run goes on only with the recipe, batch and data it was started with, unless a change is named here."""

    allow_change: tuple[str, ...] = ()  # dotted settings or whole sections, or manifest: optim.lr, phases, ...


class GuardSettings(Section):
    """When a run is not healthy, and what is done about it (trainer/guard.py)."""

    max_skipped: CountOrZero = 20  # steps not taken for a loss or gradient that is not finite, of the last 1000
    max_rollbacks: CountOrZero = 2  # to the last checkpoint, for more skipped steps than that; then the run stops
    spike_deviations: Positive = 6.0  # over the running mean: such a loss is logged with its samples
    slow_factor: Annotated[float, Field(gt=1.0)] = 1.5  # a rank's own work over the median of all: it is named
    # Without progress (a part of a step, a batch of an evaluation); below engine.timeout_minutes; none = never.
    hang_minutes: Positive | None = 15.0


class Log(Section):
    every_steps: Count = 50
    pictures_every_steps: Count = 1000  # stage mae only; stage sam has its pictures from evaluate.every_steps
    sample_keys: bool = False  # also write every step's keys and draws, one file a rank, to compare runs


class Profile(Section):
    steps: tuple[Count, Count] | None = None  # record these, first to last, counted from 1: RUN/profile/

    @model_validator(mode="after")
    def _ordered(self) -> "Profile":
        if self.steps and self.steps[0] > self.steps[1]:
            raise ValueError(f"steps: the first, {self.steps[0]}, lies after the last, {self.steps[1]}")
        return self


class Evaluate(Section):
    every_steps: Count = 5000
    num_images: Count = 64  # of the hold-out, the same first ones every time
    clicks: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 3, 5, 9)  # SAM D.1
    random_clicks: bool = False  # also clicks drawn at random, the other variant of SAM D.1
    boundary: bool = True  # also boundary IoU and boundary F; docs/evaluation.md has the cost


class Diagnostics(Section):
    """Gradients of the loss parts, spread of the hypotheses, prompt following: docs/diagnostics.md."""

    every_steps: Count | None = None  # none = off
    num_images: Count = 8  # of the hold-out, the same first ones every time


class Run(Section):
    """What both stages share."""

    run_dir: Path  # everything the run writes
    seed: CountOrZero = 0
    optim: Optim
    schedule: Schedule
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]
    batch: Batch
    engine: Engine = Engine()
    checkpoint: Checkpoint
    resume: Resume = Resume()
    guard: GuardSettings = GuardSettings()
    log: Log = Log()
    profile: Profile = Profile()


class MaeConfig(Run):
    stage: Literal["mae"]
    model: MaeModel
    data: MaeData

    @model_validator(mode="after")
    def _possible(self) -> "MaeConfig":
        problems = _averaging_problems(self) + _schedule_problems(self) + _patience_problems(self)
        if self.model.image_size % self.model.patch_size:
            problems.append(
                f"model.image_size={self.model.image_size} is no multiple of patch_size={self.model.patch_size}"
            )
        elif int((self.model.image_size // self.model.patch_size) ** 2 * (1 - self.model.mask_ratio)) == 0:
            problems.append(f"model.mask_ratio={self.model.mask_ratio} leaves no patch to see")
        if self.model.decoder_dim % self.model.decoder_heads or self.model.decoder_dim % 4:
            problems.append(
                f"model.decoder_dim={self.model.decoder_dim} must be a multiple of 4 (sine and cosine of rows and "
                f"columns) and of decoder_heads={self.model.decoder_heads}"
            )
        if self.optim.layer_decay != 1.0:
            problems.append("optim.layer_decay belongs to stage sam: MAE trains all layers at one rate")
        if any(phase.frozen for phase in self.phases):
            problems.append("phases[].frozen belongs to stage sam")
        if self.engine.checkpoint_rounds:
            problems.append("engine.checkpoint_rounds belongs to stage sam")
        if self.checkpoint.keep_best:
            problems.append("checkpoint.keep_best belongs to stage sam: stage mae has no score")
        return _or_raise(self, problems)


class SamConfig(Run):
    stage: Literal["sam"]
    model: SamModel
    data: SamData
    prompts: Prompts = Prompts()
    loss: SamLoss = SamLoss()
    evaluate: Evaluate = Evaluate()
    diagnostics: Diagnostics = Diagnostics()

    @model_validator(mode="after")
    def _possible(self) -> "SamConfig":
        problems = _averaging_problems(self) + _schedule_problems(self) + _patience_problems(self)
        if self.model.image_size % 16:
            problems.append(f"model.image_size={self.model.image_size} is no multiple of the patch size 16")
        if self.loss.resolution < self.model.image_size // 8:
            problems.append(
                f"loss.resolution={self.loss.resolution} leaves logits unread: with model.image_size="
                f"{self.model.image_size} there are {self.model.image_size // 4} a side; give half of that or more"
            )
        problems += _untrained_answers(self)
        if self.loss.focal + self.loss.dice == 0:
            problems.append("loss.focal and loss.dice are both 0: the masks would learn nothing")
        if self.data.holdout_images == 0 and self.data.eval_shards is None:
            problems.append("data.eval_shards or data.holdout_images must give evaluation something to read")
        if self.data.embeddings is not None:
            if any("image_encoder" not in phase.frozen for phase in self.phases):
                problems.append("data.embeddings needs the image encoder frozen in every phase, or set it to null")
            data = self.data
            if data.scale_jitter or data.horizontal_flip or data.color_jitter:
                problems.append("data.embeddings are of unchanged images: no scale_jitter, flip or color_jitter")
        for before, phase in zip((None, *self.phases), self.phases, strict=False):
            if len(set(phase.frozen)) == 3:
                problems.append(f"phase {phase.name} freezes everything")
            if before and (again := set(phase.frozen) - set(before.frozen)):
                # Its moments would have to be kept or dropped, and its step counts would differ within a ZeRO group.
                problems.append(f"phase {phase.name} freezes {', '.join(sorted(again))}, which {before.name} trained")
        return _or_raise(self, problems)


def _schedule_problems(config: Run) -> list[str]:
    """An end above the peak; where the length is given in steps, milestones or a peak that are never reached."""
    peak = config.optim.lr * (config.batch.global_size / 256 if config.optim.lr_per_256 else 1.0)
    if config.schedule.min_lr > peak:
        scaled = " times batch.global_size / 256" if config.optim.lr_per_256 else ""
        return [f"schedule.min_lr={config.schedule.min_lr} is above the peak {peak:g}, optim.lr{scaled}"]
    steps = [phase.steps for phase in config.phases]
    known = sum(count for count in steps if count is not None)
    late = [milestone for milestone in config.schedule.milestones if milestone >= known]
    if None in steps:
        return []
    problems = []
    if late:
        problems.append(
            f"schedule.milestones {late} lie beyond the last of {known} steps: shorten them as the phases were"
        )
    if (warmup := config.schedule.warmup_steps or 0) > known:
        problems.append(
            f"schedule.warmup_steps={warmup} is longer than the run, {known} steps: shorten it as the phases were"
        )
    return problems


def _patience_problems(config: Run) -> list[str]:
    """A collective that gives up before the watchdog looks: nobody would name the rank that hangs."""
    hang, timeout = config.guard.hang_minutes, config.engine.timeout_minutes
    if hang is None or hang < timeout:
        return []
    return [f"guard.hang_minutes={hang} must be below engine.timeout_minutes={timeout}, or null: else no rank is named"]


def _untrained_answers(config: SamConfig) -> list[str]:
    """Prompts that evaluation and users give, answered by a token which training never shows such a prompt."""
    problems = []
    loss, prompts = config.loss, config.prompts
    if loss.multimask == "single":
        if config.diagnostics.every_steps:
            problems.append(
                "diagnostics.every_steps looks at the three hypotheses, which loss.multimask=single does not train"
            )
        return problems
    if loss.multimask_when == "always":
        return problems
    two_points = prompts.types.point > 0 and sum(prompts.num_points[1:]) > 0
    two_corners = prompts.types.box > 0 and not loss.box_is_single_prompt
    if prompts.rounds == 1 and not two_points and not two_corners:
        problems.append(
            "loss.multimask_when=single_prompt trains the single-mask token on later rounds or several points, and "
            "there are none: set prompts.rounds to 2 or more, or loss.multimask_when=always"
        )
    if not (prompts.types.point or prompts.types.mask or prompts.types.none or loss.box_is_single_prompt):
        problems.append(
            "loss.box_is_single_prompt=false with boxes alone never trains the three hypotheses, which answer a click"
        )
    return problems


def _averaging_problems(config: Run) -> list[str]:
    """Engines whose weights cannot be averaged from outside."""
    engine = config.engine
    if config.optim.ema_decay is None or engine.kind != "deepspeed":
        return []
    if engine.precision == "deepspeed_fp16":
        return ["optim.ema_decay averages fp32 weights; engine.precision=deepspeed_fp16 has none: use fp16"]
    if engine.zero_stage == 3:
        return ["optim.ema_decay needs whole weights or FSDP2's shards: use engine.zero_stage 2 or engine.kind=fsdp2"]
    return []


Config = MaeConfig | SamConfig


class ConfigError(ValueError):
    """All problems of a configuration, one a line."""


def load_config(path: Path, overrides: list[str] | tuple[str, ...] = (), check_paths: bool = True) -> Config:
    """Read a YAML file, apply `dotted.key=value` overrides, check everything, return the frozen tree.

    Relative paths are taken from the working directory. Raises `ConfigError` with every problem found.
    """
    if not Path(path).is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} should hold a mapping of sections")
    problems = [problem for override in overrides if (problem := _apply_override(tree, override))]
    stage = tree.get("stage")
    root = {"mae": MaeConfig, "sam": SamConfig}.get(stage) if isinstance(stage, str) else None
    if root is None:
        raise ConfigError("\n".join([*problems, f"stage: should be mae or sam, is {stage!r}"]))
    if check_paths:
        problems += _missing_paths(tree)
    config, found = _validate(tree, root)
    if problems or found or config is None:
        raise ConfigError("\n".join([*problems, *found]))
    return config


def dump_config(config: Config) -> str:
    """YAML that loads back equal."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(tree: dict[str, Any], override: str) -> str | None:
    """Set one dotted key in place; returns the problem, if any."""
    key, equals, text = override.partition("=")
    if not equals:
        return f"{override}: an override has the form dotted.key=value"
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    node: Any = tree
    *parents, last = key.split(".")
    for depth, name in enumerate(parents):
        child = node[int(name)] if isinstance(node, list) and name.isdigit() and int(name) < len(node) else None
        if isinstance(node, dict):
            child = node.setdefault(name, {})
            if child is None:
                child = node[name] = {}
        if not isinstance(child, dict | list):
            return f"{'.'.join(parents[: depth + 1])}: is not a section, so {key} cannot be set"
        node = child
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            return f"{key}: the list has {len(node)} entries"
        node[int(last)] = value
    else:
        node[last] = value
    return None


def _causes(error: ValidationError) -> list[Any]:
    """The errors without those of a list that only lacks the items which are wrong themselves."""
    items = error.errors()
    paths = [item["loc"] for item in items]
    return [i for i in items if not any(len(p) > len(i["loc"]) > 0 and p[: len(i["loc"])] == i["loc"] for p in paths)]


def _explain(items: list[Any], root: type[Section], aside: set[tuple[int | str, ...]]) -> list[str]:
    """One line a problem: dotted path, what is wrong, the nearest valid name for an unknown key."""
    lines = []
    for item in items:
        if any(_follows(item, path) for path in aside):
            continue
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            valid = _field_names(root, item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), valid, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(sorted(valid))}"
            lines.append(f"{path}: no such key; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{path}: is required")
        else:
            message = item["msg"].removeprefix("Value error, ")
            shown = "" if isinstance(item["input"], dict) or not path else f" (is {item['input']!r})"
            lines.append(f"{path + ': ' if path else ''}{message}{shown}")
    return lines


def _in_order(path: tuple[int | str, ...]) -> list[tuple[str, int | str]]:
    """Sorts paths of mixed parts, numbers as numbers."""
    return [(type(part).__name__, part) for part in path]


def _follows(item: Any, aside: tuple[int | str, ...]) -> bool:
    """Whether an error is a consequence of what was set aside: about just that, or about its section and naming it."""
    location = item["loc"]
    if not location or aside[: len(location)] != location:
        return False
    return len(aside) == len(location) or str(aside[len(location)]) in item["msg"]


def _field_names(root: type[Section], path: tuple[int | str, ...]) -> list[str]:
    """Names valid in the section at `path`."""
    section: Any = root
    for part in path:
        if isinstance(part, int):
            continue
        section = section.model_fields[part].annotation
        arguments = [a for a in getattr(section, "__args__", ()) if isinstance(a, type) and issubclass(a, Section)]
        section = arguments[0] if arguments else section
    return list(section.model_fields)


def _validate(tree: dict[str, Any], root: type[MaeConfig | SamConfig]) -> tuple[Config | None, list[str]]:
    """The config, or None and all its problems.

    A combination is looked at only where every key and type of its section is right. So what was found wrong is set
    aside and the rest looked at again, until nothing new is found.
    """
    tree, problems, aside = copy.deepcopy(tree), [], set()
    while True:
        try:
            return root.model_validate(tree), problems
        except ValidationError as error:
            items = _causes(error)
            problems += [line for line in _explain(items, root, aside) if line not in problems]
            found = {item["loc"] for item in items if item["type"] != "missing" and item["loc"]} - aside
        aside |= found
        changed = [_set_aside(tree, path) for path in sorted(found, key=_in_order, reverse=True)]
        if not any(changed):
            return None, problems


# What stands in for a section that contradicts itself, where leaving it out would be one more problem.
STAND_INS: dict[str, dict[str, Any]] = {
    "schedule": {"warmup_steps": 0},
    "checkpoint": {"every_steps": 1},
    "phases": {"name": "", "epochs": 1},  # of unknown length: no schedule is too long for it
}


def _set_aside(tree: Any, path: tuple[int | str, ...]) -> bool:
    """Take an entry out of the tree, or put a stand-in in its place; whether anything changed."""
    *parents, last = path
    for part in parents:
        if (isinstance(tree, dict) and part in tree) or (isinstance(tree, list) and isinstance(part, int)):
            tree = tree[part]
        else:
            return False
    whole_section = len(path) == 1 or (len(path) == 2 and isinstance(last, int))  # `schedule`, `phases.0`
    stand_in = STAND_INS.get(str(path[0])) if whole_section else None
    if stand_in is not None and isinstance(tree, dict | list):
        tree[last] = dict(stand_in)
        return True
    if isinstance(tree, list) and isinstance(last, int) and last < len(tree):
        del tree[last]  # paths come in descending order, so those still to come stay right
        return True
    return isinstance(tree, dict) and tree.pop(last, tree) is not tree


def is_remote(source: str) -> bool:
    """Whether a data set is named by a URL that can be read, or by a command."""
    if source.startswith(PIPE):
        return PIPE_SLOT in source
    scheme, separator, _ = source.partition("://")
    return bool(separator) and scheme in REMOTE_SCHEMES


def _missing_paths(tree: dict[str, Any]) -> list[str]:
    """Inputs that do not exist, as far as the sections are there."""
    problems = []
    for section, key in (("data", "shards"), ("data", "eval_shards"), ("model", "init_from")):
        values = tree.get(section)
        path = values.get(key) if isinstance(values, dict) else None
        if not isinstance(path, str) or (section == "data" and is_remote(path)):
            continue
        if section == "data" and path.startswith(PIPE):
            problems.append(f"{section}.{key}: {path} lacks {PIPE_SLOT}, which stands for the name of a file")
        elif section == "data" and "://" in path:
            problems.append(f"{section}.{key}: {path} is no directory and no URL of {', '.join(REMOTE_SCHEMES)}")
        elif not Path(path).exists():
            problems.append(f"{section}.{key}: {path} does not exist")
        elif section == "data" and not (Path(path) / "manifest.json").is_file():
            problems.append(
                f"{section}.{key}: {path} holds no manifest.json; pack the data with `python -m data_tools.pack`, or "
                f"index shards that exist with `python -m data_tools.index {path}`"
            )
    return [*problems, *_run_dir_problems(tree.get("run_dir"))]


def _run_dir_problems(run_dir: Any) -> list[str]:
    """Why the run directory can be neither used nor made."""
    if not isinstance(run_dir, str):
        return []
    path = Path(run_dir)
    nearest = nearest_existing(path)
    if not nearest.is_dir():
        return [f"run_dir: {run_dir} cannot be a directory: {nearest} is a file"]
    if not os.access(nearest, os.W_OK | os.X_OK):
        return [f"run_dir: {run_dir} cannot be written: no permission in {nearest}"]
    return []
