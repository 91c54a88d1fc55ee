"""A frozen encoder's embeddings, computed once: the same training, and nothing is mixed up."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer.tiny import losses, sam_arguments
from trainer import embed, train
from trainer.config import ConfigError, load_config
from trainer.data.embeddings import EmbeddingStore
from trainer.stages import build_pipeline, build_task

FROZEN = [
    "phases=[{name: head, steps: 4, frozen: [image_encoder]}]",
    "data.horizontal_flip=0",
    "data.color_jitter=0",
]


def test_training_on_embeddings_is_training_on_images(scenes, tmp_path):
    assert train.main(sam_arguments(scenes, tmp_path / "images", *FROZEN)) == 0
    cached = [*FROZEN, f"data.embeddings={tmp_path / 'store'}"]
    arguments = sam_arguments(scenes, tmp_path / "cached", *cached)
    assert embed.main(arguments) == 0
    assert train.main(arguments) == 0
    wanted, found = losses(tmp_path / "images"), losses(tmp_path / "cached")
    # Embeddings are rounded to float16, 5e-4 of each value at random: of the loss little is left, 2e-5 seen.
    assert found == pytest.approx(wanted, rel=1e-4)
    store = np.lib.format.open_memmap(tmp_path / "store" / "embeddings.npy", mode="r+")
    store[:] = store[::-1].copy()
    config = load_config(Path(arguments[0]), arguments[1:])
    task = build_task(config, ("image_encoder",), initial_weights=True).train()
    loss, _ = task(build_pipeline(config).dataset[[0, 1, 2]].counted(3, 9))
    assert loss.item() != pytest.approx(wanted[1], rel=1e-4), "the test can fail: another image's embedding"

    assert embed.main(arguments) == 0
    assert "0 images" not in json.dumps(losses(tmp_path / "cached"))
    (tmp_path / "store" / "embeddings.json").unlink()
    assert train.main([*arguments, f"run_dir={tmp_path / 'again'}"]) == 2, "not finished"


def test_another_encoder_other_data_another_size_are_refused(scenes, tmp_path, capsys):
    cached = [*FROZEN, f"data.embeddings={tmp_path / 'store'}"]
    arguments = sam_arguments(scenes, tmp_path / "run", *cached)
    assert embed.main(arguments) == 0
    assert train.main([*arguments, "seed=1"]) == 2
    assert "comes from another image encoder" in capsys.readouterr().err
    store = EmbeddingStore(tmp_path / "store")
    with pytest.raises(ValueError, match="made with data"):
        store.check("something else", 64)
    with pytest.raises(ValueError, match="made with image_size 64"):
        store.check(store.made_of["data"], 128)


def test_a_run_does_not_go_on_with_another_encoders_embeddings(scenes, tmp_path, capsys):
    mine, other = (f"data.embeddings={tmp_path / name}" for name in ("mine", "other"))
    arguments = sam_arguments(scenes, tmp_path / "run", *FROZEN, "checkpoint.every_steps=2")
    assert embed.main([*arguments, mine]) == 0
    assert embed.main([*arguments, other, "seed=1"]) == 0
    assert train.main([*arguments, mine]) == 0
    newest = max((tmp_path / "run" / "checkpoints").glob("step_*"))
    shutil.rmtree(newest)  # two of four steps are left
    assert train.main([*arguments, other]) == 2
    assert f"{tmp_path / 'other'} comes from another image encoder" in capsys.readouterr().err
    assert train.main([*arguments, mine]) == 0
    assert newest.is_dir()


def test_what_is_there_is_not_overwritten(scenes, tmp_path, capsys):
    store = tmp_path / "store"
    arguments = sam_arguments(scenes, tmp_path / "run", *FROZEN, f"data.embeddings={store}")
    assert embed.main(arguments) == 0
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    assert embed.main([*arguments, "seed=1"]) == 2
    assert f"{store} holds embeddings of another encoder; name another directory" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before
    (store / "begun.json").write_text("{")
    assert embed.main(arguments) == 2
    assert f"{store / 'begun.json'} is damaged" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert embed.main([*arguments, f"data.embeddings={tmp_path / 'file'}"]) == 2
    assert "is a file; name a directory" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_refused(scenes, tmp_path, capsys, monkeypatch):
    arguments = sam_arguments(scenes, tmp_path / "run", *FROZEN, f"data.embeddings={tmp_path / 'store'}")
    need = 24 * 128 * 4 * 4 * 2  # images x channels x side x side x bytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need - 1))
    assert embed.main(arguments) == 2
    assert "24 images take" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need))
    assert embed.main(arguments) == 0


def test_an_interrupted_computation_goes_on(scenes, tmp_path, monkeypatch):
    arguments = sam_arguments(scenes, tmp_path / "run", *FROZEN, f"data.embeddings={tmp_path / 'store'}")
    encode, calls = embed.autocast, []

    def fail_at_the_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(embed, "autocast", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        embed.main(arguments)
    assert not (tmp_path / "store" / "embeddings.json").exists()
    config = load_config(Path(arguments[0]), arguments[1:])
    assert embed.embed(config, tmp_path / "store") == 24 - 2 * embed.BATCH
    assert EmbeddingStore(tmp_path / "store").done.sum() == 24
    assert embed.embed(config, tmp_path / "store") == 0


def test_rows_that_were_held_out_are_asked_for_before_training(scenes, tmp_path, capsys):
    cached = [*FROZEN, f"data.embeddings={tmp_path / 'store'}"]
    some = sam_arguments(scenes, tmp_path / "run", *cached, "data.holdout_images=10")
    assert embed.main(some) == 0
    every = sam_arguments(scenes, tmp_path / "run", *cached)
    assert train.main(every) == 2
    assert "training images, held out when it was made" in capsys.readouterr().err
    assert embed.main(every) == 0
    assert train.main(every) == 0
    assert embed.main([*every, "data.holdout_images=1000"]) == 2
    assert "leaves no image to train on" in capsys.readouterr().err


def test_the_config_says_what_embeddings_cannot_do(scenes, tmp_path):
    for wrong, match in (
        (["data.horizontal_flip=0.5"], "unchanged images"),
        (["phases=[{name: all, steps: 4}]"], "frozen in every phase"),
    ):
        path, *overrides = sam_arguments(scenes, tmp_path, *FROZEN, f"data.embeddings={tmp_path}", *wrong)
        with pytest.raises(ConfigError, match=match):
            load_config(Path(path), overrides)


def test_a_batch_without_embeddings_has_none(scenes, tmp_path):
    path, *overrides = sam_arguments(scenes, tmp_path)
    batch = build_pipeline(load_config(Path(path), overrides)).dataset[[0]]
    assert batch.image_embeddings.shape == torch.Size([1, 0, 0, 0])
