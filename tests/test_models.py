"""Shipped models: found by name, with defaults that their own pipeline accepts."""

import json

import pytest
import torch
import zoo

from fastdiff import models


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A models folder with one shipped model, `small`."""
    folder = tmp_path / "small"
    zoo.build("pixart_sigma").save_pretrained(folder)
    (folder / "fastdiff.json").write_text(json.dumps(
        {"kind": "image", "height": 64, "frames_rule": "4n+1", "max_sequence_length": 24,
         "call": {"clean_caption": False}, "note": "unknown keys are let be"}))
    monkeypatch.setattr(models, "HOME", tmp_path)
    return tmp_path


def test_a_shipped_model_is_found_and_loaded_by_name(home):
    assert list(models.shipped()) == ["small"]
    best = models.defaults("small")
    assert best.kind == ("image",) and best.height == 64 and best.width is None
    assert best.frame_factor == 4
    assert best.arguments == {"clean_caption": False, "max_sequence_length": 24}
    pipe = models.load("small", dtype="bfloat16")
    assert pipe.transformer.dtype == torch.bfloat16
    assert models.load("small").transformer.dtype == torch.float32


def test_the_hash_follows_the_content(home):
    before = models.find("small").sha256
    assert before == models.find("small").sha256
    (home / "small" / "README.md").write_text("a card")
    (home / "small" / "fastdiff.json").write_text("{}")
    assert models.find("small").sha256 == before
    (home / "small" / "transformer" / "config.json").write_text("{}")
    assert models.find("small").sha256 != before


@pytest.mark.parametrize(("name", "told"), [
    ("smal", "did you mean small?"), ("tiny-video", "not in this installation"),
    ("./small", "unknown model"), ("a/b/c", "unknown model"), ("/nowhere", "unknown model"),
])
def test_unknown_names(home, name, told):
    with pytest.raises(ValueError, match=told.replace("?", r"\?")):
        models.find(name)


def test_folders_and_hub_ids(home, tmp_path):
    found = models.find(tmp_path / "small")
    assert found.folder == tmp_path / "small" and not found.shipped
    assert models.find("owner/name").folder is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="not a diffusers pipeline folder"):
        models.find(tmp_path / "empty")
    (tmp_path / "small" / "fastdiff.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        models.defaults("small")


@pytest.mark.parametrize("name", list(models.shipped()))
def test_what_ships_is_small_complete_and_loads(name):
    model = models.shipped()[name]
    best = model.defaults
    assert model.bytes < 30e6 and best.kind and best.steps and best.height and best.width
    if "video" in best.kind:
        assert best.frames and best.frame_factor and (best.frames - 1) % best.frame_factor == 0
        assert best.fps
    if best.multiple:
        assert best.height % best.multiple == best.width % best.multiple == 0
    assert models.load(model).components
