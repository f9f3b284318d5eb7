"""Whose setting a model has: shared models, replaced ones, copies; and what pipe.fastdiff says."""

# diffusers exports its classes lazily and annotates arguments narrowly; no type is checked here
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import copy
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import zoo

import fastdiff
from fastdiff.attention import DenseFallbackError


@pytest.fixture
def wan():
    return zoo.build("wan")


@pytest.fixture
def stock():
    return zoo.call("wan", zoo.build("wan"))


def enable(target, *methods, **changes):
    return fastdiff.enable(target, *(methods or ["tile-sparse"]),
                           **zoo.small_options("wan", **changes))


def sharing(pipe):
    """Another pipeline with the same transformer and its own scheduler."""
    other = zoo.build("wan")
    other.transformer = pipe.transformer
    return other


# shared models


def test_a_pipeline_that_shares_says_so(wan):
    other = sharing(wan)
    enable(wan)
    assert other.fastdiff.enabled and other.fastdiff is wan.fastdiff
    other.disable_fastdiff()
    assert not wan.fastdiff.enabled and not other.fastdiff.enabled


def test_the_last_setting_counts(wan, stock):
    other = sharing(wan)
    first = enable(wan)
    second = enable(other, density=0.7)
    assert wan.fastdiff is second and second.enabled and not first.enabled
    assert "was on, and is off" in repr(first)
    zoo.call("wan", wan)
    wan.disable_fastdiff()
    # a run of a pipeline whose setting was taken away arms nothing again
    for pipe in (other, wan, other):
        assert torch.equal(zoo.call("wan", pipe), stock)
    other.disable_fastdiff()
    for pipe in (wan, other):
        assert torch.equal(zoo.call("wan", pipe), stock)
        assert not hasattr(type(pipe.scheduler), "_fastdiff_original")


def test_one_of_two_experts_can_be_made_stock():
    pipe = zoo.build("wan22")
    handle = enable(pipe)
    fastdiff.disable(pipe.transformer)
    assert pipe.fastdiff is handle and "transformer_2 (Wan)" in repr(handle)
    assert "transformer (Wan)" not in repr(handle)
    zoo.call("wan22", pipe)
    assert handle.report.summary()["sparse_calls"] == 4


def test_pipelines_that_share_a_scheduler_both_count_steps(wan):
    other = zoo.build("wan")
    other.scheduler = wan.scheduler
    for pipe in (wan, other):
        enable(pipe, dense_steps=1)
    for pipe in (wan, other, wan):
        zoo.call("wan", pipe)
        assert pipe.fastdiff.report.summary()["dense_calls"] == {"dense step": 4}


# replaced parts


def test_a_replaced_model_is_told(wan, stock):
    traces = zoo.fingerprint(wan)
    old = wan.transformer
    enable(wan, strict=False)
    wan.transformer = zoo.build("wan").transformer
    assert "runs stock: transformer, put in after" in repr(wan.fastdiff)
    assert torch.equal(zoo.call("wan", wan), stock)
    fallbacks = wan.fastdiff.report.summary()["fallbacks"]
    assert list(fallbacks.values()) == [1] and "enable_fastdiff again" in str(fallbacks)
    wan.disable_fastdiff()
    wan.transformer = old
    assert torch.equal(zoo.call("wan", wan), stock)
    now = zoo.fingerprint(wan)
    assert {k: v for k, v in now.items() if ".blocks" in k} == {
        k: v for k, v in traces.items() if ".blocks" in k}


def test_a_replaced_model_raises_in_strict_mode(wan):
    enable(wan)
    wan.transformer = zoo.build("wan").transformer
    with pytest.raises(DenseFallbackError, match="transformer would run stock: put in after"):
        zoo.call("wan", wan)
    enable(wan)
    zoo.call("wan", wan)


def test_a_wrapped_model_is_not_replaced(wan):
    enable(wan)
    wan.transformer = torch.compile(wan.transformer, backend="eager")
    zoo.call("wan", wan)
    assert wan.fastdiff.report.summary()["fallbacks"] == {}
    wan.disable_fastdiff()
    assert not wan.fastdiff.enabled


@pytest.mark.parametrize(("method", "options"), [
    ("tile-sparse", zoo.small_options("sd15")),
    ("kv-downsample", {"min_tokens": 1, "guard": False}),
])
def test_attention_slicing_is_told(method, options):
    pipe = zoo.build("sd15")
    pipe.enable_fastdiff(method, **{**options, "strict": False})
    pipe.enable_attention_slicing()
    zoo.call("sd15", pipe)
    assert "14 attention modules: SlicedAttnProcessor, set after" in repr(pipe.fastdiff)
    pipe.disable_attention_slicing()
    zoo.call("sd15", pipe)
    assert pipe.fastdiff.report.summary()["fallbacks"] == {}
    pipe.enable_fastdiff(method, **{**options, "strict": True})
    pipe.enable_attention_slicing()
    with pytest.raises(DenseFallbackError, match="14 attention modules would run stock: Sliced"):
        zoo.call("sd15", pipe)
    pipe.disable_fastdiff()
    with pytest.raises(ValueError, match="processors .SlicedAttnProcessor. .*attention slicing"):
        pipe.enable_fastdiff(method)


def test_layers_of_a_unet_can_be_told_apart():
    pipe = zoo.build("sd15")
    fastdiff.enable(pipe, "tile-sparse", **zoo.small_options("sd15"))
    zoo.call("sd15", pipe)
    names = [row["layer"] for row in pipe.fastdiff.report.rows()]
    assert len({*names}) == 7 and all(f"{name} " in repr(pipe.fastdiff) for name in names)


def test_layers_of_two_experts_can_be_told_apart():
    pipe = zoo.build("wan22")
    enable(pipe)
    zoo.call("wan22", pipe)
    assert {row["layer"] for row in pipe.fastdiff.report.rows()} == {
        f"{part}.blocks.{i}.attn1" for part in ("transformer", "transformer_2") for i in (0, 1)}


def test_a_wrong_argument_is_refused_in_the_pipelines_words(wan):
    with pytest.raises(TypeError) as stock:
        zoo.call("wan", wan, stregnth=1)
    wan.enable_fastdiff("bottleneck", stages="1:2")
    with pytest.raises(TypeError) as ours:
        zoo.call("wan", wan, stregnth=1)
    assert str(ours.value) == str(stock.value) and "__call__()" in str(stock.value)


def test_token_methods_notice_a_replaced_scheduler():
    pipe = zoo.build("sd15")
    pipe.enable_fastdiff("at-edm", guard=False, early_steps=2)
    zoo.call("sd15", pipe, num_inference_steps=4)
    wanted = pipe.fastdiff.report.summary()["methods"]
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    for _ in range(2):
        zoo.call("sd15", pipe, num_inference_steps=4)
        assert pipe.fastdiff.report.summary()["methods"] == wanted


# steps


@pytest.mark.parametrize("scheduler", [
    diffusers.DDIMScheduler, diffusers.PNDMScheduler, diffusers.EulerDiscreteScheduler,
    diffusers.DPMSolverMultistepScheduler])
def test_a_fraction_is_of_the_steps_that_run(scheduler):
    """Image to image begins in the middle of the schedule."""
    pipe: Any = zoo.build("sd15")
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(
        pipe, requires_safety_checker=False)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    pipe.set_progress_bar_config(disable=True)
    fastdiff.enable(pipe, "tile-sparse", **zoo.small_options("sd15", dense_steps=0.5))
    for strength, run in ((0.4, 4), (1.0, 10)):
        pipe("a cat", image=torch.rand(1, 3, 96, 72), strength=strength, num_inference_steps=10,
             output_type="latent")
        told = pipe.fastdiff.report.summary()
        more = scheduler is diffusers.PNDMScheduler
        assert pipe.fastdiff.clock.steps == run + more
        assert told["dense_calls"] == {"dense step": 7 * round((run + more) / 2)}


def test_a_loop_of_ones_own():
    """The lines of docs/seam.md."""
    model: Any = zoo.wan_transformer()
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
    inputs = {"encoder_hidden_states": torch.randn(1, 8, 32)}
    noise = torch.randn(1, 16, 3, 10, 14)

    @torch.no_grad()
    def run():
        scheduler.set_timesteps(4)
        latents = noise
        for t in scheduler.timesteps:
            out = model(hidden_states=latents, timestep=t[None], **inputs).sample
            latents = scheduler.step(out, t, latents).prev_sample
        return latents

    wanted = run()
    loop = SimpleNamespace(components={"transformer": model}, scheduler=scheduler)
    handle = fastdiff.enable(loop, "tile-sparse", "query-skip", **{
        **{f"tile-sparse.{k}": v for k, v in zoo.small_options("wan", dense_steps=1).items()
           if k != "strict"}, "query-skip.min_tokens": 1})
    assert not torch.equal(run(), wanted)
    assert handle.report.summary()["dense_calls"] == {"dense step": 2}
    fastdiff.disable(loop)
    assert torch.equal(run(), wanted)
    fastdiff.enable(model, "query-skip")
    with pytest.raises(DenseFallbackError, match="a bare model has no steps"):
        fastdiff.enable(model, "query-skip", strict=True)


def test_compiled_calls_that_are_not_counted_are_told(wan):
    wan.enable_fastdiff("query-skip", min_tokens=1)
    assert "nothing has run yet" in repr(wan.fastdiff)
    wan.transformer.compile(backend="eager")
    zoo.call("wan", wan)
    assert "it ran, and nothing was counted" in repr(wan.fastdiff)


# copies


@pytest.mark.parametrize("methods", [["tile-sparse"], ["tile-sparse", "bottleneck"]])
def test_a_copied_pipeline_is_on_by_itself(wan, stock, methods):
    bottleneck = {"bottleneck.stages": "1:2"} if "bottleneck" in methods else {}
    enable(wan, *methods, dense_steps=1, **bottleneck)
    fast = zoo.call("wan", wan)
    told = wan.fastdiff.report.summary()["dense_calls"]
    twin = copy.deepcopy(wan)
    assert twin.fastdiff is not wan.fastdiff and twin.fastdiff.methods == wan.fastdiff.methods
    assert torch.equal(zoo.call("wan", twin), fast)
    assert twin.fastdiff.report.summary()["dense_calls"] == told
    assert wan.fastdiff.report.summary()["dense_calls"] == told
    wan.disable_fastdiff()
    assert torch.equal(zoo.call("wan", twin), fast)
    assert torch.equal(zoo.call("wan", wan), stock)
    twin.disable_fastdiff()
    again = copy.deepcopy(twin)
    for pipe in (wan, twin, again):
        assert not pipe.fastdiff.enabled and torch.equal(zoo.call("wan", pipe), stock)


def test_a_copied_model_does_not_bring_the_original_back(wan, stock):
    enable(wan)
    twin = copy.deepcopy(wan.transformer)
    wan.disable_fastdiff()
    other = zoo.build("wan")
    other.transformer = twin
    zoo.call("wan", other)
    assert torch.equal(zoo.call("wan", wan), stock)


def test_a_copied_model_enters_its_own_cache(wan):
    config = diffusers.FirstBlockCacheConfig(threshold=0.5)
    enable(wan)
    twin = copy.deepcopy(wan)
    twin.transformer.enable_cache(config)
    lone = zoo.build("wan")
    enable(lone)
    lone.transformer.enable_cache(config)
    assert torch.equal(zoo.call("wan", twin), zoo.call("wan", lone))
    bare = copy.deepcopy(wan.transformer)
    assert bare.cache_context.__self__ is bare


# errors


def test_a_method_that_cannot_enter_leaves_the_earlier_setting_on(wan):
    enable(wan, density=0.5)
    wanted = zoo.call("wan", wan)
    with pytest.raises(ValueError, match="use kv-downsample or query-skip"):
        wan.enable_fastdiff("at-edm")
    assert wan.fastdiff.policy.density == 0.5 and wan.fastdiff.strict
    assert torch.equal(zoo.call("wan", wan), wanted)
    wan.disable_fastdiff()
    fastdiff.enable(wan.transformer, "query-skip")
    with pytest.raises(ValueError, match="kv-downsample"):
        wan.enable_fastdiff("at-edm")
    assert [method.name for method in wan.fastdiff.methods] == ["query-skip"]
