"""Simulated users: boxes and clicks on every mask of an image, answered by the network, scored at original resolution.

Protocol (SAM section 7.1 and D.1): the first click is the pixel farthest from the mask's boundary, each next one the
pixel farthest from the boundary of the error region, positive where the truth was missed, negative where too much
was taken; `random` clicks are drawn uniformly from the mask and then from the error instead. The answer to a single
prompt is the hypothesis of highest *predicted* IoU of three, to more the single-mask token's; from the second click on
the previous answer is given as mask prompt too. `box_oracle` and `click_1_oracle` take the hypothesis of highest *true*
IoU instead (SAM 7.1 "oracle"): how much of the error is choosing.

Letters: B images, M masks, H W input pixels, h w logits, Y X pixels of the original image.
"""

import hashlib
import math
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
from trainer.scores import boundary_f, boundary_iou, filled_box_iou

MATCHED = ("box", "click_1")  # answers that are kept as runs, for AP
Click = tuple[float, float, int]  # x, y in original pixels, label


FILLER = rle.from_bitmap(np.eye(8, dtype=np.uint8))  # asked for where an image has no more masks; not scored


@dataclass(frozen=True)
class EvalBatch:
    """Images with all masks to be scored. Images of weight nothing have no truths."""

    images: Tensor  # (B, 3, H, W) uint8, zero where padded
    image_sizes: Tensor  # (B, 2) int64, height and width of the content in the input
    truths: list[list[rle.Runs]]  # (B)(M), at original resolution
    keys: list[str]  # (B)
    clicks: tuple[int, ...]  # numbers of clicks after which to score, ascending
    random_clicks: bool  # also score clicks drawn at random
    boundary: bool  # also score boundaries
    single_token: bool  # the single-mask token answers every prompt: where no other was trained
    masks_at_once: int  # how many masks of an image are decoded together; limits memory, changes nothing
    keep_masks: bool = False  # return the predicted bitmaps too, for pictures
    single_token_for_boxes: bool = False  # it answers boxes: where training counts a box as two prompts
    least_masks: int = 0  # the network is called as if an image had so many: all ranks must call alike (ZeRO 3)

    def to(self, device: torch.device) -> "EvalBatch":
        return replace(self, images=self.images.to(device), image_sizes=self.image_sizes.to(device))


@dataclass(frozen=True)
class View:
    """What a person should see of one answer, if kept: bitmaps (Y, X) and the IoUs that the network predicted."""

    shown: np.ndarray
    hypotheses: list[np.ndarray]  # 3, or the single-mask token's where no other was trained
    predicted_ious: list[float]  # of each


@dataclass(frozen=True)
class MaskScore:
    """One mask of one image. Each dictionary is by protocol: `box`, `click_1`, `random_1`, ..."""

    key: str
    number: int  # of the mask in its image
    area: int  # original pixels
    iou: dict[str, float]  # the oracles and the filled box as baseline too
    predicted_iou: dict[str, float]
    boundary_iou: dict[str, float]  # empty unless asked for
    boundary_f: dict[str, float]
    clicks: list[Click]
    found: dict[str, rle.Runs]  # the answers named in MATCHED
    views: dict[str, View]  # if kept


EvalScores = list[MaskScore]


@torch.no_grad()
def interact(sam: Sam, batch: EvalBatch) -> EvalScores:
    """Answer boxes and sequences of clicks for every mask of every image.

    Images are encoded one at a time, so that a score does not depend on which images share a batch.
    """
    images = sam.normalize_images(batch.images, batch.image_sizes)
    scores: EvalScores = []
    for i, truths in enumerate(batch.truths):
        embedding = sam.encode_images(images[i : i + 1])
        height, width = batch.image_sizes[i].tolist()
        num_masks = max(len(truths), batch.least_masks)
        for first in range(0, num_masks, batch.masks_at_once):
            some = truths[first : first + batch.masks_at_once]
            user = _Session(sam, embedding, batch, some or [FILLER], first, batch.keys[i], (height, width))
            scores += user.run()[: len(some)]
    return scores


@dataclass(frozen=True)
class _Answers:
    """The network's answers to one set of prompts on M masks."""

    output: SamOutput
    bitmaps: np.ndarray  # (M, Y, X), what is shown
    predicted_ious: list[float]  # (M), of what is shown


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
        answers = {"box": self.answer_to_boxes()}
        by_center, clicks = self.answers_to_clicks(at_random=False)
        answers |= by_center
        if self.batch.random_clicks:
            answers |= self.answers_to_clicks(at_random=True)[0]
        oracle = {}
        if not self.batch.single_token:  # else the three hypotheses were never trained
            asked = [name for name in MATCHED if name in answers]
            if self.batch.single_token_for_boxes:
                asked.remove("box")
            oracle = {f"{name}_oracle": self.oracle(answers[name].output) for name in asked}
        return [self.score(m, answers, oracle, clicks[m]) for m in range(len(self.truths))]

    def score(
        self, m: int, answers: dict[str, _Answers], oracle: dict[str, list[float]], clicks: list[Click]
    ) -> MaskScore:
        truth = self.truths[m]
        bitmaps = {name: answer.bitmaps[m] for name, answer in answers.items()}
        # 2.4 ms for the runs of a bitmap of SA-1B's size and 0.01 ms to compare them, against 4.1 ms for two bitmaps.
        runs = {name: rle.from_bitmap(bitmap) for name, bitmap in bitmaps.items()}
        iou = {name: rle.iou(found, self.runs[m]) for name, found in runs.items()}
        iou |= {name: values[m] for name, values in oracle.items()}
        measured = bitmaps if self.batch.boundary else {}
        return MaskScore(
            self.key,
            self.first + m,
            rle.area(self.runs[m]),
            iou | {"filled_box": filled_box_iou(self.runs[m])},
            {name: answer.predicted_ious[m] for name, answer in answers.items()},
            {name: boundary_iou(bitmap, truth) for name, bitmap in measured.items()},
            {name: boundary_f(bitmap, truth) for name, bitmap in measured.items()},
            clicks,
            {name: runs[name] for name in MATCHED if name in runs},
            {name: self.view(answer, m) for name, answer in answers.items()} if self.batch.keep_masks else {},
        )

    def view(self, answer: _Answers, m: int) -> View:
        tokens = trained_tokens(self.batch.single_token)
        bitmaps = self.bitmaps(answer.output.low_res_logits[:, m, tokens].float())
        return View(answer.bitmaps[m], list(bitmaps), answer.output.iou_predictions[0, m, tokens].float().tolist())

    def oracle(self, output: SamOutput) -> list[float]:
        """IoU (M) of the best of the three hypotheses, at the original resolution."""
        best = [0.0] * len(self.truths)
        for k in range(1, output.low_res_logits.shape[2]):
            masks = self.bitmaps(output.low_res_logits[:, :, k].float())
            best = [max(best[m], rle.iou(rle.from_bitmap(masks[m]), truth)) for m, truth in enumerate(self.runs)]
        return best

    def answer_to_boxes(self) -> _Answers:
        boxes = np.array([rle.box(mask) for mask in self.runs], np.float32)  # x y w h
        boxes[:, 2:] += boxes[:, :2]
        scale = self.to_input_scale()
        device = self.embedding.device
        scaled = torch.from_numpy(boxes * np.tile(scale, 2).astype(np.float32)).to(device)[None]
        num_masks = len(self.runs)
        empty = torch.full((1, num_masks, 1), NO_POINT, device=device)
        output = self.decode(torch.zeros(1, num_masks, 1, 2, device=device), empty, scaled)
        return self.answers(output, *chosen(output, self.batch.single_token or self.batch.single_token_for_boxes))

    def answers_to_clicks(self, at_random: bool) -> tuple[dict[str, _Answers], list[list[Click]]]:
        """Answers after each number of clicks that is scored, by protocol, and the clicks of each mask."""
        num_masks, most = len(self.runs), max(self.batch.clicks)
        device = self.embedding.device
        coords = torch.zeros(1, num_masks, most, 2, device=device)
        labels = torch.full((1, num_masks, most), NO_POINT, device=device)
        clicks: list[list[Click]] = [[] for _ in range(num_masks)]
        uniforms = [click_uniforms(self.key, self.first + m, most) for m in range(num_masks)]
        current = np.zeros_like(self.truths)
        previous: Tensor | None = None
        answers = {}
        for number in range(most):
            for m, truth in enumerate(self.truths):
                if at_random:
                    x, y, label = random_click(current[m], truth, uniforms[m][number])
                else:
                    x, y, label = center_click(current[m], truth)
                clicks[m].append((x, y, label))
                position = (np.array([x, y]) + 0.5) * self.to_input_scale() - 0.5
                coords[0, m, number] = torch.from_numpy(position).to(coords)
                labels[0, m, number] = label
            output = self.decode(coords, labels, None, previous)
            previous, predicted = chosen(output, self.batch.single_token or number > 0)
            answer = self.answers(output, previous, predicted)
            current = answer.bitmaps
            if number + 1 in self.batch.clicks:
                answers[f"{'random' if at_random else 'click'}_{number + 1}"] = answer
        return answers, clicks

    def answers(self, output: SamOutput, logits: Tensor, predicted: Tensor) -> _Answers:
        return _Answers(output, self.bitmaps(logits[0]), predicted[0].float().tolist())

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
        """Low-resolution logits (..., h, w) to bitmaps (N, Y, X) of the original image, N the leading axes together."""
        return upsample_to_original(logits.flatten(0, -3), self.input_size, self.content, self.size)


def upsample_logits(logits: Tensor, input_size: int, content: tuple[int, int], original: tuple[int, ...]) -> Tensor:
    """(N, h, w) logits to (N, Y, X) float32, as the released predictor does it: to the input, cut, to the original."""
    at_input = F.interpolate(logits[:, None].float(), (input_size,) * 2, mode="bilinear", align_corners=False)
    at_input = at_input[..., : content[0], : content[1]]
    return F.interpolate(at_input, tuple(original), mode="bilinear", align_corners=False)[:, 0]


def upsample_to_original(
    logits: Tensor, input_size: int, content: tuple[int, int], original: tuple[int, ...]
) -> np.ndarray:
    """(N, h, w) logits to bool (N, Y, X)."""
    bitmaps = np.empty((len(logits), *original), bool)
    for n in range(len(logits)):  # one at a time: 64 masks of an SA-1B image would be a gigabyte of logits
        one = upsample_logits(logits[n : n + 1], input_size, content, original)
        bitmaps[n] = (one[0] > 0).cpu().numpy()
    return bitmaps


def best_predicted(output: SamOutput) -> Tensor:
    """Of the three hypotheses the one of highest predicted IoU, (B, M, h, w) logits, fp32."""
    best = output.iou_predictions[..., 1:].argmax(dim=-1)[..., None, None, None]
    logits = output.low_res_logits[:, :, 1:]
    return logits.gather(2, best.expand(-1, -1, 1, *logits.shape[-2:]))[:, :, 0].float()


def trained_tokens(single: bool) -> slice:
    """Mask tokens that are answers of their own: the single one where no other was trained, else the hypotheses."""
    return slice(0, 1) if single else slice(1, None)


def chosen(output: SamOutput, single: bool) -> tuple[Tensor, Tensor]:
    """What is shown, the single-mask token's or the best of the three: (B, M, h, w) logits, (B, M) predicted IoU."""
    if single:
        return output.low_res_logits[:, :, 0].float(), output.iou_predictions[..., 0]
    return best_predicted(output), output.iou_predictions[..., 1:].amax(dim=-1)


def center_click(predicted: np.ndarray, truth: np.ndarray) -> Click:
    """x, y, label of the pixel deepest inside the larger error; a perfect answer gets one more click in the truth."""
    missed, excess = truth & ~predicted, predicted & ~truth
    missed_depth, missed_at = deepest(missed)
    excess_depth, excess_at = deepest(excess)
    if missed_depth == excess_depth == 0:
        return *deepest(truth)[1], 1
    return (*missed_at, 1) if missed_depth >= excess_depth else (*excess_at, 0)


def random_click(predicted: np.ndarray, truth: np.ndarray, uniform: float) -> Click:
    """x, y, label of a pixel drawn uniformly from the error, or from the truth where there is none."""
    error = predicted ^ truth
    candidates = np.flatnonzero(error if error.any() else truth)
    y, x = divmod(int(candidates[int(uniform * len(candidates))]), truth.shape[1])
    return float(x), float(y), int(truth[y, x])


def click_uniforms(key: str, number: int, count: int) -> np.ndarray:
    """(count,) in [0, 1) for mask `number` of image `key`: the same in every evaluation, whatever the layout."""
    digest = hashlib.sha256(f"{key}/{number}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16]))).random(count)


def deepest(region: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Largest distance to the outside, the image's border counting as outside, and the x, y where it is reached."""
    ys, xs = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    if len(ys) == 0:
        return 0.0, (0.0, 0.0)
    window = region[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    # OpenCV's exact transform took 40 ms where SciPy's took 530 on 1500 x 2250 pixels; an evaluation asks thousands.
    distance = cv2.distanceTransform(np.pad(window, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    # Its last digit changes from call to call, and with it which of equally deep pixels is the first. Squared distances
    # are whole numbers, and at 4000 x 4000 pixels it is off by less than 0.1 of one.
    squared = np.rint(distance.astype(np.float64) ** 2)
    y, x = np.unravel_index(squared.argmax(), squared.shape)
    return math.sqrt(squared[y, x]), (float(xs[0] + x), float(ys[0] + y))
