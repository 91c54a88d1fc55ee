"""Arithmetic of a training step, counted by PyTorch on tensors without content, and the devices' peaks.

Model FLOPs utilisation (Chowdhery et al. 2022, PaLM, appendix B) counts what the network needs, forward and backward,
and not what activation checkpointing computes a second time. Fused attention's backward pass is counted as it is, with
the scores it computes again.
"""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from trainer.config import Config
from trainer.stages import build_task

# Dense bf16 and fp16 FLOP/s by a part of the device's name, from NVIDIA's data sheets (SXM form).
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def flops_per_image(config: Config, frozen: tuple[str, ...], dataset: Dataset) -> float:
    """FLOPs of forward and backward pass for one image: matrix products, convolutions and attention; 2 a multiply-add.

    `dataset` gives the shape of a batch; its sample is a blank one, so nothing is read, and the short pass in which
    masks ask for the network's own answer is not counted.
    """
    switches = {"activation_checkpointing": "none", "checkpoint_rounds": False, "compile": False}
    config = config.model_copy(update={"engine": config.engine.model_copy(update=switches)})
    with torch.device("meta"):
        task = build_task(config, frozen, initial_weights=False).train()
    with FakeTensorMode():
        _give_content(task)
        blank = dataset[[-1]].counted(1, 1)
        with FlopCounterMode(display=False) as counter:
            loss, _ = task(blank)
            loss.backward()
    return float(counter.get_total_flops())


def _give_content(task: nn.Module) -> None:
    """Put fake CPU tensors in the place of parameters and buffers: autocast does not know the meta device."""
    for module in task.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device in half precision; None where it is not known, or the precision is another."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
