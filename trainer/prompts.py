"""What the network is asked: first prompts drawn from the runs of a mask, later clicks from its own error.

Pure functions. First prompts are drawn in the loader (numpy) from uniforms keyed by the sample; later clicks on the
device (torch) from uniforms that came with the batch, by inverse CDF and without a host sync.

Letters: B images, M masks, P point slots, h w logits. Coordinates are x y in input pixels as the released predictor
takes them: an integer is the centre of a pixel. Sources: "doc" the user's document, "SAM" its App. A.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from data_tools import rle
from trainer.config import Prompts

FOREGROUND, BACKGROUND, NO_POINT = 1, 0, -1


class PromptType(IntEnum):
    POINT, BOX, MASK, NONE = range(4)


@dataclass(frozen=True)
class FirstPrompt:
    """The first-round prompt of one mask; a mask prompt is the answer to its points, which are then dropped."""

    type: PromptType
    coords: np.ndarray  # (P, 2) float32
    labels: np.ndarray  # (P,) int64, NO_POINT where empty
    box: np.ndarray  # (4,) float32, x1 y1 x2 y2


def num_draws(settings: Prompts) -> int:
    """Uniforms `first_prompt` takes: type, number, share of foreground, a point each, four box sides."""
    return 3 + len(settings.num_points) + 4


def first_prompt(
    mask: rle.Runs,
    window: tuple[int, int, int, int],
    transform: rle.AxisTransform,
    draws: np.ndarray,
    settings: Prompts,
) -> FirstPrompt:
    """Draw the first prompt of `mask`, seen through the source `window` (x0, y0, x1, y1), in input pixels.

    `transform` maps source to input coordinates. The mask must have a pixel inside the window.
    Counts and mix as in doc: 1 to 5 points, of n points uniformly 1 to n foreground, the rest uniform in the
    un-padded background; a mask without background in the window gets foreground points only.
    """
    types, counts = settings.types, settings.num_points
    type_draw, count_draw, share_draw, *point_draws = draws[: 3 + len(counts)]
    chosen = PromptType(pick(type_draw, (types.point, types.box, types.mask, types.none)))
    coords = np.zeros((len(counts), 2), np.float32)
    labels = np.full(len(counts), NO_POINT, np.int64)
    box = np.zeros(4, np.float32)
    if chosen == PromptType.BOX:
        box[:] = inside(noisy_box(input_box(mask, window, transform), draws[-4:], settings), window, transform)
    elif chosen != PromptType.NONE:
        count = 1
        if chosen == PromptType.POINT:
            count = 1 + pick(count_draw, counts)
        num_foreground = 1 + int(share_draw * count) if settings.random_background else count
        for i in range(count):
            pixel = None if i < num_foreground else rle.sample_background(mask, point_draws[i], window)
            labels[i] = FOREGROUND if pixel is None else BACKGROUND
            coords[i] = to_input(pixel or rle.sample_foreground(mask, point_draws[i], window), transform)
    return FirstPrompt(chosen, coords, labels, box)


def pick(draw: float, shares: Sequence[float]) -> int:
    """Number of the share that `draw`, in [0, 1), falls into; the shares add up to 1."""
    last = max(number for number, share in enumerate(shares) if share)  # the sum may miss 1 by a rounding
    return min(bisect_right(list(accumulate(shares)), draw), last)


def to_input(pixel: tuple[int, int] | None, transform: rle.AxisTransform) -> tuple[float, float]:
    """Centre of a source pixel in input coordinates whose integers are pixel centres."""
    assert pixel is not None, "a mask without a pixel in the window has no prompt"
    x, y = transform.apply(pixel[0] + 0.5, pixel[1] + 0.5)
    return x - 0.5, y - 0.5


def input_box(
    mask: rle.Runs, window: tuple[int, int, int, int], transform: rle.AxisTransform
) -> tuple[float, float, float, float]:
    """Tight box (x1, y1, x2, y2) of the part of `mask` inside `window`, in input pixels."""
    x0, y0, x1, y1 = window
    if (x0, y0, x1, y1) != (0, 0, mask.width, mask.height):
        mask = rle.crop(mask, x0, y0, x1 - x0, y1 - y0)
    x, y, width, height = rle.box(mask)
    left, top = transform.apply(x0 + x, y0 + y)
    right, bottom = transform.apply(x0 + x + width, y0 + y + height)
    return min(left, right), min(top, bottom), max(left, right), max(top, bottom)


def inside(
    box: tuple[float, float, float, float], window: tuple[int, int, int, int], transform: rle.AxisTransform
) -> np.ndarray:
    """The part of a box on the image: nobody draws one beyond its edge."""
    x0, y0, x1, y1 = window
    corners = np.array([transform.apply(x0, y0), transform.apply(x1, y1)])  # flipped, the first is on the right
    return np.clip(box, np.tile(corners.min(axis=0), 2), np.tile(corners.max(axis=0), 2))


def noisy_box(
    box: tuple[float, float, float, float], draws: np.ndarray, settings: Prompts
) -> tuple[float, float, float, float]:
    """Each coordinate moved by noise of `box_noise` of its side, at most `box_noise_pixels`; `draws` (4,) in [0, 1).

    SAM names a standard deviation of 10 % and a limit of 20 pixels but no distribution. "normal" takes it at its word:
    that deviation, cut at the limit. "uniform" is sam2's reading: even within the smaller of the two.
    """
    if not settings.box_noise:
        return box
    x1, y1, x2, y2 = box
    sides = settings.box_noise * np.array([x2 - x1, y2 - y1, x2 - x1, y2 - y1])
    if settings.box_noise_kind == "normal":
        normal = [NormalDist().inv_cdf(min(max(float(draw), 1e-9), 1 - 1e-9)) for draw in draws]
        shift = np.clip(normal * sides, -settings.box_noise_pixels, settings.box_noise_pixels)
    else:
        shift = (2 * np.asarray(draws) - 1) * np.minimum(sides, settings.box_noise_pixels)
    return x1 + shift[0], y1 + shift[1], x2 + shift[2], y2 + shift[3]


def later_rounds_with_click(settings: Prompts, rng: np.random.Generator) -> np.ndarray:
    """(rounds - 1,) bool: which later rounds add a point. Without one: the last, and others at random (SAM App. A)."""
    clicks = np.ones(settings.rounds - 1, bool)
    if settings.rounds_without_click:
        clicks[-1] = False
        others = rng.permutation(len(clicks) - 1)
        clicks[others[: settings.rounds_without_click - 1]] = False
    return clicks


def content_mask(image_sizes: Tensor, input_size: int, size: int) -> Tensor:
    """Cells of a `size` grid over the input whose centre lies on the image and not on padding, (B, 1, s, s) bool.

    image_sizes: (B, 2), height and width of the image in the input.
    """
    centres = (torch.arange(size, device=image_sizes.device) + 0.5) * (input_size / size)
    rows, columns = centres[None] < image_sizes[:, :1], centres[None] < image_sizes[:, 1:]
    return (rows[:, :, None] & columns[:, None, :])[:, None]


@torch.no_grad()
def next_click(logits: Tensor, targets: Tensor, content: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """A click drawn uniformly from where the prediction is wrong; from the background where nothing is.

    logits, targets: (B, M, h, w); content: (B, 1, h, w) bool, the un-padded part; uniforms: (B, M).
    Returns coords (B, M, 2), x y in *logit* pixels with integers at centres, and labels (B, M): foreground where the
    truth was missed, background where too much was taken.
    """
    truth = targets > 0
    wrong = ((logits > 0) != truth) & content
    anywhere = torch.where(wrong.any(dim=(-2, -1), keepdim=True), wrong, ~truth & content)
    # A mask that fills the content and is predicted so: any content pixel, and a foreground click.
    region = torch.where(anywhere.any(dim=(-2, -1), keepdim=True), anywhere, content.expand_as(anywhere))
    # Candidates are counted from 1 in reading order: first the row of the wanted one, then its place in that row.
    up_to_row = region.sum(dim=-1, dtype=torch.int32).cumsum(dim=-1, dtype=torch.int32)  # (B, M, h)
    total = up_to_row[..., -1:]
    wanted = (uniforms[..., None] * total).int().clamp(max=total - 1) + 1
    y = torch.searchsorted(up_to_row, wanted)  # first row that has so many candidates up to its end, (B, M, 1)
    row = y[..., None].expand(*y.shape, region.shape[-1])
    in_row = region.gather(2, row)[:, :, 0].cumsum(dim=-1, dtype=torch.int32)  # (B, M, w)
    x = torch.searchsorted(in_row, wanted - (up_to_row.gather(2, y) - in_row[..., -1:]))
    labels = truth.gather(2, row)[:, :, 0].gather(2, x)[..., 0].long()
    return torch.cat([x, y], dim=-1).float(), labels
