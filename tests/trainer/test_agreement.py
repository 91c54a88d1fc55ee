"""All engines train the same network (tests/agreement.py), and the comparison notices what it should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch_ranks import ROOT, clean_environment

pytestmark = pytest.mark.dist


def test_forked_ranks_keep_the_environment(tmp_path: Path) -> None:
    """PATH for one, without which DeepSpeed finds no compiler and no case with offload can run."""
    code = """
import os, sys
from pathlib import Path
from tests.fork_ranks import Ranks
folder = Path(sys.argv[1])
def patch(rank):
    (folder / f"path{rank}").write_text(os.environ["PATH"] + os.environ["RANK"])
    os._exit(0)
assert Ranks(folder / "logs", [], 2, patch).wait(60) == [0, 0]
"""
    environment = clean_environment()
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment, check=True, timeout=120)
    assert [(tmp_path / f"path{rank}").read_text() for rank in range(2)] == [
        f"{environment['PATH']}{n}" for n in (0, 1)
    ]


@pytest.mark.parametrize("how", [["--short"], pytest.param([], marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
def test_all_engines_agree(tmp_path: Path, how: list[str]) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "tests.agreement", "--out", str(out), *how]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert not json.loads(out.read_text())["bad"]
