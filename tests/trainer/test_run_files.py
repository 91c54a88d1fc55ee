"""Files beside the checkpoints may fail, one at a time and without a torn line."""

import logging
import resource
import shutil
from pathlib import Path

import pytest

from trainer.run_files import Forgiving, LineFile


def test_a_lost_directory_is_made_again(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "run" / "lines")
    assert file.write("one\n")
    shutil.rmtree(tmp_path / "run")
    assert file.write("two\n")
    assert file.write("three\n")
    assert file.path.read_text() == "two\nthree\n"


def test_a_line_is_written_whole_or_not(tmp_path: Path) -> None:
    """The disk fills up in the middle of a line: here it is the limit of a file's size."""
    file = LineFile(tmp_path / "lines")
    assert file.write("0123456\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12, before[1]))
    try:
        assert not file.write("abcdefg\n")
        assert not file.write("hijklmn\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.write("opqrstu\n")
    assert file.path.read_text() == "0123456\nopqrstu\n"


def test_it_is_said_once_an_outage(caplog: pytest.LogCaptureFixture) -> None:
    forgiving = Forgiving("the file")

    def tries(*fails: bool) -> int:
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            for failing in fails:
                with forgiving:
                    if failing:
                        raise OSError(28, "No space left")
        return len(caplog.records)

    assert tries(False, True, True, True) == 1
    assert "the file cannot be written: [Errno 28] No space left. Training goes on without" in caplog.text
    assert tries(True, False, True) == 1
    with pytest.raises(ValueError, match="something else"), forgiving:
        raise ValueError("something else")
