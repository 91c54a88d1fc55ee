"""What only a GPU shows of training: no wait for the device, the CPU's numbers, memory as planned, compiled blocks.

The engines on a GPU are in parallel/test_engines.py, attention in tests/model/test_attention.py. Every other test that
trains also runs on the GPU where there is one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.step import mae_batch, sam_batch
from tests.trainer.tiny import CONFIGS, losses, mae_arguments, sam_arguments
from trainer import loop, train
from trainer.config import Config, SamConfig, load_config
from trainer.data.batches import Batch
from trainer.distributed import World, single_process
from trainer.optim import first_trained, param_groups
from trainer.parallel.engine import Engine, build_engine
from trainer.plan import memory
from trainer.prompts import next_click
from trainer.stages import build_task, encoder_depth

pytestmark = pytest.mark.gpu

SMALL = {
    "sam_tiny": ["prompts.rounds=11", "prompts.rounds_without_click=2", "batch.micro=2", "data.max_masks=4"],
    "mae_tiny": ["batch.micro=4"],
}
# A later click depends on logits, and their last bit would move it.
ONE_ROUND = {"sam_tiny": ["prompts.rounds=1", "prompts.rounds_without_click=0"], "mae_tiny": []}


def tiny(name: str, *more: str) -> Config:
    short = ["phases=[{name: all, steps: 9}]", "schedule.warmup_steps=2"]
    return load_config(CONFIGS / f"{name}.yaml", [*SMALL[name], *short, *more], False)


def prepare(config: Config, world: World) -> tuple[Engine, Batch]:
    """The engine with the config's task on `world.device`, and a batch; the same numbers on every device."""
    torch.manual_seed(0)
    task = build_task(config, (), initial_weights=False)
    depth = encoder_depth(config) if isinstance(config, SamConfig) else 0
    groups = param_groups(task.named_parameters(), config.optim, depth, first_trained(config.phases))
    engine = build_engine(task.to(world.device), config, groups, world)
    torch.manual_seed(1)
    return engine, sam_batch(config, world) if isinstance(config, SamConfig) else mae_batch(config, world)


def step(engine: Engine, batch: Batch) -> Tensor:
    loss, _ = engine(batch)
    engine.backward(loss, last=True)
    engine.step()
    return loss.detach()


@contextmanager
def no_wait_for_the_device() -> Iterator[None]:
    """Whatever makes the host wait raises an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["sam_tiny", "mae_tiny"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_step_never_waits_for_the_device(name: str, kind: str) -> None:
    """Eleven rounds with clicks drawn from each answer, a skipped step's decision, the optimizer."""
    config = tiny(name, f"engine.kind={kind}", "engine.precision=fp16", "optim.grad_clip=1.0")
    engine, batch = prepare(config, single_process())
    engine.task.train()
    step(engine, batch)  # lazily made buffers may wait
    with no_wait_for_the_device():
        loss = step(engine, batch)
    with pytest.raises(RuntimeError, match="synchroniz"), no_wait_for_the_device():
        loss.item()
    assert torch.isfinite(loss)
    engine.close()


@pytest.mark.parametrize("name", ["sam_tiny", "mae_tiny"])
def test_the_first_losses_are_the_cpus(name: str) -> None:
    found = {}
    for device in ("cpu", "cuda:0"):
        engine, batch = prepare(tiny(name, "engine.precision=fp32", *ONE_ROUND[name]), single_process(device))
        engine.task.train(name == "mae_tiny")  # SAM's dropout draws from the device's own generator
        found[device] = [step(engine, batch).item() for _ in range(3)]
    # Convolutions of PyTorch round fp32 to TF32 on a GPU (2^-11) unless told otherwise; a loss averages over that.
    assert found["cuda:0"] == pytest.approx(found["cpu"], rel=1e-3)


def test_clicks_are_the_cpus() -> None:
    """Same logits, same uniforms: the same pixels, on 16 million candidates a batch."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 32, 256, 256, generator=generator)
    truth = (torch.rand(2, 32, 256, 256, generator=generator) < 0.3).to(torch.uint8)
    content = torch.ones(2, 1, 256, 256, dtype=torch.bool)
    content[..., 200:] = False
    uniforms = torch.rand(2, 32, generator=generator)
    wanted = next_click(logits, truth, content, uniforms)
    on_gpu = [tensor.cuda() for tensor in (logits, truth, content, uniforms)]
    with no_wait_for_the_device():
        found = next_click(*on_gpu)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["sam_tiny", "mae_tiny"])
def test_compiled_blocks_compute_the_same(name: str) -> None:
    found = {}
    for compiled in ("false", "true"):
        config = tiny(name, "engine.precision=bf16", f"engine.compile={compiled}", *ONE_ROUND[name])
        engine, batch = prepare(config, single_process())
        engine.task.train(name == "mae_tiny")  # without SAM's dropout
        found[compiled] = [step(engine, batch).item() for _ in range(3)]
    # bf16 rounds to 2^-9; a fused kernel rounds less often.
    assert found["true"] == pytest.approx(found["false"], rel=1e-2)


@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_memory_is_what_the_plan_says(kind: str, checkpointing: str) -> None:
    """ViT-B at its full size, 16 masks, 11 rounds: the largest allocation of a step within 10 % of the plan.

    Without the plan's allowance for what does not come from PyTorch's allocator.
    """
    more = [f"engine.kind={kind}", f"engine.activation_checkpointing={checkpointing}", "data.max_masks=16"]
    config = load_config(CONFIGS / "sam_vitb_paper.yaml", [*more, "batch.micro=1"], False)
    estimate = memory.estimate(config, 1, 1)
    planned = estimate.total - estimate.workspace
    engine, batch = prepare(config, single_process())
    engine.task.train()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step(engine, batch)
    measured = torch.cuda.max_memory_allocated()
    engine.close()
    assert planned == pytest.approx(measured, rel=0.1), f"planned {planned / 2**30:.2f}, was {measured / 2**30:.2f} GiB"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", ["sam", "mae"])
def test_the_command_stops_and_goes_on(
    scenes: dict[str, Path], tmp_path: Path, precision: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user runs it, in low precision: six steps at once, and stopped in the third; deterministic, so equal."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    arguments = sam_arguments if stage == "sam" else mae_arguments
    settings = [f"engine.precision={precision}", "engine.deterministic=true"]
    agree, calls = loop.agree, []

    def stop_in_the_third(micro_batches, guard, world):
        calls.append(1)
        guard.stop_requested = len(calls) == 3
        return agree(micro_batches, guard, world)

    try:
        assert train.main(arguments(scenes, tmp_path / "whole", *settings)) == 0
        monkeypatch.setattr(loop, "agree", stop_in_the_third)
        assert train.main(arguments(scenes, tmp_path / "cut", *settings)) == 75
        monkeypatch.setattr(loop, "agree", agree)
        assert train.main(arguments(scenes, tmp_path / "cut", *settings)) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    whole, cut = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert len(whole) == 6
    assert cut == whole
