"""All engines train the same network (tests/agreement.py), and the comparison notices what it should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch_ranks import ROOT, clean_environment

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("how", [["--short"], pytest.param([], marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
def test_all_engines_agree(tmp_path: Path, how: list[str]) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "tests.agreement", "--out", str(out), *how]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert not json.loads(out.read_text())["bad"]
