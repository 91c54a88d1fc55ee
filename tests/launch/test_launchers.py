"""The README's ways to start a run, each as a user types it: the same arguments, the same samples, the same losses."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch_ranks import ROOT, clean_environment, free_port, run_launcher
from tests.trainer.tiny import losses, sam_arguments, samples

BIN = Path(sys.executable).parent
TRAIN = ["-m", "trainer.train"]

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def alone(scenes, tmp_path_factory) -> Path:
    """The run of one plain process, for comparison."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    run_launcher([sys.executable, *TRAIN, *sam_arguments(scenes, run_dir)], timeout_s=600)
    return run_dir


def assert_same_run(run_dir: Path, alone: Path, num_ranks: int) -> None:
    """All ranks together saw the samples of one process; losses agree to what another order of fp32 sums changes."""
    seen = sorted(sample for rank in range(num_ranks) for sample in samples(run_dir, rank))
    assert seen == sorted(samples(alone))
    assert losses(run_dir) == pytest.approx(losses(alone), rel=1e-4)


def test_torchrun_on_one_node(scenes, alone, tmp_path):
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", *TRAIN]
    run_launcher([*command, *sam_arguments(scenes, tmp_path / "run")], timeout_s=600)
    assert_same_run(tmp_path / "run", alone, 2)


def test_torchrun_on_two_nodes(scenes, alone, tmp_path):
    """Two agents on loopback, as on two machines: each knows only the address where they meet."""
    endpoint = f"127.0.0.1:{free_port()}"
    agents, logs = [], []
    for node in (0, 1):
        command = [str(BIN / "torchrun"), "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--local-addr", "127.0.0.1", *TRAIN]
        log = (tmp_path / f"agent{node}.log").open("w")
        logs.append(log)
        agents.append(
            subprocess.Popen(
                [*command, *sam_arguments(scenes, tmp_path / "run")],
                cwd=ROOT,
                env=clean_environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
    deadline = time.monotonic() + 600
    try:
        while any(agent.poll() is None for agent in agents) and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
        for log in logs:
            log.close()
    said = "".join((tmp_path / f"agent{node}.log").read_text()[-3000:] for node in (0, 1))
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert_same_run(tmp_path / "run", alone, 2)


@pytest.mark.parametrize("place", ["num_gpus", "hostfile"])
def test_deepspeed_launcher(scenes, alone, tmp_path, place):
    """With --hostfile it would go through ssh; a file that names this machine alone needs none."""
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    where = {
        "num_gpus": ["--num_gpus", "2"],
        "hostfile": ["--hostfile", str(tmp_path / "hostfile"), "--no_ssh_check", "--master_addr=127.0.0.1"],
    }[place]
    command = [str(BIN / "deepspeed"), *where, "--master_port", str(free_port()), "--module", "trainer.train"]
    arguments = sam_arguments(scenes, tmp_path / "run", "engine.kind=deepspeed")
    # The launcher looks for python and for itself on the PATH.
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    run_launcher([*command, *arguments], timeout_s=600, env={"PATH": path})
    assert_same_run(tmp_path / "run", alone, 2)
