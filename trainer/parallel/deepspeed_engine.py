"""DeepSpeed ZeRO behind the same door: fp32 weights, torch's AdamW, autocast and loss scale as in the other engines.

DeepSpeed's own mixed precision is used for precision=deepspeed_fp16 alone. Its `fp16` and `bf16` sections cast weights
and buffers; its `torch_autocast` reduces gradients in the low precision, steps a loss scaler once per parameter group,
and never lowers the scale after an overflow. Here autocast runs inside the module and DeepSpeed sees an fp32 model
whose loss scale is set from outside (`override_loss_scale`), which its unscaling, clipping and norm all respect.

Imported by `build_engine` only when asked for: the import takes seconds.
"""

import gc
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import Optim, Run
from trainer.distributed import World, ensure_process_group
from trainer.parallel.groups import ParamGroup
from trainer.parallel.initial import hand_out
from trainer.parallel.precision import LossScale, Precision, autocast
from trainer.parallel.torch_engine import TorchEngine

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, when DeepSpeed is imported

import deepspeed
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

log = logging.getLogger(__name__)

# On the CPU DeepSpeed would compile a shared-memory all-reduce at first use: most of a minute, and a compiler, for runs
# that only try things out. Without it gloo does the same.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_MOMENTS = ("exp_avg", "exp_avg_sq")
_BUCKET_ELEMENTS = 50_000_000  # of a reduction or gathering: 200 MB in fp32, where DeepSpeed's default takes 2 GB


class DeepSpeedEngine:
    """ZeRO stages 1 to 3. One flat optimizer state per parameter group."""

    def __init__(self, task: nn.Module, config: Run, groups: Sequence[ParamGroup], world: World) -> None:
        ensure_process_group(world)
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed insists, even on one process
        self.world = world
        self.stage = config.engine.zero_stage
        assert self.stage in (1, 2, 3), "stage 0 is ZeroStage0Engine"
        hand_out(task, world)
        self.task = task
        self._groups = tuple(groups)
        self._parameters = dict(task.named_parameters())
        self._trained = {name: self._parameters[name] for group in groups for name in group.names}
        # On the CPU: DeepSpeed decides on the host whether to step, so the scale is needed there.
        self._scale = LossScale(
            config.engine.precision,
            config.engine.initial_loss_scale,
            config.engine.loss_scale_growth_steps,
            torch.device("cpu"),
        )
        # DeepSpeed's own fp16 rounds everything that it is handed. What no optimizer keeps in fp32 is kept here.
        self._half = config.engine.precision == "deepspeed_fp16"
        self._frozen = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in self._parameters.items()
            if self._half and name not in self._trained
        }
        buffers = dict(task.named_buffers())
        self.wrapped, *_ = deepspeed.initialize(
            model=_Autocast(self.task, config.engine.precision, world.device),
            optimizer=_adamw(self._parameters, groups, config.optim, config.engine.offload_optimizer),
            config=deepspeed_config(config, world),
            dist_init_required=False,
        )
        if self._half:
            _put_back(self.task, buffers)
            if world.device.type == "cpu":
                _lower_norm_inputs(self.task)
        self._zero = self.wrapped.optimizer
        self._make_states()
        self._zero.override_loss_scale(float(self._scale.scale))
        self.set_lr(config.optim.lr)

    def __call__(self, batch: Any) -> Any:
        """Forward pass, see `Engine`."""
        return self.wrapped(batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Backward pass, see `Engine`. ZeRO 2 and 3 reduce at every micro-batch and add up the shards."""
        self.wrapped.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks (and multiplies by the loss scale); ours is a sum.
        self.wrapped.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self) -> Tensor:
        """Optimizer step, see `Engine`. DeepSpeed reads the norm on the host: a host-device sync."""
        self.wrapped.step()
        skipped = bool(self._zero.overflow)
        norm = self._zero._global_grad_norm  # after unscaling, before clipping; inf where the step was skipped
        self._scale.update(torch.tensor(skipped))
        self._zero.override_loss_scale(float(self._scale.scale))
        return torch.as_tensor(float("inf") if skipped else norm, dtype=torch.float32, device=self.world.device)

    def set_lr(self, lr: float) -> None:
        """Learning rate of every group, see `Engine`."""
        for param_group, group in zip(self._zero.param_groups, self._groups, strict=True):
            param_group["lr"] = lr * group.lr_scale

    def lrs(self) -> list[float]:
        """Learning rate of every group."""
        return [param_group["lr"] for param_group in self._zero.param_groups]

    def rates(self) -> dict[str, tuple[float, float]]:
        """Rate and decay of every parameter, see `Engine`: those of the flat group that DeepSpeed has put it in."""
        names = {id(parameter): name for name, parameter in self._trained.items()}
        members = self._zero.bit16_groups if self.stage < 3 else self._zero.fp16_groups
        return {
            names[id(parameter)]: (group["lr"], group["weight_decay"])
            for group, parameters in zip(self._zero.param_groups, members, strict=True)
            for parameter in parameters
        }

    @property
    def loss_scale(self) -> float:
        """Loss scale."""
        return float(self._scale.scale)

    @property
    def num_skipped(self) -> int:
        """Steps skipped by this engine."""
        return int(self._scale.num_skipped)

    def state_dict(self) -> dict[str, Tensor]:
        """State by name, see `Engine`. Whole tensors on every rank: weights share memory (not under ZeRO-3)."""
        return dict(self.state_items())

    def state_items(self) -> Iterator[tuple[str, Tensor]]:
        """State by name, see `Engine`. All ranks step through it together: each entry may be a collective."""
        for name, value in self._weights():
            yield f"model.{name}", value
        for group, flat in zip(self._groups, self._flat_groups(), strict=True):
            for name in group.names:
                for moment in _MOMENTS:
                    yield f"optim.{moment}.{name}", safe_get_full_optimizer_state(self._trained[name], moment)
                yield f"optim.step.{name}", torch.tensor(float(self._zero.optimizer.state[flat]["step"]))
        yield from self._scale.state_dict().items()

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state, see `Engine`.

        ValueError if a weight is missing, or if names of one group have different step counts: ZeRO keeps one count
        for a group's flat state, so parameters that start training later belong in groups of their own.
        """
        names = self._state_names()
        if missing := [name for name in names if f"model.{name}" not in state]:
            raise ValueError(f"state has no weights {', '.join(missing)}")
        steps = [_common_step(group, state) for group in self._groups]
        for name in names:
            self._set_weight(name, state[f"model.{name}"])
        for name, parameter in self._trained.items():
            for moment in _MOMENTS:
                value = state.get(f"optim.{moment}.{name}")
                value = torch.zeros_like(state[f"model.{name}"]) if value is None else value
                self._set_flat(parameter, value.to(self.world.device), moment)
        for flat, step in zip(self._flat_groups(), steps, strict=True):
            entry = self._zero.optimizer.state[flat]
            entry["step"] = type(entry["step"])(step) if isinstance(entry["step"], int) else entry["step"].fill_(step)
        self._scale.load_state_dict(dict(state))
        self._zero.override_loss_scale(float(self._scale.scale))

    def full_weights(self) -> dict[str, Tensor]:
        """Whole weights on rank 0, see `Engine`."""
        weights = {}
        for name, value in self._weights():
            if self.world.is_main:
                weights[name] = value.detach().to("cpu", copy=True)
        return weights

    def close(self) -> None:
        """Take DeepSpeed's hooks off and let go of its buffers."""
        self.wrapped.destroy()
        del self.wrapped, self._zero, self.task, self._parameters, self._trained
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def _make_states(self) -> None:
        """Give AdamW its states now, so that state_dict() has every entry and load_state_dict() a place to write.

        DeepSpeed would make them one group at a time in the first step, and link them to the parameters after the
        first group only: later groups would then have none to read or write.
        """
        for flat in self._flat_groups():
            self._zero.optimizer.state[flat] = {
                "step": torch.zeros((), device=flat.device)
                if isinstance(self._zero.optimizer, torch.optim.AdamW)
                else 0,
                **{moment: torch.zeros_like(flat) for moment in _MOMENTS},
            }
        if self.stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _flat_groups(self) -> list[Tensor]:
        """This rank's flat fp32 piece of each parameter group."""
        if self.stage < 3:
            return self._zero.single_partition_of_fp32_groups
        return self._zero.fp32_partitioned_groups_flat

    def _state_names(self) -> list[str]:
        """Names of the task's parameters and persistent buffers."""
        return list(self.task.state_dict())

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole weights and buffers, fp32, on every rank."""
        for name, value in self.task.state_dict().items():
            parameter = self._parameters.get(name)
            if parameter is None or (self.stage < 3 and not self._half):
                yield name, value  # fp32 weights are the masters' exact copies
            elif parameter.requires_grad:
                yield name, safe_get_full_fp32_param(parameter)
            elif self._half:
                yield name, self._frozen[name]
            else:  # the accessor skips frozen parameters
                with deepspeed.zero.GatheredParameters([parameter]):
                    whole = parameter.detach().clone()
                yield name, whole

    def _set_weight(self, name: str, value: Tensor) -> None:
        """Write what the forward pass reads and the fp32 masters too: DeepSpeed's setter writes the masters only."""
        value = value.to(self.world.device)
        parameter = self._parameters.get(name)
        if parameter is None:
            self.task.get_buffer(name).copy_(value)
            return
        if name in self._frozen:
            self._frozen[name].copy_(value)
        if self.stage < 3:
            parameter.data.copy_(value)
        else:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        if name in self._trained:
            self._set_flat(parameter, value)

    def _set_flat(self, parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
        """Write a whole tensor into the ranks' pieces of the fp32 master, or of a moment of AdamW."""
        if self.stage < 3:
            if moment is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)
            return
        # ZeRO-3 pads the last rank's piece; its setter for whole tensors does not, and fails on odd sizes.
        piece_numel = safe_get_local_fp32_param(parameter).numel()
        padded = nn.functional.pad(value.flatten(), (0, piece_numel * self.world.size - value.numel()))
        piece = padded.narrow(0, piece_numel * self.world.rank, piece_numel)
        if moment is None:
            safe_set_local_fp32_param(parameter, piece)
        else:
            safe_set_local_optimizer_state(parameter, piece, moment)


class ZeroStage0Engine(TorchEngine):
    """ZeRO stage 0: DeepSpeed reduces the gradients, nothing is sharded. Everything else is as under DDP.

    DeepSpeed's own step would clip before unscaling, and could not skip a step without waiting for the GPU; so the
    step is `TorchEngine`'s.
    """

    def _wrap(self, task: nn.Module) -> nn.Module:
        ensure_process_group(self.world)
        os.environ.setdefault("LOCAL_RANK", str(self.world.local_rank))
        hand_out(task, self.world)
        return task

    def _finish(self, config: Run) -> None:
        self.wrapped, *_ = deepspeed.initialize(
            model=_Autocast(self.task, config.engine.precision, self.world.device),
            optimizer=self.optimizer,
            config=deepspeed_config(config, self.world) | {"gradient_clipping": 0.0},
            dist_init_required=False,
        )

    def __call__(self, batch: Any) -> Any:
        """Forward pass, see `Engine`."""
        return self.wrapped(batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Backward pass, see `Engine`."""
        self.wrapped.set_gradient_accumulation_boundary(last)
        self.wrapped.backward(loss * (self._scale.scale * self.world.size), scale_wrt_gas=False)

    def close(self) -> None:
        """Take DeepSpeed's hooks off and let go of its buffers."""
        self.wrapped.destroy()
        super().close()


def _adamw(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[ParamGroup], optim: Optim, offload: bool
) -> torch.optim.Optimizer:
    """AdamW over the groups: torch's, or with `offload` DeepSpeed's vectorised one for the CPU if it can be built."""
    param_groups = [
        {"params": [parameters[name] for name in group.names], "weight_decay": group.weight_decay} for group in groups
    ]
    settings = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    if offload and (reason := why_no_cpu_adam()):
        log.warning("offload_optimizer: %s; torch's AdamW steps on the CPU instead, slower", reason)
    elif offload:
        return DeepSpeedCPUAdam(param_groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(param_groups, fused=True, **settings)


def why_no_cpu_adam() -> str | None:
    """Why DeepSpeed's CPU AdamW cannot be had here; None if it can. Builds it at the first call: about a minute."""
    compiler = os.environ.get("CXX", "c++")
    for tool in (compiler, "ninja"):
        if shutil.which(tool) is None:
            return f"DeepSpeed compiles its CPU AdamW at first use, and there is no {tool}"
    try:
        CPUAdamBuilder().load(verbose=False)
    except (RuntimeError, OSError, ImportError, KeyError) as error:  # KeyError: it could not tell the processor
        first_line = next(iter(str(error).splitlines()), "")
        return f"DeepSpeed's CPU AdamW did not compile ({type(error).__name__}: {first_line})"
    return None


def _put_back(task: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Undo what DeepSpeed's fp16 did to buffers: the Fourier features of a prompt need fp32 coordinates."""
    for name, buffer in buffers.items():
        owner, _, key = name.rpartition(".")
        task.get_submodule(owner)._buffers[key] = buffer


def _lower_norm_inputs(task: nn.Module) -> None:
    """Layer norms of half-precision weights get half-precision inputs: CPU autocast, unlike CUDA's, leaves them be."""
    for module in task.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))


class _Autocast(nn.Module):
    """Enters autocast inside the module: DeepSpeed switches off what it finds around itself."""

    def __init__(self, task: nn.Module, precision: Precision, device: torch.device) -> None:
        super().__init__()
        self.task = task
        self.precision = precision
        self.device = device

    def forward(self, batch: Any) -> Any:
        with autocast(self.precision, self.device):
            return self.task(batch)


def deepspeed_config(config: Run, world: World) -> dict[str, Any]:
    """DeepSpeed's dictionary, generated: there is no second file of settings to keep in step."""
    on_gpu = world.device.type == "cuda"
    settings = config.engine
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "overlap_comm": on_gpu,
        "contiguous_gradients": True,
        "reduce_bucket_size": _BUCKET_ELEMENTS,
        "allgather_bucket_size": _BUCKET_ELEMENTS,
    }
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        # Only the engine's own counters use these; accumulation is driven by `last` in backward().
        "train_micro_batch_size_per_gpu": config.batch.micro,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.grad_clip or 0.0,  # absent means 1.0
        "communication_data_type": settings.reduce_dtype,
        "data_types": {"grad_accum_dtype": "fp32"},
        # The scale itself is set from outside, see the module's docstring.
        "fp16": {"enabled": settings.precision == "deepspeed_fp16", "auto_cast": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW may stand in for DeepSpeed's where nothing compiles
        "zero_optimization": zero,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def _common_step(group: ParamGroup, state: Mapping[str, Tensor]) -> float:
    """Step count that all names of a group share; 0 for those without optimizer entries."""
    steps = {name: float(state.get(f"optim.step.{name}", 0.0)) for name in group.names}
    if len(set(steps.values())) > 1:
        low, high = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
        raise ValueError(
            f"one parameter group holds {low} after {steps[low]:g} steps and {high} after {steps[high]:g}: "
            "DeepSpeed keeps one step count a group, so these need groups of their own"
        )
    return steps[group.names[0]]
