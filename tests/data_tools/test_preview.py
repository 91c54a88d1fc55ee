import numpy as np
import pytest
from PIL import Image

from data_tools.pack import main as pack
from data_tools.preview import main as preview
from data_tools.preview import outline
from tests.data_tools.tiny import jpeg_bytes, sa1b_files, write_folder


@pytest.fixture
def packed(tmp_path):
    source = write_folder(tmp_path / "raw", {**sa1b_files(range(6)), "sa_2.jpg": b"broken"})
    pack(["sa1b", str(source), "--out", str(tmp_path / "out")])
    return tmp_path / "out"


def test_sheet_shows_masks(packed, tmp_path):
    sheet = tmp_path / "sheet.png"
    assert preview([str(packed), "--out", str(sheet), "--side", "100"]) == 0
    assert Image.open(sheet).size == (300, 2 * 114), "5 samples in a grid of 3 columns"
    first = sheet.read_bytes()
    assert preview([str(packed), "--out", str(sheet), "--side", "100"]) == 0
    assert sheet.read_bytes() == first


def test_chosen_positions(packed, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert preview([str(packed), "--out", str(sheet), "--positions", "5", "0", "--side", "64"]) == 0
    assert Image.open(sheet).size == (128, 78)
    assert preview([str(packed), "--out", str(sheet), "--positions", "2", "99"]) == 2
    assert "holds no sample at [2, 99]" in capsys.readouterr().err
    assert preview([str(packed), "--out", str(sheet), "--num", "0"]) == 2


def test_plain_images(tmp_path):
    source = write_folder(tmp_path / "raw", {f"{i}.jpg": jpeg_bytes(i, mode="L") for i in range(3)})
    pack(["images", str(source), "--out", str(tmp_path / "out")])
    assert preview([str(tmp_path / "out"), "--out", str(tmp_path / "sheet.png")]) == 0


def test_outline():
    inside = np.zeros((5, 6), bool)
    inside[1:4, 2:6] = True
    expected = inside.copy()
    expected[2, 3:6] = False
    assert (outline(inside) == expected).all()
