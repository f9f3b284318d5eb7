"""What the demo makes is what the command line and plain Python make; and it can be stopped."""

import json

import numpy as np
import pytest
import torch
from demo_cases import SPARSE
from PIL import Image
from typer.testing import CliRunner

from fastdiff.cli import app
from fastdiff.config import make_methods, to_plan
from fastdiff.demo import density, python_lines
from fastdiff.demo.recording import Recording, share
from fastdiff.demo.wish import Wish, of_record
from fastdiff.demo.worker import STOPPED, Ticket
from fastdiff.policies import methods as policies

LONG = 300  # seconds; only a hang takes them
PLAN = to_plan(make_methods(["tile-sparse"], SPARSE))


def ticket(user="a"):
    return Ticket(user, lambda _: None, 600)


@pytest.fixture
def made(renderer):
    return renderer.make(Wish("video", "a red cat", seed=3, steps=3, plan=PLAN), ticket())


def test_stock_beside_fast(made, renderer):
    assert made.stock is not None and not renderer.pipe.fastdiff.enabled
    assert made.fast.frames.shape == made.stock.frames.shape == (5, 32, 48, 3)
    assert np.abs(made.fast.frames - made.stock.frames).max() > 0
    alone = renderer.make(Wish("video", "a red cat", seed=3, steps=3), ticket())
    np.testing.assert_array_equal(alone.fast.frames, made.stock.frames)
    assert alone.stock is None and alone.report is None


def test_the_table_has_every_layer_and_step(made):
    rows = np.array(made.table["density"])
    assert rows.shape == (len(made.table["layers"]), 3)
    assert made.report["density"] == pytest.approx(rows.mean(), abs=1e-3)
    chart = density.chart(made.table)
    assert chart.count("<title>") == rows.size and "step 3: density" in chart


def test_dense_steps_show_as_one(renderer):
    plan = to_plan(make_methods(["tile-sparse"], {**SPARSE, "dense_steps": 1}))
    made = renderer.make(Wish("image", "a cat", steps=3, plan=plan, compare=False), ticket())
    rows = np.array(made.table["density"])
    assert (rows[:, 0] == 1).all() and (rows[:, 1:] < 1).all()


def test_the_python_lines_make_the_same(made, renderer):
    space: dict = {}
    exec(python_lines.lines(made.settings, renderer.pipe), space)
    np.testing.assert_array_equal(np.asarray(space["frames"]), made.fast.frames)


def test_the_settings_file_makes_the_same(house, tmp_path):
    wish = Wish("image", "a red cat", seed=5, steps=2, plan=PLAN)
    job = house.ask("a", wish)
    assert job.over.wait(LONG) and job.problem == ""
    entry = job.result
    done = CliRunner().invoke(app, ["generate", "--from", str(entry.files["settings"]), "-o",
                                    str(tmp_path / "again.png")])
    assert done.exit_code == 0, done.stderr
    one, two = (np.asarray(Image.open(path)) for path in
                (entry.files["fast"], tmp_path / "again.png"))
    np.testing.assert_array_equal(one, two)
    inside = json.loads(Image.open(entry.files["fast"]).info["fastdiff"])
    assert inside["seed"] == 5 and inside["plan"]["methods"][0]["density"] == 0.4
    again = of_record(json.loads(entry.files["settings"].read_text()))
    assert (again.prompt, again.seed, again.steps) == ("a red cat", 5, 2)
    assert entry.facts["psnr"] is not None and 0 < entry.facts["ssim"] <= 1
    assert set(entry.files) == {"fast", "stock", "difference", "settings"}


def test_stop_ends_a_run_within_a_block(house):
    job = house.ask("a", Wish("video", "a cat", steps=5000))
    while job.step < 1:
        assert not job.over.wait(0.01), job.problem
    job.stop()
    assert job.over.wait(LONG) and job.state == STOPPED and job.step < 5000
    assert not house.renderer.pipe.fastdiff.enabled
    after = house.ask("a", Wish("image", "a cat", steps=1))
    assert after.over.wait(LONG) and after.problem == ""


def test_no_memory_is_told_and_the_next_job_runs(house, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    transformer = house.renderer.pipe.transformer
    monkeypatch.setattr(type(transformer), "forward", full)
    job = house.ask("a", Wish("image", "a cat", plan=PLAN))
    assert job.over.wait(LONG) and "out of memory" in job.problem
    monkeypatch.undo()
    after = house.ask("a", Wish("image", "a cat", plan=PLAN))
    assert after.over.wait(LONG) and after.problem == ""


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_recording_is_true(renderer, kind):
    """Mass against the softmax of the very queries and keys; kept against the method's choice."""
    seen = {}
    base = policies()["tile-sparse"]

    class Seen(base):
        def select(self, query, key, tiles, context):
            mask = super().select(query, key, tiles, context)
            seen[context.layer, context.clock.step] = (query, key, tiles, mask)
            return mask

    recording = Recording({"tile-sparse": Seen(**SPARSE)}, frozenset({0, 2}))
    renderer.record(Wish(kind, "a red cat", steps=3), recording, ticket())
    assert {step for _, step, _ in recording.places} == {0, 2} and recording.refused == {}
    assert recording.frames.shape[1:] == (32, 48, 3)
    for (layer, step, _), place in recording.places.items():
        query, key, tiles, mask = seen[layer, step]
        scores = torch.einsum("shd,thd->hst", query[0], key[0]) * query.shape[-1] ** -0.5
        lengths = tiles.lengths.long()
        names = torch.repeat_interleave(torch.arange(tiles.blocks), lengths)
        one_hot = torch.nn.functional.one_hot(names, tiles.blocks).float()
        wanted = one_hot.T @ (scores.softmax(-1) @ one_hot) / tiles.lengths[:, None]
        torch.testing.assert_close(place.mass.float(), wanted, atol=2e-3, rtol=0)
        assert torch.equal(place.kept.bool(), mask.keep[0])
        told = share(place, 0)
        assert 0 < told.density < 1 and told.held <= told.best + 1e-6 <= 1 + 1e-6


def test_recording_leaves_the_run_dense(renderer):
    recording = Recording({"tile-sparse": policies()["tile-sparse"](**SPARSE)}, frozenset({0}))
    renderer.record(Wish("image", "a red cat", steps=2), recording, ticket())
    stock = renderer.make(Wish("image", "a red cat", steps=2), ticket())
    np.testing.assert_array_equal(recording.frames, stock.fast.frames)
    assert not renderer.pipe.fastdiff.enabled


@pytest.mark.parametrize("name", sorted(policies()))
def test_every_attention_method_can_be_asked_or_says_why(renderer, name):
    knobs = {"min_tokens": 1, "max_density": 1.0}
    recording = Recording({name: policies()[name](**knobs)}, frozenset({0}))
    renderer.record(Wish("video", "a red cat", steps=2), recording, ticket())
    assert recording.places or recording.refused[name]
    for place in recording.places.values():
        rows = place.mass.float().sum(-1)
        torch.testing.assert_close(rows, torch.ones_like(rows), atol=2e-2, rtol=0)
        assert place.kept.min() >= 0 and place.kept.max() <= 1
