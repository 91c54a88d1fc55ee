"""Attention with decomposed relative position: fused, plain and released forms, against float64, in both directions."""

import pytest
import torch
from segment_anything.modeling.image_encoder import add_decomposed_rel_pos
from torch import Tensor

from model import attention
from model.attention import Attention, fused_attention, plain_attention
from tests.model.support import difference

CASES = [((4, 4), 16, (7, 7)), ((8, 8), 32, (15, 15)), ((14, 14), 80, (27, 27)), ((6, 9), 16, (27, 11))]


def inputs(grid: tuple[int, int], width: int, lengths: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, grid[0] * grid[1], width)] * 3 + [(length, width) for length in lengths]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def released(q: Tensor, k: Tensor, v: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, grid: tuple[int, int]) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = add_decomposed_rel_pos((q * q.shape[-1] ** -0.5) @ k.mT, q, rel_pos_h, rel_pos_w, grid, grid)
    return (scores.softmax(-1) @ v).unflatten(0, (2, 3))


def with_gradients(function, arguments: list[Tensor], grid: tuple[int, int]) -> list[Tensor]:
    arguments = [x.clone().requires_grad_() for x in arguments]
    out = function(*arguments, grid)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), arguments)]


@pytest.mark.parametrize("function", [fused_attention, plain_attention])
@pytest.mark.parametrize("grid, width, lengths", CASES)
def test_forward_and_gradients_against_float64(function, grid, width, lengths):
    arguments = inputs(grid, width, lengths)
    wanted = with_gradients(released, [x.double() for x in arguments], grid)
    found = with_gradients(function, arguments, grid)
    assert difference(found[0], wanted[0]) < 1e-5
    assert max(difference(a, b) for a, b in zip(found[1:], wanted[1:], strict=True)) < 1e-4
    # The measure sees an error: rows and columns exchanged.
    arguments[3], arguments[4] = arguments[4], arguments[3]
    assert difference(with_gradients(function, arguments, grid)[0], wanted[0]) > 1e-2


@pytest.mark.parametrize("plain_up_to", [0, 10**9])
@pytest.mark.parametrize("grid, window", [((8, 8), 0), ((8, 8), 5), ((8, 8), 4), ((7, 4), 3), ((3, 3), 5)])
def test_windows_equal_the_released_block(grid, window, plain_up_to, monkeypatch):
    """Padded window tokens are keys with the bias alone, in both formulations and for any ratio of grid to window."""
    from segment_anything.modeling.image_encoder import Block as ReleasedBlock

    from model.image_encoder import Block

    monkeypatch.setattr(attention, "MAX_PLAIN_TOKENS_ON_CPU", plain_up_to)
    theirs = ReleasedBlock(32, 2, use_rel_pos=True, window_size=window, input_size=grid, rel_pos_zero_init=False)
    theirs.norm1.eps = theirs.norm2.eps = 1e-6
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours = Block(32, 2, 4.0, use_rel_pos=True, grid=grid, window_size=window)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, *grid, 32)
    assert difference(ours(x), theirs(x)) < 1e-5
    theirs(x).square().sum().backward()
    ours(x).square().sum().backward()
    wanted = dict(theirs.named_parameters())
    assert max(difference(p.grad, wanted[name].grad) for name, p in ours.named_parameters()) < 1e-4
    if window == 5:
        with torch.no_grad():
            ours.attn.qkv.bias[32:64] += 1.0  # the keys' bias matters only through the padded tokens' position
            ours.attn.qkv.bias[64:] += 0.1
        assert difference(ours(x), theirs(x)) > 1e-3


def test_widths_that_heads_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="embed_dim=30 is not a multiple of num_heads=4"):
        Attention(30, 4, use_rel_pos=False, grid=(2, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, forward, backward", [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 2e-2, 3e-2)])
def test_on_a_gpu_against_float64(dtype, forward, backward):
    """What a GPU uses, on windows and the whole grid of vit_h. bf16 rounds to 2^-9 of a value, and a few add up."""
    function = fused_attention
    for grid, lengths in (((14, 14), (27, 27)), ((64, 64), (127, 127))):
        arguments = [x.to("cuda", dtype) for x in inputs(grid, 80, lengths)]
        arguments[3:] = [0.1 * table for table in arguments[3:]]  # as trained; else a few keys alone decide
        wanted = with_gradients(plain_attention, [x.double() for x in arguments], grid)
        found = with_gradients(function, arguments, grid)
        assert difference(found[0], wanted[0]) < forward
        assert max(difference(a, b) for a, b in zip(found[1:], wanted[1:], strict=True)) < backward
