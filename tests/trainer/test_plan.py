"""The plan against published figures, real processes, and itself."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_tools.sample_format import load_manifest
from tests.launch_ranks import launch_ranks
from trainer.config import Config, load_config
from trainer.plan import dry_run, memory, timing
from trainer.plan.__main__ import main
from trainer.plan.count import count_work
from trainer.plan.hardware import GPUS, gpu_named
from trainer.plan.simulate import Watch, simulate

CONFIGS = Path(__file__).parents[2] / "launch/configs"
A100 = GPUS["a100-80gb"]
UNCHANGED = ["data.horizontal_flip=0", "data.color_jitter=0"]  # as embeddings need their images
HEAD_ONLY = "phases=[{name: head, steps: 900, frozen: [image_encoder]}]"


def config_of(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", overrides, check_paths=False)


# ----------------------------------------------------------------------------------------------------- FLOPs, time


@pytest.fixture(scope="module")
def published():
    return count_work(config_of("sam_vith_paper"))


def test_flops_are_those_of_the_architecture(published):
    # By hand: 2980.5 GMAC; 3.62 GFLOP a mask in round 1 to 3.81 in round 11, times 64 masks.
    assert published.encoder == pytest.approx(5.961e12, rel=5e-4)
    assert published.decoder == pytest.approx(2.62e12, rel=5e-3)  # the hand figure has three digits
    assert published.training == pytest.approx(25.8e12, rel=5e-3)


def test_the_published_run_took_68_hours_at_3_percent_of_peak(published):
    config = config_of("sam_vith_paper")
    step = timing.step_time(published, 256, 256, A100, step_seconds=2.72)
    assert step.utilisation == pytest.approx(0.030, abs=0.0005)
    assert timing.length(config, step, 256, A100, num_steps=90_000).hours == pytest.approx(68.0, abs=0.05)


def test_gpus_without_an_image_and_fillers_are_no_use(published):
    for gpus, share in ((256, 1.0), (1024, 0.25), (192, 2 / 3)):
        step = timing.step_time(published, gpus, 256, A100, mfu=0.3)
        assert step.utilisation == pytest.approx(0.3 * share)
        again = timing.step_time(published, gpus, 256, A100, step_seconds=step.seconds)
        assert again.utilisation == pytest.approx(step.utilisation)


def test_95_epochs_in_90_hours_are_impossible_and_it_says_why():
    config = config_of("sam_vith")  # one round: even so
    work = count_work(config)
    step = timing.step_time(work, 256, 256, A100, mfu=0.4)
    steps = timing.length(config, step, 256, A100).num_steps
    assert steps == pytest.approx(95 * 11_183_362 / 256, abs=2)
    why = timing.impossible(work, config, steps, 90, 256, A100)
    assert why is not None
    assert "78 ms a step" in why
    assert why.startswith(
        "not to be expected"
    )  # 60 ms at the full peak: more than any published run, no more than that
    assert timing.impossible(work, config, steps, 50, 256, A100).startswith("impossible")
    assert timing.impossible(work, config, 90_000, 90, 256, A100) is None  # 90 thousand iterations are possible


def test_the_command_answers_both(capsys):
    cluster = ["--gpus", "256", "--gpu", "a100-80gb", "--no-memory"]
    assert main([str(CONFIGS / "sam_vith_paper.yaml"), *cluster, "--step-seconds", "2.72"]) == 0
    shown = capsys.readouterr().out
    assert "3.0% of peak" in shown
    assert "68.0 h = 17,408 GPU-hours" in shown
    assert main([str(CONFIGS / "sam_vith.yaml"), *cluster, "--mfu", "0.4", "--in-hours", "90"]) == 1
    assert "not to be expected. 4150075 steps in 90 h leave 78 ms a step" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", ["--gpus=0", "--gpus-per-node=0", "--mfu=0", "--mfu=3", "--step-seconds=0", "--steps=0", "--in-hours=nan",
               "--then-gpus=-1", "--plot=/nowhere/plan.png", "--plot=plan"]
)  # fmt: skip
def test_what_makes_no_sense_is_refused_at_once(option, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(CONFIGS / "sam_tiny.yaml"), option])
    assert ended.value.code == 2
    assert f"argument {option.partition('=')[0]}: " in capsys.readouterr().err


def test_without_the_roofline_a_speed_must_be_stated(capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(CONFIGS / "sam_tiny.yaml"), "--no-memory"])
    assert ended.value.code == 2
    assert "give --mfu or --step-seconds" in capsys.readouterr().err


def test_images_are_those_of_the_data_and_an_unknown_number_is_asked_for(scenes, capsys):
    published = config_of("sam_vith")
    assert timing.images_of(published, None) == (11_183_362, "as published")
    packed = config_of("sam_finetune", f"data.shards={scenes['train']}", "data.holdout_images=1")
    assert timing.images_of(packed, None)[0] == load_manifest(scenes["train"]).num_samples - 1
    assert timing.images_of(packed, 77) == (77, "as given")
    command = [str(CONFIGS / "sam_finetune.yaml"), "--no-memory", "--mfu", "0.4"]
    assert main(command) == 2
    assert "data.shards=data/mine" in capsys.readouterr().err


def test_traffic_of_a_ring_by_hand():
    # 4 values on 2 GPUs of one node: each sends half of them to reduce and half to gather.
    flow = timing.traffic("ddp", 16.0, 2, 8, 1, A100)
    assert (flow.in_node, flow.between_nodes) == (16.0, 0.0)
    # HSDP on 2 x 2: gather, gather, reduce inside (8 each), then all-reduce a half between two nodes.
    flow = timing.traffic("hsdp", 16.0, 4, 2, 1, A100)
    assert (flow.in_node, flow.between_nodes) == (24.0, 8.0)
    # With a second micro-batch: two gathers more, and no other reduction.
    flow = timing.traffic("hsdp", 16.0, 4, 2, 2, A100)
    assert (flow.in_node, flow.between_nodes) == (40.0, 8.0)


def test_gpus_are_found_by_the_names_that_drivers_give():
    assert gpu_named("NVIDIA A100-SXM4-40GB") is GPUS["a100-40gb"]
    assert gpu_named("NVIDIA H200") is GPUS["h200-141gb"]
    assert gpu_named("NVIDIA GeForce RTX 3090") is None


# ----------------------------------------------------------------------------------------------------------- memory


def test_a_checkpoint_holds_moments_and_an_average_of_what_is_trained():
    whole = memory.shape_of(config_of("sam_tiny")).num_parameters
    assert memory.checkpoint_bytes(config_of("sam_tiny")) == 12 * whole
    assert memory.checkpoint_bytes(config_of("sam_tiny", "optim.ema_decay=0.999")) == 16 * whole
    head = config_of("sam_tiny", HEAD_ONLY, "optim.ema_decay=0.999")
    trained = memory.shape_of(head).trained
    assert 0 < trained < whole
    assert memory.checkpoint_bytes(head) == 4 * whole + 12 * trained


def test_watch_counts_what_is_alive_and_the_peak():
    with Watch() as watch:
        kept = torch.zeros(100)
        gone = torch.zeros(50)
        view = kept[:10]
        assert (watch.alive, watch.peak) == (600, 600)
        del gone
        gc.collect()
        assert (watch.alive, watch.peak) == (400, 600)
        assert view.numel() == 10


def test_activations_are_linear_so_three_points_say_all():
    """A fourth, larger simulation is met by the line through three small ones."""
    config = config_of("sam_tiny", "prompts.rounds=2", "engine.precision=bf16")
    line = memory.activations(config)
    far = simulate(config, 3, 8)
    encoder, rounds, _ = line.at(3, 8)
    assert encoder == pytest.approx(far.encoder.saved_bytes, rel=0.01)
    assert rounds == pytest.approx(2 * far.decoder.saved_bytes, rel=0.01)


def test_recomputing_saves_memory_and_costs_flops():
    config = config_of("sam_tiny", "prompts.rounds=2")
    whole, again = (
        simulate(memory.with_recompute(config, blocks, rounds), 1, 4)
        for blocks, rounds in (("none", False), ("block", True))
    )
    for part in ("encoder", "decoder"):
        assert getattr(again, part).saved_bytes < 0.5 * getattr(whole, part).saved_bytes
        # One more forward pass, less what nothing in the backward pass needs.
        more = getattr(again, part).backward_flops - getattr(whole, part).backward_flops
        assert 0.5 * getattr(whole, part).flops < more <= getattr(whole, part).flops


def test_selective_recomputation_lies_between_all_and_nothing():
    kept = []
    for blocks in ("block", "selective", "none"):
        config = config_of("sam_tiny", f"engine.activation_checkpointing={blocks}", "engine.precision=bf16")
        kept.append(memory.activations(config).at(1, 2)[0])
    assert kept[0] < 0.9 * kept[1] < 0.8 * kept[2]


def test_a_frozen_encoder_keeps_nothing_and_read_embeddings_cost_no_arithmetic():
    work = {}
    for name, more in (("all", []), ("frozen", [HEAD_ONLY]), ("read", [HEAD_ONLY, "data.embeddings=e", *UNCHANGED])):
        config = config_of("sam_tiny", *more)
        work[name] = count_work(config)
        encoder = simulate(config, 1, 2).encoder
        assert (encoder.saved_bytes > 1e5) == (encoder.backward_flops > 0) == (name == "all")
        assert (encoder.flops > 0) == (name != "read")
        head = memory.states("ddp", memory.shape_of(config), 1, 1)
        assert (head.gradients < 0.8 * head.parameters) == (name != "all")
        assert head.moments == 2 * head.gradients
    assert work["all"].training - work["frozen"].training == pytest.approx(2 * work["all"].encoder)
    assert work["frozen"].training - work["read"].training == pytest.approx(work["all"].encoder)


def test_averaged_weights_are_counted_as_the_parameters_lie():
    shape = memory.Shape(1000, 100, 90, 600)
    for sharding, wanted in (("ddp", 2400), ("fsdp2", 150), ("hsdp", 300), ("zero2", 2400)):
        plain, averaged = (memory.states(sharding, shape, 16, 8, averaged=flag) for flag in (False, True))
        assert averaged.total - plain.total == wanted
    assert "zero3" not in memory.shardings_of(config_of("sam_tiny", "optim.ema_decay=0.999"), 16, 8)


def test_hsdp_shards_over_its_groups_and_is_left_out_where_they_do_not_divide(capsys):
    config = config_of("sam_tiny", "engine.kind=hsdp", "engine.shard_group_size=4")
    assert memory.shard_group(config, 16, 8) == 4
    assert memory.shard_group(config_of("sam_tiny", "engine.kind=hsdp"), 4, 8) == 4
    assert "hsdp" in memory.shardings_of(config, 12, 8)
    assert "hsdp" not in memory.shardings_of(config_of("sam_tiny"), 12, 8)
    command = [str(CONFIGS / "sam_tiny.yaml"), "--gpus", "12", "--no-memory", "--mfu", "0.4", "engine.kind=hsdp"]
    assert main(command) == 2
    assert "groups of 8 do not divide 12 ranks" in capsys.readouterr().err


def test_what_no_estimate_knows_is_named():
    more = ["engine.kind=deepspeed", "engine.offload_optimizer=true", "engine.reduce_dtype=bf16"]
    offload, reduced = memory.not_counted(config_of("sam_tiny", *more))
    assert offload.startswith("engine.offload_optimizer (")
    assert reduced.startswith("engine.reduce_dtype=bf16 (")
    assert memory.not_counted(config_of("sam_tiny")) == []


def test_more_shards_never_need_more_memory_and_one_rank_needs_all():
    shape = memory.Shape(1000, 100, 90)
    for sharding in memory.SHARDINGS:
        totals = [memory.states(sharding, shape, ranks, 8).states for ranks in (1, 8, 256)]
        assert totals == sorted(totals, reverse=True)
    assert memory.states("ddp", shape, 256, 8).states == 16_000
    assert memory.states("fsdp2", shape, 250, 8).states == 64


@pytest.mark.parametrize("sharding, ranks, shard", [("fsdp2", 250, 16), ("hsdp", 16, 500), ("fsdp2", 1, 4000)])
def test_shards_that_accumulate_hold_the_whole_gradient_beside_theirs(sharding, ranks, shard):
    shape = memory.Shape(1000, 100, 90)
    assert memory.states(sharding, shape, ranks, 8, num_micro=1).gradients == shard
    assert memory.states(sharding, shape, ranks, 8, num_micro=2).gradients == shard + (4000 if ranks > 1 else 0)


def test_the_plan_of_a_node_knows_that_it_accumulates():
    config = config_of("sam_tiny", "engine.kind=fsdp2", "batch.global_size=16", "batch.micro=1")
    whole = memory.shape_of(config).num_parameters * 4
    assert memory.estimate(config, 16, 8).gradients == pytest.approx(whole / 16)
    assert memory.estimate(config, 8, 8).gradients == pytest.approx(whole / 8 + whole)


@pytest.mark.slow
def test_what_fits_is_the_edge():
    config = config_of("sam_tiny")
    capacity = 2 * 2**30
    for fit in memory.fits_of(config, 16, 8, capacity):
        if fit.max_images in (0, 4096):
            continue
        variant = memory.with_recompute(config, fit.blocks, fit.rounds)
        edge, beyond = (
            memory.estimate(variant, 16, 8, fit.sharding, images=n).total for n in (fit.max_images, fit.max_images + 1)
        )
        assert edge <= capacity < beyond


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_states_of_zero_are_what_real_processes_hold(tmp_path, ranks):
    """Every ZeRO stage on real CPU processes: bytes of all tensors alive after a step, against the closed form."""
    launch_ranks("tests.trainer.zero_states", [str(tmp_path)], num_ranks=ranks, timeout_s=500)
    measured = torch.load(tmp_path / "states.pt")
    assert set(measured) == {1, 2, 3}
    for stage, (shape, alive, _) in measured.items():
        wanted = memory.states(f"zero{stage}", memory.Shape(*shape), ranks, ranks)
        # 2 %: padding of flat groups to whole shards, step counts, scalars.
        assert alive == pytest.approx(wanted.states, rel=0.02), stage


@pytest.mark.slow
def test_states_of_the_torch_engines_are_what_the_real_engine_builds():
    """FSDP2 at 256 ranks of a fake group, on fake tensors: weights, moments and gathered blocks."""
    config = config_of("sam_tiny", "engine.kind=fsdp2", "engine.precision=fp32", "batch.micro=1")
    shape = memory.shape_of(config)
    seen = dry_run.fake_step(config, 0, 256, 8)
    # FSDP2 gives rank 0 the rounded-up share of each tensor's first dimension, so small tensors weigh more.
    assert shape.num_parameters * 4 / 256 <= seen["weights"] <= shape.num_parameters * 4 / 8


@pytest.mark.slow
@pytest.mark.parametrize("kind, shards", [("fsdp2", 16), ("hsdp", 8)])
def test_the_last_micro_batch_turns_whole_gradients_into_shards(kind, shards):
    """What the plan says of accumulation, on the real engine."""
    config = config_of("sam_tiny", f"engine.kind={kind}", "engine.precision=fp32", "batch.micro=1")
    whole = memory.shape_of(config).num_parameters * 4
    seen = dry_run.fake_step(config, 0, 16, 8, num_micro=2)
    assert seen["reduced"] / whole == pytest.approx(1 - 1 / shards, abs=0.02)


# ---------------------------------------------------------------------------------------------------------- dry run


def test_all_256_ranks_have_each_position_once_also_after_a_change_to_192():
    config = config_of("sam_vith")
    assert dry_run.check_positions(config, (256, 192)) == []
    assert dry_run.fillers(config, 256) == 0
    assert dry_run.fillers(config, 192) == 192 * 2 - 256  # two micro-batches a rank, a third of them empty


def test_the_check_sees_a_missing_and_a_doubled_sample(monkeypatch):
    config = config_of("sam_vith")
    whole = dry_run.StepSampler.__iter__

    def spoiled(sampler):
        for positions in whole(sampler):
            yield [7 if sampler.rank == 3 else position for position in positions]

    monkeypatch.setattr(dry_run.StepSampler, "__iter__", spoiled)
    assert dry_run.check_positions(config, (256,)) == ["256 ranks: steps 1000 to 1002 are not each position once"]


def test_a_rank_of_256_builds_its_engine_and_steps():
    """DDP in this process, which is quick; FSDP2 and the command below."""
    config = config_of("sam_tiny", "engine.precision=fp32", "batch.micro=1")
    assert dry_run.fake_step(config, 255, 256, 8)["weights"] >= memory.shape_of(config).num_parameters * 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_first_and_last_of_256_ranks_build_and_step(kind):
    arguments = ["--gpus", "256", "--no-memory", "--mfu", "0.4", "--dry-run", f"engine.kind={kind}", "batch.micro=1"]
    command = [sys.executable, "-m", "trainer.plan", str(CONFIGS / "sam_tiny.yaml"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parents[1])
    assert done.returncode == 0, done.stderr
    assert "rank 0: engine built, one step taken" in done.stdout
    assert "rank 255: engine built, one step taken" in done.stdout
    assert "samples of 192 ranks: " in done.stdout


def test_plot_is_a_picture(tmp_path):
    picture = tmp_path / "plan.png"
    assert main([str(CONFIGS / "sam_tiny.yaml"), "--no-memory", "--mfu", "0.4", "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
