"""Rank facts from the environment of each launcher. What needs several ranks is tried in parallel/test_engines.py."""

import os
import sys
from pathlib import Path

import pytest
import torch

from tests.launch_ranks import RanksError, free_port, launch_ranks, run_launcher
from trainer import distributed
from trainer.distributed import (
    barrier,
    broadcast_object,
    gather_objects,
    max_on_host,
    read_place,
    single_process,
    start_world,
    stop_world,
    sum_on_host,
)

SRUN = {
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "node[3-5]",
    "SLURM_JOB_ID": "70001",
}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))


def test_torchrun() -> None:
    env = {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "1"}
    assert read_place(env) == (11, 16, 3, 8, 1)


def test_deepspeed_launcher() -> None:
    env = {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_SIZE": "8", "CROSS_RANK": "1"}
    assert read_place(env) == (11, 16, 3, 8, 1)


def test_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_first_slurm_host", lambda nodes: f"first of {nodes}")
    assert read_place(SRUN) == (17, 20, 1, 4, 2)
    assert {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "17",
        "WORLD_SIZE": "20",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
    }
    assert os.environ["MASTER_ADDR"] == "first of node[3-5]"
    assert os.environ["MASTER_PORT"] == str(10000 + 10001)


def test_a_batch_script_without_srun_is_one_process() -> None:
    assert read_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}) is None
    assert read_place({}) is None


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="LOCAL_RANK is not"):
        read_place({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="rank 2 of 2"):
        read_place({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    with pytest.raises(ValueError, match="unknown form"):
        read_place(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "eight"})


def test_one_process_agrees_with_itself() -> None:
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    world = start_world(timeout_minutes=1)
    assert (world.rank, world.size, world.host_group, world.is_main) == (0, 1, None, True)
    assert sum_on_host([1, 2.5], world) == max_on_host([1, 2.5], world) == [1.0, 2.5]
    assert broadcast_object("x", world) == "x"
    assert gather_objects("x", world) == ["x"]
    barrier(world)
    stop_world(world)


def test_a_rank_has_a_gpu_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed._local_device(1) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="local rank 2 has no GPU: this node shows 2"):
        distributed._local_device(2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert distributed._local_device(2) == torch.device("cuda", 0)
    assert single_process().device == torch.device("cuda", 0)


@pytest.mark.dist
def test_a_rank_that_fails_ends_the_others() -> None:
    with pytest.raises(RanksError, match="no_such_module"):
        launch_ranks("tests.no_such_module", num_ranks=2, timeout_s=60)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_both_launchers_start_the_deepspeed_engine(launcher: str, tmp_path: Path) -> None:
    bin_folder = Path(sys.executable).parent
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; sys.argv = sys.argv[:1]\n"  # the deepspeed launcher adds --local_rank
        "from tests.trainer.parallel.ranks import train\n"
        "from trainer.distributed import start_world, stop_world\n"
        "world = start_world(1)\n"
        "record = train(world, 'zero2', 'fp32', 1)\n"
        "print('place', world.rank, world.size, world.local_rank, world.local_size, record.losses[-1])\n"
        "stop_world(world)\n"
    )
    if launcher == "torchrun":
        command = [
            str(bin_folder / "torchrun"),
            "--standalone",
            "--local-addr=127.0.0.1",
            "--nproc-per-node=2",
            str(script),
        ]
    else:
        command = [
            str(bin_folder / "deepspeed"),
            "--num_accelerators",
            "2",
            "--master_port",
            str(free_port()),
            str(script),
        ]
    path = {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    output = run_launcher(command, timeout_s=120, env=path)
    assert "place 0 2 0 2" in output
    assert "place 1 2 1 2" in output
