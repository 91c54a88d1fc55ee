"""What a run writes down, read back as TensorBoard and other programs read it."""

import gzip
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.tiny import mae_arguments, sam_arguments
from trainer import metrics, train
from trainer.config import load_config
from trainer.distributed import single_process
from trainer.flops import flops_per_image
from trainer.guard import Guard
from trainer.metrics import Logger, Meter, console_line, throughput
from trainer.stages import build_pipeline
from trainer.tracing import Tracer


@pytest.fixture(scope="module")
def run_dir(scenes, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "sam"
    more = ["phases=[{name: all, steps: 3}]", "profile.steps=[2,3]", "evaluate.every_steps=3", "prompts.rounds=2"]
    assert train.main(sam_arguments(scenes, path, *more)) == 0
    return path


@pytest.fixture(scope="module")
def events(run_dir) -> EventAccumulator:
    accumulator = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_has_every_group(events):
    tags = set(events.Tags()["scalars"])
    assert {
        "train/loss",
        "train/round_1/focal",
        "train/round_2/dice",
        "train/round_2/iou",
        "train/grad_norm",
        "optim/lr",
        "optim/lr_group_0",
        "optim/loss_scale",
        "optim/skipped_steps",
        "data/stall_share",
        "data/stall_share_mean",
        "data/read_ms",
        "data/jpeg_ms",
        "data/masks_ms",
        "data/prompts_ms",
        "data/collate_ms",
        "data/transfer_ms",
        "data/bad_samples",
        "speed/step_seconds",
        "speed/images_per_second",
        "memory/peak_gb",
        "eval/miou",
        "eval/miou_box",
        "eval_boundary_f/box",
        "eval_calibration/click_1_ece",
        "eval_box/ap",
    } <= tags
    assert all(events.Scalars(f"data/{stage}_ms")[-1].value > 0 for stage in ("read", "jpeg", "masks", "prompts"))


def test_pictures_and_texts_are_there(events):
    assert {"eval/masks", "eval/rounds_1", "eval/rounds_2"} <= set(events.Tags()["images"])
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "global_size: 3" in texts["config/text_summary"]
    assert "torch: " in texts["environment/text_summary"]
    assert "commit: " in texts["environment/text_summary"]
    assert "aten::" in texts["profile/step_3/text_summary"]


def test_the_file_for_machines_has_the_same_numbers(run_dir, events):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    for tag in events.Tags()["scalars"]:
        written = {line["step"]: line[tag] for line in lines if tag in line}
        shown = {event.step: event.value for event in events.Scalars(tag)}
        assert shown == pytest.approx(written, rel=1e-6, abs=1e-9), tag  # TensorBoard keeps float32


def test_the_profiler_records_the_steps_it_was_asked_for(run_dir):
    (trace,) = (run_dir / "profile").iterdir()
    assert trace.name == "steps_2_to_3.json.gz"
    recorded = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [event for event in recorded if event.get("name", "").startswith("Optimizer.step#")]
    assert len({event["ts"] for event in steps}) == 2


def test_a_lost_run_directory_ends_nothing(tmp_path, caplog):
    """TensorBoard's thread dies of it; numbers come back with the directory."""
    logger = Logger(tmp_path / "run", single_process("cpu"))
    logger.scalars(1, {"train/loss": 1.0})
    logger._tensorboard.flush()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("in its place")
    for step in range(2, 30):  # more than its queue holds
        logger.scalars(step, {"train/loss": 1.0})
        logger.text("note", "a text")
        time.sleep(0.01)
    logger.file("rates.txt", "a file")
    assert [record.message.split(" cannot be written")[0] for record in caplog.records] == [
        str(tmp_path / "run" / "metrics.jsonl"), "TensorBoard", str(tmp_path / "run" / "rates.txt"),
    ]  # fmt: skip
    (tmp_path / "run").unlink()
    for step in (30, 31):
        logger.scalars(step, {"train/loss": float(step)})
    logger.close()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [30, 31]
    accumulator = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    accumulator.Reload()
    assert [event.value for event in accumulator.Scalars("train/loss")] == [30.0, 31.0]


def test_a_window_that_a_phase_or_a_stop_cuts_has_a_trace_of_each_part(scenes, tmp_path, monkeypatch):
    """Phases of 2 and 4 steps, stopped after step 4: a profiler that ran on would crash the process at its end."""
    arguments = sam_arguments(scenes, tmp_path / "run", "profile.steps=[2,5]")
    config = load_config(Path(arguments[0]), arguments[1:])
    guard = Guard()
    after = Tracer.after

    def stop_in_step_4(tracer: Tracer, step: int) -> str | None:
        guard.stop_requested = step == 3
        return after(tracer, step)

    monkeypatch.setattr(Tracer, "after", stop_in_step_4)
    assert not train.run(config, single_process(), guard), "not finished"
    assert not torch.autograd.profiler._is_profiler_enabled
    traces = tmp_path / "run" / "profile"
    assert sorted(path.name for path in traces.iterdir()) == ["steps_2_to_2.json.gz", "steps_3_to_4.json.gz"]
    assert train.main(arguments) == 0, "and goes on in the window"
    assert (traces / "steps_5_to_5.json.gz").exists()


def test_a_window_past_the_end_of_the_run_is_refused(scenes, tmp_path, capsys):
    assert train.main(sam_arguments(scenes, tmp_path / "run", "profile.steps=[2,50]")) == 2
    assert "profile.steps: [2,50] goes past the run's last step, 6" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_not_finite_writes_json_and_says_so(scenes, tmp_path, caplog):
    """Python reads NaN, which no other program takes for JSON."""
    more = ["phases=[{name: all, steps: 3}]", "optim.lr=1e25", "schedule.warmup_steps=0", "guard.max_skipped=10"]
    train.main(sam_arguments(scenes, tmp_path / "run", *more))

    def refuse(name: str) -> float:
        raise AssertionError(name)

    lines = [
        json.loads(line, parse_constant=refuse)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert any(line.get("train/loss", 0) is None for line in lines)
    (line,) = [line for line in lines if "eval/miou" in line]
    assert line["eval_calibration/box_bias"] is None
    assert "masks are not finite" in caplog.text


def test_the_console_line_says_how_long_it_will_take():
    values = {"speed/step_seconds": 2.0, "train/loss": 1.5, "train/iou": 0.25, "optim/lr": 1e-3}
    values |= {"train/grad_norm": 3.0, "optim/skipped_steps": 0.0, "data/stall_share": 0.1}
    line = console_line(100, 1900, values, 16)
    assert "left 1:00:00" in line
    assert "8.0 images/s" in line
    assert "\n" not in line


def test_an_evaluation_is_no_part_of_a_steps_time(monkeypatch):
    """By a clock that is read at 0 s (new meter), 10 s and 100 s (evaluation), and 103 s (end)."""
    times = iter([0.0, 10.0, 100.0, 103.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    meter = Meter()
    with meter.paused():
        pass
    meter.end_step(torch.zeros(()))
    assert meter.collect(single_process())["speed/step_seconds"] == 13.0


def test_mfu_is_model_flops_over_peak():
    values = throughput(step_seconds=0.5, global_size=8, flops_per_image=2e12, peak=100e12, num_ranks=2)
    assert values["speed/mfu"] == pytest.approx(16 * 2e12 / 200e12)
    assert "speed/mfu" not in throughput(0.5, 8, None, None, 2)


def test_flops_of_the_autoencoder_equal_the_formula(scenes, tmp_path):
    """Per token and block 12 d^2 multiply-adds and 2 d a token attended to; backward is twice forward."""
    arguments = mae_arguments(scenes, tmp_path / "run")
    config = load_config(Path(arguments[0]), arguments[1:])
    dataset = build_pipeline(config).dataset

    def attention(tokens: int, width: int, depth: int) -> int:
        return depth * 2 * tokens**2 * width

    def blocks(tokens: int, width: int, depth: int) -> int:
        return depth * 12 * tokens * width**2 + attention(tokens, width, depth)

    patches, visible = 16, 4  # 64 pixels, a quarter of the patches stays
    patch_values = 3 * 16 * 16
    width, decoder = 192, config.model.decoder_dim
    forward = patches * patch_values * width + blocks(1 + visible, width, 4)
    forward += (1 + visible) * width * decoder + blocks(1 + patches, decoder, config.model.decoder_depth)
    forward += (1 + patches) * decoder * patch_values
    counted = flops_per_image(config, (), dataset)
    expected = 2 * 3 * forward
    # The patch projection needs no gradient for the image: half of its backward pass is saved.
    expected -= 2 * patches * patch_values * width
    # Fused attention computes its scores again in the backward pass: 2.5 times forward instead of 2.
    expected += attention(1 + visible, width, 4) + attention(1 + patches, decoder, config.model.decoder_depth)
    assert counted == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_a_frozen_encoder_costs_no_backward_pass(scenes, tmp_path):
    arguments = sam_arguments(scenes, tmp_path / "run")
    config = load_config(Path(arguments[0]), arguments[1:])
    dataset = build_pipeline(config).dataset
    whole, frozen = flops_per_image(config, (), dataset), flops_per_image(config, ("image_encoder",), dataset)
    assert 0 < frozen < whole
