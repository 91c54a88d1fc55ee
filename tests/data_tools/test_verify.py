import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_tools.pack import main as pack
from data_tools.sample_format import (
    index_name,
    load_manifest,
    load_quarantine,
    open_index,
)
from data_tools.verify import main as verify
from tests.data_tools.tiny import jpeg_bytes, sa1b_files, tar_bytes, tree_bytes, write_folder


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory):
    """Two sources, a folder and a compressed tar, of 5 and 3 positions: shards 0, 1, 2 and 100, 101."""
    folder = tmp_path_factory.mktemp("packed")
    write_folder(folder / "a", sa1b_files(range(5)))
    write_folder(folder, {"b.tar": tar_bytes(sa1b_files(range(10, 13)), "w:gz")})
    assert pack(["sa1b", str(folder / "a"), str(folder / "b.tar"), "--out", str(folder / "o"), "--shard-size=2"]) == 0
    return folder


@pytest.fixture
def packed(packed_once, tmp_path):
    shutil.copytree(packed_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "o", [str(tmp_path / "a"), str(tmp_path / "b.tar")]


def flip_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def test_sound(packed, capsys):
    out, _ = packed
    assert verify([str(out)]) == 0
    assert verify([str(out), "--deep", "--workers", "2"]) == 0
    assert "8 samples in 5 shards are sound" in capsys.readouterr().out


def change_column(out: Path) -> None:
    path = out / "index/width.npy"
    np.save(path, np.load(path) + 1)


FAST = {
    "missing tar": lambda out: (out / "shard-000001.tar").unlink(),
    "cut tar": lambda out: (out / "shard-000100.tar").write_bytes((out / "shard-000100.tar").read_bytes()[:-700]),
    "missing index": lambda out: (out / "shard-000001.index.npy").unlink(),
    "cut index": lambda out: (out / "shard-000101.index.npy").write_bytes(b"\x93NUMPY"),
    "index of another shard": lambda out: shutil.copy(out / "shard-000002.index.npy", out / "shard-000001.index.npy"),
    "missing column": lambda out: (out / "index/width.npy").unlink(),
    "empty column": lambda out: (out / "index/width.npy").write_bytes(b""),
    "changed column": change_column,
}


@pytest.mark.parametrize("damage", FAST)
def test_fast_finds_and_repair_restores(packed, capsys, damage):
    out, sources = packed
    before = tree_bytes(out)
    FAST[damage](out)
    assert verify([str(out)]) == 1
    assert f"python -m data_tools.verify {out} --repair SRC..." in capsys.readouterr().err
    assert verify([str(out), "--repair", *sources]) == 0
    assert tree_bytes(out) == before


def test_deep_finds_what_fast_does_not(packed, capsys):
    out, sources = packed
    before = tree_bytes(out)
    row = np.load(out / index_name("shard-000001.tar"))[1]
    flip_byte(out / "shard-000001.tar", int(row["jpg_offset"] + row["jpg_size"] // 2))
    flip_byte(out / "shard-000100.tar", 10)  # a tar header: no sample is hit
    assert verify([str(out), "--repair", *sources]) == 0  # sees sizes alone, and says so
    assert "8 samples in 5 shards are there in full (--deep reads them too)" in capsys.readouterr().out
    assert verify([str(out), "--deep"]) == 1
    err = capsys.readouterr().err
    assert f"python -m data_tools.verify {out} --deep --repair SRC..." in err
    assert "damaged: shard-000001.tar[1] sa_3: its bytes have changed" in err
    assert "damaged: shard-000100.tar: its SHA-256 is not the manifest's, though no sample is hit" in err
    assert verify([str(out), "--deep", "--repair", *sources]) == 0
    assert tree_bytes(out) == before


def test_repair_refuses_a_changed_source(packed, capsys):
    out, sources = packed
    (out / "shard-000000.tar").unlink()
    write_folder(Path(sources[0]), {"sa_0.jpg": jpeg_bytes(77)})
    assert verify([str(out), "--repair", *sources]) == 1
    assert "the source has changed" in capsys.readouterr().err
    assert not (out / "shard-000000.tar").exists()
    assert not list(out.glob(".shard*"))
    assert verify([str(out), "--repair", sources[1]]) == 1
    assert "its source a is not among those given" in capsys.readouterr().err


def test_quarantine_covers_samples_and_shards(packed, capsys):
    out, _ = packed
    row = np.load(out / index_name("shard-000001.tar"))[1]
    flip_byte(out / "shard-000001.tar", int(row["json_offset"] + 20))
    (out / "shard-000100.tar").unlink()
    columns = {name: column.tolist() for name, column in open_index(out).items()}
    assert verify([str(out), "--deep", "--quarantine"]) == 0
    assert [(entry.position, entry.key) for entry in load_quarantine(out)] == [
        (3, "sa_3"), (5, "shard-000100.tar"), (6, "shard-000100.tar")
    ]  # fmt: skip
    assert load_quarantine(out)[0].reason == "its bytes have changed (CRC-32)"
    assert {name: column.tolist() for name, column in open_index(out).items()} == columns
    capsys.readouterr()
    assert verify([str(out), "--deep"]) == 0, "damage that is quarantined is known"
    (out / "shard-000002.tar").unlink()
    assert verify([str(out)]) == 1


def test_gaps_are_sound(tmp_path):
    source = write_folder(tmp_path / "raw", {**sa1b_files(range(4)), "sa_2.jpg": b"broken"})
    assert pack(["sa1b", str(source), "--out", str(tmp_path / "out"), "--allow-bad", "1"]) == 0
    assert verify([str(tmp_path / "out"), "--deep"]) == 0


def test_stray_shard_is_a_problem(packed, capsys):
    out, _ = packed
    shutil.copy(out / "shard-000000.tar", out / "shard-000003.tar")
    assert verify([str(out)]) == 1
    assert "is not in the manifest" in capsys.readouterr().err


def test_nothing_to_check(tmp_path, capsys):
    assert verify([str(tmp_path)]) == 2
    assert "python -m data_tools.pack" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text("{")
    assert verify([str(tmp_path)]) == 2
    assert "does not parse" in capsys.readouterr().err


def test_images_are_verified_and_repaired(tmp_path):
    source = write_folder(tmp_path / "raw", {f"c/{i}.jpg": jpeg_bytes(i) for i in range(5)})
    out = tmp_path / "out"
    assert pack(["images", str(source), "--out", str(out), "--shard-size", "2"]) == 0
    before = tree_bytes(out)
    (out / "shard-000001.tar").unlink()
    assert verify([str(out), "--deep", "--repair", str(source)]) == 0
    assert tree_bytes(out) == before


def test_members_can_be_read_by_tarfile(packed):
    out, _ = packed
    for shard in load_manifest(out).shards:
        with tarfile.open(out / shard.name) as tar:
            names = tar.getnames()
        keys = [name.removesuffix(".jpg") for name in names[::2]]
        assert names == [f"{key}.{part}" for key in keys for part in ("jpg", "json")]


def test_repair_lifts_the_quarantine_of_what_it_rebuilt(packed, capsys):
    out, sources = packed
    row = np.load(out / index_name("shard-000001.tar"))[1]
    flip_byte(out / "shard-000001.tar", int(row["jpg_offset"] + row["jpg_size"] // 2))
    assert verify([str(out), "--deep", "--quarantine"]) == 0
    assert [entry.position for entry in load_quarantine(out)] == [3]
    assert verify([str(out), "--deep", "--repair", *sources]) == 0
    assert "1 positions are in quarantine no longer" in capsys.readouterr().out
    assert load_quarantine(out) == []


@pytest.mark.parametrize("name", ["../outside.tar", "shard-000000"])
def test_a_manifest_cannot_name_other_places(packed, name):
    out, _ = packed
    manifest = out / "manifest.json"
    manifest.write_text(manifest.read_text().replace("shard-000000.tar", name))
    with pytest.raises(ValueError, match="no file name of a tar"):
        load_manifest(out)
