"""PyTorch's own ways to train on several ranks: replicas (DDP, or one plain process), shards (FSDP2), both (HSDP)."""

import gc
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from trainer.config import Run
from trainer.distributed import World, ensure_process_group
from trainer.parallel.groups import ParamGroup
from trainer.parallel.initial import fill_from_rank_0, hand_out, local_part, take_whole
from trainer.parallel.precision import LossScale, autocast, dtype_of

_MOMENTS = ("exp_avg", "exp_avg_sq")
_DDP_KEYWORDS = inspect.signature(DistributedDataParallel.__init__).parameters
# Newer PyTorch warns at the old name, older PyTorch does not know the new one.
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_KEYWORDS else "broadcast_buffers"


class TorchEngine:
    """What replicas and shards share: AdamW, loss scale, clipping, state. A subclass wraps the task and reduces."""

    def __init__(self, task: nn.Module, config: Run, groups: Sequence[ParamGroup], world: World) -> None:
        self.world = world
        self.precision = config.engine.precision
        self.grad_clip = config.optim.grad_clip
        self.task = task
        self._reduce_dtype = dtype_of(config.engine.reduce_dtype)
        self._shard_group_size = config.engine.shard_group_size or world.local_size  # HSDP only
        self.wrapped = self._wrap(self.task)
        parameters = dict(self.task.named_parameters())  # after wrapping: FSDP2 replaces them by shards
        self._lr_scales = [group.lr_scale for group in groups]
        self._trained = {name: parameters[name] for group in groups for name in group.names}
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [parameters[name] for name in group.names], "weight_decay": group.weight_decay}
                for group in groups
            ],
            lr=config.optim.lr,
            betas=config.optim.betas,
            eps=config.optim.eps,
            fused=True,  # also what lets a step be skipped on the device, through `found_inf`
        )
        for parameter in self._trained.values():  # from the start, so that state_dict() always has every entry
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=world.device),
                **{moment: torch.zeros_like(parameter) for moment in _MOMENTS},
            }
        self._scale = LossScale(
            self.precision, config.engine.initial_loss_scale, config.engine.loss_scale_growth_steps, world.device
        )
        self._finish(config)
        self.set_lr(config.optim.lr)

    def _finish(self, config: Run) -> None:
        """For a backend that wants to see the optimizer."""

    def _wrap(self, task: nn.Module) -> nn.Module:
        raise NotImplementedError

    def _prepare_reduction(self, last: bool) -> None:
        """Called before each backward pass: ranks reduce in it if `last`, else gradients add up locally."""
        raise NotImplementedError

    def __call__(self, batch: Any) -> Any:
        """Forward pass, see `Engine`."""
        with autocast(self.precision, self.world.device):
            return self.wrapped(batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Backward pass, see `Engine`."""
        self._prepare_reduction(last)
        # Both wrappers average over ranks; ours is a sum. Scaling the loss and not the gradient also brings it to the
        # size that a mean over this rank's samples has, where fp16 is at its best.
        (loss * (self._scale.scale * self.world.size)).backward()

    @torch.no_grad()
    def step(self) -> Tensor:
        """Optimizer step, see `Engine`. No host-device sync."""
        grads = [local_part(parameter.grad) for parameter in self._grads_present()]
        norm = _whole(torch.nn.utils.get_total_norm([p.grad for p in self._trained.values()])) / self._scale.scale
        factor = 1.0 / self._scale.scale
        if self.grad_clip is not None:
            factor = factor * (self.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        if self.grad_clip is not None or self._scale.dynamic:
            torch._foreach_mul_(grads, factor)
        skipped = ~torch.isfinite(norm)
        # What GradScaler hands to a fused optimizer: it then leaves parameters, moments and step counts as they are.
        self.optimizer.grad_scale, self.optimizer.found_inf = None, skipped.float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._scale.update(skipped)
        return norm

    def _grads_present(self) -> list[nn.Parameter]:
        missing = [name for name, parameter in self._trained.items() if parameter.grad is None]
        if missing:
            raise ValueError(
                "no gradient for trained parameters; a task must use each one, with weight zero if need be: "
                + ", ".join(missing)
            )
        return list(self._trained.values())

    def set_lr(self, lr: float) -> None:
        """Learning rate of every group, see `Engine`."""
        for group, lr_scale in zip(self.optimizer.param_groups, self._lr_scales, strict=True):
            group["lr"] = lr * lr_scale

    def lrs(self) -> list[float]:
        """Learning rate of every group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def rates(self) -> dict[str, tuple[float, float]]:
        """Rate and decay of every parameter, see `Engine`."""
        names = {id(parameter): name for name, parameter in self._trained.items()}
        return {
            names[id(parameter)]: (group["lr"], group["weight_decay"])
            for group in self.optimizer.param_groups
            for parameter in group["params"]
        }

    @property
    def loss_scale(self) -> float:
        """Loss scale; a host-device sync."""
        return float(self._scale.scale)

    @property
    def num_skipped(self) -> int:
        """Steps skipped by this engine; a host-device sync."""
        return int(self._scale.num_skipped)

    def state_dict(self) -> dict[str, Tensor]:
        """State by name, see `Engine`; shares memory with the live state."""
        return dict(self.state_items())

    def state_items(self) -> Iterator[tuple[str, Tensor]]:
        """State by name, see `Engine`."""
        for name, value in self.task.state_dict().items():
            yield f"model.{name}", value
        for name, parameter in self._trained.items():
            for key, value in self.optimizer.state[parameter].items():
                yield f"optim.{key}.{name}", value
        yield from self._scale.state_dict().items()

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state, see `Engine`. ValueError if a weight is missing."""
        live = self.state_dict()
        if missing := [key for key in live if key.startswith("model.") and key not in state]:
            raise ValueError(f"state has no {', '.join(missing)}")
        for key, target in live.items():
            if key.startswith("scaler."):
                continue
            if key in state:
                _assign(target, state[key])
            else:
                target.zero_()  # first trained now
        self._scale.load_state_dict(state)

    def full_weights(self) -> dict[str, Tensor]:
        """Whole weights on rank 0, see `Engine`. One tensor at a time is whole on the device."""
        weights = {}
        for name, value in self.task.state_dict().items():
            whole = _whole(value)  # a collective: on every rank
            if self.world.is_main:
                weights[name] = whole.detach().to("cpu", copy=True)
        return weights

    def close(self) -> None:
        """Let go of the task, the wrapper and its hooks, and the optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        del self.wrapped, self.task, self.optimizer, self._trained
        gc.collect()  # the wrappers hold themselves in cycles
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()


class DdpEngine(TorchEngine):
    """A replica per rank, gradients averaged in buckets during the backward pass. One process: the plain module."""

    def _wrap(self, task: nn.Module) -> nn.Module:
        hand_out(task, self.world)
        if self.world.size == 1:
            return task
        wrapped = DistributedDataParallel(
            task,
            device_ids=[self.world.device.index] if self.world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **{_SYNC_BUFFERS: False},  # buffers are constants: rank 0's at the start are everyone's
        )
        if self._reduce_dtype != torch.float32:
            lowered = {torch.bfloat16: bf16_compress_hook, torch.float16: fp16_compress_hook}
            wrapped.register_comm_hook(None, lowered[self._reduce_dtype])
        return wrapped

    def __call__(self, batch: Any) -> Any:
        """Forward pass, see `Engine`."""
        if self.world.size == 1 or not torch.is_grad_enabled():
            return super().__call__(batch)
        # DDP wants to know before the *forward* pass whether the ranks will reduce; our door says so at the backward
        # pass. So the forward pass leaves the reducer alone, and `_prepare_reduction` arms it when it is time.
        with self.wrapped.no_sync():
            return super().__call__(batch)

    def _prepare_reduction(self, last: bool) -> None:
        if self.world.size > 1 and last:
            self.wrapped.reducer.prepare_for_backward([])  # what DDP's forward does outside no_sync()


class Fsdp2Engine(TorchEngine):
    """Parameters, gradients and moments sharded over all ranks, per shard unit and the rest in the root."""

    def _wrap(self, task: nn.Module) -> nn.Module:
        ensure_process_group(self.world)
        whole = take_whole(task, self.world)
        mesh = self._mesh()
        # Weights travel and are kept in fp32; autocast lowers them where they are used, exactly as under DDP.
        policy = MixedPrecisionPolicy(reduce_dtype=self._reduce_dtype)
        for unit in task.shard_units():
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        wrapped = fully_shard(task, mesh=mesh, mp_policy=policy)
        fill_from_rank_0(task, whole, self.world)
        return wrapped

    def _mesh(self) -> DeviceMesh:
        return init_device_mesh(self.world.device.type, (self.world.size,))

    def _prepare_reduction(self, last: bool) -> None:
        self.wrapped.set_is_last_backward(last)
        self.wrapped.set_requires_gradient_sync(last)


class HsdpEngine(Fsdp2Engine):
    """Sharded inside groups of `engine.shard_group_size` ranks, replicated across them.

    The parameters travel inside a node, where links are fast; across nodes only the gradients of a shard do. Zhao et
    al. 2023 (PyTorch FSDP), section 3.2.2, "hybrid sharding".
    """

    def _mesh(self) -> DeviceMesh:
        size = self._shard_group_size
        if self.world.size % size:
            raise ValueError(
                f"engine.shard_group_size={size} does not divide {self.world.size} ranks; it is a node's "
                f"{self.world.local_size} ranks when not given"
            )
        # Ranks of a node have consecutive numbers, so a row of the mesh lies inside one.
        shape = (self.world.size // size, size)
        return init_device_mesh(self.world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _assign(target: Tensor, value: Tensor) -> None:
    """Copy `value` into `target`, either of which may be sharded; every rank has the whole of a plain tensor."""
    if target is value:
        return
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    elif isinstance(value, DTensor) and not isinstance(target, DTensor):
        value = value.full_tensor()
    target.copy_(value)
