"""What the network is asked: the document's mix, and clicks that are uniform over the error."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from data_tools import rle
from trainer.config import Prompts, TypeProbabilities
from trainer.prompts import (
    BACKGROUND,
    FOREGROUND,
    PromptType,
    first_prompt,
    later_rounds_with_click,
    next_click,
    num_draws,
    pick,
)

P_VALUE = 1e-4  # a correct sampler fails one such test in ten thousand; seeds are fixed, so never by chance again


def draw_many(settings: Prompts, count: int):
    bitmap = np.zeros((20, 30), bool)
    bitmap[5:15, 8:20] = True
    mask, transform = rle.from_bitmap(bitmap), rle.AxisTransform(2.0, 2.0, 0.0, 0.0)
    rng = np.random.default_rng(0)
    return [
        first_prompt(mask, (0, 0, 30, 20), transform, rng.random(num_draws(settings)), settings) for _ in range(count)
    ]


def test_the_mix_and_the_counts_are_the_documents():
    prompts = draw_many(Prompts(), 4000)
    kinds = np.bincount([p.type for p in prompts], minlength=4)
    assert chisquare(kinds, 4000 * np.array([0.5, 0.3, 0.15, 0.05])).pvalue > P_VALUE
    assert chisquare(kinds, 4000 * np.array([0.5, 0.25, 0.2, 0.05])).pvalue < P_VALUE, "the test can fail"
    points = [p for p in prompts if p.type == PromptType.POINT]
    counts = np.bincount([(p.labels >= 0).sum() for p in points], minlength=6)[1:]
    assert chisquare(counts, len(points) * np.array([0.4, 0.3, 0.15, 0.1, 0.05])).pvalue > P_VALUE
    pairs = [p for p in points if (p.labels >= 0).sum() == 2]
    backgrounds = sum((p.labels == BACKGROUND).any() for p in pairs)
    assert chisquare([backgrounds, len(pairs) - backgrounds]).pvalue > P_VALUE, "of two, one or two are foreground"
    assert all((p.labels == FOREGROUND).any() for p in points)
    masks = [p for p in prompts if p.type == PromptType.MASK]
    assert all((p.labels >= 0).sum() == 1 for p in masks), "answered from one point"


def test_points_are_uniform_in_their_mask():
    prompts = draw_many(Prompts(types=TypeProbabilities(point=1, box=0, mask=0, none=0), num_points=(1.0,)), 3000)
    x = np.array([(p.coords[0] + 0.5) / 2 - 0.5 for p in prompts])
    assert (x == x.round()).all(), "a centre of a pixel is an integer, in the source and in the input"
    x = x.astype(int)
    cells = np.ravel_multi_index((x[:, 1] - 5, x[:, 0] - 8), (10, 12))
    assert chisquare(np.bincount(cells, minlength=120)).pvalue > P_VALUE


def test_box_noise_stays_within_its_limits():
    only_boxes = TypeProbabilities(point=0, box=1, mask=0, none=0)
    exact = draw_many(Prompts(types=only_boxes), 1)[0].box
    np.testing.assert_allclose(exact, [16, 10, 40, 30])
    noisy = np.array([p.box for p in draw_many(Prompts(types=only_boxes, box_noise=0.1), 500)]) - exact
    assert (np.abs(noisy) <= [2.4 + 1e-5, 2.0 + 1e-5, 2.4 + 1e-5, 2.0 + 1e-5]).all()
    assert np.abs(noisy).max() > 2.2
    settings = Prompts(types=only_boxes, box_noise=0.1, box_noise_kind="normal", box_noise_pixels=4.0)
    normal = np.array([p.box for p in draw_many(settings, 4000)]) - exact
    assert np.abs(normal).max() <= 4.0 + 1e-5
    # A deviation of 10 % of sides of 24 and 20; cutting at 4 takes 10 and 5 % off it (1.67 and 2 deviations).
    np.testing.assert_allclose(normal.std(axis=0), [2.4 * 0.902, 2.0 * 0.959] * 2, rtol=0.04)


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_a_noisy_box_stays_on_the_image(kind):
    """Of a mask that covers it, also where it is flipped; the rest of the input is padding."""
    settings = Prompts(
        types=TypeProbabilities(point=0, box=1, mask=0, none=0), box_noise=0.1, box_noise_kind=kind, num_points=(1.0,)
    )
    mask = rle.from_bitmap(np.ones((20, 30), bool))
    rng = np.random.default_rng(0)
    for transform in (rle.AxisTransform(2.0, 2.0, 0.0, 0.0), rle.AxisTransform(-2.0, 2.0, 60.0, 0.0)):
        boxes = np.array(
            [
                first_prompt(mask, (0, 0, 30, 20), transform, rng.random(num_draws(settings)), settings).box
                for _ in range(200)
            ]
        )
        assert (boxes >= 0).all()
        assert (boxes <= [60, 40, 60, 40]).all()
        assert (boxes[:, :2] < boxes[:, 2:]).all()
        assert (boxes[:, 0] > 0).any(), "noise that leads inside is kept"


def test_a_share_of_nothing_is_never_drawn():
    """Shares may miss 1 by a rounding, and a draw may come that close."""
    assert pick(0.99999995, (0.3333333, 0.6666666, 0.0, 0.0)) == 1


def test_clicks_are_uniform_over_the_error_and_labelled_by_the_truth():
    generator = torch.Generator().manual_seed(0)
    truth = (torch.rand(1, 1, 6, 6, generator=generator) > 0.5).to(torch.uint8)
    logits = torch.randn(1, 1, 6, 6, generator=generator)
    content = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    content[..., 5] = False
    many = 4000
    coords, labels = next_click(
        logits.expand(1, many, 6, 6), truth.expand(1, many, 6, 6), content, torch.rand(1, many, generator=generator)
    )
    cells = (coords[0, :, 1] * 6 + coords[0, :, 0]).long()
    wrong = (((logits > 0) != (truth > 0)) & content).flatten()
    counts = torch.bincount(cells, minlength=36)
    assert counts[~wrong].sum() == 0
    assert chisquare(counts[wrong].numpy()).pvalue > P_VALUE
    assert torch.equal(labels[0], truth.flatten()[cells].long())


def test_without_an_error_the_click_falls_on_the_background():
    truth = torch.zeros(1, 2, 4, 4, dtype=torch.uint8)
    truth[0, 0, 1, 1] = 1
    truth[0, 1] = 1
    content = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    coords, labels = next_click(truth.float() * 2 - 1, truth, content, torch.tensor([[0.999999, 0.0]]))
    assert labels.tolist() == [[0, 1]], "a full mask has no background: a click on it"
    assert coords[0, 0].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    "predicted, in_content, in_padding",
    [(1.0, 0, 0), (-1.0, 1, 1), (-1.0, 0, 0), (1.0, 1, 0)],
    ids=["excess everywhere", "missed everywhere", "no error", "no error and no background"],
)
def test_no_click_falls_on_the_padding(predicted, in_content, in_padding):
    """The content is 4 x 3 of 6 x 6 cells; clicks reach all of it and nothing else, wherever the error lies."""
    content = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    content[..., :4, :3] = True
    truth = torch.where(content, in_content, in_padding).to(torch.uint8).expand(1, 12, 6, 6)
    uniforms = (torch.arange(12) + 0.5)[None] / 12
    coords, labels = next_click(torch.full((1, 12, 6, 6), predicted), truth, content, uniforms)
    assert coords[0].tolist() == [[x, y] for y in range(4) for x in range(3)]
    assert labels.tolist() == [[in_content] * 12]


def test_the_published_rounds_without_a_click():
    settings = Prompts(rounds=11, rounds_without_click=2)
    draws = [later_rounds_with_click(settings, np.random.default_rng(i)) for i in range(200)]
    assert all(len(d) == 10 and d.sum() == 8 and not d[-1] for d in draws)
    assert len({int(np.flatnonzero(~d)[0]) for d in draws}) == 9, "the other one is anywhere"
