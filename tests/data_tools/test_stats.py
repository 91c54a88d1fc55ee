import json

import pytest
from PIL import Image

from data_tools.pack import main as pack
from data_tools.stats import main as stats
from tests.data_tools.tiny import jpeg_bytes, record, sa1b_files, write_folder


def test_stats_of_sa1b(tmp_path, capsys):
    source = write_folder(tmp_path / "raw", {**sa1b_files(range(6)), "sa_2.jpg": b"broken"})
    assert pack(["sa1b", str(source), "--out", str(tmp_path / "out"), "--allow-bad=1", "--shard-size=4"]) == 0
    assert stats([str(tmp_path / "out"), "--out", str(tmp_path / "stats")]) == 0
    text = capsys.readouterr().out
    assert "5 images (1 gaps) with 15 masks in 2 shards" in text
    tree = json.loads((tmp_path / "stats/stats.json").read_text())
    assert tree["quantities"]["masks per image"]["mean"] == 3
    areas = [each["area"] for n in (0, 1, 3, 4, 5) for each in record(n)["annotations"]]
    found = tree["quantities"]["mask area in pixels"]
    assert found["num_values"] == 15
    assert (found["quantiles"]["p0"], found["quantiles"]["p100"]) == (min(areas), max(areas))
    for quantity in tree["quantities"].values():
        assert sum(quantity["histogram"]["counts"]) == quantity["num_values"], "no value outside the bins"
    assert Image.open(tmp_path / "stats/stats.png").size[0] > 100


def test_stats_of_images_and_of_a_sample(tmp_path, capsys):
    source = write_folder(tmp_path / "raw", {f"{i}.jpg": jpeg_bytes(i, 30 + i) for i in range(3)})
    assert pack(["images", str(source), "--out", str(tmp_path / "out")]) == 0
    assert stats([str(tmp_path / "out"), "--out", str(tmp_path / "stats")]) == 0
    assert "predicted IoU" not in capsys.readouterr().out
    write_folder(tmp_path / "raw2", sa1b_files(range(6)))
    assert pack(["sa1b", str(tmp_path / "raw2"), "--out", str(tmp_path / "out2")]) == 0
    assert stats([str(tmp_path / "out2"), "--max-images", "2", "--out", str(tmp_path / "stats")]) == 0
    tree = json.loads((tmp_path / "stats/stats.json").read_text())
    assert tree["quantities"]["predicted IoU"]["num_values"] == 6
    assert tree["quantities"]["masks per image"]["num_values"] == 6


@pytest.mark.parametrize("arguments", [["absent"], ["."]])
def test_stats_of_nothing(tmp_path, capsys, arguments):
    assert stats([str(tmp_path / arguments[0])]) == 2
    assert "python -m data_tools.pack" in capsys.readouterr().err
