"""Start a Python module as several ranks on this machine and collect what they print.

    outputs = launch_ranks("tests.trainer.parallel.ranks", [str(folder)], num_ranks=2)

The ranks find each other over loopback, see no GPU unless told to, and are killed (they alone) when one fails or time
is up.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


# For `env` of `launch_ranks`: the ranks see the first GPU after all.
ON_GPU = {"CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": "cuda"}


class RanksError(AssertionError):
    """A rank failed or time ran out; the message holds the ends of all outputs."""


def launch_ranks(
    module: str,
    args: Sequence[str] = (),
    num_ranks: int = 2,
    timeout_s: float = 240.0,
    env: Mapping[str, str] | None = None,
) -> list[str]:
    """Run `python -m module args` as `num_ranks` ranks; returns each one's stdout and stderr together."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(num_ranks)]
        port = free_port()
        processes = []
        try:
            for rank, log in enumerate(logs):
                variables = rank_environment(rank, num_ranks, port) | dict(env or {})
                with log.open("wb") as file:
                    command = [sys.executable, "-m", module, *args]
                    processes.append(_start(command, variables, file))
            _wait(processes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                _kill(process)
        outputs = [log.read_text(errors="replace") for log in logs]
    codes = [process.returncode for process in processes]
    if any(codes):
        ends = "\n".join(f"--- rank {rank}, exit {codes[rank]}\n{text[-4000:]}" for rank, text in enumerate(outputs))
        raise RanksError(f"{module} {' '.join(args)} on {num_ranks} ranks:\n{ends}")
    return outputs


def run_launcher(command: Sequence[str], timeout_s: float = 240.0, env: Mapping[str, str] | None = None) -> str:
    """Run a launcher such as torchrun or deepspeed, which starts the ranks itself; returns its output."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = _start(command, clean_environment() | dict(env or {}), file)
        try:
            _wait([process], time.monotonic() + timeout_s)
        finally:
            _kill(process)
        text = log.read_text(errors="replace")
    if process.returncode:
        raise RanksError(f"{' '.join(command)}: exit {process.returncode}\n{text[-6000:]}")
    return text


def clean_environment() -> dict[str, str]:
    """This process's environment on the CPU, one thread, without any launcher's variables."""
    launcher_names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in launcher_names and not name.startswith(("SLURM_", "TORCHELASTIC_"))
    }
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return variables | {
        "PYTHONPATH": path,
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torchrun would set for one rank of a single node."""
    return clean_environment() | {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """A port of loopback that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(command: Sequence[str], variables: Mapping[str, str], file: object) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=dict(variables),
        stdout=file,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # its own process group, so that its children go with it
    )


def _wait(processes: Sequence[subprocess.Popen], deadline: float) -> None:
    """Until all have ended, one has failed (the others may then wait for it forever), or time is up."""
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.returncode for process in processes):
            time.sleep(2.0)  # let the others say what they saw
            return
        time.sleep(0.05)


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
