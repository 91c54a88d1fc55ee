"""The three batch scripts on a real Slurm: three nodes on this machine (cluster.sh), two for a job.

What a job of 256 GPUs meets in a month, in minutes: a job of higher priority, the time limit, a node that dies, a node
that preflight refuses, a run that gets no further; and the two stages as a chain. At the end the samples that were
trained on, step by step, are those of a run that nobody interrupted.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from data_tools import synthesize
from tests.conftest import pack_scenes
from tests.trainer.tiny import mae_arguments, sam_arguments
from trainer.config import load_config

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1500),  # a busy machine takes a minute for an import
    pytest.mark.skipif(shutil.which("slurmctld") is None, reason="no Slurm here: apt-get install slurm-wlm munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmctld and slurmd of the test cluster run as root"),
]

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "tests/slurm/cluster.sh"
# What the scripts ask for, at the size of this machine. All else is theirs.
SMALL = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2"]
LONG = 100_000  # steps of a run that ends when the test has seen enough


class Cluster:
    """The running cluster and a checkout of its own for the jobs' logs."""

    def __init__(self, directory: Path, project: Path) -> None:
        self.directory, self.project = directory, project
        self.hurried: set[tuple[str, str]] = set()  # jobs told to start soon, and which of their starts
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
            "SLURM_CONF": str(directory / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",  # n0 and n1 are no host names here
            "GLOO_SOCKET_IFNAME": "lo",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *command: str, **variables: str) -> str:
        env = self.env | variables
        done = subprocess.run(command, cwd=self.project, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, script: str, *arguments: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """Submit a script of launch/ as a user does; returns the job's number."""
        return self.run("sbatch", "--parsable", *SMALL, *options, script, *arguments, **variables).strip()

    def show(self, job: str) -> dict[str, str]:
        """`scontrol show job`, by name."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def state(self, job: str) -> str:
        """State. A requeued job need not wait its two minutes, but a few seconds it must: slurmd revokes the ended
        start's credentials by the second, and refuses a start within that second ("Job credential revoked")."""
        shown = self.show(job)
        this_start = (job, shown["Restarts"])
        if shown["JobState"] == "PENDING" and shown["Reason"] == "BeginTime" and this_start not in self.hurried:
            self.hurried.add(this_start)
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")
        return shown["JobState"]

    def wait(self, job: str, what: str, true: Callable[[], bool], seconds: float = 400.0) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            state = self.state(job)
            late = time.monotonic() > deadline
            if late or state in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                pytest.fail(f"{what}: {'not in time' if late else ''}; job is {self.show(job)}\n{self.log(job)}")
            time.sleep(0.3)

    def wait_state(self, job: str, *states: str, seconds: float = 400.0) -> None:
        self.wait(job, f"waiting for {states}", lambda: self.state(job) in states, seconds)

    def log(self, job: str) -> str:
        """The ends of everything the job wrote."""
        files = [*self.project.glob(f"*-{job}.out"), *self.project.glob(f"runs/slurm/*-{job}/**/*.log")]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(files))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("cluster")
    project = tmp_path_factory.mktemp("project")
    for name in ("launch", "trainer", "model", "data_tools", ".venv"):
        (project / name).symlink_to(ROOT / name)
    if not (ROOT / ".venv").exists():  # tests run by another environment
        (project / ".venv/bin").mkdir(parents=True)
        (project / ".venv/bin/python").symlink_to(sys.executable)
    subprocess.run([str(CLUSTER), "start", str(directory)], check=True)
    try:
        yield Cluster(directory, project)
    finally:
        subprocess.run([str(CLUSTER), "stop", str(directory)], check=False)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("slurm_scenes")
    return {"train": pack_scenes(root, "train", 24, 0), "eval": pack_scenes(root, "eval", 4, 9)}


class Run:
    """A small SAM run whose length is in its config file, so that a test can say when it has seen enough."""

    def __init__(self, cluster: Cluster, packed: dict[str, Path], name: str, *overrides: str) -> None:
        self.directory = cluster.project / "runs" / name
        self.config = cluster.project / f"{name}.yaml"
        changes = "resume.allow_change=[phases.0.steps]"
        arguments = sam_arguments(packed, self.directory, f"phases=[{{name: all, steps: {LONG}}}]", changes, *overrides)
        tree = load_config(Path(arguments[0]), arguments[1:]).model_dump(mode="json")
        self.config.write_text(yaml.safe_dump(tree))
        self.set_steps(LONG)

    def set_steps(self, steps: int) -> None:
        """Counts at the next start."""
        tree = yaml.safe_load(self.config.read_text())
        tree["phases"][0]["steps"] = steps
        self.config.write_text(yaml.safe_dump(tree))

    def last_step(self) -> int:
        file = self.directory / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def saved_step(self) -> int:
        latest = self.directory / "checkpoints/LATEST"
        return int(latest.read_text().removeprefix("step_")) if latest.exists() else -1

    def sequence(self) -> dict[int, list[tuple[int, str]]]:
        """Step -> (position, key) of all ranks; of a step done twice, what it was done with each time must agree."""
        found: dict[int, dict[int, str]] = {}
        for file in self.directory.glob("samples_rank*.jsonl"):
            for line in map(json.loads, file.read_text().splitlines()):
                slots = found.setdefault(line["step"], {})
                assert slots.setdefault(line["position"], line["key"]) == line["key"]
        return {step: sorted(slots.items()) for step, slots in found.items()}


def uninterrupted(cluster: Cluster, packed: dict[str, Path], steps: int) -> dict[int, list[tuple[int, str]]]:
    """The same run in one process from start to end."""
    run = Run(cluster, packed, "uninterrupted")
    run.set_steps(steps)
    cluster.run(".venv/bin/python", "-m", "trainer.train", str(run.config))
    return run.sequence()


def test_a_bad_node_is_excluded_and_the_job_goes_elsewhere(cluster, packed):
    """One node has another numpy: preflight says so, and the requeued job avoids it."""
    run = Run(cluster, packed, "elsewhere")
    run.set_steps(3)
    other = cluster.project / "other_environment/numpy-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.0.1\n")
    # What runs on n1 sees this first, as on a node that an update forgot.
    python = cluster.project / "python_of_node"
    python.write_text(
        f'#!/bin/bash\n[ "$SLURMD_NODENAME" = n1 ] && export PYTHONPATH={other.parent}\n'
        f'exec {cluster.project}/.venv/bin/python "$@"\n'
    )
    python.chmod(0o755)
    job = cluster.sbatch("launch/sam_vith.slurm", CONFIG=str(run.config), PYTHON=str(python))
    cluster.wait(job, "exclusion", lambda: cluster.show(job).get("ExcNodeList") == "n1")
    assert "0.0.1" in cluster.log(job)
    cluster.wait_state(job, "COMPLETED")
    assert "start 1 at step -1 on n[0,2]" in cluster.log(job)
    assert run.saved_step() == 3


def test_a_stop_in_the_preflight_queues_the_job_again(cluster, packed):
    """Processes that were stopped before they could report are no finding about their nodes."""
    run = Run(cluster, packed, "stopped_early")
    run.set_steps(2)
    job = cluster.sbatch("launch/sam_vith.slurm", CONFIG=str(run.config))
    begun = cluster.project / f"runs/slurm/sam_vith-{job}/preflight/rank0000.log"
    cluster.wait(job, "preflight", begun.exists)
    cluster.run("scancel", "--signal=TERM", job)  # to the processes and not to the script, as before a time limit
    cluster.wait_state(job, "COMPLETED")
    assert "stopped by a signal in preflight" in cluster.log(job)
    assert cluster.show(job)["Restarts"] == "1"
    assert run.saved_step() == 2


def test_a_run_that_gets_no_further_is_given_up(cluster, packed):
    """Each start dies at the same place: after the second without a new step, no third is made."""
    run = Run(cluster, packed, "nowhere")
    run.directory.mkdir(parents=True)
    (run.directory / "checkpoints").touch()  # cannot be a directory: nothing is ever saved
    run.set_steps(2)
    job = cluster.sbatch("launch/sam_vith.slurm", CONFIG=str(run.config), PREFLIGHT="0", MAX_STARTS_WITHOUT_STEP="2")
    deadline = time.monotonic() + 500
    while cluster.state(job) != "FAILED" and time.monotonic() < deadline:
        time.sleep(0.5)
    assert cluster.show(job)["Restarts"] == "2", cluster.log(job)
    assert "giving up: 2 starts at step -1" in cluster.log(job)


def test_sam_waits_for_mae_and_takes_its_weights(cluster, packed):
    mae_config, sam_config = cluster.project / "chain_mae.yaml", cluster.project / "chain_sam.yaml"
    mae_run, sam_run = cluster.project / "runs/chain_mae", cluster.project / "runs/chain_sam"
    for config, arguments in (
        (mae_config, mae_arguments(packed, mae_run, "phases=[{name: pretrain, steps: 2}]")),
        (sam_config, sam_arguments(packed, sam_run, "phases=[{name: all, steps: 2}]")),
    ):
        tree = load_config(Path(arguments[0]), arguments[1:]).model_dump(mode="json")
        config.write_text(yaml.safe_dump(tree))
    options = {name: " ".join(SMALL) for name in ("MAE_SBATCH", "SAM_SBATCH")}
    said = cluster.run(
        "launch/pretrain_then_sam.sh", MAE_CONFIG=str(mae_config), SAM_CONFIG=str(sam_config), PREFLIGHT="0", **options
    )
    mae, sam = re.findall(r"job (\d+)", said)
    assert cluster.state(sam) == "PENDING"
    cluster.wait_state(mae, "COMPLETED")
    cluster.wait_state(sam, "COMPLETED")
    assert (sam_run / "checkpoints/LATEST").read_text().strip() == "step_00000002"
    assert yaml.safe_load((sam_run / "config.yaml").read_text())["model"]["init_from"] == str(mae_run)


def test_packing_as_an_array_of_jobs_and_the_join(cluster, tmp_path):
    """Two tars, a task each, then the join, as the head of the script says."""
    raw, packed, scenes = tmp_path / "raw", tmp_path / "packed", tmp_path / "scenes"
    raw.mkdir()
    synthesize.main(["--out", str(scenes), "--num-images", "6", "--size", "64"])
    for number in (0, 1):
        with tarfile.open(raw / f"sa_00000{number}.tar", "w") as tar:
            for image in range(3 * number, 3 * number + 3):
                for suffix in (".jpg", ".json"):
                    tar.add(scenes / f"sa_{image}{suffix}", arcname=f"sa_{image}{suffix}")
    variables = {"SOURCE": str(raw), "OUT": str(packed)}
    small = ("--cpus-per-task=1", "--mem=500M")
    job = cluster.run("sbatch", "--parsable", *small, "--array=0-1", "launch/pack_sa1b.slurm", **variables).strip()
    after = (f"--dependency=afterany:{job}", "--array=0")
    join = cluster.run("sbatch", "--parsable", *small, *after, "launch/pack_sa1b.slurm", "join", **variables).strip()
    cluster.wait_state(join, "COMPLETED")
    assert sum(shard["num_samples"] for shard in json.loads((packed / "manifest.json").read_text())["shards"]) == 6


def test_preempted_then_a_node_dies_then_the_time_limit(cluster, packed):
    """One job meets all three, goes on each time, and ends complete."""
    run = Run(cluster, packed, "hunted", "checkpoint.every_steps=20")
    job = cluster.sbatch(
        "launch/sam_vith.slurm", options=("--time=30", "--signal=USR1@30"), CONFIG=str(run.config), PREFLIGHT="0"
    )
    cluster.wait(job, "first steps", lambda: run.last_step() >= 30)

    high = cluster.run("sbatch", "--parsable", "--partition=high", "--nodes=3", "--exclusive", "--wrap=sleep 1").strip()
    cluster.wait_state(job, "PENDING")
    saved = run.saved_step()
    assert saved % 20 or saved >= 40, "it saved when it was told to go"
    cluster.wait_state(high, "COMPLETED")

    cluster.wait(job, "steps after preemption", lambda: run.last_step() >= saved + 25)
    cluster.run(str(CLUSTER), "kill-node", str(cluster.directory), "n1")
    cluster.wait_state(job, "PENDING")  # by the script's or by Slurm's own doing
    saved = run.saved_step()
    cluster.run(str(CLUSTER), "start-node", str(cluster.directory), "n1")

    cluster.wait(job, "steps after the node's death", lambda: run.last_step() >= saved + 25)
    restarts = int(cluster.show(job)["Restarts"])
    minutes, seconds = map(int, cluster.show(job)["RunTime"].split(":")[-2:])
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + (seconds > 0) + 1}")
    cluster.wait(job, "time limit", lambda: cluster.state(job) == "PENDING")
    saved = run.saved_step()
    run.set_steps(saved + 5)
    cluster.wait_state(job, "COMPLETED")
    assert int(cluster.show(job)["Restarts"]) == restarts + 1
    assert "SIGUSR1: saving" in cluster.log(job)
    assert run.sequence() == uninterrupted(cluster, packed, saved + 5)
