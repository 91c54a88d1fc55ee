"""The guard's and the watchdog's decisions, and one try of every fault (tests/faults.py)."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.faults import FAULTS
from tests.launch_ranks import ROOT, clean_environment
from trainer.config import GuardSettings
from trainer.distributed import single_process
from trainer.guard import SKIP_WINDOW, GaveUp, Guard, Outcome, SpikeDetector
from trainer.watchdog import behind, slow_ranks

WORLD = single_process("cpu")
# The others take long: `slow`.
SHORT = ("signal_training", "not_finite", "hang")


def attached(tmp_path: Path, growth_steps: int | None = None, **settings: int) -> Guard:
    guard = Guard()
    guard.attach(GuardSettings(hang_minutes=None, **settings), WORLD, tmp_path, growth_steps)
    guard.detach()  # these tests judge steps and need no thread
    guard.begin()
    return guard


def run_steps(guard: Guard, losses: list[float], norms: list[float] | None = None) -> list[Outcome | None]:
    verdicts = []
    for step, loss in enumerate(losses):
        norm = norms[step] if norms else loss
        guard.note_step(step, torch.tensor(loss), torch.tensor(norm), [f"key{step}"])
        verdicts.append(guard.judge(guard.report()))
    return verdicts


def test_skipped_steps_past_the_budget_roll_back_and_then_give_up(tmp_path: Path) -> None:
    guard = attached(tmp_path, max_skipped=2, max_rollbacks=1)
    nan = math.nan
    assert run_steps(guard, [1.0, nan, 1.0, nan, nan]) == [None] * 4 + [Outcome.ROLL_BACK]
    assert guard.healthy_until == 1
    entries = [json.loads(line) for line in (tmp_path / "unhealthy_rank0.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["event"], entry["keys"]) for entry in entries] == [
        (step, "skipped", [f"key{step}"]) for step in (1, 3, 4)
    ]
    guard.begin()
    assert guard.skipped_steps() == ()
    with pytest.raises(GaveUp, match="max_rollbacks=1"):
        run_steps(guard, [nan] * 3)


def test_the_search_for_a_loss_scale_is_no_fault(tmp_path: Path) -> None:
    """fp16: the gradient overflows, the loss does not. But not for ever, and not if the loss is NaN."""
    inf = math.inf
    guard = attached(tmp_path, growth_steps=2000, max_skipped=0)
    assert run_steps(guard, [1.0] * 20, [inf] * 20) == [None] * 20
    assert run_steps(guard, [1.0] * 5, [inf] * 5)[-1] is Outcome.ROLL_BACK
    guard.begin()
    assert run_steps(guard, [math.nan]) == [Outcome.ROLL_BACK]
    plain = attached(tmp_path, max_skipped=0)
    assert run_steps(plain, [1.0], [inf]) == [Outcome.ROLL_BACK]


def test_a_gradient_that_is_not_finite_now_and_again_is_a_fault_under_fp16_too(tmp_path: Path) -> None:
    """Good steps between the bad ones do not make them a search for a scale, except for one after each growth."""
    guard = attached(tmp_path, growth_steps=2000, max_skipped=2)
    assert run_steps(guard, [1.0] * 9, [math.inf, math.inf, *[1.0, math.nan] * 3, 1.0])[-2] is Outcome.ROLL_BACK
    assert guard.healthy_until == 3
    guard = attached(tmp_path, growth_steps=3, max_skipped=0)
    assert run_steps(guard, [1.0] * 40, [1.0, 1.0, 1.0, math.inf] * 10) == [None] * 40
    assert run_steps(guard, [1.0], [math.inf]) == [Outcome.ROLL_BACK]


def test_a_loss_scale_that_was_restored_may_be_about_to_grow(tmp_path: Path) -> None:
    """A resumed run counts good steps from the checkpoint on, the scaler from where it was: one skip is explained."""
    guard = attached(tmp_path, growth_steps=8, max_skipped=0)
    guard.begin(restored=True)
    assert run_steps(guard, [1.0] * 5, [1.0] * 4 + [math.inf]) == [None] * 5
    assert run_steps(guard, [1.0] * 3, [1.0, 1.0, math.inf])[-1] is Outcome.ROLL_BACK  # the second is not
    guard.begin()
    assert run_steps(guard, [1.0, 1.0], [1.0, math.inf])[-1] is Outcome.ROLL_BACK  # nor in a run that begins
    plain = attached(tmp_path, max_skipped=0)
    plain.begin(restored=True)
    assert run_steps(plain, [1.0], [math.inf]) == [Outcome.ROLL_BACK]


def test_a_loss_scale_of_nothing_gives_up(tmp_path: Path) -> None:
    """Few enough to stay within the budget, steps may still be skipped more often than the scale grows."""
    guard = attached(tmp_path, growth_steps=2000)
    guard.check_loss_scale(7, 65536.0 * 0.5**24)
    with pytest.raises(GaveUp, match="step 7: the loss scale has fallen to 3"):
        guard.check_loss_scale(7, 2.0**-15)


def test_what_is_not_judged_yet_is_settled_before_a_save(tmp_path: Path) -> None:
    """On a GPU a step is judged one step late; the last ones of a stretch would never be."""
    guard = attached(tmp_path, max_skipped=1)
    guard._lag = 1
    for step, loss in enumerate([math.nan, 1.0, math.nan, math.nan]):
        guard.note_step(step, torch.tensor(loss), torch.tensor(loss), [f"key{step}"])
        if step < 2:
            assert guard.settle() is None
            assert guard.skipped_steps() == (0,)
    assert guard.settle() is Outcome.ROLL_BACK
    assert guard.healthy_until == 0


def test_a_skipped_step_is_forgotten_after_a_while(tmp_path: Path) -> None:
    guard = attached(tmp_path, max_skipped=1)
    run_steps(guard, [math.nan] + [1.0] * (SKIP_WINDOW - 1))
    assert guard.skipped_steps() == (0,)
    guard.note_step(SKIP_WINDOW, torch.tensor(1.0), torch.tensor(1.0), [])
    guard.settle()
    assert guard.skipped_steps() == ()


def test_a_stop_on_any_rank_stops(tmp_path: Path) -> None:
    guard = attached(tmp_path)
    assert guard.judge([0.0, 1.0, 0.0, 0.0]) is None
    assert guard.judge([1.0, 1.0, 0.0, 0.0]) is Outcome.STOPPED  # another rank's: this one saw no signal


def test_a_spike_is_seen_and_does_not_become_usual() -> None:
    detector = SpikeDetector(6.0)
    noise = [1.0 + 0.1 * (-1) ** step for step in range(60)]
    assert [detector.add(loss) for loss in noise] == [None] * 60
    assert "usual 1" in detector.add(2.0)
    assert detector.add(2.0) is not None
    assert detector.add(1.1) is None


def test_slow_descent_is_no_spike() -> None:
    detector = SpikeDetector(6.0)
    assert [detector.add(10.0 / (1 + step)) for step in range(300)] == [None] * 300


def test_who_is_behind() -> None:
    places = {0: (40, "7 agree", "a"), 1: (38, "7 load", "b"), 2: (40, "7 agree", "a"), 3: (-1, "0 start", "?")}
    assert behind({k: v for k, v in places.items() if k < 3}) == "Behind the others: rank 1 on b (step 7 in load)"
    assert "rank 3" in behind(places)
    assert "All ranks are at the same place" in behind({0: places[0], 2: places[2]})


def test_who_is_slow() -> None:
    assert slow_ranks([1.0, 1.1, 0.9, 2.0], 1.5) == [3]
    assert slow_ranks([0.001, 0.01], 1.5) == []  # too little to matter
    assert slow_ranks([1.0, 2.0], 1.5) == [1]
    assert slow_ranks([1.0], 1.5) == []


# Two ranks that hang, each in a fork of its own. SIGALRM ends one that its watchdog does not.
TWO_THAT_HANG = """
import os, signal, sys, time
from pathlib import Path
from trainer.distributed import single_process
from trainer.watchdog import Watchdog

def stderr_is_full(folder):
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)

def disk_does_not_answer(folder):  # whoever opens a FIFO without a counterpart waits
    for name in ("rank_00000", "rank_00000.tmp"):
        os.mkfifo(folder / name)

for case in (stderr_is_full, disk_does_not_answer):
    folder = Path(sys.argv[1], case.__name__)
    folder.mkdir()
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        case(folder)
        Watchdog(folder, single_process("cpu"), hang_minutes=0.01).start()
        while True:
            time.sleep(1)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_nothing_that_the_watchdog_waits_for_keeps_it_from_ending_the_rank(tmp_path: Path) -> None:
    """What makes a rank hang may well be the disk that the report is read from or written to."""
    command = [sys.executable, "-c", TWO_THAT_HANG, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=90)
    assert done.stdout.split() == ["76", "76"], done.stderr
    assert "no progress" in done.stderr


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=9), st.floats(1.1, 4))
def test_fewer_than_half_of_the_ranks_are_slow(seconds: list[float], factor: float) -> None:
    assert len(slow_ranks(seconds, factor)) <= len(seconds) / 2


@pytest.mark.dist
def test_faults(tmp_path: Path) -> None:
    """One try of each of a few, in a process that forks the ranks: see tests/faults.py for what survival means."""
    check_faults(SHORT, tmp_path)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAULTS if name not in SHORT])
def test_other_faults(tmp_path: Path, name: str) -> None:
    check_faults((name,), tmp_path)


def check_faults(names: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "tests.faults", "--short", "--out", str(out), "--only", *names]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=500)
    assert out.exists(), done.stdout[-2000:] + done.stderr[-3000:]
    rows = json.loads(out.read_text())
    assert [row["problems"] for row in rows] == [[] for _ in names], done.stdout[-5000:]
    tried = [row for row in rows if row["tried"]]
    if not tried:
        pytest.skip(rows[0]["notes"][0])
