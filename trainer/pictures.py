"""Pictures that a person can read: prompts, truth and prediction side by side; input, masked, reconstruction."""

import numpy as np
from PIL import Image, ImageDraw

from trainer.interactive import MaskScore

PANEL_SIDE = 192  # pixels
TRUTH, PREDICTED, POSITIVE, NEGATIVE, BOX = (60, 200, 80), (255, 140, 0), (40, 220, 60), (230, 40, 40), (60, 120, 255)


def overlay(image: np.ndarray, mask: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """`image` (Y, X, 3) uint8 with `mask` (Y, X) bool tinted and outlined."""
    out = image.astype(np.float32)
    out[mask] = 0.5 * out[mask] + 0.5 * np.array(color)
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    out[mask & ~inside] = color
    return out.astype(np.uint8)


def sample_row(
    image: np.ndarray,
    masks: list[np.ndarray],
    clicks: list[list[tuple[float, float, int]]],
    boxes: list[list[float] | None],
) -> np.ndarray:
    """A training sample: the input (Y, X, 3), then each target (s, s) bool over it with its prompts in input pixels."""
    panels = [draw_prompts(image, PANEL_SIDE, [], None, "input")]
    for mask, points, box in zip(masks, clicks, boxes, strict=True):
        size = Image.fromarray(mask).resize(image.shape[1::-1], Image.Resampling.NEAREST)
        drawn = [click for click in points if click[2] >= 0]
        caption = "box" if box else f"{len(drawn)} points" if drawn else "no prompt"
        corners = (box[0], box[1], box[2], box[3]) if box else None
        panels.append(draw_prompts(overlay(image, np.asarray(size), TRUTH), PANEL_SIDE, drawn, corners, caption))
    return grid([panels])


def overlay_many(image: np.ndarray, masks: list[np.ndarray]) -> np.ndarray:
    """All masks (Y, X) bool in colours of their own, large ones below small ones."""
    out = image
    for number, mask in enumerate(sorted(masks, key=np.count_nonzero, reverse=True)):
        hue = int(number * 0.618034 % 1 * 255)  # the golden section keeps neighbours in the list apart
        color = Image.new("HSV", (1, 1), (hue, 200, 255)).convert("RGB").getpixel((0, 0))
        out = overlay(out, mask, color)  # type: ignore[arg-type]
    return out


def draw_full_size(
    image: np.ndarray, clicks: list[tuple[float, float, int]], box: tuple[float, float, float, float] | None
) -> np.ndarray:
    """Clicks and box on an image of its own size."""
    picture = Image.fromarray(image)
    pen = ImageDraw.Draw(picture)
    reach = max(3, max(image.shape[:2]) // 150)
    if box is not None:
        pen.rectangle(box, outline=BOX, width=max(1, reach // 2))
    for x, y, label in clicks:
        color = POSITIVE if label else NEGATIVE
        pen.ellipse([x - reach, y - reach, x + reach, y + reach], fill=color, outline="white")
    return np.asarray(picture)


def enlarge(image: np.ndarray, side: int) -> tuple[Image.Image, float]:
    """The image with its long side brought to `side` pixels, and the factor."""
    factor = side / max(image.shape[:2])
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    return Image.fromarray(image).resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX), factor


def draw_prompts(
    image: np.ndarray,
    side: int,
    clicks: list[tuple[float, float, int]],
    box: tuple[float, float, float, float] | None,
    caption: str,
) -> np.ndarray:
    """A square panel of `side` pixels: the image, clicks (green + object, red - background), the box x1 y1 x2 y2."""
    panel = Image.new("RGB", (side, side + 14), "white")
    picture, factor = enlarge(image, side)
    panel.paste(picture, (0, 14))
    pen = ImageDraw.Draw(panel)
    pen.text((2, 1), caption, fill="black")
    if box is not None:
        pen.rectangle([round(c * factor) + (14 if i % 2 else 0) for i, c in enumerate(box)], outline=BOX, width=2)
    for number, (x, y, label) in enumerate(clicks, 1):
        cx, cy = (x + 0.5) * factor, (y + 0.5) * factor + 14
        pen.ellipse([cx - 5, cy - 5, cx + 5, cy + 5], fill=POSITIVE if label else NEGATIVE, outline="white")
        pen.text((cx - 3, cy - 6), str(number), fill="white")
    return np.asarray(panel)


def answer_row(
    image: np.ndarray, truth: np.ndarray, box: tuple[int, int, int, int], score: MaskScore, most_clicks: int
) -> list[np.ndarray]:
    """Truth, answer to a box (x y w h), to one click and to `most_clicks`, prompts drawn."""
    panels = [draw_prompts(overlay(image, truth, TRUTH), PANEL_SIDE, [], None, "truth")]
    for name in ("box", "click_1", f"click_{most_clicks}"):
        if name in score.views:
            masked = overlay(image, score.views[name].shown, PREDICTED)
            panels.append(_with_prompts(masked, name, box, score, f"{name} IoU {score.iou[name]:.2f}"))
    return panels


def round_rows(
    image: np.ndarray, truth: np.ndarray, box: tuple[int, int, int, int], score: MaskScore
) -> list[list[np.ndarray]]:
    """A row for each set of prompts: the prompts on the truth, three hypotheses with predicted IoU, answer, error."""
    rows = []
    for name, view in score.views.items():
        if name.startswith("random"):
            continue  # whose clicks are not kept
        row = [_with_prompts(overlay(image, truth, TRUTH), name, box, score, f"{name} on the truth")]
        for number, (mask, predicted) in enumerate(zip(view.hypotheses, view.predicted_ious, strict=True), 1):
            caption = f"hypothesis {number}: {predicted:.2f}"
            row.append(draw_prompts(overlay(image, mask, PREDICTED), PANEL_SIDE, [], None, caption))
        caption = f"answer: {score.predicted_iou[name]:.2f}, true {score.iou[name]:.2f}"
        row.append(draw_prompts(overlay(image, view.shown, PREDICTED), PANEL_SIDE, [], None, caption))
        missed = overlay(image, truth & ~view.shown, BOX)
        row.append(draw_prompts(overlay(missed, view.shown & ~truth, NEGATIVE), PANEL_SIDE, [], None, "missed, excess"))
        rows.append(row)
    return rows


def _with_prompts(
    image: np.ndarray, name: str, box: tuple[int, int, int, int], score: MaskScore, caption: str
) -> np.ndarray:
    """The prompts of protocol `name` drawn: the box, or the first n clicks of `click_n`."""
    if name == "box":
        x, y, width, height = box
        return draw_prompts(image, PANEL_SIDE, [], (x, y, x + width, y + height), caption)
    return draw_prompts(image, PANEL_SIDE, score.clicks[: int(name.removeprefix("click_"))], None, caption)


def grid(rows: list[list[np.ndarray]], gap: int = 4) -> np.ndarray:
    """Panels of equal size, row by row, on white."""
    if not rows:
        return np.full((1, 1, 3), 255, np.uint8)
    height, width = rows[0][0].shape[:2]
    num_columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (height + gap) - gap, num_columns * (width + gap) - gap, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, panel in enumerate(row):
            y, x = r * (height + gap), c * (width + gap)
            sheet[y : y + height, x : x + width] = panel
    return sheet


def reconstruction(images: np.ndarray, rebuilt: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """MAE: input, what the encoder saw, what came back (hidden patches only). All (B, Y, X, 3) uint8; hidden bool."""
    masked = np.where(hidden, np.uint8(127), images)
    pasted = np.where(hidden, rebuilt, images)
    return grid([[images[i], masked[i], pasted[i]] for i in range(len(images))])
