"""`make demo`, a few steps of everything: each command of the pipeline runs after the other."""

import pytest

from trainer import demo


@pytest.mark.dist
def test_the_whole_pipeline_runs_on_synthetic_scenes_and_goes_on(tmp_path, capfd):
    out = tmp_path / "demo"
    assert demo.main(["--out", str(out), "--quick"]) == 0
    for name in ("masks.png", "table.md", "sam_tiny.pth", "runs/sam_tiny/metrics.jsonl", "runs/mae_tiny/tensorboard"):
        assert (out / name).exists(), name
    said = capfd.readouterr().out
    assert "carried" in said
    assert "| 3 clicks |" in said


def test_a_folder_that_is_not_from_a_demo_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(SystemExit, match="not from a demo"):
        demo.main(["--out", str(tmp_path)])
    assert (tmp_path / "thesis.txt").read_text() == "dear"


def test_data_that_is_no_folder_is_refused(tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path / "demo"), "--data", str(tmp_path / "nowhere")]) == 2
    assert "no folder" in capsys.readouterr().err
