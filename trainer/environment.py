"""Where a run ran: versions, devices, the code's commit and the command, as text for the log."""

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from trainer.distributed import World

PACKAGES = (
    "torch",
    "torchvision",
    "deepspeed",
    "numpy",
    "numba",
    "opencv-python-headless",
    "simplejpeg",
    "pycocotools",
)


def environment(world: World) -> str:
    """One fact a line."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.processor() or "CPU"
    lines = [
        f"command: {shlex.join([sys.executable, *sys.argv])}",
        f"commit: {commit()}",
        f"host of rank 0: {platform.node()}",
        f"ranks: {world.size} on {world.num_nodes} nodes",
        f"device: {device}",
        f"python: {platform.python_version()}, {platform.platform()}",
        f"CUDA: {torch.version.cuda}, NCCL: {nccl_version(world)}",
    ]
    for package in PACKAGES:
        try:
            lines.append(f"{package}: {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{package}: not installed")
    return "\n".join(lines)


def commit() -> str:
    """The code's commit, with a mark where files differ from it; `unknown` outside a git checkout."""
    root = Path(__file__).parent.parent
    try:
        shown = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="],  # of the code, whatever its tags
            cwd=root,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return "unknown"
    return shown.stdout.strip() or "unknown"


def nccl_version(world: World) -> str:
    if world.device.type != "cuda":
        return "not used"
    return ".".join(map(str, torch.cuda.nccl.version()))
