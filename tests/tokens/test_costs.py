"""The measured costs: once a machine, in a file, and the guard that asks them."""

# diffusers exports its classes lazily and annotates arguments narrowly; no type is checked here
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import json

import pytest
import torch
import zoo

import fastdiff
from fastdiff.tokens import costs
from fastdiff.tokens.at_edm import AtEdm

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    costs.forget()
    yield
    costs.forget()


def test_measured_once_and_kept(tmp_path):
    made = []

    def make():
        made.append(1)
        return lambda: torch.randn(64, 64) @ torch.randn(64, 64)

    first = costs.seconds("a product", CPU, make)
    assert first > 0 and costs.seconds("a product", CPU, make) == first and len(made) == 1
    costs.forget()
    assert costs.seconds("a product", CPU, make) == first and len(made) == 1
    folder = tmp_path / "cache"
    assert [path.name for path in folder.iterdir()] == ["costs-1.json"]
    assert json.loads((folder / "costs-1.json").read_text()) == {"a product": first}


@pytest.mark.parametrize("content", ["", "[1, 2]", "{\"a\": \"b\"", "{\"a product\": -1}"])
def test_a_broken_file_is_measured_anew(tmp_path, content):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "costs-1.json").write_text(content)
    assert costs.seconds("a product", CPU, lambda: lambda: None) > 0


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "file"))
    assert costs.seconds("a product", CPU, lambda: lambda: None) > 0


def test_cache_folder_of_the_platform(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTDIFF_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert costs.cache_folder() == tmp_path / "fastdiff"
    monkeypatch.setattr("sys.platform", "darwin")
    assert costs.cache_folder().parts[-3:] == ("Library", "Caches", "fastdiff")


def test_a_verdict_wants_a_margin():
    assert costs.Verdict(1.0, 0.9).pays and not costs.Verdict(1.0, 0.995).pays
    assert str(costs.Verdict(0.002, 0.001)) == "1.00 ms, stock 2.00 ms"


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_guard_follows_the_measurement(name, monkeypatch):
    pipe = zoo.build(name)
    stock = zoo.call(name, pipe)
    fastdiff.enable(pipe, AtEdm(early_steps=0), strict=True)
    # a few dozen tokens: ranking costs more than it saves
    assert torch.equal(zoo.call(name, pipe), stock)
    told = pipe.fastdiff.report.methods["at-edm"]
    assert told["blocks whole: would not pay"] > 0 and "blocks pruned" not in told
    assert any(str(value).startswith("whole (") and "stock" in str(value)
               for value in told.values())
    monkeypatch.setattr(costs, "measure", lambda run, device: 1.0 if run() is None else 0.5)
    monkeypatch.setattr(costs.Verdict, "pays", property(lambda self: True))
    assert not torch.equal(zoo.call(name, pipe), stock)
    assert pipe.fastdiff.report.methods["at-edm"]["blocks pruned"] > 0
