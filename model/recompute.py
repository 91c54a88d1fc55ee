"""Activations that are computed again in the backward pass instead of kept.

Chen et al. 2016 (arXiv 1604.06174); what to keep follows Korthikanti et al. 2022 (arXiv 2205.05198), section 5.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_aten = torch.ops.aten
# Nearly all the work of a block and a minor part of its memory: linear layers and fused attention. The products inside
# plain attention are not here: N x N scores are the largest activation of all.
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def recomputed(function: Callable[..., Any], *inputs: Any, selective: bool) -> Any:
    """`function(*inputs)`, whose activations the backward pass computes again; with `selective` all but `KEPT`."""
    if not selective:
        return checkpoint(function, *inputs, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _keep)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


def _keep(context: object, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
