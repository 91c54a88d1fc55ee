"""Preflight: what it finds, whom it blames, and that it runs as a command, alone and on two processes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.launch_ranks import ROOT, clean_environment, launch_ranks
from tests.trainer.tiny import sam_arguments
from trainer.config import load_config
from trainer.preflight import (
    GPUS_SEEN,
    Report,
    Row,
    attempt,
    check_shards,
    check_space,
    check_writable,
    checkpoint_bytes,
    judge,
    judge_reports,
    main,
    memory_row,
    newest_step,
)


def reports(num_nodes: int, per_node: int = 2) -> list[Report]:
    """Processes that found nothing wrong."""
    return [
        Report(
            rank,
            f"n{rank // per_node}",
            [Row("config", True, "")],
            {"numpy": "2.0", GPUS_SEEN: "8"},
            {"matmul TFLOP/s": 100.0 + rank, "copy GB/s": 20.0},
        )
        for rank in range(num_nodes * per_node)
    ]


NODES = [f"n{i}" for i in range(8)]


def test_all_is_well():
    verdict = judge_reports(reports(8), NODES, 2)
    assert (verdict.code, verdict.bad_nodes) == (0, {})


@pytest.mark.parametrize(
    "spoil, why",
    [
        (lambda found: found.pop(6), "no report"),
        (lambda found: found[6].versions.update(numpy="1.0"), "versions"),
        (lambda found: found[6].versions.update({GPUS_SEEN: "7"}), "versions"),
        (lambda found: found[7].rows.append(Row("device", False, "CUDA error")), "device"),
        (lambda found: found[7].measured.update({"matmul TFLOP/s": 50.0}), "matmul TFLOP/s"),
        (lambda found: found[6].measured.update({"copy GB/s": 2.0}), "copy GB/s"),
        (lambda found: found[6].rows.append(Row("run_dir", False, "read-only")), "run_dir"),
    ],
)
def test_one_bad_node_is_named_and_its_absence_is_not_the_others_fault(spoil, why):
    found = reports(8)
    spoil(found)
    for report in found[:6]:
        report.rows.append(Row("processes meet", False, "timed out", "", "meeting"))
    verdict = judge_reports(found, NODES, 2)
    assert (verdict.code, verdict.bad_nodes) == (1, {"n3": why})


def test_many_bad_nodes_are_no_nodes_fault():
    found = reports(8)
    for report in found[:8]:
        report.rows.append(Row("data.shards", False, "not mounted"))
    verdict = judge_reports(found, NODES, 2)
    assert (verdict.code, verdict.bad_nodes) == (2, {})


def test_wrong_settings_blame_no_node():
    found = reports(8)
    found[0].rows.append(Row("disk", False, "full", "", "run"))
    assert judge_reports(found, NODES, 2).code == 2


def test_judge_writes_the_names_for_the_job_script(tmp_path, capsys):
    for report in reports(4):
        if report.node != "n2":
            report.write(tmp_path)
    assert judge(tmp_path, NODES[:4], 2, tmp_path / "bad") == 1
    assert (tmp_path / "bad").read_text() == "n2\n"
    assert "-> the node is dead or python does not start there" in capsys.readouterr().out


def test_a_short_and_a_missing_shard_are_named(scenes, tmp_path):
    assert check_shards("data.shards", str(scenes["train"])).ok
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in scenes["train"].iterdir():
        if file.is_file():
            (broken / file.name).write_bytes(file.read_bytes())
    (broken / "shard-000000.tar").write_bytes(b"short")
    (broken / "shard-000001.tar").unlink()
    row = check_shards("data.shards", str(broken))
    assert not row.ok
    assert "shard-000000.tar has 5 bytes" in row.found
    assert "shard-000001.tar missing" in row.found


def test_a_missing_index_and_one_of_other_data_are_named(scenes, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(scenes["train"], broken)
    column = broken / "index/image_id.npy"
    np.save(column, np.load(column)[:-1])
    assert "the index has " in check_shards("data.shards", str(broken)).found
    column.write_bytes(column.read_bytes()[:100])
    assert f"{column} is damaged" in check_shards("data.shards", str(broken)).found
    column.unlink()
    assert f"{column} is missing" in check_shards("data.shards", str(broken)).found


def test_data_that_cannot_be_opened_still_give_a_table(scenes, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(scenes["train"], broken)
    (broken / "manifest.json").write_text("{")
    assert main(sam_arguments(scenes, tmp_path / "run", f"data.shards={broken}")) == 2
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[1] for line in lines if line.startswith("FAIL")} == {"data.shards", "loader"}
    assert any(line.startswith("ok    matmul") for line in lines)


def test_a_gpu_that_cannot_compute_is_its_nodes_fault():
    def check(config, report, world):
        raise RuntimeError("CUDA error: uncorrectable ECC error\nmore")

    report = Report(0, "n0")
    assert not attempt("device", check, None, report, None)
    assert (report.rows[0].found, report.rows[0].scope) == ("CUDA error: uncorrectable ECC error", "node")


def test_a_run_directory_that_cannot_be_made_is_found(tmp_path):
    (tmp_path / "file").write_text("")
    assert not check_writable(tmp_path / "file" / "run").ok
    assert check_writable(tmp_path / "run").ok


def test_space_is_that_of_the_checkpoints_to_come(scenes, tmp_path, monkeypatch):
    arguments = sam_arguments(scenes, tmp_path)
    config = load_config(Path(arguments[0]), arguments[1:])
    monkeypatch.setattr("trainer.preflight.checkpoint_bytes", lambda config: 10**9)
    for free, fits in ((4.1e9, True), (3.9e9, False)):  # keep_last=3 and one being written
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: type("Usage", (), {"free": free}))
        assert check_space(config).ok == fits
    more = ["checkpoint.every_steps=10", "checkpoint.keep_every=2", "phases=[{name: all, steps: 100}]"]
    config = load_config(Path(arguments[0]), [*arguments[1:], *more])
    assert "9.0 GB to come" in check_space(config).found  # and steps 20, 40, ... 100 for good


def test_a_checkpoint_with_averaged_weights_is_a_third_larger(scenes, tmp_path):
    arguments = sam_arguments(scenes, tmp_path)
    plain, averaged = (
        checkpoint_bytes(load_config(Path(arguments[0]), [*arguments[1:], *more]))
        for more in ([], ["optim.ema_decay=0.999"])
    )
    assert 3 * averaged == 4 * plain


def test_memory_that_is_not_all_counted_warns_and_does_not_fail():
    assert memory_row(50e9, 80e9, 85e9, []).ok
    assert not memory_row(90e9, 80e9, 85e9, []).ok
    row = memory_row(90e9, 80e9, 85e9, ["engine.compile"])
    assert row.ok
    assert "WARNING, it may not fit; not counted: engine.compile" in row.found


def test_newest_step(tmp_path):
    assert newest_step(tmp_path) == -1
    for name in ("step_00000500", "step_00002000", "step_00003000.abandoned"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "COMPLETE").touch()
    (tmp_path / "checkpoints/step_00004000").mkdir()  # died while it was written
    (tmp_path / "checkpoints/LATEST").touch()  # an empty one, as a full disk leaves it
    assert newest_step(tmp_path) == 2000


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_report_and_one_reads(scenes, tmp_path):
    arguments = sam_arguments(scenes, tmp_path / "run")
    launch_ranks("trainer.preflight", [*arguments, "--reports", str(tmp_path)], num_ranks=2, timeout_s=500)
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert all(row["ok"] for report in found for row in report["rows"])
    assert "all-reduce GB/s" in found[1]["measured"]
    assert "loader images/s a worker" in found[0]["measured"]
    command = [sys.executable, "-m", "trainer.preflight", *arguments, "--judge", str(tmp_path), "--tasks-per-node", "2"]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fit to run" in done.stdout


@pytest.mark.slow
def test_as_a_command_alone_and_with_a_wrong_setting(scenes, tmp_path):
    for more, code, said in (([], 0, "fit to run"), (["optim.lrr=1"], 2, "did you mean lr?")):
        command = [sys.executable, "-m", "trainer.preflight", *sam_arguments(scenes, tmp_path / "run", *more)]
        done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        assert said in done.stdout + done.stderr
