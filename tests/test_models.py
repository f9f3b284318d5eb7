"""Shipped models: found by name, with defaults that their own pipeline accepts."""

import json
import shutil

import pytest
import torch
import zoo

from fastdiff import models
from fastdiff.models import packed


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


def test_eight_bit_weights_come_back_within_half_a_step():
    torch.manual_seed(0)
    weights = {"conv": torch.randn(24, 16, 3, 3), "matrix": torch.randn(70, 65) * 0.02,
               "bias": torch.randn(64), "steps": torch.arange(5), "zero": torch.zeros(64, 64)}
    back = packed.unpack(packed.pack(weights), torch.float32)
    assert back.keys() == weights.keys()
    for name in ("conv", "matrix"):
        rows, others = weights[name].flatten(1), back[name].flatten(1)
        # fp32 scales; the half step itself is hit by ties
        assert ((rows - others).abs().amax(1) <= rows.abs().amax(1) / 254 * 1.0001).all()
    assert torch.equal(back["bias"], weights["bias"].bfloat16().float())
    assert torch.equal(back["steps"], weights["steps"]) and not back["zero"].any()


def test_a_folder_with_eight_bit_and_lent_parts(home):
    before = models.load("small")
    packed.pack_part(home / "small" / "transformer")
    # another model without an autoencoder of its own
    shutil.copytree(home / "small", home / "second")
    shutil.rmtree(home / "second" / "vae")
    (home / "second" / "fastdiff.json").write_text(json.dumps({"parts": {"vae": "small"}}))
    for name in ("small", "second"):
        pipe = models.load(name, dtype="float32")
        assert not any((home / name / "transformer").glob("*model.safetensors"))
        for part in ("transformer", "vae"):
            for (key, old), new in zip(getattr(before, part).state_dict().items(),
                                       getattr(pipe, part).state_dict().values(), strict=True):
                assert (old - new).abs().max() <= old.abs().max() / 127, key
    assert models.load("second", dtype="bfloat16").transformer.dtype == torch.bfloat16
    (home / "small" / "transformer" / "config.json").write_text(json.dumps(
        {**before.transformer.config, "num_layers": before.transformer.config.num_layers + 1}))
    with pytest.raises(ValueError, match="missing"):
        models.load("small")


def test_weights_together_stay_below_forty_megabytes():
    weights = list(models.HOME.rglob("*.safetensors"))
    assert weights and sum(path.stat().st_size for path in weights) <= 40e6
