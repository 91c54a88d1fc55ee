"""The real task on tensors without storage: counts parameters, FLOPs, bytes moved and bytes alive, part by part.

Everything but the choice of an attention kernel is the code that trains; that one asks the device, so it is replaced by
what a GPU would choose (`pretend_gpu`). The tensors say they live on a CPU, because autograd asks the driver before it
runs backward for a GPU. Autocast differs there: layer norms compute and answer in fp32 on a GPU, so they do here.

Letters as in sam_task.py: B images, M masks an image, R rounds.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from model import attention
from model.build import SIZES
from model.mae import random_masking
from trainer.config import Config, MaeConfig, SamConfig
from trainer.data.batches import Batch, MaeBatch, SamBatch
from trainer.mae_task import MaeTask
from trainer.parallel.precision import autocast
from trainer.prompts import content_mask
from trainer.sam_task import SamTask
from trainer.stages import build_task, encoder_depth


@dataclass(frozen=True)
class Part:
    """What one part of a step costs a micro-batch."""

    flops: float  # forward
    backward_flops: float  # without recomputing
    bytes_moved: float  # forward: what its kernels read and write if each stands alone (eager)
    backward_bytes_moved: float
    saved_bytes: float  # kept from forward to backward
    extra_bytes: float  # alive at the worst moment of its forward or backward, beside what was saved


@dataclass(frozen=True)
class Simulation:
    """A micro-batch of a task."""

    encoder: Part
    first: Part  # SAM's first round, which scores more answers than the others; for MAE the same as `decoder`
    decoder: Part  # one later round, or MAE's decoder with its loss
    output_bytes: float  # of the encoder: embedding and its gradient, if any, stay for as long as rounds run


@contextmanager
def pretend_gpu() -> Iterator[None]:
    """Inside, new tensors are fake, and attention is what it would be on a GPU."""
    with ExitStack() as stack:
        stack.enter_context(patch("model.attention.attend", gpu_attend))
        stack.enter_context(patch("model.two_way_transformer.masked_attention", gpu_attention))
        stack.enter_context(patch("torch.nn.functional.layer_norm", gpu_layer_norm))
        stack.enter_context(without_initialisation())
        stack.enter_context(FakeTensorMode())
        yield


def gpu_attend(q: Tensor, k: Tensor, v: Tensor, rel_pos: tuple[Tensor, Tensor] | None, grid: tuple[int, int]) -> Tensor:
    """`model.attention.attend` without its exception for CPUs."""
    if rel_pos is None:
        return gpu_attention(q, k, v)
    with patch("torch.nn.functional.scaled_dot_product_attention", gpu_attention):
        return attention.fused_attention(q, k, v, *rel_pos, grid)


@contextmanager
def without_initialisation() -> Iterator[None]:
    """`trunc_normal_` looks at values, of which fake tensors have none; `Module.to` would swap every parameter."""
    with (
        patch("torch.nn.init.trunc_normal_", lambda tensor, *_, **__: tensor),
        patch("torch.nn.Module.to", lambda module, *_, **__: module),
    ):
        yield


def gpu_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The kernel that a GPU would choose: flash in half precision without a mask, else the memory-efficient one."""
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
    if attn_mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    bias = None
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
        bias = bias.expand(*q.shape[:3], k.shape[2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, bias, torch.is_grad_enabled(), scale=scale)[0]


def gpu_layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """A layer norm as autocast makes it on a GPU."""
    return torch.layer_norm(x.float() if torch.is_autocast_enabled("cpu") else x, shape, weight, bias, eps)


class Watch(TorchDispatchMode):
    """Bytes of tensors alive, their highest number since `restart`, and bytes that kernels read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak, self.moved = 0, 0, 0
        self._known: dict[int, int] = {}

    def restart(self) -> None:
        self.peak, self.moved = self.alive, 0

    def note(self, tensor: Tensor) -> bool:
        """Count a storage when it is first seen, and its end; whether it is new."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return False
        self._known[key] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key).atexit = False
        return True

    def _forget(self, key: int) -> None:
        self.alive -= self._known.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if any("DTensor" in kind.__name__ for kind in types):
            return NotImplemented  # it comes back as operations on the local shards
        out = func(*args, **(kwargs or {}))
        made = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        fresh = [tensor for tensor in made if self.note(tensor)]
        if fresh or func._schema.is_mutable:  # the rest are views
            read = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
            self.moved += sum(tensor.numel() * tensor.element_size() for tensor in (*read, *made))
        return out


def fake_batch(config: Config, images: int, masks: int, device: str = "cpu") -> Batch:
    """A batch of the right shapes and types, with undefined values."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    side = config.model.image_size
    common = {
        "positions": empty(images, dtype=torch.int64),
        "image_weight": empty(images),
        "keys": [""] * images,
        "problems": [],
        "num_images": 1.0,
        "num_masks": 1.0,
        "images": empty(images, 3, side, side, dtype=torch.uint8),
        "color_factors": empty(images, 3),
    }
    if isinstance(config, MaeConfig):
        return MaeBatch(**common, noise=empty(images, (side // config.model.patch_size) ** 2))
    points, target = len(config.prompts.num_points), config.loss.resolution
    grid = side // 16
    embedding = (SIZES[config.model.size].prompt_dim, grid, grid) if config.data.embeddings else (0, 0, 0)
    later = config.prompts.rounds - 1
    return SamBatch(
        **common,
        image_sizes=empty(images, 2, dtype=torch.int64),
        masks=empty(images, masks, target, target, dtype=torch.uint8),
        mask_valid=empty(images, masks, dtype=torch.bool),
        point_coords=empty(images, masks, points, 2),
        point_labels=empty(images, masks, points, dtype=torch.int64),
        boxes=empty(images, masks, 4),
        has_box=empty(images, masks, dtype=torch.bool),
        wants_mask=empty(images, masks, dtype=torch.bool),
        click_uniforms=empty(images, masks, later),
        gets_click=empty(images, later, dtype=torch.bool),
        drop_path_uniforms=empty(images, encoder_depth(config), 2),
        num_mask_prompts=masks,  # at worst all of them
        image_embeddings=empty(images, *embedding, dtype=torch.float16),
    )


def frozen_of(config: Config) -> tuple[str, ...]:
    """Parts that the last phase does not train. It trains most: a phase freezes nothing that one before it trained."""
    return config.phases[-1].frozen


def fake_task(config: Config, frozen: tuple[str, ...] = ()) -> nn.Module:
    """The task of the config, without its starting weights; inside `pretend_gpu` or another fake mode."""
    return build_task(config, frozen, initial_weights=False).train()


@dataclass
class Stretch:
    """What a stretch of the step cost; bytes alive are beyond those at its start."""

    flops: float = 0.0
    moved: float = 0.0
    peak: float = 0.0
    kept: float = 0.0


@contextmanager
def stretch(watch: Watch) -> Iterator[Stretch]:
    cost, before = Stretch(), watch.alive
    watch.restart()
    with FlopCounterMode(display=False) as counter:
        yield cost
    cost.flops, cost.moved = counter.get_total_flops(), watch.moved
    cost.peak, cost.kept = watch.peak - before, watch.alive - before


def simulate(config: Config, images: int = 1, masks: int = 1) -> Simulation:
    """One micro-batch forward and backward, part by part, in the last phase, which trains most.

    An encoder that is frozen there has no backward pass, and one whose embeddings are read does not run. SAM's later
    round is the second one (with a mask prompt and room for every click, as all but the first are).
    """
    rounds = config.prompts.rounds if isinstance(config, SamConfig) else 1
    first = first_back = None
    with pretend_gpu():
        task, batch, watch = fake_task(config, frozen_of(config)), fake_batch(config, images, masks), Watch()
        device = torch.device("cpu")
        with watch, autocast(config.engine.precision, device):
            for parameter in task.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)  # there from the start, as DDP's buckets are
            for tensor in (*task.parameters(), *task.buffers(), *vars(batch).values()):
                if isinstance(tensor, Tensor):
                    watch.note(tensor)
            with stretch(watch) as encoding:
                if isinstance(task, SamTask):
                    encoded = task.encode(batch)
                else:
                    encoded, finish = mae_encode(task, batch)
            output = encoded.detach().requires_grad_(encoded.requires_grad)
            if isinstance(task, SamTask):
                prompts = task.first_prompts(output, batch)
                content = content_mask(batch.image_sizes, batch.images.shape[-1], batch.masks.shape[-1])
                if rounds > 1:
                    with stretch(watch) as first:
                        scores = task._checkpointed_round(output, prompts, batch, 0)
                        loss = scores.loss.sum()
                        prompts = task.add_click(prompts, scores.answer, content, batch, 0)
                    with stretch(watch) as first_back:
                        loss.backward()
                    del scores, loss
                with stretch(watch) as decoding:
                    scores = task._checkpointed_round(output, prompts, batch, 1 if rounds > 1 else 0)
                    loss = scores.loss.sum()
                    if rounds > 1:
                        prompts = task.add_click(prompts, scores.answer, content, batch, 1 % (rounds - 1))
            else:
                with stretch(watch) as decoding:
                    loss = finish(output)
            with stretch(watch) as decoding_back:
                loss.backward()
            with stretch(watch) as encoding_back:
                if encoded.requires_grad:
                    encoded.backward(output.grad)
    copies = 2.0 if encoded.requires_grad else 1.0
    output_bytes = copies * encoded.numel() * encoded.element_size()
    later = part(decoding, decoding_back)
    first_part = part(first, first_back) if first and first_back else later
    return Simulation(part(encoding, encoding_back, encoded), first_part, later, output_bytes)


def mae_encode(task: MaeTask, batch: MaeBatch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Latents, and what turns them into the loss: `MaeTask.forward`, cut in two."""
    mae = task.mae
    images = mae.normalize_images(batch.images)
    ids_keep, ids_restore, hidden = random_masking(batch.noise, mae.mask_ratio)
    latent = mae.forward_encoder(images, ids_keep)
    return latent, lambda latent: mae.forward_loss(images, mae.forward_decoder(latent, ids_restore), hidden).sum()


def part(forward: Stretch, backward: Stretch, output: Tensor | None = None) -> Part:
    """`output` is the forward's result, which is not counted as saved."""
    output_bytes = output.numel() * output.element_size() if output is not None else 0
    return Part(
        forward.flops,
        backward.flops,
        forward.moved,
        backward.moved,
        forward.kept - output_bytes,
        max(forward.peak - forward.kept, backward.peak),
    )
