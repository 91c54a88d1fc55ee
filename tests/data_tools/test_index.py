import json

import numpy as np
import pytest

from data_tools.index import main as index
from data_tools.pack import main as pack
from data_tools.sample_format import (
    Quarantined,
    load_manifest,
    load_quarantine,
    open_index,
    parse_record,
    read_raw,
    save_quarantine,
)
from data_tools.verify import main as verify
from tests.data_tools.tiny import jpeg_bytes, sa1b_files, tar_bytes, tree_bytes, write_folder


def foreign_images(folder):
    """Two shards as timm and img2dataset write them; one sample has no image, one a broken one."""
    first, second = {}, {}
    for number in range(3):
        first[f"n01_{number}.jpg"] = jpeg_bytes(number, 30 + number, 40)
        first[f"n01_{number}.cls"] = b"7"
    for number in range(4):
        second[f"00001000{number}.json"] = json.dumps({"url": "x", "caption": "y", "width": 1}).encode()
        second[f"00001000{number}.jpeg"] = jpeg_bytes(10 + number)
        second[f"00001000{number}.txt"] = b"y"
    del second["000010001.jpeg"]
    second["000010002.jpeg"] = b"broken"
    files = {"imagenet1k-train-0000.tar": tar_bytes(first), "imagenet1k-train-0001.tar": tar_bytes(second)}
    write_folder(folder, files)
    return files, {**first, **second}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_images_of_others(tmp_path, workers):
    files, members = foreign_images(tmp_path)
    assert index([str(tmp_path), "--workers", workers]) == 1
    assert index([str(tmp_path), "--allow-bad", "2"]) == 0
    manifest, columns = load_manifest(tmp_path), open_index(tmp_path)
    assert manifest.kind == "images"
    assert [shard.name for shard in manifest.shards] == sorted(files)
    assert [shard.num_positions for shard in manifest.shards] == [3, 4]
    assert columns["height"].tolist() == [30, 31, 32, 48, 0, 0, 48]
    assert (columns["jpg_size"] > 0).tolist() == [True] * 4 + [False] * 2 + [True]
    assert columns["json_size"].tolist() == [0] * 7
    assert len(set(columns["image_id"].tolist())) == 6, "a hash of the key; 0 for gaps"
    assert read_raw(tmp_path, manifest, columns, 1, "jpg") == members["n01_1.jpg"]
    assert read_raw(tmp_path, manifest, columns, 6, "jpg") == members["000010003.jpeg"]
    bad = {each["key"]: each["reason"] for each in json.loads((tmp_path / "report.json").read_text())["bad"]}
    assert bad.keys() == {"000010001", "000010002"}
    assert {name: (tmp_path / name).read_bytes() for name in files} == files, "no tar is changed"
    assert verify([str(tmp_path), "--deep"]) == 0


def test_sa1b_tars_as_they_are(tmp_path):
    files = sa1b_files(range(6))
    names = sorted(files)
    halves = [{name: files[name] for name in half} for half in (names[:6], names[6:])]
    write_folder(tmp_path, {f"sa_{i:06d}.tar": tar_bytes(half) for i, half in enumerate(halves)})
    assert index([str(tmp_path)]) == 0
    manifest, columns = load_manifest(tmp_path), open_index(tmp_path)
    assert (manifest.kind, manifest.num_masks) == ("sa1b", 18)
    for position in range(6):
        record = parse_record(read_raw(tmp_path, manifest, columns, position, "json"))
        assert record.image_id == columns["image_id"][position] == position
        assert read_raw(tmp_path, manifest, columns, position, "jpg") == files[f"sa_{position}.jpg"]
    assert verify([str(tmp_path), "--deep"]) == 0


def test_indexing_goes_on_where_it_was(tmp_path):
    foreign_images(tmp_path)
    index([str(tmp_path)])
    before = tree_bytes(tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.info.json")}
    (tmp_path / "imagenet1k-train-0000.info.json").unlink()
    (tmp_path / "manifest.json").unlink()
    index([str(tmp_path)])
    assert tree_bytes(tmp_path) == before
    kept = tmp_path / "imagenet1k-train-0001.info.json"
    assert kept.stat().st_mtime_ns == times[kept.name]


def test_packed_data_gets_its_index_anew(tmp_path):
    source = write_folder(tmp_path / "raw", {**sa1b_files(range(5)), "sa_1.jpg": b"broken"})
    out = tmp_path / "out"
    pack(["sa1b", str(source), "--out", str(out), "--shard-size", "2"])
    before = tree_bytes(out)
    np.save(out / "index/width.npy", np.zeros(3))
    (out / "manifest.json").unlink()
    assert index([str(out), "--allow-bad", "1"]) == 0
    assert tree_bytes(out) == before
    for path in (out / "sources").iterdir():
        path.unlink()
    assert index([str(out), "--allow-bad", "1"]) == 0
    assert tree_bytes(out) == {name: data for name, data in before.items() if "sources/" not in name}


def test_unusable_directories(tmp_path, capsys):
    for folder, files, message in [
        ("none", {}, "holds no .tar"),
        ("gzip", {"a.tar": tar_bytes(sa1b_files(range(1)), "w:gz")}, "is compressed"),
        ("cut", {"a.tar": tar_bytes(sa1b_files(range(1)))[:3000]}, "is not a whole tar"),
        (
            "mixed",
            {"a.tar": tar_bytes(sa1b_files(range(1))), "b.tar": tar_bytes({"x.jpg": jpeg_bytes(1)})},
            "separately",
        ),
    ]:
        (tmp_path / folder).mkdir()
        write_folder(tmp_path / folder, files)
        assert index([str(tmp_path / folder)]) == 2
        assert message in capsys.readouterr().err
    assert index([str(tmp_path / "absent")]) == 2


def test_the_quarantine_follows_its_samples(tmp_path):
    """A tar holds another's samples again; when it is gone, they are no doubles, and other entries have moved."""
    files = sa1b_files(range(4))
    write_folder(tmp_path, {"a.tar": tar_bytes(files), "b.tar": tar_bytes(files)})
    write_folder(tmp_path, {"c.tar": tar_bytes(sa1b_files(range(10, 12)))})
    assert index([str(tmp_path)]) == 1
    assert [entry.position for entry in load_quarantine(tmp_path)] == [4, 5, 6, 7]
    save_quarantine(tmp_path, [*load_quarantine(tmp_path), Quarantined(9, "sa_11", "by hand")])
    (tmp_path / "a.tar").unlink()
    assert index([str(tmp_path)]) == 0
    assert load_quarantine(tmp_path) == [Quarantined(5, "sa_11", "by hand")]
