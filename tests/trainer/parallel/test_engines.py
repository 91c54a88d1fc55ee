"""Every engine on several ranks does what one plain process does."""

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.launch_ranks import ON_GPU, launch_ranks, run_launcher
from tests.trainer.parallel.drive import Record, different_keys, make_engine, run_steps, whole_state
from tests.trainer.parallel.ranks import CASES, ENGINES, STEPS, phase_change, train
from tests.trainer.parallel.toy import ToyTask, toy_config, toy_groups
from trainer.checkpoint import Checkpointer, RunState
from trainer.distributed import single_process
from trainer.parallel.engine import ParamGroup, build_engine
from trainer.parallel.initial import check_filled, fill_with_nan
from trainer.parallel.precision import LossScale

WORLD = single_process("cpu")
pytestmark = pytest.mark.dist

# fp32 sums in another order differ by some 1e-7 a step; Adam divides by the gradient, and a few steps make 1e-6 of it.
FP32 = {"rtol": 1e-5, "atol": 1e-6}
# One bf16 rounding is 2^-9 = 2e-3 of a value, fp16's 2^-12; a step of Adam moves each weight by lr = 1e-2 whatever the
# gradient's size, so a small gradient's sign may decide over 2e-2 of a weight. Losses average over that.
LOW_LOSS = 5e-3


CORE = ["ddp", "fsdp2", "zero2", "zero3"]
OTHERS = [name for name in ENGINES if name not in (*CORE, "hsdp pairs")]
EVERY = [*CORE, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
Results = list[dict[str, Any]]  # what each rank found


def prepare(folder: Path) -> Path:
    """A checkpoint of one process after two steps: the ranks' relay starts from it."""
    engine = make_engine(WORLD, "ddp")
    run_steps(engine, WORLD, range(2), accumulation=2)
    path = Checkpointer(folder / "relay", 20, WORLD).save(engine, RunState(2, 16, 0))
    torch.save(whole_state(engine), path.with_suffix(".pt"))
    return folder


def read_results(folder: Path, num_ranks: int) -> Results:
    return [torch.load(folder / f"rank{rank}_of_{num_ranks}.pt", weights_only=False) for rank in range(num_ranks)]


@pytest.fixture(scope="module")
def results_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Results]:
    """Engine name -> what two ranks found, all scenarios. One start for the engines on offer, one for the others."""

    @functools.cache
    def start(names: str) -> Results:
        folder = prepare(tmp_path_factory.mktemp("engines"))
        launch_ranks("tests.trainer.parallel.ranks", [str(folder), names], num_ranks=2)
        return [found | {"folder": folder} for found in read_results(folder, 2)]

    return lambda name: start(",".join(CORE if name in CORE else OTHERS))


@pytest.fixture(scope="module")
def alone() -> dict[str, Record]:
    """The same training on one plain process; accumulation changes nothing there but rounding."""
    return {case: train(WORLD, "ddp", case, 1) for case in CASES}


def disagreements(found: Record, wanted: Record, rtol: float, atol: float) -> list[str]:
    """What differs by more than the tolerance: losses and norms of all steps, weights after the last."""
    wrong = []
    for name in ("losses", "norms"):
        one, other = torch.tensor(getattr(found, name)), torch.tensor(getattr(wanted, name))
        if not torch.allclose(one, other, rtol=rtol, atol=atol):
            wrong.append(f"{name}: {one.tolist()} against {other.tolist()}")
    assert found.weights.keys() == wanted.weights.keys()
    for name, weight in found.weights.items():
        if not torch.allclose(weight, wanted.weights[name], rtol=rtol, atol=atol):
            wrong.append(f"{name} by {float((weight - wanted.weights[name]).abs().max()):.2e}")
    return wrong


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("case", ["fp32", "fp32 clipped"])
@pytest.mark.parametrize("name", EVERY)
def test_engine_agrees_with_one_process(
    results_of: Callable[[str], Results], alone: dict[str, Record], name: str, case: str, accumulation: int
) -> None:
    record = results_of(name)[0][f"train {name} {case} {accumulation}"]
    assert not disagreements(record, alone[case], **FP32)
    assert record.skipped == 0


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("case", ["bf16 clipped", "fp16 clipped"])
def test_low_precision_with_clipping_stays_near_fp32(
    results_of: Callable[[str], Results], alone: dict[str, Record], name: str, case: str
) -> None:
    for accumulation in (1, 2):
        record = results_of(name)[0][f"train {name} {case} {accumulation}"]
        torch.testing.assert_close(record.losses, alone["fp32 clipped"].losses, rtol=LOW_LOSS, atol=0.0)
        torch.testing.assert_close(record.norms, alone["fp32 clipped"].norms, rtol=LOW_LOSS, atol=0.0)
        assert record.skipped == 0
        assert record.scale == (1024.0 if "fp16" in case else 1.0)


@pytest.mark.parametrize("name", EVERY[1:])
@pytest.mark.parametrize("case", ["bf16 clipped", "fp16 clipped"])
def test_low_precision_is_the_same_under_every_engine(
    results_of: Callable[[str], Results], name: str, case: str
) -> None:
    """Same ranks, same autocast, same fp32 reduction: rounding is then the same too."""
    record = results_of(name)[0][f"train {name} {case} 2"]
    # DeepSpeed's AdamW for the CPU orders its own arithmetic otherwise, and a weight that is one bit off can round to
    # another bf16.
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if "offload" in name else {"rtol": 1e-4, "atol": 1e-5}
    assert not disagreements(record, results_of("ddp")[0][f"train ddp {case} 2"], **tolerance)


@pytest.mark.parametrize("name", EVERY)
def test_gradients_may_travel_in_bf16(
    results_of: Callable[[str], Results], alone: dict[str, Record], name: str
) -> None:
    record = results_of(name)[0][f"low reduce {name}"]
    torch.testing.assert_close(record.losses, alone["fp32 clipped"].losses, rtol=LOW_LOSS, atol=0.0)
    # It must also do something: sums of rounded gradients have another norm.
    assert record.norms != results_of(name)[0][f"train {name} bf16 clipped 2"].norms


@pytest.mark.parametrize("name", EVERY)
def test_only_rank_0_needs_to_build_the_network(
    results_of: Callable[[str], Results], alone: dict[str, Record], name: str
) -> None:
    found = results_of(name)[0][f"meta {name}"]
    assert not different_keys(found["first"], ToyTask().state_dict())
    assert not disagreements(found["record"], alone["fp32"], **FP32)


@pytest.mark.parametrize("name", ["zero2", "zero3", pytest.param("zero1", marks=pytest.mark.slow)])
def test_deepspeeds_own_fp16(results_of: Callable[[str], Results], alone: dict[str, Record], name: str) -> None:
    for number, rank_results in enumerate(results_of(name)):
        found = rank_results[f"own fp16 {name}"]
        assert found["half"] == sorted(parameter for parameter, _ in ToyTask().named_parameters())
        assert found["dtypes"] == {torch.float32}
        assert torch.equal(found["fourier"], ToyTask().fourier)
        assert torch.equal(found["frozen"], ToyTask().encoder[0].up.weight)
        assert found["not_loaded"] == []
        if number == 0:
            # Weights themselves are rounded now: twice the roundings of autocast.
            torch.testing.assert_close(
                found["record"].losses, alone["fp32 clipped"].losses, rtol=2 * LOW_LOSS, atol=0.0
            )
            assert found["record"].skipped == 0


def test_a_forgotten_initialisation_is_named() -> None:
    task = ToyTask()
    fill_with_nan(task)
    for name, parameter in task.named_parameters():
        if name != "decoder.head.bias":
            torch.nn.init.ones_(parameter)
    task.fourier.zero_()
    with pytest.raises(ValueError, match=r"never initialised: decoder\.head\.bias, scratch"):
        check_filled(task)


def test_offloading_says_what_it_does_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from trainer.parallel import deepspeed_engine

    task = ToyTask()
    parameters = dict(task.named_parameters())
    monkeypatch.setattr(deepspeed_engine.shutil, "which", lambda tool: None)
    with caplog.at_level("WARNING"):
        optimizer = deepspeed_engine._adamw(parameters, toy_groups(task), toy_config().optim, offload=True)
    assert type(optimizer) is torch.optim.AdamW
    assert "there is no c++; torch's AdamW steps on the CPU instead" in caplog.text


def test_offloading_outlives_a_machine_that_does_not_know_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed asks a command for it; without the command the answer has no such entry."""
    from trainer.parallel import deepspeed_engine

    def load(builder: object, verbose: bool) -> None:
        raise KeyError("arch")

    monkeypatch.setattr(deepspeed_engine.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(deepspeed_engine.CPUAdamBuilder, "load", load)
    assert "did not compile (KeyError: 'arch')" in str(deepspeed_engine.why_no_cpu_adam())


@pytest.mark.slow
def test_four_ranks(tmp_path: Path, alone: dict[str, Record]) -> None:
    """Two groups of two shards (HSDP), and every ZeRO stage, on twice as many ranks."""
    names = ["hsdp pairs", "fsdp2", "zero0", "zero1", "zero2", "zero3"]
    launch_ranks("tests.trainer.parallel.ranks", [str(prepare(tmp_path)), ",".join(names)], num_ranks=4)
    for found in read_results(tmp_path, 4):
        assert found["relay"]["not_loaded"] == {name: [] for name in [*names, "ddp"]}
        for name in names:
            assert found[f"phases {name}"]["not_loaded"] == []
            assert found[f"overflow {name} fp16"]["changed"] == []
            assert found[f"overflow {name} fp16"]["scale"] == 512.0
    for name in names:
        for case in ("fp32", "fp32 clipped"):
            record = read_results(tmp_path, 4)[0][f"train {name} {case} 2"]
            assert not disagreements(record, alone[case], **FP32)


def test_a_shard_group_must_divide_the_ranks() -> None:
    with pytest.raises(ValueError, match="shard_group_size=2 does not divide 1 ranks"):
        make_engine(WORLD, "hsdp", shard_group_size=2)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_process_agrees_with_itself_under_accumulation(alone: dict[str, Record], accumulation: int) -> None:
    for case in ("fp32", "fp32 clipped"):
        assert not disagreements(train(WORLD, "ddp", case, accumulation), alone[case], **FP32)


def test_a_wrong_scale_is_noticed(alone: dict[str, Record]) -> None:
    """Adam hides a constant factor in the weights, so the comparison must see it in the norms."""
    engine = make_engine(WORLD, "ddp")
    wrong = run_steps(engine, WORLD, STEPS, accumulation=2, wrong_factor=0.5)
    assert any(line.startswith("norms") for line in disagreements(wrong, alone["fp32"], **FP32))


@pytest.mark.parametrize("precision, scale_after", [("fp16", 512.0), ("fp32", 1.0)])
@pytest.mark.parametrize("name", EVERY)
def test_all_ranks_skip_a_step_with_infinite_gradients(
    results_of: Callable[[str], Results], name: str, precision: str, scale_after: float
) -> None:
    for rank_results in results_of(name):
        found = rank_results[f"overflow {name} {precision}"]
        assert found["changed"] == []
        assert not math.isfinite(found["norm"])
        assert (found["scale"], found["skipped"], found["skipped_later"]) == (scale_after, 1, 1)
        assert found["step"] == 2.0  # of three


@pytest.mark.parametrize("name", EVERY)
def test_phase_change(results_of: Callable[[str], Results], name: str, tmp_path: Path) -> None:
    found, wanted = results_of(name)[0][f"phases {name}"], phase_change(WORLD, "ddp", tmp_path)
    assert found["not_loaded"] == wanted["not_loaded"] == []
    assert found["fresh"].keys() == wanted["fresh"].keys()
    assert set(found["fresh"].values()) == {0.0}
    assert all("encoder" in key for key in found["fresh"])
    assert found["steps"] == wanted["steps"]
    assert found["steps"]["optim.step.encoder.0.up.weight"] == 3.0
    assert found["steps"]["optim.step.decoder.head.weight"] == 6.0
    both = [Record(part["losses"], part["norms"], part["weights"]) for part in (found, wanted)]
    assert not disagreements(*both, **FP32)


def test_ddp_reduces_at_the_last_micro_batch_only(results_of: Callable[[str], Results]) -> None:
    for rank_results in results_of("ddp"):
        assert rank_results["ddp local"] == {"before": False, "after last": True}


@pytest.mark.parametrize("names", [CORE, pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_a_checkpoint_goes_through_every_engine(results_of: Callable[[str], Results], names: list[str]) -> None:
    """One process, then two ranks under each engine in turn, then one process: exact at every hand-over."""
    results = results_of(names[0])
    for rank_results in results:
        assert rank_results["relay"]["not_loaded"] == {name: [] for name in [*names, "ddp"]}
    checkpointer = Checkpointer(results[0]["folder"] / "relay", 20, WORLD)
    newest = checkpointer.newest()
    num_steps = 2 + 2 * (len(names) + 1)
    assert newest.name == f"step_{num_steps:08d}"
    resumed = make_engine(WORLD, "ddp")
    assert checkpointer.load(newest, resumed) == RunState(num_steps, 8 * num_steps, 0)
    assert not different_keys(torch.load(newest.with_suffix(".pt")), whole_state(resumed))

    never_stopped = make_engine(WORLD, "ddp")
    record = run_steps(never_stopped, WORLD, range(num_steps), accumulation=2)
    # Twice as many steps as above, whose differences grow from step to step: ten times the tolerance.
    torch.testing.assert_close(results[0]["relay"]["losses"], record.losses[2:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0]["relay"]["norms"], record.norms[2:], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_three_ranks(tmp_path: Path) -> None:
    """Three divides neither the batch nor most parameters."""
    names = ["fsdp2", "zero2", "zero3"]
    launch_ranks("tests.trainer.parallel.ranks", [str(prepare(tmp_path)), ",".join(names), "relay"], num_ranks=3)
    for found in read_results(tmp_path, 3):
        assert found["relay"]["not_loaded"] == {name: [] for name in [*names, "ddp"]}


@pytest.mark.slow
def test_one_plain_process_under_every_engine(alone: dict[str, Record], tmp_path: Path) -> None:
    """No launcher, no process group but the engine's own group of one."""
    names = ["fsdp2", "zero2"]
    run_launcher([sys.executable, "-m", "tests.trainer.parallel.ranks", str(prepare(tmp_path)), ",".join(names)])
    (found,) = read_results(tmp_path, 1)
    for name in names:
        assert not disagreements(found[f"train {name} fp32 clipped 2"], alone["fp32 clipped"], **FP32)
        assert found[f"phases {name}"]["not_loaded"] == []
        assert found[f"overflow {name} fp16"]["skipped"] == 1
    assert found["relay"]["not_loaded"] == {name: [] for name in [*names, "ddp"]}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "names", [["ddp", "fsdp2", "hsdp"], ["zero0", "zero1"], ["zero2", "zero3"], ["zero2 offload"]], ids="-".join
)
def test_every_engine_on_a_gpu(tmp_path: Path, alone: dict[str, Record], names: list[str]) -> None:
    """One rank on a GPU with NCCL does what one process on the CPU does, and takes over the CPU's checkpoint."""
    launch_ranks("tests.trainer.parallel.ranks", [str(prepare(tmp_path)), ",".join(names)], 1, 400.0, ON_GPU)
    (found,) = read_results(tmp_path, 1)
    assert found["relay"]["not_loaded"] == {name: [] for name in [*names, "ddp"]}
    for name in names:
        for case in ("fp32", "fp32 clipped"):
            # Sums in another order than the CPU's, and the TF32 of no product: as between numbers of ranks.
            assert not disagreements(found[f"train {name} {case} 2"], alone[case], **FP32), (name, case)
        for case in ("bf16 clipped", "fp16 clipped"):
            record = found[f"train {name} {case} 2"]
            torch.testing.assert_close(record.losses, alone["fp32 clipped"].losses, rtol=LOW_LOSS, atol=0.0)
            assert record.skipped == 0
        assert found[f"phases {name}"]["not_loaded"] == []
        for precision, scale_after in (("fp16", 512.0), ("fp32", 1.0)):
            skipping = found[f"overflow {name} {precision}"]
            assert skipping["changed"] == []
            assert (skipping["scale"], skipping["skipped"], skipping["step"]) == (scale_after, 1, 2.0)
    for name in {"zero1", "zero2", "zero3"}.intersection(names):
        record = found[f"own fp16 {name}"]["record"]
        torch.testing.assert_close(record.losses, alone["fp32 clipped"].losses, rtol=2 * LOW_LOSS, atol=0.0)


def test_host_agreements(results_of: Callable[[str], Results]) -> None:
    for rank, rank_results in enumerate(results_of("ddp")):
        host = rank_results["host"]
        assert host["world"] == (rank, 2, rank, 2, 1, 0)
        assert host["sum"] == [3.0, 2.0**53]
        assert host["max"] == [1.0, -1.0]
        assert host["broadcast"] == {"from": 0}
        assert host["gather"] == ([0, 1] if rank == 0 else [])


def test_groups_must_be_the_trained_parameters() -> None:
    task = ToyTask(frozen=True)
    groups = toy_groups(task)
    with pytest.raises(ValueError, match=r"trained but in no group: .*decoder\.norm\.weight"):
        build_engine(task, toy_config(), groups[1:], WORLD)
    with pytest.raises(ValueError, match="in two groups"):
        build_engine(task, toy_config(), [*groups, groups[0]], WORLD)
    with pytest.raises(ValueError, match=r"no trained parameters of the task: encoder\.0\.up\.weight"):
        build_engine(task, toy_config(), [*groups, ParamGroup(("encoder.0.up.weight",), 1.0, 0.0)], WORLD)
    with pytest.raises(ValueError, match=r"not float32.*decoder\.head\.bias"):
        build_engine(task.half(), toy_config(), groups, WORLD)


def test_learning_rates_follow_the_groups() -> None:
    engine = make_engine(WORLD, "ddp")
    assert sorted(set(engine.lrs())) == [0.005, 0.01]
    engine.set_lr(0.1)
    assert sorted(set(engine.lrs())) == [0.05, 0.1]


def test_a_parameter_without_gradient_is_named() -> None:
    engine = make_engine(WORLD, "ddp")
    engine.task.counts_nothing.requires_grad_(False)
    engine.backward(engine({"x": torch.zeros(1, 10), "y": torch.zeros(1, 3)})[0], last=True)
    with pytest.raises(ValueError, match=r"no gradient.*counts_nothing"):
        engine.step()


def test_deepspeed_needs_one_step_count_a_group() -> None:
    from trainer.parallel.deepspeed_engine import _common_step

    group = ParamGroup(("a", "b", "c"), 1.0, 0.0)
    with pytest.raises(ValueError, match="holds c after 0 steps and a after 3"):
        _common_step(group, {"optim.step.a": torch.tensor(3.0), "optim.step.b": torch.tensor(3.0)})
    assert _common_step(ParamGroup(("a",), 1.0, 0.0), {"optim.step.a": torch.tensor(3.0)}) == 3.0


def test_units_are_compiled_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    make_engine(WORLD, "ddp", compile=True)
    assert compiled == ["Block", "Block"]


def test_loss_scale_moves_as_gradscaler_does() -> None:
    scale = LossScale("fp16", 1024.0, growth_steps=2, device=torch.device("cpu"))
    seen = []
    for skipped in (False, True, False, False, False):
        scale.update(torch.tensor(skipped))
        seen.append((float(scale.scale), float(scale.growth_tracker)))
    assert seen == [(1024.0, 1.0), (512.0, 0.0), (512.0, 1.0), (1024.0, 0.0), (1024.0, 1.0)]
    assert int(scale.num_skipped) == 1
    constant = LossScale("bf16", 1024.0, growth_steps=1, device=torch.device("cpu"))
    constant.update(torch.tensor(True))
    assert float(constant.scale) == 1.0
    assert constant.state_dict() == {}
