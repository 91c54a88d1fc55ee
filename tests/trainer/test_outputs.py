"""Places where a command cannot write are refused, with the option's name."""

from pathlib import Path

import pytest

from trainer.outputs import check_file, check_folder, check_place


def test_new_and_old_files_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_file("--out", Path("new.json"))
    Path("old.json").touch()
    check_file("--out", Path("old.json"))
    check_place("--out", tmp_path)


@pytest.mark.parametrize("check", [check_file, check_place])
def test_no_folder(check, tmp_path):
    with pytest.raises(ValueError, match=r"--picture: .*none is no folder: make it first"):
        check("--picture", tmp_path / "none" / "a.png")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder: name a file"):
        check_file("--out", tmp_path)


def test_a_file_is_no_folder_nor_is_there_one_below_it(tmp_path):
    (tmp_path / "file").touch()
    check_folder("--out", tmp_path / "a" / "b")
    check_folder("--out", tmp_path)
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"--out: .*file is a file: name a folder"):
            check_folder("--out", path)


@pytest.mark.parametrize("name", ["new", "old"])
def test_no_permission(name, tmp_path, monkeypatch):
    """Root may write everywhere, so the answer is made."""
    (tmp_path / "old").touch()
    asked = []
    monkeypatch.setattr("os.access", lambda path, mode: asked.append(path))
    with pytest.raises(ValueError, match=f"no permission to write .*{name}"):
        check_place("--out", tmp_path / name)
    assert asked == [tmp_path / "old" if name == "old" else tmp_path]
