import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from pycocotools import mask as coco_mask

import data_tools.pack
from data_tools.pack import main as pack
from data_tools.sample_format import load_manifest, load_quarantine, open_index, parse_record
from tests.data_tools.tiny import (
    REAL_DATA,
    annotation,
    jpeg_bytes,
    record,
    sa1b_files,
    tar_bytes,
    tree_bytes,
    write_folder,
)

REPO = Path(__file__).resolve().parents[2]


def run_pack(*arguments: object) -> int:
    return pack([str(argument) for argument in arguments])


def read_samples(directory: Path) -> dict[str, dict]:
    """What a plain WebDataset reader sees, by key."""
    shards = [str(directory / shard.name) for shard in load_manifest(directory).shards]
    return {sample["__key__"]: sample for sample in webdataset.WebDataset(shards, shardshuffle=False)}


def check_offsets(directory: Path) -> None:
    """Every index row leads to the bytes of the shard's members."""
    manifest, columns, row = load_manifest(directory), open_index(directory), 0
    for shard in manifest.shards:
        data = (directory / shard.name).read_bytes()
        assert len(data) == shard.num_bytes
        for position in range(row, row + shard.num_positions):
            if columns["jpg_size"][position] == 0:
                continue
            start, size = int(columns["jpg_offset"][position]), int(columns["jpg_size"][position])
            assert data[start : start + 2] == b"\xff\xd8"
            assert data[start + size - 2 : start + size] == b"\xff\xd9"
            start, size = int(columns["json_offset"][position]), int(columns["json_size"][position])
            found = parse_record(data[start : start + size])
            assert found.image_id == columns["image_id"][position]
            assert (found.height, found.width) == (columns["height"][position], columns["width"][position])
            assert len(found.annotations) == columns["num_masks"][position]
        row += shard.num_positions


def test_sa1b_folder(tmp_path):
    files = sa1b_files(range(100, 107))
    source = write_folder(tmp_path / "raw", {**files, "LICENSE.txt": b"x"})
    assert run_pack("sa1b", source, "--out", tmp_path / "out", "--shard-size", 3) == 0

    manifest = load_manifest(tmp_path / "out")
    assert manifest.kind == "sa1b"
    assert [shard.name for shard in manifest.shards] == [f"shard-00000{i}.tar" for i in range(3)]
    assert [shard.num_positions for shard in manifest.shards] == [3, 3, 1]
    assert (manifest.num_samples, manifest.num_masks) == (7, 21)
    samples = read_samples(tmp_path / "out")
    assert list(samples) == [f"sa_{n}" for n in range(100, 107)]
    for key, sample in samples.items():
        assert sample["jpg"] == files[f"{key}.jpg"]
        assert json.loads(sample["json"]) == json.loads(files[f"{key}.json"])
    check_offsets(tmp_path / "out")


def test_folder_tar_and_gzip_give_the_same_shards(tmp_path):
    files = sa1b_files(range(5))
    shuffled = dict(random.Random(0).sample(list(files.items()), len(files)))
    write_folder(tmp_path / "folder/sa_000000.tar", files)
    write_folder(tmp_path / "tar", {"sa_000000.tar": tar_bytes({f"./{n}": d for n, d in shuffled.items()})})
    write_folder(tmp_path / "gzip", {"sa_000000.tar": tar_bytes(files, "w:gz")})
    for form in ("folder", "tar", "gzip"):
        source = tmp_path / form / "sa_000000.tar"
        assert run_pack("sa1b", source, "--out", tmp_path / f"out-{form}", "--shard-size", 2) == 0
    assert tree_bytes(tmp_path / "out-folder") == tree_bytes(tmp_path / "out-tar") == tree_bytes(tmp_path / "out-gzip")


def test_few_unpacked_copies_are_on_the_disk_at_a_time(tmp_path, monkeypatch):
    sources = {f"{i}.tar": tar_bytes(sa1b_files(range(10 * i, 10 * i + 3)), "w:gz") for i in range(4)}
    write_folder(tmp_path / "raw", sources)
    seen = []

    def count_and_pack(task):
        seen.append(len(list((tmp_path / "out/.scratch").rglob("*.unpacked"))))
        return real_pack_shard(task)

    real_pack_shard = data_tools.pack.pack_shard
    monkeypatch.setattr(data_tools.pack, "pack_shard", count_and_pack)
    command = ("sa1b", *(tmp_path / "raw" / name for name in sources), "--out", tmp_path / "out", "--shard-size", 2)
    assert run_pack(*command) == 0
    assert seen == [1] * 8
    assert run_pack(*command) == 0
    assert not (tmp_path / "out/.scratch").exists()


def test_workers_do_not_change_a_byte(tmp_path):
    files = sa1b_files(range(20))
    files["sa_3.jpg"] = b"broken"
    source = write_folder(tmp_path / "raw", files)
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        assert run_pack("sa1b", source, "--out", out, "--shard-size", 4, "--workers", workers, "--allow-bad", 1) == 0
    assert tree_bytes(tmp_path / "out1") == tree_bytes(tmp_path / "out3")


def test_array_job_equals_one_run(tmp_path, capsys):
    sources = [write_folder(tmp_path / f"raw{i}", sa1b_files(range(10 * i, 10 * i + 3 + i))) for i in range(3)]
    stride = ("--shard-size", 2, "--shard-stride", 7)
    assert run_pack("sa1b", *reversed(sources), "--out", tmp_path / "one", *stride) == 0
    names = [shard.name for shard in load_manifest(tmp_path / "one").shards]
    assert names == [f"shard-{n:06d}.tar" for n in (0, 1, 7, 8, 14, 15, 16)]

    out = ("--out", tmp_path / "array")
    assert run_pack("sa1b", *sources, *out, *stride, "--source-index", 2) == 0
    assert run_pack("sa1b", sources[0], *out, *stride, "--source-index", 0, "--num-sources", 3) == 0
    assert not (tmp_path / "array/manifest.json").exists()
    assert run_pack("join", tmp_path / "array") == 2
    assert "--source-index 1" in capsys.readouterr().err
    assert run_pack("sa1b", *sources, *out, *stride, "--source-index", 1) == 0
    assert run_pack("join", tmp_path / "array") == 0
    assert tree_bytes(tmp_path / "one") == tree_bytes(tmp_path / "array")


def damage_samples(files: dict[str, bytes]) -> dict[str, str]:
    """Spoil most samples of 0..19; returns key to a part of the reason that has to be reported."""
    reasons = {}

    def spoil(number: int, reason: str, change) -> None:
        reasons[f"sa_{number}"] = reason
        tree = json.loads(files[f"sa_{number}.json"])
        change(tree)
        files[f"sa_{number}.json"] = json.dumps(tree).encode()

    def spoil_mask(number: int, reason: str, change) -> None:
        spoil(number, reason, lambda tree: change(tree["annotations"][1]))

    files["sa_1.jpg"] = b"\xff\xd8 this is no image"
    files["sa_2.jpg"] = files["sa_2.jpg"][:-100]
    files["sa_3.json"] = b'{"image": {'
    del files["sa_4.json"]
    del files["sa_5.jpg"]
    files["sa_6.jpg"] = jpeg_bytes(6, height=40)
    files["sa_7.jpg"] = jpeg_bytes(7, form="PNG")
    reasons |= {"sa_1": "JPEG does not decode", "sa_2": "JPEG does not decode", "sa_3": "JSON does not parse"}
    reasons |= {"sa_4": "JPEG without JSON", "sa_5": "JSON without JPEG", "sa_6": "the JPEG has 64 x 40"}
    reasons |= {"sa_7": "is PNG, not JPEG"}
    spoil_mask(8, "RLE size is [48, 63]", lambda a: a["segmentation"].update(size=[48, 63]))
    spoil_mask(9, "annotations[1]: ", lambda a: a["segmentation"].update(counts=a["segmentation"]["counts"] + "1"))
    spoil_mask(10, '"area" says 1,', lambda a: a.update(area=1))
    spoil_mask(11, '"bbox" says', lambda a: a["bbox"].__setitem__(2, a["bbox"][2] + 5))
    spoil_mask(12, "occurs twice in the image", lambda a: a.update(id=1200))
    empty = coco_mask.encode(np.zeros((48, 64), np.uint8, order="F"))["counts"].decode()
    spoil_mask(13, "the mask is empty", lambda a: a["segmentation"].update(counts=empty))
    spoil_mask(14, '"predicted_iou" should be a number', lambda a: a.update(predicted_iou=float("nan")))
    spoil(15, "image_id 0 occurs in an earlier sample", lambda tree: tree["image"].update(image_id=0))
    spoil(16, "JSON is of another image", lambda tree: tree["image"].update(file_name="sa_99.jpg"))
    spoil(17, '"image.width" should be int', lambda tree: tree["image"].update(width="64"))
    return reasons


@pytest.fixture
def damaged(tmp_path):
    files = sa1b_files(range(20))
    reasons = damage_samples(files)
    return write_folder(tmp_path / "raw", files), reasons


def test_bad_samples_leave_gaps_and_are_reported(tmp_path, damaged):
    source, reasons = damaged
    out = tmp_path / "out"
    assert run_pack("sa1b", source, "--out", out) == 1
    report = json.loads((out / "report.json").read_text())
    found = {bad["key"]: bad["reason"] for bad in report["bad"]}
    assert found.keys() == reasons.keys()
    for key, reason in reasons.items():
        assert reason in found[key], (key, found[key])
    text = (out / "report.txt").read_text()
    assert all(f"{key}.j" in text for key in reasons)

    keys = sorted(f"sa_{n}" for n in range(20))
    sizes = open_index(out)["jpg_size"]
    assert [key for key, size in zip(keys, sizes, strict=True) if size == 0] == sorted(reasons)
    assert load_manifest(out).num_samples == 20 - len(reasons)
    check_offsets(out)


def test_allow_bad_covers_a_number(tmp_path, damaged):
    source, reasons = damaged
    assert run_pack("sa1b", source, "--out", tmp_path / "a", "--allow-bad", len(reasons)) == 0
    assert run_pack("sa1b", source, "--out", tmp_path / "a", "--allow-bad", len(reasons) - 1) == 1
    assert run_pack("sa1b", source, "--out", tmp_path / "a", "--allow-bad", -1) == 2


def test_a_bad_sample_does_not_move_its_neighbours(tmp_path):
    files = sa1b_files(range(9))
    write_folder(tmp_path / "good", files)
    write_folder(tmp_path / "bad", {**files, "sa_4.jpg": b"broken"})
    for form in ("good", "bad"):
        run_pack("sa1b", tmp_path / form, "--out", tmp_path / f"out-{form}", "--shard-size", 3)
    good, bad = tree_bytes(tmp_path / "out-good"), tree_bytes(tmp_path / "out-bad")
    assert {name for name in good if name.endswith(".tar") and good[name] != bad[name]} == {"shard-000001.tar"}
    ids = [open_index(tmp_path / f"out-{form}")["image_id"].tolist() for form in ("good", "bad")]
    assert ids[1] == [*ids[0][:4], 0, *ids[0][5:]]


def test_warnings_are_counted_and_quirks_are_not(tmp_path):
    tree = record(0)
    full = np.zeros((48, 64), bool)
    full[1:] = True
    tree["annotations"].append(annotation(full, 77))
    other = record(1)
    other["annotations"][0]["id"] = 77
    empty = record(2, num_masks=0)
    files = sa1b_files(range(3))
    for number, changed in enumerate((tree, other, empty)):
        files[f"sa_{number}.json"] = json.dumps(changed).encode()
    assert run_pack("sa1b", write_folder(tmp_path / "raw", files), "--out", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/report.json").read_text())["warnings"] == {
        "annotation id occurs in another image of the shard": 1,
        "image without masks": 1,
        "mask covers more than 90 % of the image": 1,
    }


def test_image_id_of_another_shard_is_quarantined(tmp_path):
    files = sa1b_files(range(6))
    tree = json.loads(files["sa_5.json"])
    tree["image"]["image_id"] = 1
    files["sa_5.json"] = json.dumps(tree).encode()
    assert run_pack("sa1b", write_folder(tmp_path / "raw", files), "--out", tmp_path / "out", "--shard-size", 3) == 1
    [entry] = load_quarantine(tmp_path / "out")
    assert (entry.position, entry.reason) == (5, "image_id 1 occurs in an earlier shard")
    assert "image_id 1 occurs" in (tmp_path / "out/report.txt").read_text()


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_and_run_again(tmp_path, workers):
    source = write_folder(tmp_path / "raw", sa1b_files(range(120)))
    command = ["sa1b", str(source), "--shard-size", "4", "--workers", str(workers), "--out"]
    assert pack([*command, str(tmp_path / "whole")]) == 0
    out = tmp_path / "killed"
    rng, num_kills = random.Random(workers), 0
    for _ in range(4 - workers):
        packer = subprocess.Popen(
            [sys.executable, "-m", "data_tools.pack", *command, str(out)], cwd=REPO, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120  # a busy machine takes long to start a process
        goal = len(list(out.glob("*.info.json"))) + rng.randint(1, 6)
        while packer.poll() is None and time.monotonic() < deadline and len(list(out.glob("*.info.json"))) < goal:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.01)
        if packer.poll() is None:
            os.kill(packer.pid, signal.SIGKILL)
            num_kills += 1
        packer.wait()
        assert_nothing_half_written(out, tmp_path / "whole")
    assert num_kills
    assert not (out / "manifest.json").exists()
    wait_for_silence(out)
    assert pack([*command, str(out)]) == 0
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")


def assert_nothing_half_written(out: Path, whole: Path) -> None:
    """Whatever has a final name has its final content."""
    for path in out.rglob("*"):
        if path.is_file() and not path.name.endswith(".tmp"):
            assert path.read_bytes() == (whole / path.relative_to(out)).read_bytes(), path


def wait_for_silence(out: Path) -> None:
    """Workers of a killed packer end by themselves, within moments."""
    before = None
    while before != (before := sorted((path.name, path.stat().st_size) for path in out.iterdir())):
        time.sleep(0.3)


def test_finished_shards_are_not_done_again(tmp_path, capsys):
    source = write_folder(tmp_path / "raw", sa1b_files(range(8)))
    command = ("sa1b", source, "--out", tmp_path / "out", "--shard-size", 2)
    assert run_pack(*command) == 0
    before = tree_bytes(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    (tmp_path / "out/shard-000002.info.json").unlink()
    (tmp_path / "out/.shard-000002.tar.1.tmp").write_bytes(b"left by a killed process")
    assert run_pack(*command) == 0
    assert "1 shards packed, 3 found finished" in capsys.readouterr().err
    assert tree_bytes(tmp_path / "out") == before
    assert [p.name for p, t in times.items() if p.stat().st_mtime_ns != t] == ["shard-000002.tar"]


@pytest.mark.parametrize("change", [("--shard-size", 3), ("--resize-long-side", 30)])
def test_other_settings_into_the_same_folder_are_refused(tmp_path, capsys, change):
    source = write_folder(tmp_path / "raw", sa1b_files(range(4)))
    assert run_pack("sa1b", source, "--out", tmp_path / "out") == 0
    assert run_pack("sa1b", source, "--out", tmp_path / "out", *change) == 2
    assert "was begun otherwise" in capsys.readouterr().err


def test_other_source_into_the_same_folder_is_refused(tmp_path, capsys):
    for name, start in (("a", 0), ("b", 10)):
        write_folder(tmp_path / name, sa1b_files(range(start, start + 3)))
    assert run_pack("sa1b", tmp_path / "a", "--out", tmp_path / "out") == 0
    assert run_pack("sa1b", tmp_path / "b", "--out", tmp_path / "out") == 2
    assert "was begun otherwise" in capsys.readouterr().err


def test_more_shards_than_numbers_are_refused(tmp_path, capsys):
    sources = [write_folder(tmp_path / name, sa1b_files(range(i, i + 4))) for i, name in ((0, "a"), (10, "b"))]
    out = ("--out", tmp_path / "out", "--shard-size", 1, "--shard-stride", 3)
    assert run_pack("sa1b", *sources, *out) == 2
    assert "--shard-stride 4" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ images


def image_files() -> dict[str, bytes]:
    return {f"n{c:03d}/n{c:03d}_{i}.JPEG": jpeg_bytes(10 * c + i, 30 + i, 40) for c in range(3) for i in range(4)}


def test_images_of_class_folders_and_of_a_tar_of_tars(tmp_path):
    files = image_files()
    write_folder(tmp_path / "a/train", files)
    classes = {
        f"n{c:03d}.tar": tar_bytes({Path(n).name: d for n, d in files.items() if n.startswith(f"n{c:03d}/")})
        for c in range(3)
    }
    write_folder(tmp_path / "b", {"train": tar_bytes(classes)})
    for form in ("a", "b"):
        source = tmp_path / form / "train"
        assert run_pack("images", source, "--out", tmp_path / f"out-{form}", "--shard-size", 5) == 0
    assert tree_bytes(tmp_path / "out-a") == tree_bytes(tmp_path / "out-b")

    assert load_manifest(tmp_path / "out-a").kind == "images"
    samples = read_samples(tmp_path / "out-a")
    assert {key: sample["jpg"] for key, sample in samples.items()} == {
        name.removesuffix(".JPEG").replace("/", "__"): data for name, data in files.items()
    }
    check_offsets(tmp_path / "out-a")


def test_flat_images_dots_collisions_and_other_formats(tmp_path):
    files = {"a.b.jpg": jpeg_bytes(1), "a_b.jpeg": jpeg_bytes(2), "c.png": jpeg_bytes(3, form="PNG"), "x.txt": b""}
    files["grey.jpg"] = jpeg_bytes(4, mode="L")
    files["cmyk.jpg"] = jpeg_bytes(5, mode="CMYK")
    source = write_folder(tmp_path / "raw", files)
    assert run_pack("images", source, "--out", tmp_path / "out") == 1
    bad = json.loads((tmp_path / "out/report.json").read_text())["bad"]
    assert {each["file"]: each["reason"] for each in bad} == {
        "a_b.jpeg": "its key a_b is that of a.b.jpg already",
        "c.png": "is PNG, not JPEG",
    }
    assert set(read_samples(tmp_path / "out")) == {"a_b", "grey", "cmyk"}
    assert run_pack("images", source, "--out", tmp_path / "out2", "--reencode", "--allow-bad", 1) == 0
    assert set(read_samples(tmp_path / "out2")) == {"a_b", "grey", "cmyk", "c"}


# ------------------------------------------------------------------------------------------------ user's errors


@pytest.mark.parametrize("layout", ["sa1b", "images"])
def test_empty_source_is_an_error(tmp_path, capsys, layout):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/readme.txt").touch()
    assert run_pack(layout, tmp_path / "raw", "--out", tmp_path / "out") == 2
    assert f"{tmp_path / 'raw'} holds no" in capsys.readouterr().err


def test_unusable_sources_are_errors(tmp_path, capsys):
    good = write_folder(tmp_path / "raw", sa1b_files(range(2)))
    cut = tmp_path / "sa_000000.tar"
    cut.write_bytes(tar_bytes(sa1b_files(range(4)))[:5000])
    packed = tar_bytes(sa1b_files(range(4)), "w:gz")
    (tmp_path / "gz.tar").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "text.tar").write_text("no tar at all " * 100)
    out = ("--out", tmp_path / "out")
    for sources, message in [
        ([tmp_path / "absent"], "does not exist"),
        ([good, good], "given twice"),
        ([cut], "is not a whole tar"),
        ([tmp_path / "gz.tar"], "is not a whole gzip file"),
        ([tmp_path / "text.tar"], "is not a whole tar"),
        ([tmp_path], "give its subfolders"),
        ([good, "--source-index", 1], "--source-index 1"),
        ([good, "--num-sources", 3], "--num-sources N"),
        ([good, "--workers", 0], "--workers"),
        ([good, "--shard-size", 0], "--shard-size"),
    ]:
        assert run_pack("sa1b", *sources, *out) == 2, message
        assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- real data


@pytest.mark.real_data
@pytest.mark.skipif(not (REAL_DATA / "sa1b_genuine").is_dir(), reason="real images are not beside the project")
def test_genuine_sa1b(tmp_path):
    source = REAL_DATA / "sa1b_genuine"
    assert run_pack("sa1b", source, "--out", tmp_path / "out", "--shard-size", 3) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["num_samples"], report["num_masks"], report["bad"], report["warnings"]) == (8, 832, [], {})
    check_offsets(tmp_path / "out")
    for key, sample in read_samples(tmp_path / "out").items():
        assert sample["jpg"] == (source / f"{key}.jpg").read_bytes()
        before = json.loads((source / f"{key}.json").read_text())
        after = json.loads(sample["json"])
        assert after["image"] == before["image"]
        for old, new in zip(before["annotations"], after["annotations"], strict=True):
            assert {**old, "segmentation": None} == {**new, "segmentation": None}
            assert coco_mask.iou([old["segmentation"]], [new["segmentation"]], [0])[0, 0] == 1.0


@pytest.mark.real_data
@pytest.mark.skipif(not (REAL_DATA / "coco_free").is_dir(), reason="real images are not beside the project")
def test_real_photos(tmp_path):
    assert run_pack("sa1b", REAL_DATA / "coco_free", "--out", tmp_path / "sa1b") == 0
    assert run_pack("images", REAL_DATA / "photos", "--out", tmp_path / "images", "--shard-size", 100) == 0
    assert load_manifest(tmp_path / "sa1b").num_masks == 887
    assert load_manifest(tmp_path / "images").num_samples == 224
