"""The scripts of demo/examples do what they say, at the smallest size."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "demo" / "examples"


def script(monkeypatch, name: str, *words: str | Path, code: int | None = None) -> None:
    monkeypatch.setattr(sys, "argv", [name, *(str(word) for word in words)])
    if code is None:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert left.value.code == code


def test_compare(monkeypatch, tmp_path, capsys):
    script(monkeypatch, "compare.py", "a red apple", "--steps", "2", "--size", "64",
           "--out", tmp_path / "both.png")
    with Image.open(tmp_path / "both.png") as both:
        assert both.size == (128, 64)
    assert "PSNR" in capsys.readouterr().out


def test_a_table_is_made_and_goes_on(monkeypatch, tmp_path, capsys):
    words = [EXAMPLES / "prompts.csv", tmp_path / "out", "--set", "size=32", "steps=1", "frames=5"]
    script(monkeypatch, "batch_csv.py", *words, code=0)
    assert "3 made, 0 were there" in capsys.readouterr().out
    script(monkeypatch, "batch_csv.py", *words, code=0)
    assert "0 made, 3 were there" in capsys.readouterr().out


def test_a_sweep_is_plotted(monkeypatch, tmp_path):
    script(monkeypatch, "sweep.py", tmp_path, "--densities", "0.2", "0.6", "--seeds", "1",
           "--prompts", "a red apple", "--set", "size=128", "steps=2", "dense_steps=0",
           "tile=1x2x2")
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["density"] for row in rows] == [0.2, 0.6]
    assert rows[0]["computed"] < rows[1]["computed"] <= 1 and rows[0]["psnr"] > 0
    with Image.open(tmp_path / "sweep.png") as plot:
        assert plot.size == (640, 400)
