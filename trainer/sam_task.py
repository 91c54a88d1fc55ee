"""One training step of stage 2: encode the images once, then prompt, decode and score, round after round.

Letters: B images, M masks an image, P points a mask, K mask tokens (4), R rounds, H W input pixels, h w logits (H / 4),
s target pixels. Everything that touches parameters happens inside one `forward`, because FSDP2 and ZeRO hook it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.prompt_encoder import Prompts as PromptBatch
from model.sam import Sam, SamOutput
from model.weights import TransferReport
from trainer.config import SamConfig
from trainer.data.batches import SamBatch
from trainer.data.images import jitter_colors
from trainer.diagnostics import DiagnosticBatch, diagnose
from trainer.interactive import EvalBatch, EvalScores, best_predicted, chosen, interact
from trainer.losses import (
    dice_loss,
    focal_loss,
    iou_loss,
    mask_iou,
    mean_per_image,
    mean_per_mask,
    resize_logits,
    sample_points,
)
from trainer.prompts import NO_POINT, content_mask, next_click

SINGLE, MULTI = 0, slice(1, 4)  # mask tokens: one for an unambiguous prompt, three for an ambiguous one


@dataclass(frozen=True)
class Scores:
    """What one round earned each mask, (B, M) each; `answer` (B, M, h, w) is what the next round builds on.

    The parts are those of the mask that was trained: of three hypotheses the one of least loss, chosen with the truth.
    So `iou` is an oracle's and not what a user would be shown, which evaluation scores.
    """

    loss: Tensor
    focal: Tensor
    dice: Tensor
    iou_error: Tensor
    iou: Tensor
    answer: Tensor


class SamTask(nn.Module):
    """`forward(batch) -> (loss, metrics)`; in evaluation `EvalBatch -> EvalScores`, `DiagnosticBatch -> sums`."""

    weight_report: TransferReport | None = None  # what came from model.init_from, on ranks that read it

    def __init__(self, sam: Sam, config: SamConfig, frozen: tuple[str, ...]) -> None:
        super().__init__()
        self.sam, self.config, self.frozen = sam, config, frozen
        sam.image_encoder.activation_checkpointing = config.engine.activation_checkpointing
        for part in frozen:
            getattr(sam, part).requires_grad_(False)

    def shard_units(self) -> list[nn.Module]:
        return self.sam.shard_units()

    def compile_parts(self) -> None:
        """torch.compile of the encoder's blocks, of both halves of a round and of its losses, in place.

        A prompt round is bound by memory, so that fusing its kernels counts for more than the encoder's.
        """
        for module in (*self.sam.shard_units(), self.sam.prompt_encoder, self.sam.mask_decoder):
            module.compile()
        self.compare = torch.compile(self.compare)

    def train(self, mode: bool = True) -> "SamTask":
        """Frozen parts stay in evaluation mode: no dropout where nothing is learned."""
        super().train(mode)
        for part in self.frozen:
            getattr(self.sam, part).eval()
        return self

    def forward(
        self, batch: SamBatch | EvalBatch | DiagnosticBatch
    ) -> tuple[Tensor, dict[str, Tensor]] | EvalScores | Tensor:
        if isinstance(batch, EvalBatch):
            return interact(self.sam, batch)
        if isinstance(batch, DiagnosticBatch):
            return diagnose(self.sam, self.config, batch)
        image_embeddings = self.encode(batch)
        content = content_mask(batch.image_sizes, batch.images.shape[-1], batch.masks.shape[-1])
        prompts = self.first_prompts(image_embeddings, batch)
        rounds = self.config.prompts.rounds
        losses, metrics = [], {}
        for number in range(rounds):
            scores = self._checkpointed_round(image_embeddings, prompts, batch, number)
            losses.append(self._mean(scores.loss, batch))
            metrics |= self._metrics(scores, batch, f"round_{number + 1}/" if rounds > 1 else "")
            if number + 1 < rounds:
                prompts = self.add_click(prompts, scores.answer, content, batch, number)
        loss = torch.stack(losses).sum()
        return loss, {"loss": loss.detach(), **metrics}

    def encode(self, batch: SamBatch) -> Tensor:
        """Images to embeddings (B, C, H/16, W/16); a frozen encoder runs without a graph, or ran before."""
        if batch.image_embeddings.numel():
            return batch.image_embeddings.float()
        images = batch.images
        if self.config.data.color_jitter:
            images = jitter_colors(images, batch.color_factors, batch.image_sizes)
        images = self.sam.normalize_images(images, batch.image_sizes)
        with torch.set_grad_enabled(torch.is_grad_enabled() and "image_encoder" not in self.frozen):
            return self.sam.encode_images(images, batch.drop_path_uniforms)

    def first_prompts(self, image_embeddings: Tensor, batch: SamBatch) -> PromptBatch:
        """The prompts of round 1. A mask prompt is the network's own answer to one point, never the truth."""
        coords, labels = pad_points(batch.point_coords, batch.point_labels, self.config.prompts.rounds - 1)
        logits_size = 4 * image_embeddings.shape[-1]
        mask_logits = image_embeddings.new_zeros((*labels.shape[:2], logits_size, logits_size), dtype=torch.float32)
        prompts = PromptBatch(
            coords, labels, batch.boxes, batch.has_box, mask_logits, torch.zeros_like(batch.wants_mask)
        )
        if not self.config.prompts.types.mask:
            return prompts
        # At least one mask even where none asks: shards are gathered by calls, which all ranks must make alike.
        asking = max(1, batch.num_mask_prompts)
        with torch.no_grad():
            one_point = PromptBatch(*(x[:, :asking] for x in prompts))
            one_point = one_point._replace(
                point_coords=one_point.point_coords[:, :, :1], point_labels=one_point.point_labels[:, :, :1]
            )
            output = self.sam.decode_masks(image_embeddings, one_point)
            answer, _ = chosen(output, single=self.config.loss.multimask == "single")
        wants_mask = batch.wants_mask
        mask_logits[:, :asking] = torch.where(wants_mask[:, :asking, None, None], answer, 0.0)
        return prompts._replace(
            point_labels=torch.where(wants_mask[..., None], NO_POINT, labels),
            mask_logits=mask_logits,
            has_mask=wants_mask,
        )

    def add_click(
        self, prompts: PromptBatch, answer: Tensor, content: Tensor, batch: SamBatch, number: int
    ) -> PromptBatch:
        """The next round's prompts: one more click in the error of `answer`, and `answer` itself as mask prompt."""
        resized = resize_logits(answer, batch.masks.shape[-1])
        coords, labels = next_click(resized, batch.masks, content, batch.click_uniforms[:, :, number])
        scale = batch.images.shape[-1] / batch.masks.shape[-1]
        coords = (coords + 0.5) * scale - 0.5
        labels = torch.where(batch.gets_click[:, number, None], labels, NO_POINT)
        slot = batch.point_labels.shape[-1] + number
        new_coords, new_labels = prompts.point_coords.clone(), prompts.point_labels.clone()
        new_coords[:, :, slot], new_labels[:, :, slot] = coords, labels
        return prompts._replace(
            point_coords=new_coords,
            point_labels=new_labels,
            mask_logits=answer,
            has_mask=torch.ones_like(prompts.has_mask),
        )

    def _checkpointed_round(
        self, image_embeddings: Tensor, prompts: PromptBatch, batch: SamBatch, number: int
    ) -> Scores:
        if self.config.engine.checkpoint_rounds and torch.is_grad_enabled():
            return checkpoint(self.round, image_embeddings, prompts, batch, number, use_reentrant=False)
        return self.round(image_embeddings, prompts, batch, number)

    def round(self, image_embeddings: Tensor, prompts: PromptBatch, batch: SamBatch, number: int) -> Scores:
        """Decode one set of prompts and score every hypothesis that counts against the truth."""
        settings = self.config.loss
        output = self.sam.decode_masks(image_embeddings, prompts)
        alone = self.single_token_only(number)
        answers = output.low_res_logits[:, :, : 1 if alone else None]
        focal, dice, true_iou = self.compare(answers, batch.masks)  # (B, M, K) each
        iou_error = iou_loss(output.iou_predictions[..., : 1 if alone else None], true_iou)
        mask_part = settings.focal * focal + settings.dice * dice
        total = mask_part + settings.iou * iou_error
        choose_by = (total if settings.select_by == "total" else mask_part).detach()

        ambiguous = num_prompts(prompts, settings.box_is_single_prompt) <= 1
        if alone:
            loss, trained = total[..., SINGLE], torch.zeros_like(ambiguous, dtype=torch.int64)[..., None]
        else:
            best = 1 + choose_by[..., MULTI].argmin(dim=-1, keepdim=True)
            three = pick(total, best) if settings.multimask == "best" else total[..., MULTI].mean(dim=-1)
            if settings.iou_on == "all" and settings.multimask == "best":
                three = pick(mask_part, best) + settings.iou * iou_error[..., MULTI].mean(dim=-1)
            if settings.multimask_when == "always":
                # Token 0 would stay untrained in the document's recipe; it learns from the unambiguous prompts.
                loss, trained = three + total[..., SINGLE] * ~ambiguous, best
            else:
                loss = torch.where(ambiguous, three, total[..., SINGLE])
                trained = torch.where(ambiguous[..., None], best, SINGLE)
        return Scores(
            loss,
            pick(focal, trained).detach(),
            pick(dice, trained).detach(),
            pick(iou_error, trained).detach(),
            pick(true_iou, trained),
            (answers[:, :, SINGLE] if alone else self.answer(output, ambiguous)).detach(),
        )

    def single_token_only(self, number: int) -> bool:
        """Whether the single-mask token alone counts in round `number`, known without looking at the data.

        From the second round on every mask has its first prompt and its own answer, unless the first prompt was none
        or was itself an answer. The three hypotheses are then not even resized.
        """
        loss, types = self.config.loss, self.config.prompts.types
        if loss.multimask == "single":
            return True
        return loss.multimask_when == "single_prompt" and number > 0 and types.mask == types.none == 0

    def compare(self, answers: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Focal loss, dice loss and true IoU (B, M, K) of answers (B, M, K, h, w) to masks (B, M, s, s)."""
        settings = self.config.loss
        truth = masks[:, :, None]
        if settings.sampled_points is None:
            logits = resize_logits(answers, settings.resolution)  # (B, M, K, s, s)
            points, truth_at_points = logits, truth
        else:
            sampled = sample_points(answers.flatten(0, 1), masks.flatten(0, 1), settings.sampled_points)
            points, truth_at_points = (x.unflatten(0, masks.shape[:2]) for x in sampled)  # (B, M, K, 1, P)
            logits = resize_logits(answers.detach(), settings.resolution)
        focal = focal_loss(points, truth_at_points, settings.focal_alpha, settings.focal_gamma)
        return focal, dice_loss(points, truth_at_points, settings.dice_smooth), mask_iou(logits, truth)

    def answer(self, output: SamOutput, ambiguous: Tensor) -> Tensor:
        """The mask the network would show, (B, M, h, w) logits: by predicted IoU of three, or the single token's."""
        best = best_predicted(output)
        if self.config.loss.multimask_when == "always":
            return best
        return torch.where(ambiguous[..., None, None], best, output.low_res_logits[:, :, SINGLE])

    def _mean(self, per_mask: Tensor, batch: SamBatch) -> Tensor:
        if self.config.loss.normalize == "image_mean":
            return mean_per_image(per_mask, batch.mask_valid, batch.image_weight, batch.num_images)
        return mean_per_mask(per_mask, batch.mask_valid, batch.image_weight, batch.num_masks)

    def _metrics(self, scores: Scores, batch: SamBatch, prefix: str) -> dict[str, Tensor]:
        parts = {"focal": scores.focal, "dice": scores.dice, "iou_error": scores.iou_error, "iou": scores.iou}
        return {prefix + name: self._mean(part, batch) for name, part in parts.items()}


def num_prompts(prompts: PromptBatch, box_is_single: bool = True) -> Tensor:
    """How many prompts each mask has, (B, M): points, a box (or its two corners), a mask."""
    boxes = prompts.has_box.int() * (1 if box_is_single else 2)
    return (prompts.point_labels != NO_POINT).sum(dim=-1) + boxes + prompts.has_mask.int()


def pick(values: Tensor, index: Tensor) -> Tensor:
    """(B, M, K) at (B, M, 1) to (B, M)."""
    return values.gather(-1, index)[..., 0]


def pad_points(coords: Tensor, labels: Tensor, num_more: int) -> tuple[Tensor, Tensor]:
    """Empty slots for the clicks of later rounds: (B, M, P, 2) and (B, M, P) to P + num_more."""
    return F.pad(coords, (0, 0, 0, num_more)), F.pad(labels, (0, num_more), value=NO_POINT)
