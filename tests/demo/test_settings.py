"""What the page sends: limits, links, files, and the method panel's fields."""

import dataclasses
import types
import typing

import pytest

from fastdiff.cli.errors import InputError
from fastdiff.config import PRESETS, make_methods, methods, to_plan
from fastdiff.demo.generate_tab import at_any_size
from fastdiff.demo.limits import Limits
from fastdiff.demo.method_panel import about, knobs, plan_of
from fastdiff.demo.sentences import sentence
from fastdiff.demo.wish import Wish, of_link, of_record, to_link, whole
from fastdiff.models import Defaults

LIMITS = Limits(side=64, steps=10, frames=9, prompt=20)


@pytest.mark.parametrize("changes, words", [
    ({"prompt": "  "}, "the prompt is empty"),
    ({"prompt": "x" * 21}, "21 characters: accepted are up to 20"),
    ({"negative": "x" * 21}, "21 characters"),
    ({"kind": "../x"}, "unknown kind"),
    ({"seed": -1}, "seed -1 is not possible here"),
    ({"seed": 2**32}, "accepted is 0 to 4294967295"),
    ({"steps": 11}, "steps 11 is not possible here: accepted is 1 to 10"),
    ({"steps": 0}, "accepted is 1 to 10"),
    ({"height": 65}, "height 65"), ({"width": 0}, "width 0"), ({"frames": 10}, "frames 10"),
    ({"guidance": 1e9}, "guidance"), ({"guidance": float("nan")}, "guidance"),
])
def test_what_is_out_of_bounds_is_refused_in_a_sentence(changes, words):
    with pytest.raises(InputError, match=words):
        Wish(**{"kind": "image", "prompt": "a cat", **changes}).check(LIMITS)


def test_limits_follow_the_model():
    found = Limits.of(Defaults(height=256, width=384, frames=33))
    assert (found.side, found.frames) == (768, 65)
    assert Limits.of(Defaults()).side == 1024


def test_numbers_of_fields():
    assert whole("seed", 3.0) == 3 and whole("seed", None) is None
    for value in (1.5, True, "7", float("nan"), float("inf")):
        with pytest.raises(InputError):
            whole("seed", value)


def test_a_link_carries_a_wish():
    wish = Wish("video", "ein roter Apfel — schön", seed=7, frames=9, compare=False,
                plan=to_plan(make_methods(["turbo"], {})))
    assert of_link(to_link(wish)) == wish


@pytest.mark.parametrize("text", ["", "@@@", "bnVsbA", "W10", "e30", "eyJraW5kIjozfQ"])
def test_a_broken_link_is_refused(text):
    with pytest.raises(InputError):
        of_link(text)


@pytest.mark.parametrize("record", [
    {}, {"kind": "image"}, {"kind": "image", "prompt": 3},
    {"kind": "image", "prompt": "a", "seed": True}, {"kind": "image", "prompt": "a", "plan": []},
    {"kind": "image", "prompt": "a", "plan": {"fastdiff_plan": 1, "methods": [{"method": "x"}]}},
    {"kind": "image", "prompt": "a", "plan": {"fastdiff_plan": 1, "methods": [
        {"method": "tile-sparse", "density": "half"}]}},
])
def test_settings_of_the_wrong_type_are_refused(record):
    with pytest.raises((InputError, ValueError)):
        of_record(record)


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_knob_reads_back_what_it_shows(name):
    cls = methods()[name]
    found = knobs(cls)
    fields = {field.name for field in dataclasses.fields(cls)}
    assert {knob.name for knob in found} <= fields
    for knob in found:
        assert knob.read(knob.shown(knob.default)) == knob.default
    plan = plan_of([name], {(name, knob.name): knob.shown(knob.default) for knob in found})
    assert plan == to_plan(make_methods([name], {}))
    assert about(cls)


@pytest.mark.parametrize("name", sorted(methods()))
def test_no_knob_of_the_page_names_a_file(name):
    """What is typed becomes words and numbers; nothing that opens a path."""
    allowed = (bool, int, float, str, types.NoneType, tuple, ...)
    for knob in knobs(methods()[name]):
        for part in (knob.hint, *typing.get_args(knob.hint)):
            assert part in allowed or typing.get_origin(part) in (
                typing.Union, types.UnionType, tuple), f"{name}.{knob.name}: {part}"
        assert "file" not in knob.name and "path" not in knob.about.lower().split()


def test_knobs_of_the_default_method_are_documented():
    assert all(knob.about for knob in knobs(methods()["tile-sparse"]))


@pytest.mark.parametrize("shown, words", [
    ({("tile-sparse", "density"): "2"}, "density=2.0 is not possible"),
    ({("tile-sparse", "density"): "much"}, "tile-sparse: density='much' is not possible"),
    ({("tile-sparse", "tile"): "4,4"}, "3 whole numbers"),
    ({("tile-sparse", "tile"): "x" * 300}, "too long"),
])
def test_bad_values_are_told_with_the_method(shown, words):
    with pytest.raises((InputError, ValueError), match=words):
        plan_of(["tile-sparse"], shown)


def test_methods_compose_and_two_of_a_kind_do_not():
    names = ["tile-sparse", *(n for n, cls in methods().items() if cls.kind == "tokens")][:2]
    plan = plan_of(names, {("tile-sparse", "density"): "0.3"})
    assert plan is not None
    assert [entry["method"] for entry in plan["methods"]] == names
    assert plan["methods"][0]["density"] == 0.3
    assert plan_of([], {}) is None
    with pytest.raises(ValueError, match="one attention method at a time"):
        plan_of(["tile-sparse", "random-blocks"], {})
    with pytest.raises(InputError, match="unknown method"):
        plan_of(["no-such"], {})


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_any_size_lifts_the_break_even_alone(preset):
    plan = to_plan(make_methods([preset], {}))
    free = at_any_size(plan, "video")
    assert free is not None
    before, after = plan["methods"][0], free["methods"][0]
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"min_tokens", "max_density"}
    own = to_plan(make_methods([preset], {"min_tokens": 64}))
    kept = at_any_size(own, "image")
    assert kept is not None and kept["methods"][0]["min_tokens"] == 64
    assert at_any_size(None, "image") is None


def test_a_sentence_keeps_the_commands_in_it():
    error = InputError("leave --size out, or run `fastdiff calibrate --method tile-sparse`")
    assert sentence(error) == (
        "leave size out, or run `fastdiff calibrate --method tile-sparse`", True)
