"""The named attention methods, end to end through pipelines: a clip, joint attention, a UNet."""

# diffusers exports its classes lazily and annotates arguments narrowly; no type is checked here
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import json
import logging
import typing

import pytest
import torch
import zoo

from fastdiff.cli import choice
from fastdiff.policies import methods

# how many attention calls over the grid one run of two steps makes
CALLS = {"wan": 8, "sd3": 6, "sd15": 14, "hunyuan_video": 6}
VARIANTS = {
    "vmoba": ("vmoba", {}),
    "vmoba tiles": ("vmoba", {"form": "tiles", "tail": True}),
    "vmoba threshold": ("vmoba", {"select_by": "threshold", "group": "head", "tau": 0.25}),
    "neighborhood": ("neighborhood", {}),
    "neighborhood sliding": ("neighborhood", {"window": (0.5, 0.5, 0.5), "stride": (1, 1, 1)}),
    "neighborhood alternate": ("neighborhood", {"window": (0.5, 0.4, 0.4), "alternate": True}),
    "top-p": ("top-p", {}),
    "top-p share": ("top-p", {"p": 0.6, "score": "proxy", "proxy_heads": 2}),
    "radial": ("radial", {}),
    "bands": ("bands", {}),
}
families = pytest.mark.parametrize("family", CALLS)
variants = pytest.mark.parametrize("variant", VARIANTS)


def options(family, variant, **changes):
    method, own = VARIANTS[variant]
    small = zoo.small_options(family, **{**own, **changes})
    if method in ("radial", "bands"):
        small["tile"] = None
    return method, small


@pytest.fixture(scope="module")
def pairs():
    made: dict = {}

    def pair(family):
        """A pipeline to drive, and what stock makes of the same weights."""
        if family not in made:
            pipe = zoo.build(family)
            made[family] = pipe, zoo.call(family, pipe)
        return made[family]

    return pair


def fast(family, pipe, variant, changes=None, **call):
    method, small = options(family, variant, **(changes or {}))
    pipe.enable_fastdiff(method, **small)
    try:
        return zoo.call(family, pipe, **call), pipe.fastdiff.report
    finally:
        pipe.disable_fastdiff()


@families
@variants
def test_sparse_runs_in_every_layer(family, variant, pairs):
    pipe, stock = pairs(family)
    latents, report = fast(family, pipe, variant)
    total = report.summary()
    assert total["sparse_calls"] == CALLS[family]
    assert not total["dense_calls"] and not total["fallbacks"]
    assert total["density"] < 1 and total["flops"] < total["stock_flops"]
    assert latents.isfinite().all() and latents.shape == stock.shape
    assert not torch.equal(latents, stock)
    # and nothing is left behind
    assert torch.equal(zoo.call(family, pipe), stock)
    again, _ = fast(family, pipe, variant)
    assert torch.equal(again, latents)


@families
@pytest.mark.parametrize("variant", ["vmoba", "vmoba tiles", "neighborhood", "top-p", "radial",
                                     "bands"])
def test_density_one_is_dense(family, variant, pairs):
    pipe, stock = pairs(family)
    latents, report = fast(family, pipe, variant, {"density": 1.0})
    assert report.summary()["sparse_calls"] == CALLS[family]
    assert report.summary()["density"] == pytest.approx(1)
    zoo.assert_near(latents, stock)


@pytest.mark.parametrize("family", ["sd15", "sd3", "wan"])
@variants
def test_batch_of_two_is_two_runs(family, variant, pairs):
    pipe, _ = pairs(family)
    prompts = ["a red cat", "blue"]
    both, _ = fast(family, pipe, variant, prompt=prompts)
    one, _ = fast(family, pipe, variant, prompt=prompts[:1])
    two, _ = fast(family, pipe, variant, prompt=prompts[1:], seed=1)
    zoo.assert_near(both, torch.cat([one, two]))


@pytest.mark.parametrize("family", ["wan", "sd3"])
@pytest.mark.parametrize("variant", ["vmoba", "neighborhood sliding", "top-p", "radial", "bands"])
def test_any_size(family, variant, pairs):
    pipe, _ = pairs(family)
    grids = [(1, 7, 5), (4, 3, 3)] if family == "wan" else [(1, 7, 13), (1, 1, 17)]
    for grid in grids:
        latents, report = fast(family, pipe, variant, grid=grid)
        assert latents.isfinite().all()
        assert report.summary()["sparse_calls"] == CALLS[family]


def test_a_kernel_that_cannot_run_is_told(caplog):
    """On a CPU single windows are gathered, with the same result, and the report says why."""
    pipe = zoo.build("wan")
    pipe.enable_fastdiff("neighborhood", **options("wan", "neighborhood sliding")[1])
    with caplog.at_level(logging.WARNING, "fastdiff"):
        zoo.call("wan", pipe)
        zoo.call("wan", pipe)
    told = pipe.fastdiff.report.methods["neighborhood"]["gathered because"]
    assert told.startswith("no implementation of window_attention for torch.float32")
    assert f"neighborhood: gathered because {told}" in str(pipe.fastdiff)
    assert [told in record.message for record in caplog.records] == [True]


def test_vmoba_cycles_over_the_layers():
    pipe = zoo.build("hunyuan_video")
    pipe.enable_fastdiff("vmoba", **options("hunyuan_video", "vmoba", frames_chunk=1,
                                            plane_chunk=(1, 1), box_chunk=(1, 1, 1),
                                            top_k=(1, 1, 1))[1])
    zoo.call("hunyuan_video", pipe)
    rows = pipe.fastdiff.report.rows()
    frames, height, width = zoo.GRIDS["hunyuan_video"]
    grid, tokens = frames * height * width, frames * height * width + zoo.TEXT
    text = 1 - (grid / tokens) ** 2
    for row, chunk in zip(rows, (height * width, frames, 1), strict=True):
        assert row["density"] == pytest.approx(text + grid * chunk / tokens**2)


def test_first_layers_and_steps_are_dense_for_real():
    pipe = zoo.build("wan")
    pipe.enable_fastdiff("vmoba", **options("wan", "vmoba", dense_layers=1, dense_steps=0.25)[1])
    zoo.call("wan", pipe, num_inference_steps=8)
    first, second = pipe.fastdiff.report.rows()
    assert first["sparse_calls"] == 0 and first["dense_calls"] == {"dense layer": 16}
    assert second["sparse_calls"] == 12 and second["dense_calls"] == {"dense step": 4}


def test_window_that_does_not_fit_a_level_of_a_unet_is_an_error():
    pipe = zoo.build("sd15")
    pipe.enable_fastdiff("neighborhood", **options("sd15", "neighborhood", window=(1, 8, 8))[1])
    with pytest.raises(ValueError, match=r"window=8 .* 'h' .* accepted is 1 to 6, or a share"):
        zoo.call("sd15", pipe)


@pytest.mark.parametrize("variant", ["vmoba", "neighborhood sliding", "bands"])
def test_compiled_whole(variant, fresh_dynamo):
    pipe = zoo.build("wan")
    method, small = options("wan", variant)
    pipe.enable_fastdiff(method, **small)
    eager = zoo.call("wan", pipe)
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")
    assert torch.equal(zoo.call("wan", pipe), eager)
    assert pipe.fastdiff.report.summary()["sparse_calls"] == CALLS["wan"]


def test_report_names_what_computed_it(pairs):
    pipe, _ = pairs("wan")
    found = {variant: fast("wan", pipe, variant)[1].rows()[0]["implementation"]
             for variant in ("vmoba", "neighborhood sliding", "radial")}
    assert found == {"vmoba": "torch", "neighborhood sliding": "gathered", "radial": "torch"}


@pytest.mark.parametrize("method", ["vmoba", "neighborhood", "top-p", "radial", "bands"])
def test_method_is_reachable_by_plan(method):
    pipe = zoo.build("wan")
    pipe.enable_fastdiff(method)
    plan = json.loads(json.dumps(pipe.fastdiff.plan()))
    policy = pipe.fastdiff.policy
    pipe.enable_fastdiff(plan=plan)
    assert pipe.fastdiff.policy == policy


@pytest.mark.parametrize(("method", "typed", "wanted"), [
    ("vmoba", {"preset": "wan-480p"}, {"top_k": [2, 6, 18]}),
    ("vmoba", {"frames_chunk": "2.5", "top_k": "1,2,3"}, {"frames_chunk": 2.5, "top_k": [1, 2, 3]}),
    ("vmoba", {"include_self_in_k": "no"}, {"include_self_in_k": False}),
    ("neighborhood", {"window": "1,8,8", "stride": "1x4x4"}, {"window": [1, 8, 8],
                                                             "stride": [1, 4, 4]}),
    ("neighborhood", {"window": "1.0,0.5,0.5", "causal": "t"}, {"window": [1.0, 0.5, 0.5]}),
    ("top-p", {"p": "0.9", "score": "mean"}, {"p": 0.9, "score": "mean"}),
    ("radial", {"width": "1"}, {"width": 1.0}),
    ("bands", {"band": "pixels"}, {"band": "pixels"}),
])
def test_options_can_be_typed(method, typed, wanted):
    plan = json.loads(json.dumps(choice.plan(method, None, typed, None)))["methods"][0]
    assert {k: plan[k] for k in wanted} == wanted
    kinds = typing.get_type_hints(methods()[method])
    for name, value in wanted.items():
        if not isinstance(value, list):
            assert isinstance(plan[name], type(value)), kinds[name]
