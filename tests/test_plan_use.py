"""Plans as users have them: edited, damaged, of another version, in another place."""

# pyright: basic

import copy
import json
from pathlib import Path

import pytest
import zoo

import fastdiff
from fastdiff.calibration import Goal, Runs, Work, search
from fastdiff.config import from_plan, to_plan
from fastdiff.policies.sparse_vdit import SparseVDiT
from fastdiff.policies.tile_sparse import TileSparse

STEPS = 4
SPARSE = {"dense_steps": 1, "min_tokens": 1, "max_density": 1.0, "sink": 0, "tile": (1, 2, 2)}


@pytest.fixture(scope="module")
def wan():
    return zoo.build("wan")


@pytest.fixture(scope="module")
def plans(wan):
    call = {**zoo.size("wan"), **zoo._CALL["wan"], "num_inference_steps": STEPS}
    found = {}
    for base in (TileSparse(**SPARSE), SparseVDiT(**SPARSE)):
        runs = Runs(wan, ["a red cat"], call, Work(None, {}))
        made = search.calibrate(runs, base, Goal(density=0.4))
        found[base.name] = json.loads(json.dumps(to_plan([made])))
    return found


def _edited(plan, key, value):
    made = copy.deepcopy(plan)
    made["methods"][0]["calibration"][key] = value
    return made


def _first(table, entry):
    """The table with another first entry in its second range."""
    made = copy.deepcopy(table)
    made[1][0] = entry
    return made


@pytest.mark.parametrize("name", ["tile-sparse", "sparse-vdit"])
@pytest.mark.parametrize("key, value", [
    ("model", []), ("model", {}), ("model", {"transformer": 1}), ("scheduler", "UniPC"),
    ("scheduler", {"class": "UniPC"}), ("steps", 0), ("steps", "4"), ("steps", 4.5),
    ("layers", [None, [2, 3, 5]]), ("layers", 2), ("begins", [2, 0, 3]), ("begins", [1, 2, 3]),
    ("begins", ["a", "b", "c"]), ("begins", []), ("stripes", [1]), ("stripes", {"0": "ff"}),
    ("stripes", {"0": {"0": "0xg"}}), ("stripes", {"0": {"0": 5}}), ("found", None)])
def test_an_edited_calibration_is_refused_by_the_name_of_what_is_wrong(plans, name, key, value):
    with pytest.raises(ValueError, match=f"calibration's {key}.*accepted is"):
        from_plan(_edited(plans[name], key, value))


@pytest.mark.parametrize("name, key, entry", [
    *(("tile-sparse", "density", entry) for entry in (
        None, "a", 1.5, -0.1, float("nan"), [], [0.5], [0.5, 0.5, 0.5], [0.5, "a"], [[0.5], 0.5])),
    *(("sparse-vdit", "modes", entry) for entry in (None, "", "f", "fff", "fz", 5, ["f", "f"]))])
def test_an_edited_table_is_refused_with_the_place(plans, name, key, entry):
    table = plans[name]["methods"][0]["calibration"][key]
    with pytest.raises(ValueError, match=f"{key} of range 1, layer 0.*for each head"):
        from_plan(_edited(plans[name], key, _first(table, entry)))
    for damaged in ([], {}, 5, [None]):
        with pytest.raises(ValueError, match=f"{key} table must have 3 ranges of 2 layers"):
            from_plan(_edited(plans[name], key, damaged))


def test_a_refused_plan_changes_nothing(wan, plans):
    before = zoo.fingerprint(wan)
    with pytest.raises(ValueError, match="steps"):
        fastdiff.enable(wan, plan=_edited(plans["tile-sparse"], "steps", 0))
    assert zoo.fingerprint(wan) == before and not wan.fastdiff.enabled


def test_a_density_by_hand_is_a_plan_too(wan, plans):
    """One number in place of one for each head, as a person would write it."""
    table = plans["tile-sparse"]["methods"][0]["calibration"]["density"]
    fastdiff.enable(wan, plan=_edited(plans["tile-sparse"], "density", _first(table, 0.5)))
    assert zoo.call("wan", wan, num_inference_steps=STEPS).isfinite().all()
    fastdiff.disable(wan)


def test_a_plan_of_a_later_version_says_so(plans):
    with pytest.raises(ValueError, match="of version 2, and this FastDiff reads version 1"):
        from_plan({**plans["tile-sparse"], "fastdiff_plan": 2})


def test_plan_files_are_found_by_any_path(plans, tmp_path):
    class Somewhere:
        def __fspath__(self):
            return str(tmp_path / "plan.json")

    (tmp_path / "plan.json").write_text(json.dumps(plans["tile-sparse"]))
    given = (str(tmp_path / "plan.json"), tmp_path / "plan.json", Somewhere())
    assert len({from_plan(path)[0].name for path in given}) == 1
    with pytest.raises(ValueError, match="is a folder"):
        from_plan(Path(tmp_path))


def _search(pipe, folder=None, prompts=("a red cat",), **options):
    call = {**zoo.size("wan"), **zoo._CALL["wan"], "num_inference_steps": STEPS}
    runs = Runs(pipe, [*prompts], call, Work(folder, {}))
    return search.calibrate(runs, TileSparse(**SPARSE), Goal(density=0.4), **options)


def test_what_was_on_before_a_search_is_on_after_it(plans):
    pipe = zoo.build("wan")
    handle = fastdiff.enable(pipe, "tile-sparse", "bottleneck", force=True, strict=True)
    _search(pipe)
    assert pipe.fastdiff.methods == handle.methods and pipe.fastdiff.strict
    fastdiff.disable(pipe)
    with pytest.raises(ValueError, match="at least one prompt"):
        _search(pipe, prompts=())
    with pytest.raises(ValueError, match="ranges=0 is not possible: accepted is 1 or more"):
        _search(pipe, ranges=0)
    assert not pipe.fastdiff.enabled


def test_a_damaged_part_of_a_search_is_made_again(wan, tmp_path, plans):
    folder = tmp_path / "work"
    _search(wan, folder)
    parts = sorted(folder.glob("*.pt"))
    whole = {part.name: part.read_bytes() for part in parts}
    for part, cut in zip(parts, (0, 50, 300), strict=False):
        part.write_bytes(part.read_bytes()[:cut])
    again = json.loads(json.dumps(to_plan([_search(wan, folder)])))
    assert again == plans["tile-sparse"]
    assert all(len(part.read_bytes()) == len(whole[part.name]) for part in parts)
    (folder / "settings.json").write_text('{"st')
    with pytest.raises(ValueError, match="settings.json' is damaged.*--restart"):
        Work(folder, {})
