"""The paperwork: shell scripts parse, the README's commands and files exist, jobs are queued again when they should."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "launch").rglob("*.slurm"), *(ROOT / "launch").rglob("*.sh")])
README = (ROOT / "README.md").read_text()


def test_there_are_scripts():
    assert {"mae_vith", "sam_vith", "pack_sa1b"} <= {path.stem for path in SCRIPTS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_the_script(path):
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert checked.stderr == ""


# --------------------------------------------------------------------------------------- scripts with a false Slurm


@pytest.fixture
def slurm(tmp_path):
    """Run a batch script in a false checkout with a false srun and scontrol; returns (exit code, log, calls)."""
    project, programs, calls = tmp_path / "project", tmp_path / "bin", tmp_path / "calls"
    (project / ".venv/bin").mkdir(parents=True)
    (project / "launch").symlink_to(ROOT / "launch")
    programs.mkdir()
    calls.touch()

    def program(path: Path, text: str) -> None:
        path.write_text(f'#!/bin/bash\necho "{path.name} $*" >> {calls}\n{text}\n')
        path.chmod(0o755)

    def run(
        script: str,
        arguments: list[str],
        code: int = 0,
        state: str = "RUNNING",
        judged: int = 0,
        preflight: int = 0,  # what its srun ends with
        refused: str = "never",  # a verb of scontrol that fails
        **variables: str,
    ):
        program(programs / "srun", f'case "$*" in *trainer.train*) exit {code};; *) exit {preflight};; esac')
        queued = programs / "queued"
        queued.unlink(missing_ok=True)
        program(
            programs / "scontrol",
            f"""state={state}; [ -e {queued} ] && state=PENDING
            case "$*" in
                *hostnames*) echo n0; echo n1;;
                *"show job"*) echo "JobId=7 JobState=$state ExcNodeList=n9 Reason=x";;
                {refused}*) exit 1;;
                requeue*) touch {queued}; kill -TERM $PPID; sleep 0.2;;  # Slurm ends the script
            esac""",
        )
        # The preflight's answers: the newest step, and on judging the names of bad nodes.
        judge = f"echo n1 > runs/slurm/job-7/bad_nodes; exit {judged}" if judged == 1 else f"exit {judged}"
        program(project / ".venv/bin/python", f'case "$*" in *--print-step*) echo 5;; *--judge*) {judge};; esac')
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(project),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "job",
            "SLURM_JOB_NODELIST": "n[0-1]",
            "SLURM_CPUS_PER_TASK": "4",
            **variables,
        }
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / script), *arguments], env=environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()

    run.project = project
    return run


@pytest.mark.parametrize("stage", ["mae", "sam"])
def test_job_starts_the_trainer_with_config_engine_and_overrides(slurm, stage):
    code, _, calls = slurm(f"{stage}_vith.slurm", ["optim.lr=4e-4", "log.every_steps=7"], ENGINE="deepspeed")
    assert code == 0
    preflight, srun = [shlex.split(call) for call in calls if call.startswith("srun")]
    assert preflight[preflight.index("-m") + 1] == "trainer.preflight"
    assert f"launch/configs/{stage}_vith.yaml" in preflight
    start = srun.index("-m")
    assert srun[start:] == [
        "-m",
        "trainer.train",
        f"launch/configs/{stage}_vith.yaml",
        "optim.lr=4e-4",
        "log.every_steps=7",
        "engine.kind=deepspeed",
    ]
    assert not any("requeue" in call for call in calls)
    assert (slurm.project / "runs/slurm/job-7").is_dir()  # srun's --output would fail without


@pytest.mark.parametrize(
    "code, state, queued",
    [
        (75, "RUNNING", True),  # saved on a signal
        (75, "CANCELLED", False),
        (1, "RUNNING", True),  # a crash, perhaps of a node that Slurm has not missed yet; the guard ends it
        (137, "RUNNING", True),
        (2, "RUNNING", False),  # wrong settings stay wrong
        (0, "RUNNING", False),
    ],
)
def test_a_job_is_queued_again_after_a_signal_or_a_crash(slurm, code, state, queued):
    exit_code, log, calls = slurm("sam_vith.slurm", [], code, state)
    assert ("scontrol requeue 7" in calls) == queued
    assert exit_code == (0 if queued else code), log


@pytest.mark.parametrize("code, judged", [(75, 0), (1, 0), (0, 1)])
def test_a_job_that_slurm_does_not_queue_again_does_not_end_as_complete(slurm, code, judged):
    """Otherwise `afterok` would start the next stage on half-trained weights."""
    exit_code, log, _ = slurm("sam_vith.slurm", [], code, judged=judged, refused="requeue")
    assert exit_code == (code or 1)
    assert "Slurm did not queue it again" in log


def test_a_job_whose_nodes_cannot_be_excluded_is_not_left_held(slurm):
    code, log, calls = slurm("sam_vith.slurm", [], judged=1, refused="update")
    assert code == 0
    assert "could not be excluded" in log
    assert "scontrol release 7" in calls


@pytest.fixture
def chain(tmp_path):
    """Submit both stages with a false sbatch; returns what was printed, the exit code and the jobs' arguments."""
    calls, sbatch, config = tmp_path / "calls", tmp_path / "sbatch", tmp_path / "mae.yaml"
    sbatch.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >> {calls}\necho 7\n')
    sbatch.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "MAE_CONFIG": str(config)}

    def submit(run_dir: str, *arguments: str, **variables: str) -> tuple[str, int, list[str]]:
        tiny = (ROOT / "launch/configs/mae_tiny.yaml").read_text()
        config.write_text(re.sub("(?m)^run_dir:.*$", run_dir, tiny))
        command = [ROOT / "launch/pretrain_then_sam.sh", *arguments]
        variables = {"PYTHON": sys.executable, **variables}
        done = subprocess.run(command, env=environment | variables, capture_output=True, text=True)
        return done.stdout + done.stderr, done.returncode, calls.read_text().splitlines() if calls.exists() else []

    return submit


@pytest.mark.parametrize(
    "line, found",
    [
        ("run_dir: runs/a   # the first", "runs/a"),
        ('run_dir: "runs/b c"', "runs/b c"),
        ("run_dir: 'runs/d' # quoted", "runs/d"),
        ("run_dir: runs/x#y", "runs/x#y"),
    ],
)
def test_sam_starts_from_the_run_that_the_config_of_mae_names(chain, line, found):
    said, code, calls = chain(line)
    assert code == 0, said
    assert f"model.init_from={found}" in calls
    _, _, calls = chain(line, "run_dir=runs/given")
    assert "model.init_from=runs/given" in calls


@pytest.mark.parametrize(
    "line, arguments, variables, named",
    [
        ("run_dirs: runs/e", [], {}, "run_dir"),
        ("run_dir: null", [], {}, "run_dir"),
        ("run_dir: runs/a", ["--", "optim.lrr=1"], {}, "did you mean lr?"),
        ("run_dir: runs/a", [], {"SAM_CONFIG": "/nope.yaml"}, "/nope.yaml does not exist"),
    ],
)
def test_what_is_wrong_with_either_stage_is_said_before_the_first_is_queued(chain, line, arguments, variables, named):
    said, code, calls = chain(line, *arguments, **variables)
    assert (code, calls) == (2, [])
    assert named in said


def test_the_guard_counts_starts_without_a_step(slurm):
    for _ in range(3):
        code, log, calls = slurm("sam_vith.slurm", [], code=1)
        assert code == 0
        assert "giving up" not in log
    num_calls = len(calls)
    code, log, calls = slurm("sam_vith.slurm", [], code=1)  # the fourth start at step 5
    assert code == 1
    assert "giving up: 3 starts at step 5" in log
    assert not any(call.startswith(("srun", "scontrol requeue")) for call in calls[num_calls:])


@pytest.mark.parametrize("ended", [143, 138])
def test_a_stop_in_the_preflight_is_no_finding(slurm, ended):
    """SIGTERM, SIGUSR1: processes that had no time to report must not look like broken nodes or wrong settings."""
    code, log, calls = slurm("sam_vith.slurm", [], judged=1, preflight=ended)
    assert code == 0
    assert "stopped by a signal in preflight" in log
    assert "scontrol requeue 7" in calls
    assert not any("--judge" in call or "ExcNodeList=n" in call for call in calls)


def test_bad_nodes_are_excluded_beside_those_excluded_before(slurm):
    code, log, calls = slurm("sam_vith.slurm", [], judged=1)
    assert code == 0
    assert "bad nodes: n1" in log
    held, updated, released = [call for call in calls if "hold" in call or "update" in call or "release" in call]
    assert held == "scontrol requeuehold 7"
    assert updated == "scontrol update JobId=7 ExcNodeList=n9,n1"
    assert released == "scontrol release 7"
    assert not any("trainer.train" in call for call in calls)


def test_wrong_settings_found_by_preflight_end_the_job(slurm):
    code, _, calls = slurm("sam_vith.slurm", [], judged=2)
    assert code == 2
    assert not any("trainer.train" in call or "requeue" in call for call in calls)


def test_packing_gives_each_task_its_tar(slurm):
    source = slurm.project / "raw"
    source.mkdir()
    for name in ("sa_2.tar", "sa_1.tar"):
        (source / name).touch()
    code, log, calls = slurm("pack_sa1b.slurm", ["--allow-bad", "5"], SOURCE="raw", SLURM_ARRAY_TASK_ID="1")
    assert code == 0, log
    assert calls == [
        "python -m data_tools.pack sa1b raw/sa_2.tar --out data/sa1b --source-index 1 --num-sources 2 --workers 4 "
        "--allow-bad 5"
    ]
    code, log, _ = slurm("pack_sa1b.slurm", [], SOURCE="raw", SLURM_ARRAY_TASK_ID="2")
    assert code == 2
    assert "--array=0-1" in log


def test_packing_joins(slurm):
    code, log, calls = slurm("pack_sa1b.slurm", ["join", "--allow-bad", "5"], SLURM_ARRAY_TASK_ID="0", OUT="packed")
    assert code == 0, log
    assert calls == ["python -m data_tools.pack join packed --allow-bad 5"]


def test_packer_takes_the_options_that_the_script_gives():
    for layout in (["sa1b", "--help"], ["join", "--help"]):
        shown = subprocess.run(
            [sys.executable, "-m", "data_tools.pack", *layout], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        wanted = {"sa1b": ["--source-index", "--num-sources", "--workers", "--out"], "join": ["--allow-bad"]}
        assert all(option in shown for option in wanted[layout[0]])


# --------------------------------------------------------------------------------------------------------- README


def test_readme_commands_name_modules_and_files_that_exist():
    modules = set(re.findall(r"(?:-m|--module) ((?:trainer|data_tools|model)[\w.]*)", README))
    assert {"trainer.train", "trainer.evaluate", "trainer.export", "data_tools.pack"} <= modules
    missing = [
        name
        for name in modules
        if not (path := ROOT / name.replace(".", "/")).with_suffix(".py").is_file()
        and not (path / "__main__.py").is_file()
    ]
    missing += [
        name for name in set(re.findall(r"launch/[\w./]+\.(?:yaml|slurm)", README)) if not (ROOT / name).is_file()
    ]
    assert not missing


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    pictures = {"docs/images/demo_masks.png"}  # comes from a run of the demo
    assert links
    assert not [link for link in links if "://" not in link and link not in pictures and not (ROOT / link).exists()]


def test_readme_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][a-z-]+)", README)) - {"demo"} <= targets
    assert "demo" in targets


def test_readme_marks_are_the_registered_ones():
    registered = re.findall(r'^  "(\w+):', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE) == registered


def test_readme_tree_lists_files_that_exist():
    tree = re.search(r"<!-- tree -->\n```\n(.*?)```", README, re.DOTALL)
    assert tree
    folder, listed, missing = "", 0, []
    for line in tree[1].splitlines():
        name = line.split()[0] if line.split() else ""
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        path = ROOT / (folder + name if line.startswith(" ") else name)
        listed += 1
        if name and not path.exists():
            missing.append(str(path.relative_to(ROOT)))
    assert listed > 50
    assert not missing
