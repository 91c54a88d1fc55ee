import io
import json
import tarfile

import numpy as np
import pytest
import simplejpeg
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

from data_tools import rle
from data_tools.pack import main as pack
from data_tools.sample_format import load_manifest, open_index, parse_record, read_raw
from data_tools.sources.checks import check_jpeg
from data_tools.sources.coco import deepest_point
from data_tools.sources.listing import list_source, sorted_sources
from data_tools.sources.samples import Conversion, smaller_size
from data_tools.verify import main as verify
from tests.data_tools.tiny import HEIGHT, WIDTH, boxes, jpeg_bytes, sa1b_files, tar_bytes, tree_bytes, write_folder


def test_listing_goes_by_name_whatever_the_order_on_disk(tmp_path):
    files = dict(reversed(sa1b_files(range(8, 12)).items()))
    folder = list_source(write_folder(tmp_path / "f", files), "sa1b", tmp_path)
    (tmp_path / "t.tar").write_bytes(tar_bytes({f"deep/er/{name}": data for name, data in files.items()}))
    tar = list_source(tmp_path / "t.tar", "sa1b", tmp_path)
    assert [entry.key for entry in folder.entries] == ["sa_10", "sa_11", "sa_8", "sa_9"]
    assert folder.digest == tar.digest
    for entry, other in zip(folder.entries, tar.entries, strict=True):
        assert entry.image.read() == other.image.read() == files[f"{entry.key}.jpg"]
        assert entry.annotations.read() == other.annotations.read() == files[f"{entry.key}.json"]


def test_sources_are_numbered_by_name(tmp_path):
    paths = [tmp_path / name for name in ("z/sa_000001.tar", "a/sa_000002.tar", "m/sa_000000.tar")]
    for path in paths:
        path.parent.mkdir()
        path.touch()
    assert [path.name for path in sorted_sources(paths)] == ["sa_000000.tar", "sa_000001.tar", "sa_000002.tar"]


def test_a_file_that_shrinks_after_listing_is_noticed(tmp_path):
    path = tmp_path / "t.tar"
    path.write_bytes(tar_bytes(sa1b_files(range(3))))
    entry = list_source(path, "sa1b", tmp_path).entries[-1]
    path.write_bytes(path.read_bytes()[: entry.image.offset + 10])
    with pytest.raises(ValueError, match=r"only 10 of \d+ bytes"):
        entry.image.read()


def test_a_tar_cut_anywhere_is_noticed(tmp_path):
    data = tar_bytes(sa1b_files(range(2)))
    path = tmp_path / "t.tar"
    end = len(data.rstrip(b"\0"))
    for cut in (1, 511, 512, 600, 5 * 512, *range(end - 1500, end, 100), end // 512 * 512):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="not a whole tar"):
            list_source(path, "sa1b", tmp_path)


@pytest.mark.parametrize("cut", [10, 200, 900, -1])
def test_truncated_jpeg_is_noticed(cut):
    with pytest.raises(ValueError, match="JPEG does not decode"):
        check_jpeg(jpeg_bytes(1, 200, 300)[:cut])


@pytest.mark.parametrize("progressive", [False, True])
def test_the_small_grey_decode_finds_what_a_full_decode_finds(progressive):
    """The check decodes an eighth of the size in grey. Against every pixel in colour, over damage of each kind.

    A flipped bit often leaves a stream that decodes, to other pixels: neither finds that. It shows only against the
    checksums that packing writes.
    """
    buffer = io.BytesIO()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)).resize((320, 240))
    image.save(buffer, "JPEG", quality=90, progressive=progressive)
    whole = buffer.getvalue()
    assert check_jpeg(whole, decode=False) == check_jpeg(whole) == (240, 320)
    rng, found, agreed = np.random.default_rng(1), 0, 0
    for number in range(150):
        data, place = bytearray(whole), int(rng.integers(2, len(whole) - 2))
        if number % 3 == 0:
            data = data[:place]  # cut
        elif number % 3 == 1:
            data[place : place + 64] = bytes(len(data[place : place + 64]))  # a torn page
        else:
            data[place] ^= 1 << int(rng.integers(8))
        try:
            simplejpeg.decode_jpeg(bytes(data), "RGB")
            is_sound = True
        except ValueError:
            is_sound = False
        try:
            check_jpeg(bytes(data))
            passes = True
        except ValueError:
            passes = False
        assert passes <= is_sound, f"damage {number} at byte {place} passes the check and does not decode"
        if number % 3 == 0:
            with pytest.raises(ValueError, match="JPEG"):
                check_jpeg(bytes(data), decode=False)  # header and end alone: every cut, and no more is claimed
        found, agreed = found + (not is_sound), agreed + (passes == is_sound)
    assert found > 60
    assert agreed > 140  # the check may refuse a little more


def test_progressive_grey_and_cmyk_are_jpeg():
    image = Image.fromarray(np.zeros((40, 50, 3), np.uint8))
    for options in ({"progressive": True}, {}):
        for mode in ("RGB", "L", "CMYK"):
            buffer = io.BytesIO()
            image.convert(mode).save(buffer, "JPEG", **options)
            assert check_jpeg(buffer.getvalue()) == (40, 50)


# -------------------------------------------------------------------------------------------------------- COCO


def coco_source(folder):
    """Two images with a polygon, an RLE, a crowd with counts, and a polygon smaller than a pixel; one without any."""
    mask, crowd = boxes(1, 1)[0], boxes(2, 1)[0]
    compressed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    annotations = [
        {"segmentation": [[2, 3, 20, 3, 20, 30, 2, 30], [30, 5, 40, 5, 40, 9]], "iscrowd": 0},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": compressed["counts"].decode()}, "iscrowd": 0},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": rle.from_bitmap(crowd).counts.tolist()}, "iscrowd": 1},
        {"segmentation": [[5, 5, 5.1, 5, 5.1, 5.1]], "iscrowd": 0},
    ]
    for number, each in enumerate(annotations):
        each |= {"id": 10 + number, "image_id": 7, "category_id": 3, "bbox": [0, 0, 1, 1], "area": 1.5}
    images = [
        {"id": number, "file_name": f"train/{number:04d}.jpg", "height": HEIGHT, "width": WIDTH} for number in (9, 7)
    ]
    write_folder(folder / "images/train", {f"{number:04d}.jpg": jpeg_bytes(number) for number in (7, 9)})
    tree = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "x"}]}
    (folder / "instances.json").write_text(json.dumps(tree))
    return tree, mask, crowd


def pack_coco(folder, *more: str) -> int:
    names = {"annotations": "instances.json", "images": "images", "out": "out"}
    return pack(["coco", *(f"--{option}={folder / name}" for option, name in names.items()), *more])


def test_coco_becomes_sa1b(tmp_path):
    tree, mask, crowd = coco_source(tmp_path)
    assert pack_coco(tmp_path) == 0
    out = tmp_path / "out"
    manifest, columns = load_manifest(out), open_index(out)
    assert (manifest.kind, manifest.num_samples, manifest.num_masks) == ("sa1b", 2, 3)
    record = parse_record(read_raw(out, manifest, columns, 0, "json"))
    assert (record.image_id, record.key, record.width, record.height) == (7, "0007", WIDTH, HEIGHT)
    polygons = coco_mask.merge(coco_mask.frPyObjects(tree["annotations"][0]["segmentation"], HEIGHT, WIDTH))
    for each, expected in zip(record.annotations, [coco_mask.decode(polygons), mask, crowd], strict=True):
        assert (coco_mask.decode(each["segmentation"]) == expected).all()
        box = coco_mask.toBbox(each["segmentation"])
        assert each["bbox"] == [box[0], box[1], box[2] - 1, box[3] - 1]
        assert each["area"] == expected.sum()
        [[x, y]] = each["point_coords"]
        assert expected[int(y), int(x)]
        assert each["predicted_iou"] == each["stability_score"] == 1.0
        assert each["crop_box"] == [0, 0, WIDTH, HEIGHT]
    assert [each["iscrowd"] for each in record.annotations] == [0, 0, 1]
    warnings = json.loads((out / "report.json").read_text())["warnings"]
    assert warnings == {"COCO mask without a pixel, dropped": 1, "image without masks": 1}
    assert verify([str(out), "--deep"]) == 0
    before = tree_bytes(out)
    (out / "shard-000000.tar").unlink()
    assert verify([str(out), "--repair", str(tmp_path / "instances.json"), str(tmp_path / "images")]) == 0
    assert tree_bytes(out) == before


def test_coco_without_crowds(tmp_path):
    coco_source(tmp_path)
    assert pack_coco(tmp_path, "--no-crowds") == 0
    assert load_manifest(tmp_path / "out").num_masks == 2


@pytest.mark.parametrize(
    "segmentation, reason",
    [
        ([[1, 2, 3, 4]], "a polygon needs"),
        ({"size": [1, 2], "counts": [2]}, "RLE size is [1, 2]"),
        ({"size": [HEIGHT, WIDTH], "counts": [5]}, "RLE runs sum to 5"),
        ([], "should be polygons or RLE"),
        ([3.0, 4.0], "a polygon needs"),
        ({"size": [HEIGHT, WIDTH], "counts": None}, "RLE counts should be"),
        ([["a", "b", "c", "d", "e", "f"]], "a polygon needs"),
        ([[0, 0, 1e300, 0, 5, 5]], "a polygon reaches 1e+300"),
    ],
)
def test_bad_coco_annotations_are_reported(tmp_path, segmentation, reason):
    tree, _, _ = coco_source(tmp_path)
    tree["annotations"][1]["segmentation"] = segmentation
    (tmp_path / "instances.json").write_text(json.dumps(tree))
    assert pack_coco(tmp_path) == 1
    [bad] = json.loads((tmp_path / "out/report.json").read_text())["bad"]
    assert bad["key"] == "0007"
    assert f"annotation 11: {reason}" in bad["reason"]


def test_a_coco_annotation_without_id_is_reported(tmp_path):
    tree, _, _ = coco_source(tmp_path)
    del tree["annotations"][1]["id"]
    (tmp_path / "instances.json").write_text(json.dumps(tree))
    assert pack_coco(tmp_path) == 1
    [bad] = json.loads((tmp_path / "out/report.json").read_text())["bad"]
    assert '"id" should be int, is None' in bad["reason"]


def test_missing_coco_image_is_reported(tmp_path):
    coco_source(tmp_path)
    (tmp_path / "images/train/0009.jpg").unlink()
    assert pack_coco(tmp_path, "--allow-bad=1") == 0
    [bad] = json.loads((tmp_path / "out/report.json").read_text())["bad"]
    assert "does not exist" in bad["reason"]


@pytest.mark.parametrize("text", ["{", "[]", '{"images": []}', '{"images": [], "annotations": []}'])
def test_files_that_are_not_coco(tmp_path, capsys, text):
    coco_source(tmp_path)
    (tmp_path / "instances.json").write_text(text)
    assert pack_coco(tmp_path) == 2
    assert "instances.json" in capsys.readouterr().err


def test_deepest_point_is_inside():
    rng = np.random.default_rng(0)
    for _ in range(200):
        mask = rng.random((9, 11)) < rng.random()
        if mask.any():
            x, y = deepest_point(mask)
            assert mask[int(y), int(x)]
    block = np.zeros((20, 30), bool)
    block[3:12, 10:25] = True
    x, y = deepest_point(block)
    assert y == 7
    assert 14 <= x <= 20


# ------------------------------------------------------------------------------------------------------ resizing


def test_smaller_size_never_enlarges():
    assert smaller_size(1500, 2250, Conversion("sa1b", resize_long_side=1024)) == (683, 1024)
    assert smaller_size(300, 400, Conversion("sa1b", resize_long_side=1024)) == (300, 400)
    assert smaller_size(400, 300, Conversion("images", resize_short_side=150)) == (200, 150)
    assert smaller_size(1, 5000, Conversion("images", resize_long_side=10)) == (1, 10)


def test_resizing_sa1b_moves_everything_along(tmp_path):
    source = write_folder(tmp_path / "raw", sa1b_files(range(4)))
    out = tmp_path / "out"
    assert pack(["sa1b", str(source), "--out", str(out), "--resize-long-side=32"]) == 0
    assert verify([str(out), "--deep"]) == 0, "area, box and size agree with the resized masks"
    manifest, columns = load_manifest(out), open_index(out)
    for position in range(4):
        record = parse_record(read_raw(out, manifest, columns, position, "json"))
        assert (record.height, record.width) == (24, 32)
        image = Image.open(io.BytesIO(read_raw(out, manifest, columns, position, "jpg")))
        assert image.size == (32, 24)
        before = json.loads((source / f"{record.key}.json").read_text())["annotations"]
        for old, new in zip(before, record.annotations, strict=True):
            expected = coco_mask.decode(old["segmentation"])[1::2, 1::2]  # centres on edges count downwards
            assert (rle.to_bitmap(rle.parse(new["segmentation"])) == expected).mean() > 0.97
            assert new["area"] == rle.area(rle.parse(new["segmentation"]))
            assert new["point_coords"][0][0] == old["point_coords"][0][0] / 2
            assert new["crop_box"] == [0, 0, 32, 24]
            assert new["id"] == old["id"]


def test_masks_that_vanish_in_resizing_are_dropped(tmp_path):
    source = write_folder(tmp_path / "raw", sa1b_files(range(4)))
    assert pack(["sa1b", str(source), "--out", str(tmp_path / "out"), "--resize-long-side=2"]) == 0
    assert verify([str(tmp_path / "out"), "--deep"]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["num_masks"] + report["warnings"]["mask too small to survive the resizing, dropped"] == 12


def test_resizing_images(tmp_path):
    source = write_folder(tmp_path / "raw", {"a.jpg": jpeg_bytes(1, 100, 80), "b.jpg": jpeg_bytes(2, 30, 40)})
    out = tmp_path / "out"
    assert pack(["images", str(source), "--out", str(out), "--resize-short-side=40"]) == 0
    manifest, columns = load_manifest(out), open_index(out)
    assert columns["height"].tolist() == [50, 30]
    assert columns["width"].tolist() == [40, 40]
    assert read_raw(out, manifest, columns, 1, "jpg") == (source / "b.jpg").read_bytes()


@pytest.mark.parametrize("change", [{"id": "7a"}, {"id": 2**70}, {"id": -1}, {"id": 7, "height": 5, "width": None}])
def test_odd_coco_images_are_reported(tmp_path, change):
    tree, _, _ = coco_source(tmp_path)
    tree["images"][1] |= change
    for annotation in tree["annotations"]:
        annotation["image_id"] = change["id"]
    (tmp_path / "instances.json").write_text(json.dumps(tree))
    assert pack_coco(tmp_path) == 1
    [bad] = json.loads((tmp_path / "out/report.json").read_text())["bad"]
    assert "id should be" in bad["reason"] or "COCO says None x 5" in bad["reason"]


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_absurd_numbers_and_depths_are_bad_samples(tmp_path, value):
    files = sa1b_files(range(3))
    tree = json.loads(files["sa_1.json"])
    tree["annotations"][0]["area"] = value
    files |= {"sa_1.json": json.dumps(tree).encode(), "sa_2.json": b"[" * 200_000}
    write_folder(tmp_path / "in", files)
    assert pack(["sa1b", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 1
    assert len(json.loads((tmp_path / "out/report.json").read_text())["bad"]) == 2


def test_one_name_in_two_folders_is_a_bad_sample(tmp_path):
    files = {f"a/{name}": data for name, data in sa1b_files(range(2)).items()}
    files |= {f"b/{name}": data for name, data in sa1b_files(range(1, 3)).items()}
    write_folder(tmp_path, {"in.tar": tar_bytes(files)})
    problems = {entry.key: entry.problem for entry in list_source(tmp_path / "in.tar", "sa1b", tmp_path).entries}
    assert [key for key, problem in problems.items() if "have one name" in problem] == ["sa_1"]


def test_hard_links_in_a_tar_are_files(tmp_path):
    write_folder(tmp_path / "in", {"x.jpg": jpeg_bytes(1)})
    (tmp_path / "in/y.jpg").hardlink_to(tmp_path / "in/x.jpg")
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        tar.add(tmp_path / "in", ".")
    with tarfile.open(tmp_path / "in.tar") as tar:
        assert any(member.islnk() for member in tar)
    entries = list_source(tmp_path / "in.tar", "images", tmp_path / "scratch").entries
    assert [entry.image.read() for entry in entries] == [jpeg_bytes(1)] * 2


def test_resized_images_are_turned_as_exif_says(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((100, 160, 3), np.uint8)).save(buffer, "JPEG", exif=exif)
    write_folder(tmp_path / "in", {"x.jpg": buffer.getvalue()})
    assert pack(["images", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--resize-short-side", "50"]) == 0
    jpeg = read_raw(tmp_path / "out", load_manifest(tmp_path / "out"), open_index(tmp_path / "out"), 0, "jpg")
    assert simplejpeg.decode_jpeg(jpeg).shape == (80, 50, 3)
    assert open_index(tmp_path / "out")["height"][0] == 80
