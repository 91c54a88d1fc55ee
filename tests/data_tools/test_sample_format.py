import io
import json
import tarfile
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.sample_format import (
    INDEX_DTYPE,
    TAR_END,
    Manifest,
    Quarantined,
    Record,
    ShardInfo,
    encode_record,
    encode_sample,
    index_name,
    info_name,
    join_indexes,
    load_manifest,
    load_quarantine,
    locate,
    npy_bytes,
    open_index,
    parse_record,
    save_manifest,
    save_quarantine,
    shard_name,
    write_whole,
)
from tests.data_tools.tiny import record

keys = st.text(st.characters(codec="utf-8", exclude_characters="/\0.", exclude_categories=["Cs"]), min_size=1)


@given(st.lists(st.tuples(keys, st.binary(max_size=2000)), max_size=5, unique_by=lambda pair: pair[0]))
def test_samples_are_tar_members_at_the_offsets_said(samples):
    data, rows = b"", []
    for number, (key, jpeg) in enumerate(samples):
        more, row = encode_sample(Record(number, 4, 3, f"{key}.jpg", []), jpeg, len(data))
        data += b"".join(more)
        rows.append(row)
    with tarfile.open(fileobj=io.BytesIO(data + TAR_END)) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    assert list(members) == [f"{key}.{part}" for key, _ in samples for part in ("jpg", "json")]
    for (key, jpeg), row in zip(samples, np.array(rows, INDEX_DTYPE), strict=True):
        assert members[f"{key}.jpg"] == jpeg == data[row["jpg_offset"] : row["jpg_offset"] + row["jpg_size"]]
        json_bytes = data[row["json_offset"] : row["json_offset"] + row["json_size"]]
        assert members[f"{key}.json"] == json_bytes
        assert row["crc32"] == zlib.crc32(jpeg + json_bytes)


def test_record_round_trip():
    data = json.dumps(record(5)).encode()
    parsed = parse_record(data)
    assert json.loads(encode_record(parsed)) == json.loads(data)
    assert parse_record(encode_record(parsed)) == parsed
    assert parsed.key == "sa_5"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tree: tree.pop("image"), 'no "image" object'),
        (lambda tree: tree["image"].pop("width"), "image.width"),
        (lambda tree: tree["image"].update(width=True), "image.width"),
        (lambda tree: tree["image"].update(height=0), "1 to 65535"),
        (lambda tree: tree["image"].update(height=70000), "1 to 65535"),
        (lambda tree: tree["image"].update(image_id=-1), "63-bit"),
        (lambda tree: tree["image"].update(image_id=2**63), "63-bit"),
        (lambda tree: tree.update(annotations={}), "should be a list"),
        (lambda tree: tree["annotations"][1].pop("segmentation"), r"annotations\[1\]"),
        (lambda tree: tree["annotations"].append(3), r"annotations\[3\]"),
    ],
)
def test_bad_records_say_what_is_wrong(change, message):
    tree = record(5)
    change(tree)
    with pytest.raises(ValueError, match=message):
        parse_record(json.dumps(tree).encode())


@pytest.mark.parametrize("data", [b"", b"\xff", b"{", b"[]", b"3"])
def test_what_is_not_json(data):
    with pytest.raises(ValueError, match="JSON"):
        parse_record(data)


def test_manifest_index_and_quarantine_round_trip(tmp_path):
    shards = tuple(ShardInfo(shard_name(n), n + 1, n, 3, 10, "ab") for n in range(3))
    manifest = Manifest("images", shards)
    save_manifest(tmp_path, manifest)
    assert load_manifest(tmp_path) == manifest
    assert (manifest.num_positions, manifest.num_samples, manifest.num_masks, manifest.num_bytes) == (6, 3, 9, 30)

    rows = np.zeros(6, INDEX_DTYPE)
    rows["image_id"] = range(6)
    for start, shard in zip((0, 1, 3), shards, strict=True):
        write_whole(tmp_path / index_name(shard.name), npy_bytes(rows[start : start + shard.num_positions]))
    join_indexes(tmp_path, shards)
    assert open_index(tmp_path)["image_id"].tolist() == list(range(6))
    assert [(locate(manifest, p)[0].name[11], locate(manifest, p)[1]) for p in range(6)] == [
        ("0", 0), ("1", 0), ("1", 1), ("2", 0), ("2", 1), ("2", 2)
    ]  # fmt: skip

    assert load_quarantine(tmp_path) == []
    entries = [Quarantined(5, "b", "y"), Quarantined(2, "a", "x"), Quarantined(5, "b", "later")]
    save_quarantine(tmp_path, entries)
    assert load_quarantine(tmp_path) == [entries[1], entries[0]]
    assert not list(tmp_path.rglob("*.tmp"))
    assert info_name(shards[0].name) == "shard-000000.info.json"


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "does not parse"),
        ("[]", "does not parse"),
        ('{"version": 9}', "format version 9"),
        ('{"version": 1, "kind": "sa1b"}', "does not parse"),
        ('{"version": 1, "kind": "sa1b", "shards": [{"name": "x"}]}', "does not parse"),
    ],
)
def test_broken_manifests(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_manifest(tmp_path)
    with pytest.raises(ValueError, match="pack it with"):
        load_manifest(tmp_path / "absent")


def test_broken_indexes(tmp_path):
    shard = ShardInfo(shard_name(0), 2, 2, 0, 10, "ab")
    path = tmp_path / index_name(shard.name)
    for data, message in [
        (None, "is missing"),
        (b"", "is damaged"),
        (npy_bytes(np.zeros(2)), "another format"),
        (npy_bytes(np.zeros(1, INDEX_DTYPE)), "has 1 rows, the manifest says 2"),
    ]:
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            join_indexes(tmp_path, [shard])
        assert "--repair SRC..." in str(error.value)
    with pytest.raises(ValueError, match=r"data_tools\.index"):
        open_index(tmp_path)
