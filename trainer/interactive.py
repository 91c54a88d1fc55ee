"""Simulated users: box and clicks on every mask of an image, answered by the network, scored at original resolution.

Protocol (SAM section 7.1 and D.1): the first click is the pixel farthest from the mask's boundary, each next one the
pixel farthest from the boundary of the error region, positive where the truth was missed, negative where too much
was taken. The answer to a single prompt is the hypothesis of highest *predicted* IoU of three, to more the single-mask
token's; from the second click on the previous answer is given as mask prompt too. `box_oracle` and `click_1_oracle`
take the hypothesis of highest *true* IoU instead (SAM 7.1 "oracle"): how much of the error is choosing.

Letters: B images, M masks, H W input pixels, h w logits, Y X pixels of the original image.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_tools import rle
from model.prompt_encoder import Prompts
from model.sam import Sam, SamOutput
from trainer.prompts import NO_POINT


@dataclass(frozen=True)
class EvalBatch:
    """Images with all masks to be scored. Images of weight nothing have no truths."""

    images: Tensor  # (B, 3, H, W) uint8, zero where padded
    image_sizes: Tensor  # (B, 2) int64, height and width of the content in the input
    truths: list[list[rle.Runs]]  # (B)(M), at original resolution
    keys: list[str]  # (B)
    clicks: tuple[int, ...]  # numbers of clicks after which to score, ascending
    single_token: bool  # the single-mask token answers every prompt: where no other was trained
    masks_at_once: int  # how many masks of an image are decoded together; limits memory, changes nothing
    keep_masks: bool = False  # return the predicted bitmaps too, for pictures

    def to(self, device: torch.device) -> "EvalBatch":
        return replace(self, images=self.images.to(device), image_sizes=self.image_sizes.to(device))


@dataclass(frozen=True)
class MaskScore:
    """One mask of one image: IoU by protocol, for example `box`, `click_1`, and the filled box as baseline."""

    key: str
    number: int  # of the mask in its image
    iou: dict[str, float]
    clicks: list[tuple[float, float, int]]  # x, y in original pixels, label
    predicted: dict[str, np.ndarray]  # bitmaps (Y, X) if kept


EvalScores = list[MaskScore]


@torch.no_grad()
def interact(sam: Sam, batch: EvalBatch) -> EvalScores:
    """Answer a box and a sequence of clicks for every mask of every image."""
    images = sam.normalize_images(batch.images, batch.image_sizes)
    embeddings = sam.encode_images(images)
    scores: EvalScores = []
    for i, truths in enumerate(batch.truths):
        height, width = batch.image_sizes[i].tolist()
        for first in range(0, len(truths), batch.masks_at_once):
            some = truths[first : first + batch.masks_at_once]
            user = _Session(sam, embeddings[i : i + 1], batch, some, first, batch.keys[i], (height, width))
            scores += user.run()
    return scores


class _Session:
    """One image and some of its masks, from number `first` on. B = 1 throughout."""

    def __init__(
        self,
        sam: Sam,
        embedding: Tensor,
        batch: EvalBatch,
        truths: list[rle.Runs],
        first: int,
        key: str,
        content: tuple[int, int],
    ) -> None:
        self.sam, self.embedding, self.batch, self.key, self.content = sam, embedding, batch, key, content
        self.runs, self.first = truths, first
        self.truths = np.stack([rle.to_bitmap(mask) for mask in truths]).astype(bool)  # (M, Y, X)
        self.size = self.truths.shape[1:]
        self.input_size = batch.images.shape[-1]
        self.logits_size = 4 * embedding.shape[-1]

    def run(self) -> EvalScores:
        to_boxes = self.answer_to_boxes()
        answers = {"box": self.bitmaps(chosen(to_boxes, self.batch.single_token))}
        answers_to_clicks, clicks, to_first_clicks = self.answers_to_clicks()
        answers |= answers_to_clicks
        oracle = {}
        if not self.batch.single_token:  # else the three hypotheses were never trained
            oracle = {"box_oracle": self.oracle(to_boxes), "click_1_oracle": self.oracle(to_first_clicks)}
        scores = []
        for m, truth in enumerate(self.truths):
            iou = {name: bitmap_iou(masks[m], truth) for name, masks in answers.items()}
            iou |= {name: values[m] for name, values in oracle.items()}
            iou["filled_box"] = filled_box_iou(self.runs[m])
            kept = {name: masks[m] for name, masks in answers.items()} if self.batch.keep_masks else {}
            scores.append(MaskScore(self.key, self.first + m, iou, clicks[m], kept))
        return scores

    def oracle(self, output: SamOutput) -> list[float]:
        """IoU (M) of the best of the three hypotheses, at the original resolution."""
        best = [0.0] * len(self.truths)
        for k in range(1, output.low_res_logits.shape[2]):
            masks = self.bitmaps(output.low_res_logits[:, :, k].float())
            best = [max(best[m], bitmap_iou(masks[m], truth)) for m, truth in enumerate(self.truths)]
        return best

    def answer_to_boxes(self) -> SamOutput:
        boxes = np.array([rle.box(mask) for mask in self.runs], np.float32)  # x y w h
        boxes[:, 2:] += boxes[:, :2]
        scale = self.to_input_scale()
        device = self.embedding.device
        scaled = torch.from_numpy(boxes * np.tile(scale, 2).astype(np.float32)).to(device)[None]
        num_masks = len(self.runs)
        empty = torch.full((1, num_masks, 1), NO_POINT, device=device)
        return self.decode(torch.zeros(1, num_masks, 1, 2, device=device), empty, scaled)

    def answers_to_clicks(self) -> tuple[dict[str, np.ndarray], list[list[tuple[float, float, int]]], SamOutput]:
        """Bitmaps (M, Y, X) after each number of clicks that is scored, the clicks of each mask, the first output."""
        num_masks, most = len(self.runs), max(self.batch.clicks)
        device = self.embedding.device
        coords = torch.zeros(1, num_masks, most, 2, device=device)
        labels = torch.full((1, num_masks, most), NO_POINT, device=device)
        clicks: list[list[tuple[float, float, int]]] = [[] for _ in range(num_masks)]
        current = np.zeros_like(self.truths)
        previous: Tensor | None = None
        first: SamOutput | None = None
        answers = {}
        for number in range(most):
            for m, truth in enumerate(self.truths):
                x, y, label = center_click(current[m], truth)
                clicks[m].append((x, y, label))
                position = (np.array([x, y]) + 0.5) * self.to_input_scale() - 0.5
                coords[0, m, number] = torch.from_numpy(position).to(coords)
                labels[0, m, number] = label
            output = self.decode(coords, labels, None, previous)
            first = first or output
            previous = chosen(output, self.batch.single_token or number > 0)
            current = self.bitmaps(previous)
            if number + 1 in self.batch.clicks:
                answers[f"click_{number + 1}"] = current
        assert first is not None, "at least one click"
        return answers, clicks, first

    def decode(
        self, coords: Tensor, labels: Tensor, boxes: Tensor | None, mask_logits: Tensor | None = None
    ) -> SamOutput:
        num_masks, size = len(self.runs), self.logits_size
        flags = torch.ones(1, num_masks, dtype=torch.bool, device=self.embedding.device)
        prompts = Prompts(
            coords,
            labels,
            boxes if boxes is not None else coords.new_zeros(1, num_masks, 4),
            flags if boxes is not None else ~flags,
            mask_logits if mask_logits is not None else coords.new_zeros(1, num_masks, size, size),
            flags if mask_logits is not None else ~flags,
        )
        return self.sam.decode_masks(self.embedding, prompts)

    def to_input_scale(self) -> np.ndarray:
        """Input pixels for an original pixel, x and y."""
        return np.array([self.content[1] / self.size[1], self.content[0] / self.size[0]])

    def bitmaps(self, logits: Tensor) -> np.ndarray:
        """Low-resolution logits (1, M, h, w) to bitmaps (M, Y, X) of the original image."""
        return upsample_to_original(logits, self.input_size, self.content, self.size)[0]


def upsample_to_original(
    logits: Tensor, input_size: int, content: tuple[int, int], original: tuple[int, ...]
) -> np.ndarray:
    """(B, M, h, w) logits to bool (B, M, Y, X), as the released predictor does it in two bilinear steps."""
    bitmaps = np.empty((*logits.shape[:2], *original), bool)
    for m in range(logits.shape[1]):  # one at a time: 64 masks of an SA-1B image would be a gigabyte of logits
        one = F.interpolate(logits[:, m : m + 1].float(), (input_size,) * 2, mode="bilinear", align_corners=False)
        one = one[..., : content[0], : content[1]]
        one = F.interpolate(one, tuple(original), mode="bilinear", align_corners=False)
        bitmaps[:, m : m + 1] = (one > 0).cpu().numpy()
    return bitmaps


def best_predicted(output: SamOutput) -> Tensor:
    """Of the three hypotheses the one of highest predicted IoU, (B, M, h, w) logits, fp32."""
    best = output.iou_predictions[..., 1:].argmax(dim=-1)[..., None, None, None]
    logits = output.low_res_logits[:, :, 1:]
    return logits.gather(2, best.expand(-1, -1, 1, *logits.shape[-2:]))[:, :, 0].float()


def chosen(output: SamOutput, single: bool) -> Tensor:
    """The answer that is shown, (B, M, h, w) logits, fp32: the single-mask token's or the best of the three."""
    return output.low_res_logits[:, :, 0].float() if single else best_predicted(output)


def center_click(predicted: np.ndarray, truth: np.ndarray) -> tuple[float, float, int]:
    """x, y, label of the pixel deepest inside the larger error; a perfect answer gets one more click in the truth."""
    missed, excess = truth & ~predicted, predicted & ~truth
    missed_depth, missed_at = deepest(missed)
    excess_depth, excess_at = deepest(excess)
    if missed_depth == excess_depth == 0:
        return *deepest(truth)[1], 1
    return (*missed_at, 1) if missed_depth >= excess_depth else (*excess_at, 0)


def deepest(region: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Largest distance to the outside, the image's border counting as outside, and the x, y where it is reached."""
    ys, xs = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    if len(ys) == 0:
        return 0.0, (0.0, 0.0)
    window = region[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    # OpenCV's exact transform took 40 ms where SciPy's took 530 on 1500 x 2250 pixels; an evaluation asks thousands.
    distance = cv2.distanceTransform(np.pad(window, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return float(distance.max()), (float(xs[0] + x), float(ys[0] + y))


def bitmap_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bitmaps; 1 if both are empty."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def filled_box_iou(mask: rle.Runs) -> float:
    """IoU of a mask with its own filled box: what a box prompt is worth without a network."""
    _, _, width, height = rle.box(mask)
    return rle.area(mask) / (width * height) if width * height else 1.0
