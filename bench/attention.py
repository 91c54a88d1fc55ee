"""Attention formulations compared: time of forward + backward, peak memory, error against float64.

    python -m bench.attention                       # small cases; on a CPU about a minute
    python -m bench.attention --case vit_h_global   # one case by name, e.g. on a GPU
    python -m bench.attention --out attention.json

On a CPU the time is the process's own (`time.process_time`, use one thread), so that a busy machine matters less; on
a GPU it is taken between events. Medians of `--repeats` after one warm-up, on random values.

Legend: B = windows or images, n = heads, N = tokens, D = width of one head.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import fused_attention, masked_attention, plain_attention, relative_terms

# name: (B, n, grid side, D); the relative position tables fit the grid
RELATIVE = {
    "vit_tiny_window": (32, 3, 5, 64),
    "vit_tiny_global": (8, 3, 8, 64),
    "window_14": (4, 12, 14, 64),
    "vit_h_window": (25, 16, 14, 80),
    "global_16": (1, 12, 16, 64),
    "global_24": (1, 12, 24, 64),
    "global_32": (1, 12, 32, 64),
    "vit_h_global": (1, 16, 64, 80),
}
# name: (B, n, queries, keys, D), with a key mask: the mask decoder's three attentions
MASKED = {
    "decoder_image_to_token": (48, 8, 64, 11, 8),
    "decoder_token_to_image": (48, 8, 11, 64, 8),
    "decoder_image_to_token_1024px": (16, 8, 4096, 14, 16),
    "decoder_token_to_image_1024px": (16, 8, 14, 4096, 16),
}
ON_REQUEST = {"vit_h_window", "vit_h_global", "decoder_image_to_token_1024px", "decoder_token_to_image_1024px"}

Attend = Callable[..., Tensor]


def library_kernel(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)


@functools.cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, grid: tuple[int, int]) -> Tensor:
    """The score written as a function that the compiler puts into the kernel; differentiable on a GPU only."""
    rel_h, rel_w = relative_terms(q, rel_pos_h, rel_pos_w, grid)
    width = grid[1]

    def add_position(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + rel_h[batch, head, query, key // width] + rel_w[batch, head, query, key % width]

    return compiled_flex_attention()(q, k, v, score_mod=add_position)


def relative_case(name: str, device: torch.device) -> tuple[list[Tensor], tuple, dict[str, Attend]]:
    batch, heads, side, width = RELATIVE[name]
    shapes = [(batch, heads, side * side, width)] * 3 + [(2 * side - 1, width)] * 2
    arguments = [torch.randn(shape, device=device) for shape in shapes]
    formulations = {"plain": plain_attention, "fused": fused_attention}
    if device.type == "cuda":
        formulations["flex"] = flex
    return arguments, ((side, side),), formulations


def masked_case(name: str, device: torch.device) -> tuple[list[Tensor], tuple, dict[str, Attend]]:
    batch, heads, queries, keys, width = MASKED[name]
    arguments = [torch.randn(batch, heads, n, width, device=device) for n in (queries, keys, keys)]
    mask = torch.rand(batch, 1, 1, keys, device=device) < 0.8
    mask[..., :5] = True
    return arguments, (mask,), {"library": library_kernel, "chosen": masked_attention}


def forward_backward(attend: Attend, arguments: list[Tensor], rest: tuple) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in arguments]
    out = attend(*leaves, *rest)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).to(out).view_as(out))]


def seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            begin = time.process_time()
            function()
            times.append(time.process_time() - begin)
    return statistics.median(times)


def measure(name: str, device: torch.device, dtype: torch.dtype, repeats: int) -> list[dict[str, object]]:
    """One row for each formulation: its time, its peak memory on a GPU, and its largest relative errors."""
    torch.manual_seed(0)
    arguments, rest, formulations = (relative_case if name in RELATIVE else masked_case)(name, device)
    low = [x.to(dtype) for x in arguments]
    # The truth is the first formulation in float64, of the very numbers that the others get.
    wanted = forward_backward(next(iter(formulations.values())), [x.double() for x in low], rest)
    rows = []
    for label, attend in formulations.items():
        try:
            found = forward_backward(attend, low, rest)
        except (RuntimeError, NotImplementedError, ImportError) as error:  # no compiler, or a width that it refuses
            rows.append({"case": name, "formulation": label, "failed": str(error).splitlines()[0][:200]})
            continue
        errors = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True)]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elapsed = seconds(lambda attend=attend: forward_backward(attend, low, rest), device, repeats)
        row = {"case": name, "dtype": str(dtype).removeprefix("torch."), "formulation": label}
        row |= {"ms": round(1000 * elapsed, 3), "error_forward": errors[0], "error_gradient": max(errors[1:])}
        if device.type == "cuda":
            row["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
        rows.append(row)
    return rows


def main() -> None:
    cases = [*RELATIVE, *MASKED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=cases, action="append", help="repeatable; default: all, on a CPU the small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append", help="repeatable; default: both")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file, written after every case; default: standard output")
    settings = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = settings.case or [name for name in cases if device.type == "cuda" or name not in ON_REQUEST]
    dtypes = [getattr(torch, name) for name in settings.dtype or ["float32", "bfloat16"]]
    rows: list[dict[str, object]] = []
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
    }
    for name in chosen:
        for dtype in dtypes:
            rows += measure(name, device, dtype, settings.repeats)
            if settings.out is not None:  # after every case: what was measured stays if time runs out
                settings.out.write_text(json.dumps(report, indent=1) + "\n")
    if settings.out is None:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
