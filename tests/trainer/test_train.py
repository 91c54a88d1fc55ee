"""The entry point as a user runs it: golden losses, stop and go on, several ranks, bad input."""

import errno
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from model.build import build_mae, build_sam
from tests.launch_ranks import free_port
from tests.trainer.tiny import losses, mae_arguments, sam_arguments, samples
from trainer import loop, train
from trainer.checkpoint import Checkpointer, load_weights
from trainer.checkpoint_files import read_scores
from trainer.config import load_config
from trainer.data.batches import MaeBatch
from trainer.distributed import single_process
from trainer.guard import Guard
from trainer.metrics import Logger, Meter
from trainer.stages import build_pipeline

GOLDEN = Path(__file__).parents[1] / "golden"


def newest(run_dir: Path) -> Path:
    path = Checkpointer(run_dir / "checkpoints", 3, single_process()).newest()
    assert path is not None
    return path


@pytest.fixture(scope="module")
def sam_run(scenes, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run") / "sam"
    assert train.main(sam_arguments(scenes, run_dir)) == 0
    return run_dir


@pytest.fixture(scope="module")
def mae_run(scenes, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run") / "mae"
    assert train.main(mae_arguments(scenes, run_dir)) == 0
    return run_dir


@pytest.mark.parametrize("stage", ["sam", "mae"])
def test_losses_equal_the_golden_ones(stage, request):
    """A change here means that training changed: renew tests/golden/*.txt in a commit that says why."""
    run_dir = request.getfixturevalue(f"{stage}_run")
    found = losses(run_dir)
    lines = (GOLDEN / f"{stage}_tiny.txt").read_text().split()
    golden = {int(step): float(loss) for step, loss in (line.split(":") for line in lines)}
    # fp32 sums in another order on another CPU; six steps amplify that by far less than this.
    assert found == pytest.approx(golden, rel=2e-3), f"found {found}"
    assert found != pytest.approx({step: 1.01 * loss for step, loss in golden.items()}, rel=2e-3)


@pytest.mark.parametrize("stop_after", [1, 2, 4])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(scenes, sam_run, tmp_path, monkeypatch, stop_after):
    """Stops inside the frozen phase, on the change of phase, and after it."""
    agree, calls = loop.agree, []

    def stop_at(micro_batches, guard, world):
        calls.append(1)
        guard.stop_requested = len(calls) == stop_after
        return agree(micro_batches, guard, world)

    monkeypatch.setattr(loop, "agree", stop_at)
    assert train.main(sam_arguments(scenes, tmp_path)) == 75
    monkeypatch.undo()
    assert train.main(sam_arguments(scenes, tmp_path)) == 0
    assert samples(tmp_path) == samples(sam_run)
    # The same arithmetic on the same machine: equal, not close.
    assert losses(tmp_path) == losses(sam_run)
    ours, theirs = load_weights(newest(tmp_path)), load_weights(newest(sam_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("when", ["in the last step", "in its evaluation"])
def test_a_stop_at_the_end_does_not_lose_the_last_evaluation(scenes, tmp_path, monkeypatch, when):
    arguments = sam_arguments(scenes, tmp_path, "checkpoint.keep_best=true")
    agree, evaluate, calls = loop.agree, train.evaluate_and_log, []

    def stop_in_step(micro_batches, guard, world):
        calls.append(1)
        guard.stop_requested = when == "in the last step" and len(calls) == 6
        return agree(micro_batches, guard, world)

    def stop_in_evaluation(*arguments):
        *_, step, stop = arguments
        stop.__self__.stop_requested = when == "in its evaluation" and step == 6
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "agree", stop_in_step)
    monkeypatch.setattr(train, "evaluate_and_log", stop_in_evaluation)
    assert train.main(arguments) == 75
    assert newest(tmp_path).name == "step_00000006"
    monkeypatch.undo()
    assert train.main(arguments) == 0
    assert read_scores(tmp_path / "checkpoints").keys() == {2, 6}
    written = (tmp_path / "metrics.jsonl").read_text()
    assert train.main(arguments) == 0
    assert (tmp_path / "metrics.jsonl").read_text() == written  # it is there: nothing is left to do
    assert len(samples(tmp_path)) == 6 * 3


def test_a_stop_waits_for_no_diagnosis(scenes, tmp_path, monkeypatch):
    agree, diagnosed = loop.agree, Mock()

    def stop_at_once(micro_batches, guard, world):
        guard.stop_requested = True
        return agree(micro_batches, guard, world)

    monkeypatch.setattr(loop, "agree", stop_at_once)
    monkeypatch.setattr(train, "diagnose_and_log", diagnosed)
    assert train.main(sam_arguments(scenes, tmp_path, "diagnostics.every_steps=1")) == 75
    assert newest(tmp_path).name == "step_00000001"
    diagnosed.assert_not_called()


def test_the_frozen_encoder_stays_until_joint_training(scenes, sam_run, tmp_path):
    frozen_only = ["phases=[{name: freeze_encoder, steps: 2, frozen: [image_encoder]}]"]
    assert train.main(sam_arguments(scenes, tmp_path, *frozen_only)) == 0
    frozen = load_weights(newest(tmp_path))
    fresh = train.build_task(train.load_config(*split(sam_arguments(scenes, tmp_path))), (), False).state_dict()
    joint = load_weights(newest(sam_run))
    name = "sam.image_encoder.blocks.0.attn.qkv.weight"
    assert torch.equal(frozen[name], fresh[name]), "frozen weights are saved, unchanged"
    assert not torch.equal(joint[name], fresh[name])
    assert not torch.equal(frozen["sam.mask_decoder.iou_token.weight"], fresh["sam.mask_decoder.iou_token.weight"])


def split(arguments: list[str]) -> tuple[Path, list[str]]:
    return Path(arguments[0]), arguments[1:]


def test_micro_batches_and_a_batch_that_does_not_divide_change_nothing(scenes, sam_run, tmp_path):
    """Global batch 3 in micro-batches of 2: two of them, one place filled with weight zero."""
    assert train.main(sam_arguments(scenes, tmp_path, "batch.micro=2")) == 0
    # Sums in another order, six steps of AdamW.
    assert losses(tmp_path) == pytest.approx(losses(sam_run), rel=1e-4)


def test_worker_processes_change_nothing(scenes, sam_run, tmp_path):
    assert train.main(sam_arguments(scenes, tmp_path, "data.workers=2")) == 0
    assert losses(tmp_path) == losses(sam_run)


@pytest.mark.dist
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "deepspeed"])
def test_two_ranks_learn_what_one_learns(scenes, sam_run, tmp_path, engine):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = sam_arguments(scenes, tmp_path, f"engine.kind={engine}")
    run([*command, "-m", "trainer.train", *arguments])
    # Sums in another order, six steps of AdamW.
    assert losses(tmp_path) == pytest.approx(losses(sam_run), rel=1e-3)
    seen = sorted(samples(tmp_path, 0) + samples(tmp_path, 1))
    assert seen == sorted(samples(sam_run))


@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_and_leaves(scenes, tmp_path, number):
    """As Slurm and Ctrl-C send it: the loader's processes get it too."""
    arguments = sam_arguments(scenes, tmp_path, "phases=[{name: joint, steps: 100000}]", "data.workers=1")
    command = [sys.executable, "-m", "trainer.train", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    ) as process:
        try:
            for line in process.stdout:
                if line.startswith("step 3/"):
                    os.killpg(process.pid, number)
                    break
            rest = process.stdout.read()
            assert process.wait(timeout=60) == 75, rest
        finally:
            process.kill()
    assert "stopped at step" in rest
    done = train.read_run_state(newest(tmp_path)).step
    assert done >= 3
    assert len(samples(tmp_path)) == 3 * done


@pytest.mark.dist
def test_a_signal_ends_a_rank_that_waits_for_the_others(scenes, tmp_path):
    """They may never come. A handler in Python would not run before they do."""
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "trainer.train", *sam_arguments(scenes, tmp_path / "run")]
    for number in (signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(command, env=environment() | place) as process:
            try:
                wait_for_port(int(place["MASTER_PORT"]))
                process.send_signal(number)
                assert process.wait(timeout=20) == -number
            finally:
                process.kill()
    assert not (tmp_path / "run").exists()


def wait_for_port(port: int) -> None:
    """Until somebody listens there: rank 0 does once it waits for the others."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"nobody listens on port {port}")


def test_weights_that_are_not_finite_at_the_end_of_a_phase_end_the_run(scenes, tmp_path, capsys):
    """Passed over when the next phase loads, they would have the phase trained again and again."""
    settings = ["optim.lr=1e39", "schedule.warmup_steps=0", "schedule.kind=constant", "checkpoint.every_steps=1"]
    phases = "phases=[{name: short, steps: 2}, {name: long, steps: 4}]"
    assert train.main(mae_arguments(scenes, tmp_path, *settings, phases)) == 70
    assert "phase short has reached step 2, but the checkpoint there cannot be used" in capsys.readouterr().err


def test_ranks_without_an_image_are_named(scenes, tmp_path, capsys):
    arguments = mae_arguments(scenes, tmp_path / "run", "batch.global_size=4")
    config = load_config(Path(arguments[0]), arguments[1:])
    for size in (4, 6):
        world = replace(single_process("cpu"), size=size)
        logger = Logger(tmp_path / "run", world)
        train.announce(config, build_pipeline(config), [6], world, logger)
        logger.close()
        said = "WARNING: 2 of 6 ranks have no image to train on: batch.global_size is 4"
        assert (said in capsys.readouterr().out) == (size == 6)


def test_a_run_that_trains_nothing_says_so(scenes, tmp_path, capsys):
    nothing = ["data.max_mask_area=1e-9", "phases=[{name: all, steps: 30}]"]
    assert train.main(sam_arguments(scenes, tmp_path, *nothing)) == 2
    assert "20 steps in a row had nothing to train on" in capsys.readouterr().err


def test_all_config_problems_come_at_once_and_nothing_starts(scenes, tmp_path, capsys):
    code = train.main(sam_arguments(scenes, tmp_path / "run", "optim.lrr=1", "batch.micro=none", "prompts.rounds=0"))
    said = capsys.readouterr().err
    assert code == 2
    for part in ("optim.lrr", "did you mean lr", "batch.micro", "prompts.rounds"):
        assert part in said
    assert not (tmp_path / "run").exists()


class FullDisk(io.TextIOBase):
    """A stream that takes nothing."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_under_standard_error_changes_no_exit_code(scenes, tmp_path, monkeypatch):
    config = train.load_config(*split(mae_arguments(scenes, tmp_path)))
    ends = {ValueError("a"): 2, train.GaveUp("b"): 70, train.SaveError("c"): 74, torch.OutOfMemoryError("d"): 71}
    monkeypatch.setattr(sys, "stderr", FullDisk())
    for error, code in ends.items():
        monkeypatch.setattr(train, "run", Mock(side_effect=error))
        assert train.run_guarded(config, single_process("cpu"), Guard()) == code
    assert train.main(["missing.yaml"]) == 2


def test_nor_does_what_cannot_be_written_at_the_end_of_the_process():
    """Where text is left in a buffer then, Python itself ends with 120."""
    command = [sys.executable, "-m", "trainer.train", "missing.yaml"]
    buffered = {name: value for name, value in environment().items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "wb", buffering=0) as full:
        done = subprocess.run(command, stdout=full, stderr=full, env=buffered, timeout=90)
    assert done.returncode == 2


def test_a_broken_sample_ends_nothing_where_it_cannot_be_named(monkeypatch, caplog):
    one = torch.zeros(1)
    batch = MaeBatch(torch.tensor([5]), one, ["sa_1"], ["sa_1: truncated"], 1, 1, one, one, one)
    monkeypatch.setattr(sys, "stdout", FullDisk())
    loop.note_samples(batch, 7, Meter(), None)
    assert "step 7: sample trains nothing: sa_1: truncated" in caplog.text


def test_half_of_a_launcher_is_an_error_in_a_line(scenes, tmp_path, monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert train.main(mae_arguments(scenes, tmp_path / "run")) == 2
    assert "LOCAL_RANK is not: start with torchrun" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_cut_short_stops_training_and_names_the_repair(scenes, tmp_path, workers):
    """In a process of its own, so that it shows whether the program also ends."""
    broken = tmp_path / "shards"
    subprocess.run(["cp", "-r", str(scenes["train"]), str(broken)], check=True)
    victims = sorted(broken.glob("shard-*.tar"))
    for victim in victims:
        os.truncate(victim, victim.stat().st_size - 1000)
    arguments = sam_arguments({**scenes, "train": broken}, tmp_path / "run", f"data.workers={workers}")
    done = subprocess.run(
        [sys.executable, "-m", "trainer.train", *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=90,
    )
    assert done.returncode == 2
    assert "shard-0" in done.stderr
    assert "data_tools.verify" in done.stderr


def test_a_finished_run_is_not_touched_by_a_start_with_another_network(scenes, sam_run, tmp_path, capsys):
    run_dir = tmp_path / "run"
    subprocess.run(["cp", "-r", str(sam_run), str(run_dir)], check=True)
    before = (run_dir / "config.yaml").read_text()
    assert train.main(sam_arguments(scenes, run_dir, "model.size=vit_b")) == 2
    assert "model.size: 'vit_tiny' there, 'vit_b' now" in capsys.readouterr().err
    assert (run_dir / "config.yaml").read_text() == before


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(scenes, mae_run, tmp_path, capsys):
    """It would replace them, whatever its settings: what is left of them may be worth having."""
    run_dir = tmp_path / "run"
    subprocess.run(["cp", "-r", str(mae_run), str(run_dir)], check=True)
    (file,) = run_dir.glob("checkpoints/step_*/__0_0.distcp")
    os.truncate(file, file.stat().st_size - 1)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert train.main(mae_arguments(scenes, run_dir, "optim.lr=5e-3")) == 2
    said = capsys.readouterr().err
    assert f"none of the checkpoints in {run_dir}/checkpoints can be used (step_00000006)" in said
    assert "move the directory away to begin anew" in said
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_another_seed_or_batch_is_not_the_same_run(scenes, sam_run, tmp_path, capsys):
    subprocess.run(["cp", "-r", str(sam_run), str(tmp_path / "run")], check=True)
    arguments = sam_arguments(scenes, tmp_path / "run", "seed=1", "phases=[{name: joint, steps: 9}]")
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    assert "seed: 0 there, 1 now" in said
    assert "phases.0.steps: 2 there, 9 now" in said


def test_a_change_that_is_named_is_allowed_and_the_samples_go_on(scenes, sam_run, tmp_path, capsys):
    """Another global batch and rate: the next samples of the order come next, none twice and none left out."""
    subprocess.run(["cp", "-r", str(sam_run), str(tmp_path / "run")], check=True)
    changed = ["batch.global_size=2", "optim.lr=1e-5", "phases.1.steps=6"]
    arguments = sam_arguments(scenes, tmp_path / "run", *changed)
    assert train.main([*arguments, "resume.allow_change=[optim, phases]"]) == 2
    said = capsys.readouterr().err
    assert "batch.global_size: 3 there, 2 now" in said
    assert "optim.lr" not in said
    assert train.main([*arguments, "resume.allow_change=[optim.lrr, phases]"]) == 2
    assert "resume.allow_change: optim.lrr is no part of the recipe" in capsys.readouterr().err
    allowed = "resume.allow_change=[optim.lr, phases, batch.global_size]"
    assert train.main([*arguments, allowed]) == 0
    assert sorted(position for _, position, _ in samples(tmp_path / "run")) == list(range(6 * 3 + 2 * 2))
    state = train.read_run_state(newest(tmp_path / "run"))
    assert (state.step, state.samples_seen) == (8, 22)
    assert state.config["optim"]["lr"] == 1e-5
    assert "torch" in state.code
    assert train.main(sam_arguments(scenes, tmp_path / "run", *changed)) == 0  # the recipe now is the changed one


def test_a_checkpoint_past_the_end_of_the_run_is_an_error(scenes, mae_run, tmp_path, capsys):
    """Epochs are counted anew with another batch, and the run would end with code 0 where it had only begun."""
    run_dir = tmp_path / "run"
    subprocess.run(["cp", "-r", str(mae_run), str(run_dir)], check=True)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    changed = ["batch.global_size=8", "phases=[{name: pretrain, epochs: 1}]"]
    allowed = "resume.allow_change=[phases, batch.global_size]"
    assert train.main(mae_arguments(scenes, run_dir, *changed, allowed)) == 2
    said = capsys.readouterr().err
    assert "step_00000006 is at step 6, past the run's last step, 3" in said
    assert "counted from step 0 with batch.global_size=8" in said
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_what_decides_what_is_learned_is_in_the_recipe(scenes):
    config = train.load_config(*split(sam_arguments(scenes, Path("unused"))))
    found = train.recipe(config, train.build_pipeline(config))
    assert {"optim.lr", "model.size", "phases.0.frozen.0", "prompts.num_points.0", "manifest", "seed"} <= found.keys()
    assert not [key for key in found if key.startswith(("log.", "checkpoint.", "engine.kind", "run_dir", "resume."))]


def test_sam_takes_the_encoder_of_a_mae_run(scenes, mae_run, tmp_path, capsys):
    assert train.main(sam_arguments(scenes, tmp_path, f"model.init_from={mae_run}", "optim.lr=1e-12")) == 0
    assert "MAE to SAM: 51 carried" in capsys.readouterr().out
    report = (tmp_path / "initial_weights.txt").read_text().splitlines()
    assert report[0] == f"# from {mae_run}"
    kinds = Counter(line.split()[0] for line in report[1:])
    tasks = train.build_task(train.load_config(*split(sam_arguments(scenes, tmp_path))), (), False)
    assert sum(kinds[kind] for kind in ("carried", "resized", "new")) == len(tasks.sam.state_dict())
    assert kinds["dropped"] > 10
    rates = (tmp_path / "rates.txt").read_text().splitlines()
    assert rates[0] == "# phase joint from step 2"
    assert {line.split()[-1] for line in rates[2:]} == {name for name, _ in tasks.sam.named_parameters()}
    mae, sam = load_weights(newest(mae_run)), load_weights(newest(tmp_path))
    name = "blocks.1.mlp.lin1.weight"
    torch.testing.assert_close(sam[f"sam.image_encoder.{name}"], mae[f"mae.{name}"], rtol=0, atol=1e-6)


def test_initial_weights_that_do_not_fit_are_explained(scenes, tmp_path, capsys):
    file = tmp_path / "sam.pth"
    command = sam_arguments(scenes, tmp_path / "run", f"model.init_from={file}")
    whole = build_sam("vit_tiny", 64).state_dict()
    name = "image_encoder.neck.0.weight"
    for weights, message in (
        (whole | {name: torch.full_like(whole[name], torch.nan)}, f"{file} holds values that are not finite"),
        ({key: value for key, value in whole.items() if key != name}, f"{file} will not go into this SAM: {name} is"),
        ({"something": torch.zeros(1)}, "image_encoder.blocks.0.norm1.bias is missing; and 198 more"),
        (build_mae("vit_b", 64).state_dict(), f"{file} is a vit_b, model.size is vit_tiny: set model.size=vit_b"),
    ):
        torch.save(weights, file)
        assert train.main(command) == 2
        shown = capsys.readouterr().err
        assert message in shown
        assert len(shown) < 1000


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
