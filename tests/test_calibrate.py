"""Plans: what calibrate finds, that it goes on after a stop, and what a plan refuses."""

import dataclasses
import itertools
import json
from typing import Any

import imageio.v3 as iio
import pytest
import torch
import zoo
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from typer.testing import CliRunner

import fastdiff
from fastdiff.calibration import Goal, Rules, Runs, Work, prompts, search
from fastdiff.calibration.budgets import Curve, allocate, hull
from fastdiff.calibration.probe import Ledger
from fastdiff.cli import app
from fastdiff.cli.output import without_tables
from fastdiff.clock import StepClock
from fastdiff.config import from_plan, to_plan
from fastdiff.method import Method
from fastdiff.policies.calibrated import Calibration
from fastdiff.policies.sparse_vdit import SparseVDiT
from fastdiff.policies.tile_sparse import TileSparse

STEPS = 4
SPARSE = {"dense_steps": 1, "min_tokens": 1, "max_density": 1.0, "sink": 0}


@pytest.fixture(scope="module")
def wan():
    return zoo.build("wan")


def runs_of(pipe, folder=None, family="wan", asked=("a red cat", "a dog")):
    call = {**zoo.size(family), **zoo._CALL[family], "num_inference_steps": STEPS}
    return Runs(pipe, [*asked], call, Work(folder, {"steps": STEPS}))


def calibrate(*args, **options) -> Any:
    return search.calibrate(*args, **options)


def plain(policy: Method):
    """The plan as a file would hold it."""
    return json.loads(json.dumps(to_plan([policy])))


@pytest.fixture(scope="module")
def searched(wan) -> Any:
    return calibrate(runs_of(wan), SparseVDiT(**SPARSE, tile=(1, 2, 2)), Goal(density=0.4))


@pytest.fixture(scope="module")
def shared(wan) -> Any:
    return calibrate(runs_of(wan), TileSparse(**SPARSE, tile=(1, 2, 2)), Goal(density=0.4))


def run(pipe, plan, **changes):
    fastdiff.enable(pipe, plan=plan, strict=True)
    try:
        found = zoo.call("wan", pipe, **{"num_inference_steps": STEPS, **changes})
        return found, pipe.fastdiff.report.summary(), repr(pipe.fastdiff)
    finally:
        fastdiff.disable(pipe)


# sparse-vdit


def test_the_table_has_a_mode_for_every_step_layer_and_head(searched):
    found = searched.calibration
    assert found.begins == [0, 2, 3] and found.layers == [[2, 3, 5, 7]] * 2
    assert all(len(modes) == 2 and {*modes} <= {*"fsdmv"} for row in found.modes for modes in row)
    assert found.found["density"] <= 0.4 and sum(found.found["modes"].values()) == pytest.approx(1)


def test_a_plan_runs_at_the_density_it_states(wan, searched):
    out, total, told = run(wan, plain(searched))
    calls = total["sparse_calls"] + total["dense_calls"].get("the method chose dense", 0)
    full = total["dense_calls"].get("the method chose dense", 0)
    realised = (total["density"] * total["sparse_calls"] + full) / calls
    assert realised == pytest.approx(searched.calibration.found["density"], abs=0.005)
    assert "calibrated for WanTransformer3DModel, 3x5x7 tokens, 4 steps" in told
    assert torch.isfinite(out).all()


def test_a_search_is_repeatable(wan, searched):
    again = calibrate(runs_of(wan), SparseVDiT(**SPARSE, tile=(1, 2, 2)), Goal(density=0.4))
    assert plain(again) == plain(searched)


def test_stripes_are_kept_for_the_heads_that_use_them(searched):
    found = searched.calibration
    used = {(layer, head) for row in found.modes for layer, modes in enumerate(row)
            for head, mode in enumerate(modes) if mode == "v"}
    known = {(int(layer), int(head)) for layer, heads in found.stripes.items() for head in heads}
    assert used == known


def test_nothing_accepted_is_stock(wan):
    stock = zoo.call("wan", wan, num_inference_steps=STEPS)
    policy = calibrate(runs_of(wan), SparseVDiT(**SPARSE), Goal(density=0.4), rules=Rules(eps=-1.0))
    assert {m for row in policy.calibration.modes for modes in row for m in modes} == {"f"}
    out, _, _ = run(wan, plain(policy))
    assert torch.equal(out, stock)


def test_the_second_pass_sees_the_errors_of_the_first(wan):
    """Errors propagate through the search, as in the paper: later losses differ between passes."""
    runs = runs_of(wan, asked=["a red cat"])
    calibrate(runs, SparseVDiT(**SPARSE, tile=(1, 2, 2)), Goal(density=0.3))
    dense, sparse = (Ledger(**runs.work.part(f"round-{i}-0", dict)) for i in (0, 1))
    first, last = (1, 0), (STEPS - 1, 1)
    assert torch.equal(dense.error[first], sparse.error[first])
    assert not torch.equal(dense.energy[last], sparse.energy[last])


def test_ranges_share_a_row_of_the_table(wan):
    policy = calibrate(runs_of(wan), SparseVDiT(**SPARSE), Goal(density=0.4), ranges=1)
    assert policy.calibration.begins == [0] and len(policy.calibration.modes) == 1


def test_a_joint_model_with_text_is_searched():
    pipe = zoo.build("flux")
    runs = runs_of(pipe, family="flux")
    policy = calibrate(runs, SparseVDiT(**SPARSE, tile=(1, 3, 3)), Goal(density=0.6))
    fastdiff.enable(pipe, plan=plain(policy), strict=True)
    out = zoo.call("flux", pipe, num_inference_steps=STEPS)
    assert torch.isfinite(out).all() and pipe.fastdiff.report.summary()["sparse_calls"] > 0


@pytest.mark.parametrize("family", ["wan22", "sd15"])
def test_two_experts_and_layers_of_many_sizes_are_searched(family):
    pipe = zoo.build(family)
    name: Any = zoo._FAMILY.get(family, family)
    call = {**zoo.size(name), **zoo._CALL[name], "num_inference_steps": STEPS}
    runs = Runs(pipe, ["a red cat"], call, Work(None, {}))
    policy = calibrate(runs, SparseVDiT(**SPARSE, tile=(1, 2, 2)), Goal(density=0.6))
    layers, modes = policy.calibration.layers, policy.calibration.modes
    assert len(layers) == 4 if family == "wan22" else len({tuple(x) for x in layers}) > 1
    assert all(len(row[i]) == layers[i][0] for row in modes for i in range(len(layers)))
    fastdiff.enable(pipe, plan=plain(policy), strict=True)
    for steps in (STEPS, 7):
        assert torch.isfinite(zoo.call(family, pipe, num_inference_steps=steps)).all()
    assert pipe.fastdiff.report.summary()["sparse_calls"] > 0


# densities by layer and head


def test_sharing_out_is_never_worse_than_uniform_and_meets_the_density(wan, shared):
    near = shared.calibration.found["latents_db"]
    assert {*near} == {"uniform", "layer", "head"}
    assert near[shared.calibration.found["share"]] >= near["uniform"]
    _, total, _ = run(wan, plain(shared))
    assert total["density"] == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize("select_by", ["threshold", "top-k", "top-p"])
def test_a_plan_gives_each_head_its_density(wan, shared, select_by, monkeypatch):
    row = [[0.25, 0.7], [0.7, 0.25]]
    found = dataclasses.replace(shared.calibration, begins=[0], density=[row])
    masks: list[Any] = []
    stock = TileSparse.select

    def select(*args):
        masks.append(stock(*args))
        return masks[-1]

    monkeypatch.setattr(TileSparse, "select", select)
    fastdiff.enable(wan, dataclasses.replace(shared, calibration=found, select_by=select_by))
    zoo.call("wan", wan, num_inference_steps=STEPS)
    fastdiff.disable(wan)
    share = masks[0].offsets.diff().float() / 105
    for mask, wanted in zip(masks[:2], row, strict=True):
        density = ((mask.keep.float() @ share) @ share)[0]
        torch.testing.assert_close(density, torch.tensor(wanted), atol=0.06, rtol=0)


def test_a_target_is_met_with_less_density_where_it_is_lower(wan):
    runs = runs_of(wan)
    low, high = (calibrate(runs, SparseVDiT(**SPARSE, tile=(1, 2, 2)), Goal(psnr=psnr))
                 for psnr in (20.0, 49.5))
    assert low.calibration.found["goal"]["psnr"] >= 20
    assert high.calibration.found["goal"]["psnr"] >= 49.5
    assert low.density < high.density


def test_a_largest_error_is_kept(wan):
    told = []
    policy = calibrate(runs_of(wan, asked=["a red cat"]), TileSparse(**SPARSE, tile=(1, 2, 2)),
                       Goal(error=0.004), ranges=1, tell=told.append)
    assert policy.calibration.found["goal"]["error"] <= 0.004
    assert any("uniform" in line for line in told)


def test_an_impossible_target_is_refused_with_advice(wan):
    with pytest.raises(ValueError, match="dense_steps=0.3"):
        calibrate(runs_of(wan), SparseVDiT(**{**SPARSE, "max_density": 0.3}, tile=(1, 2, 2)),
                  Goal(error=1e-7))


def test_a_method_that_routes_tokens_itself_is_calibrated_too(wan):
    from fastdiff.policies.vmoba import VMoBA

    runs = runs_of(wan, asked=["a red cat"])
    policy = calibrate(runs, VMoBA(**SPARSE), Goal(density=0.4), ranges=1)
    _, total, _ = run(wan, plain(policy))
    assert 0.2 < total["density"] < 0.6


def test_options_that_fix_the_cost_leave_nothing_to_share_out(wan):
    from fastdiff.policies.neighborhood import Neighborhood

    with pytest.raises(ValueError, match="does not depend on density"):
        calibrate(runs_of(wan, asked=["a red cat"]), Neighborhood(**SPARSE, window=(1, 3, 3)),
                  Goal(density=0.4), ranges=1)


def test_the_hull_is_convex_and_falls():
    points = [(0.1, 5.0), (0.2, 4.9), (0.3, 1.0), (0.5, 2.0), (1.0, 0.0)]
    assert hull(points) == [(0.1, 5.0), (0.3, 1.0), (1.0, 0.0)]
    assert hull([*points[:3], (1.0, 1.5)]) == [(0.1, 5.0), (0.3, 1.0)]


def test_allocation_is_the_best_of_a_grid():
    torch.manual_seed(0)
    grid = [0.1, 0.2, 0.4, 0.8, 1.0]
    curves = [Curve([(d, w / d - w) for d in grid], 1.0) for w in (1.0, 3.0, 0.2)]
    found = allocate(curves, 0.4)
    assert sum(found) / 3 == pytest.approx(0.4)

    def error(choice):
        total = 0.0
        for curve, density in zip(curves, choice, strict=True):
            below = max(p for p in curve.points if p[0] <= density + 1e-9)
            above = min(p for p in curve.points if p[0] >= density - 1e-9)
            part = 0 if above == below else (density - below[0]) / (above[0] - below[0])
            total += below[1] + part * (above[1] - below[1])
        return total

    for choice in itertools.product(grid, repeat=3):
        if sum(choice) / 3 <= 0.4:
            assert error(found) <= error(choice) + 1e-9


@pytest.mark.parametrize("gains, chosen", [
    ([1.0, 1.2, 0.9], "layer"), ([6.0, -5.0, 0.5], "uniform"), ([-1.0, -1.0, -1.0], "uniform"),
])
def test_another_share_must_gain_more_than_its_doubt(wan, gains, chosen, monkeypatch):
    from fastdiff.calibration.budgets import BudgetSearch

    bases = [20.0, 25.0, 30.0]
    monkeypatch.setattr(BudgetSearch, "measure", lambda self, bound: None)
    monkeypatch.setattr(BudgetSearch, "plan", lambda self, density, share, bound: TileSparse(
        calibration=Calibration(model={}, scheduler=None, steps=4, layers=[], begins=[0],
                                density=[[]], found={"share": share})))
    monkeypatch.setattr(Runs, "decibels", lambda self, method, name: bases if "uniform" in name
                        else [b + g - ("head" in name) for b, g in zip(bases, gains, strict=True)])
    monkeypatch.setattr(search, "mean_density", lambda policy, cells: 0.2)
    policy = calibrate(runs_of(wan), TileSparse(**SPARSE), Goal(density=0.2))
    assert policy.calibration.found["share"] == chosen


# what a plan refuses


def test_another_architecture_is_refused_with_the_difference(searched):
    pipe = zoo.build("wan")
    pipe.transformer = zoo.wan_transformer(num_layers=3)
    before = zoo.fingerprint(pipe)
    with pytest.raises(ValueError, match="num_layers is 3, in the plan 2"):
        fastdiff.enable(pipe, plan=plain(searched))
    assert zoo.fingerprint(pipe) == before


def test_another_family_is_refused_by_class(searched):
    with pytest.raises(ValueError, match="knows no part 'unet'|of class WanTransformer3DModel"):
        fastdiff.enable(zoo.build("sd15"), plan=plain(searched))


def test_another_scheduler_is_refused(searched):
    pipe = zoo.build("wan")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=5.0)
    with pytest.raises(ValueError, match="flow_shift is 5.0, in the plan 3.0"):
        fastdiff.enable(pipe, plan=plain(searched))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="UniPCMultistepScheduler, and this one is FlowMatch"):
        fastdiff.enable(pipe, plan=plain(searched))


@pytest.mark.parametrize("plan", ["searched", "shared"])
def test_another_density_is_refused_beside_a_plan(wan, plan, request):
    policy = request.getfixturevalue(plan)
    with pytest.raises(ValueError, match="density=0.3 .* 0.4, which the plan was found for"):
        fastdiff.enable(wan, plan=plain(policy), density=0.3)
    assert not wan.fastdiff.enabled


@pytest.mark.parametrize("plan", ["searched", "shared"])
def test_another_size_is_refused_with_both_grids(wan, plan, request):
    policy = request.getfixturevalue(plan)
    with pytest.raises(ValueError, match="3 x 5 x 7 latent tokens, and this run has 3 x 5 x 8"):
        run(wan, plain(policy), width=8 * 16)


def test_another_number_of_steps_is_read_by_place_and_told(wan, searched):
    _, total, told = run(wan, plain(searched), num_inference_steps=8)
    assert "found for 4 steps, read at the same part of the way for 8" in told
    assert total["sparse_calls"] > 0


def test_the_range_of_a_step():
    found = Calibration(model={}, scheduler=None, steps=8, layers=[], begins=[0, 3, 6])
    at = [found.range_of(StepClock(step=s, steps=8)) for s in range(8)]
    assert at == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [found.range_of(StepClock(step=s, steps=4)) for s in range(4)] == [0, 1, 1, 2]
    assert found.range_of(StepClock()) == 1


def test_a_plan_is_the_same_after_a_round_trip(searched, shared):
    for policy in (searched, shared):
        again: Any = from_plan(plain(policy))[0]
        assert plain(again) == plain(policy) and again.calibration == policy.calibration


@pytest.mark.parametrize("changes, told", [
    ({"modes": [["ff"]]}, "3 ranges of 2 layers"), ({"steps": None}, "needs"),
])
def test_a_broken_calibration_is_refused(searched, changes, told):
    plan = plain(searched)
    entry = plan["methods"][0]["calibration"]
    for key, value in changes.items():
        entry[key] = value
        if value is None:
            del entry[key]
    with pytest.raises(ValueError, match=told):
        from_plan(plan)


def test_the_same_plan_replaces_and_leaves_stock_bit_for_bit(wan, searched):
    before, stock = zoo.fingerprint(wan), zoo.call("wan", wan)
    run(wan, plain(searched))
    assert zoo.fingerprint(wan) == before and torch.equal(zoo.call("wan", wan), stock)


# a search that is stopped


class Stopped(Exception):
    pass


@pytest.mark.parametrize("base", [SparseVDiT(**SPARSE, tile=(1, 2, 2)),
                                  TileSparse(**SPARSE, tile=(1, 2, 2))])
def test_a_stopped_search_goes_on_and_finds_the_same(wan, tmp_path, base):
    asked = ["a red cat"] if isinstance(base, TileSparse) else ["a red cat", "a dog"]
    whole = calibrate(runs_of(wan, asked=asked), base, Goal(density=0.4), ranges=1)
    begun: list[str] = []
    generate = Runs.generate

    def counted(self, number, method, what, kind):
        begun.append(what)
        if len(begun) == 4:
            raise Stopped
        return generate(self, number, method, what, kind)

    Runs.generate = counted
    try:
        with pytest.raises(Stopped):
            calibrate(runs_of(wan, tmp_path, asked=asked), base, Goal(density=0.4), ranges=1)
        assert not wan.fastdiff.enabled
        first = len(begun) - 1
        resumed = calibrate(runs_of(wan, tmp_path, asked=asked), base, Goal(density=0.4), ranges=1)
        total = len(begun) - 1
        begun.clear()
        begun += ["x"] * 4
        calibrate(runs_of(wan, asked=asked), base, Goal(density=0.4), ranges=1)
        assert total == len(begun) - 4 and first == 3
    finally:
        Runs.generate = generate
    assert plain(resumed) == plain(whole)
    assert not list(tmp_path.glob("*.part"))


def test_parts_of_other_settings_are_refused(wan, tmp_path):
    Work(tmp_path, {"steps": 3, "seed": 0})
    # nothing was made with those settings, so they bind nobody
    Work(tmp_path, {"steps": 4, "seed": 0}).part("first", lambda: 1)
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        Work(tmp_path, {"steps": 4, "seed": 1})


# input


@pytest.mark.parametrize("goal", [{}, {"density": 0.2, "psnr": 30.0}, {"density": 2.0},
                                  {"psnr": -1.0}, {"error": 3.0}])
def test_goals_are_exactly_one_and_possible(goal):
    with pytest.raises(ValueError, match="one goal|not possible"):
        Goal(**goal)


def test_a_run_that_is_never_sparse_is_refused(wan):
    for base in (SparseVDiT(min_tokens=10_000), TileSparse(min_tokens=10_000)):
        with pytest.raises(ValueError, match="min_tokens"):
            calibrate(runs_of(wan), base, Goal(density=0.2))


def test_a_density_that_would_run_dense_is_refused(wan):
    with pytest.raises(ValueError, match="max_density=0.3"):
        calibrate(runs_of(wan), TileSparse(min_tokens=1), Goal(density=0.5))


def test_prompts_come_from_a_file(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("# note\na cat\n\n a dog \n")
    assert prompts(str(path)) == ["a cat", "a dog"]
    path.write_text("\n")
    with pytest.raises(ValueError, match="no prompt"):
        prompts(str(path))
    with pytest.raises(ValueError, match="neither"):
        prompts(str(tmp_path / "none.txt"))
    assert len(prompts("default")) >= 4


# the command


@pytest.fixture(scope="module")
def folder(wan, tmp_path_factory) -> str:
    place = tmp_path_factory.mktemp("models") / "wan"
    wan.save_pretrained(place)
    (place / "fastdiff.json").write_text(json.dumps({
        "kind": ["video", "image"], "height": 48, "width": 64, "frames": 5, "fps": 8, "steps": 3,
        "guidance": 4.0, "max_sequence_length": zoo.TEXT, "multiple": 16, "frames_rule": "4n+1"}))
    return str(place)


def command(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    return result


def test_the_command_writes_a_plan_that_generate_runs(folder, tmp_path):
    plan, clip = tmp_path / "plan.json", tmp_path / "a.mp4"
    file = tmp_path / "p.txt"
    file.write_text("a cat\n")
    knobs = [x for k in ("min_tokens=1", "max_density=1", "dense_steps=1", "tile=1,1,2")
             for x in ("--option", k)]
    words = ["calibrate", "-m", folder, "--method", "sparse-vdit", "--density", "0.5", "--prompts",
             file, "-o", plan, *knobs]
    result = command(*words)
    assert "use it" in result.stdout and not (tmp_path / "plan.json.work").exists()
    content = json.loads(plan.read_text())
    assert content["methods"][0]["calibration"]["steps"] == 3
    assert content["made"]["prompts"] == ["a cat"] and content["made"]["versions"]["torch"]
    command("generate", "a cat", "-m", folder, "--plan", plan, "-o", clip)
    sidecar = json.loads((tmp_path / "a.mp4.json").read_text())
    assert sidecar["report"]["sparse_calls"] > 0
    # the whole plan makes it again; inside the clip, where room is short, the table is left out
    assert sidecar["plan"]["methods"][0]["calibration"]["modes"]
    inside = without_tables(sidecar)["plan"]["methods"][0]
    assert "calibration" not in inside and inside["density"] == 0.5
    again = tmp_path / "b.mp4"
    command("generate", "--from", f"{clip}.json", "-o", again)
    assert (iio.imread(again) == iio.imread(clip)).all()
    refused = command("generate", "a cat", "-m", folder, "--plan", plan, "-o", clip, "--size",
                      "64x64", code=2)
    assert "2 x 3 x 4 latent tokens" in refused.stderr and "4 x 4" in refused.stderr
    assert "exists: --overwrite" in command(*words, code=2).stderr


def test_a_refusal_after_loading_leaves_no_folder(folder, tmp_path):
    words = ["calibrate", "-m", folder, "-o", tmp_path / "plan.json"]
    assert "max_density" in command(*words, "--density", "0.9", "--option", "max_density=0.3",
                                    code=2).stderr
    assert list(tmp_path.iterdir()) == []
    # what is finished stays, and so does what is not ours
    home = tmp_path / "plan.json.work"
    work = Work(home, {})
    (home / "note.txt").touch()
    work.leave()
    assert [path.name for path in home.iterdir()] == ["note.txt"]
    Work(home, {}).part("first", lambda: 1)
    work.leave()
    assert sorted(path.name for path in home.iterdir()) == ["first.pt", "note.txt", "settings.json"]


@pytest.mark.parametrize("words, told", [
    (["--density", "0.2", "--target-psnr", "30"], "one goal"), ([], "one goal"),
    (["--density", "0.2", "--method", "nothing"], "unknown method"),
    (["--density", "0.2", "--prompts", "/no/such/file"], "neither"),
    (["--density", "0.2", "-o", "/no/such/folder/plan.json"], "does not exist"),
    (["--density", "0.2", "--loss", "mse"], "relative, raw"),
])
def test_bad_words_are_refused_in_one_line(words, told, tmp_path):
    place = [] if "-o" in words else ["-o", tmp_path / "plan.json"]
    result = command("calibrate", *words, *place, code=2)
    assert told in result.stderr and "Traceback" not in result.stderr
