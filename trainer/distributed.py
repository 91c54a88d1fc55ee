"""Who am I among the processes of this run, and the few agreements that are made on the host.

Started by `torchrun`, by the `deepspeed` launcher, by `srun`, or as one plain process. Gradients and weights travel on
the accelerator's own group (NCCL, or gloo without CUDA) inside `trainer/parallel`; what is here travels over a gloo
group between CPUs, so that agreeing on a flag or adding up a counter never waits for the GPU.
"""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """The place of this process in the run. Counts and ranks start at 0; `device` is this process's own."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    num_nodes: int
    node: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None  # gloo over all ranks; None for one process

    @property
    def is_main(self) -> bool:
        """True on rank 0, which alone writes logs and publishes files."""
        return self.rank == 0


def single_process(device: torch.device | str | None = None) -> World:
    """A world of one, without any process group: for tools, tests and plain `python -m ...`."""
    if device is None:
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    return World(rank=0, size=1, local_rank=0, local_size=1, num_nodes=1, node=0, device=torch.device(device))


def start_world(timeout_minutes: float) -> World:
    """Join the other processes of the run, as the environment describes them.

    `timeout_minutes` is how long a collective may wait before the run is given up. Raises ValueError where the
    environment contradicts itself or the machine.
    """
    place = read_place(os.environ)
    if place is None:
        return single_process()
    rank, size, local_rank, local_size, node = place
    num_nodes = -(-size // local_size)
    if num_nodes == 1:
        # One node needs no other interface, and a container's host name often resolves to nothing that listens.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = timedelta(minutes=timeout_minutes)
    device = _local_device(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, rank=rank, world_size=size, device_id=device)
        host_group = dist.new_group(backend="gloo", timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout, rank=rank, world_size=size)
        host_group = dist.group.WORLD
    return World(rank, size, local_rank, local_size, num_nodes, node, device, host_group)


def stop_world(world: World) -> None:
    """Leave the process group. Nothing to do for one process, unless an engine needed a group of one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def ensure_process_group(world: World) -> None:
    """A process group even for one process: FSDP2 and DeepSpeed cannot work without."""
    if dist.is_initialized():
        return
    assert world.size == 1, "start_world makes the group when there are several processes"
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # no port, no network


def sum_on_host(values: Sequence[float], world: World) -> list[float]:
    """Sum over ranks of each value, in float64 on the CPU; every rank gets the same numbers."""
    return _reduce_on_host(values, world, dist.ReduceOp.SUM)


def max_on_host(values: Sequence[float], world: World) -> list[float]:
    """Largest over ranks of each value, in float64 on the CPU."""
    return _reduce_on_host(values, world, dist.ReduceOp.MAX)


def barrier(world: World) -> None:
    """Wait until every rank's host is here (says nothing about its GPU)."""
    if world.size > 1:
        dist.barrier(group=world.host_group)


def broadcast_object(obj: Any, world: World) -> Any:
    """Rank 0's object, on every rank. It travels pickled: small things only."""
    if world.size == 1:
        return obj
    box = [obj if world.is_main else None]
    dist.broadcast_object_list(box, src=0, group=world.host_group, device=torch.device("cpu"))
    return box[0]


def gather_objects(obj: Any, world: World) -> list[Any]:
    """Every rank's object in rank order on rank 0, an empty list elsewhere. Pickled: small things only."""
    if world.size == 1:
        return [obj]
    box: list[Any] | None = [None] * world.size if world.is_main else None
    dist.gather_object(obj, box, dst=0, group=world.host_group)
    return box or []


def read_place(env: Mapping[str, str]) -> tuple[int, int, int, int, int] | None:
    """(rank, size, local_rank, local_size, node) from the launcher's variables; None for one plain process.

    Under `srun` the variables that torch and DeepSpeed look for are added to the environment.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
        if "LOCAL_RANK" not in env:
            raise ValueError(
                "RANK and WORLD_SIZE are set but LOCAL_RANK is not: start with torchrun, deepspeed or srun"
            )
        local_rank = int(env["LOCAL_RANK"])
        local_size = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or size)  # torchrun's, DeepSpeed's name
        node = int(env.get("GROUP_RANK") or env.get("CROSS_RANK") or rank // local_size)
    elif int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        # Only srun sets SLURM_STEP_NUM_TASKS: a batch script has SLURM_PROCID=0 as well, and is one process.
        rank, size = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
        local_rank, node = int(env["SLURM_LOCALID"]), int(env["SLURM_NODEID"])
        local_size = _slurm_tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])[node]
        os.environ.update(_torch_names_for_slurm(env, rank, size, local_rank, local_size))
    else:
        return None
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise ValueError(f"rank {rank} of {size}, local rank {local_rank} of {local_size} is not possible")
    return rank, size, local_rank, local_size, node


def _torch_names_for_slurm(
    env: Mapping[str, str], rank: int, size: int, local_rank: int, local_size: int
) -> dict[str, str]:
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
    # The job id keeps two jobs on one node apart.
    names["MASTER_PORT"] = env.get("MASTER_PORT") or 10000 + int(env.get("SLURM_JOB_ID", "0")) % 20000
    names["MASTER_ADDR"] = env.get("MASTER_ADDR") or _first_slurm_host(env["SLURM_STEP_NODELIST"])
    return {name: str(value) for name, value in names.items()}


def _first_slurm_host(node_list: str) -> str:
    """First host of a compressed list such as node[03-07]; only Slurm itself reads every form of it."""
    shown = subprocess.run(["scontrol", "show", "hostnames", node_list], check=True, capture_output=True, text=True)
    return shown.stdout.split()[0]


def _slurm_tasks_per_node(text: str) -> list[int]:
    """`8(x2),4` means 8, 8 and 4 tasks."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={text!r} has an unknown form")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _local_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    num_visible = torch.cuda.device_count()
    if num_visible == 1:
        return torch.device("cuda:0")  # the launcher gave each process its own GPU
    if local_rank >= num_visible:
        raise ValueError(f"local rank {local_rank} has no GPU: this node shows {num_visible}")
    return torch.device("cuda", local_rank)


def _reduce_on_host(values: Sequence[float], world: World, op: dist.ReduceOp) -> list[float]:
    if world.size == 1:
        return [float(value) for value in values]
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=op, group=world.host_group)
    return tensor.tolist()
