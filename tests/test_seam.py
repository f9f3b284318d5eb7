"""Entering and leaving: what may be driven, the clock, strict mode, errors, copies, files."""

# diffusers exports its classes lazily and annotates arguments narrowly; no type is checked here
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import copy
import gc
import json
import logging
import math
import weakref

import diffusers
import pytest
import torch
import zoo

import fastdiff
from fastdiff.attention import DenseFallbackError
from fastdiff.method import REGISTRY
from fastdiff.policies import methods
from fastdiff.policies.tile_sparse import TileSparse


@pytest.fixture
def wan():
    return zoo.build("wan")


@pytest.fixture
def selects(monkeypatch):
    """(step, branch, layer) of every selection."""
    seen = []
    stock = TileSparse.select

    def select(self, query, key, tiles, context):
        seen.append((context.clock.step, context.clock.branch, context.layer))
        return stock(self, query, key, tiles, context)

    monkeypatch.setattr(TileSparse, "select", select)
    return seen


def enable(name, target, **changes):
    return fastdiff.enable(target, "tile-sparse", **zoo.small_options(name, **changes))


# what a user sees


def test_pipeline_methods(wan):
    assert "off" in repr(wan.fastdiff) and not wan.fastdiff.enabled
    assert wan.enable_fastdiff() is wan
    assert wan.fastdiff.enabled and wan.fastdiff.policy.name == "tile-sparse"
    assert "nothing has run yet" in repr(wan.fastdiff)
    assert wan.disable_fastdiff() is wan
    assert not wan.fastdiff.enabled


def test_report_prints_every_layer(wan):
    enable("wan", wan)
    zoo.call("wan", wan)
    text = repr(wan.fastdiff)
    assert "transformer (Wan)" in text
    assert "blocks.0.attn1" in text and "blocks.1.attn1" in text
    assert "FALLBACK" not in text


def test_report_is_of_the_last_run(wan):
    enable("wan", wan)
    for _ in range(2):
        zoo.call("wan", wan)
        assert wan.fastdiff.report.summary()["sparse_calls"] == 8


@pytest.mark.parametrize("preset", ["quality", "balanced", "turbo"])
def test_presets_run(wan, preset):
    wan.enable_fastdiff(preset, min_tokens=1)
    zoo.call("wan", wan, num_inference_steps=4)
    assert wan.fastdiff.report.summary()["sparse_calls"] > 0


def test_policy_object_is_taken(wan):
    wan.enable_fastdiff(fastdiff.TileSparse(density=0.3), min_tokens=7)
    assert wan.fastdiff.policy == fastdiff.TileSparse(density=0.3, min_tokens=7)


@pytest.mark.parametrize("as_file", [False, True])
def test_plan_comes_back(wan, as_file, tmp_path):
    handle = enable("wan", wan, seed=3)
    plan = json.loads(json.dumps(handle.plan()))
    if as_file:
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(plan))
        plan = path
    wan.enable_fastdiff(plan=plan)
    assert wan.fastdiff.policy == handle.policy


def test_enabling_twice_replaces(wan):
    twin = zoo.build("wan")
    enable("wan", wan)
    enable("wan", wan, density=0.9)
    zoo.call("wan", wan)
    zoo.call("wan", twin)
    assert wan.fastdiff.report.summary()["density"] > 0.7
    assert len(wan.fastdiff.report.rows()) == 2
    wan.disable_fastdiff()
    assert zoo.fingerprint(wan) == zoo.fingerprint(twin)


def test_disabling_twice_or_never_enabled_is_harmless(wan):
    twin = zoo.build("wan")
    wan.disable_fastdiff()
    enable("wan", wan)
    wan.disable_fastdiff()
    wan.disable_fastdiff()
    assert zoo.fingerprint(wan) == zoo.fingerprint(twin)


# what may be driven


def test_two_experts_are_both_driven():
    pipe, twin = zoo.build("wan22"), zoo.build("wan22")
    handle = enable("wan22", pipe)
    assert set(fastdiff.find_denoisers(pipe)) == {"transformer", "transformer_2"}
    assert "transformer (Wan), transformer_2 (Wan)" in repr(handle)
    zoo.call("wan22", pipe)
    rows = handle.report.rows()
    assert len(rows) == 4 and all(row["sparse_calls"] == 2 for row in rows)
    pipe.disable_fastdiff()
    assert torch.equal(zoo.call("wan22", pipe), zoo.call("wan22", twin))
    assert zoo.fingerprint(pipe) == zoo.fingerprint(twin)


def test_bare_model(wan):
    twin = zoo.build("wan")
    stock = zoo.call("wan", twin)
    handle = enable("wan", wan.transformer, dense_steps=5)
    latents = zoo.call("wan", wan)
    # without a scheduler there is no step, so no dense ones
    assert handle.report.summary()["sparse_calls"] == 8
    assert not torch.equal(latents, stock)
    fastdiff.disable(wan.transformer)
    assert torch.equal(zoo.call("wan", wan), stock)
    assert zoo.fingerprint(wan) == zoo.fingerprint(twin)


def test_bare_unet():
    unet = zoo.build("sd15").unet
    handle = enable("sd15", unet)
    sample, text = torch.randn(1, 4, 12, 9), torch.randn(1, 24, 32)
    fast = unet(sample, 3, text).sample
    assert handle.report.summary()["sparse_calls"] == 7
    fastdiff.disable(unet)
    assert not torch.equal(fast, unet(sample, 3, text).sample)


@pytest.mark.parametrize("first", ["pipe", "model"])
def test_pipeline_and_its_model_are_one_setting(wan, first):
    twin = zoo.build("wan")
    for target in ("pipe", "model") if first == "pipe" else ("model", "pipe"):
        enable("wan", wan if target == "pipe" else wan.transformer)
    zoo.call("wan", wan)
    zoo.call("wan", twin)
    wan.disable_fastdiff()
    assert zoo.fingerprint(wan) == zoo.fingerprint(twin)
    assert torch.equal(zoo.call("wan", wan), zoo.call("wan", twin))


def test_pipelines_that_share_a_model_share_its_setting():
    pipe = zoo.build("sd15")
    stock = zoo.call("sd15", pipe)
    traces = zoo.fingerprint(pipe)
    other = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    enable("sd15", pipe)
    assert not torch.equal(zoo.call("sd15", other), stock)
    other.disable_fastdiff()
    assert torch.equal(zoo.call("sd15", pipe), stock)
    pipe.disable_fastdiff()
    assert zoo.fingerprint(pipe) == traces


def test_modular_pipeline(wan):
    modular = pytest.importorskip("diffusers.modular_pipelines.wan")
    if not hasattr(modular, "WanBlocks"):
        pytest.skip("this diffusers has no modular Wan")
    pipe = modular.WanBlocks().init_pipeline()
    pipe.update_components(**{
        name: part for name, part in wan.components.items()
        if name in ("transformer", "scheduler", "vae", "text_encoder", "tokenizer")
    })

    def run():
        generator = torch.Generator("cpu").manual_seed(0)
        return pipe(prompt=zoo.PROMPT, num_inference_steps=2, generator=generator,
                    max_sequence_length=zoo.TEXT, **zoo.size("wan"), output="latents")

    stock = run()
    handle = enable("wan", pipe)
    assert handle is pipe.fastdiff
    fast = run()
    assert handle.report.summary()["sparse_calls"] > 0
    assert handle.clock.steps == 2 and handle.clock.step == 2
    assert not torch.equal(fast, stock)
    fastdiff.disable(pipe)
    assert torch.equal(run(), stock)


def test_anything_with_components_and_a_scheduler(wan):
    class Vehicle:
        components = wan.components
        scheduler = wan.scheduler

    vehicle = Vehicle()
    handle = enable("wan", vehicle, dense_steps=1)
    zoo.call("wan", wan)
    total = handle.report.summary()
    assert total["sparse_calls"] == 4 and total["dense_calls"] == {"dense step": 4}
    fastdiff.disable(vehicle)
    twin = zoo.build("wan")
    zoo.call("wan", twin)
    assert zoo.fingerprint(wan) == zoo.fingerprint(twin)


def test_unknown_subclass_of_a_known_model_is_driven(wan):
    class Finetuned(diffusers.WanTransformer3DModel):
        pass

    wan.transformer.__class__ = Finetuned
    enable("wan", wan)
    zoo.call("wan", wan)
    assert wan.fastdiff.report.summary()["sparse_calls"] == 8


def test_model_without_a_record_is_served_over_its_grid():
    torch.manual_seed(0)
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, hidden_size=32,
        num_layers=2, cross_attention_dim=32, cross_attention_dim_t5=32, sample_size=16,
        pooled_projection_dim=8, text_len=4, text_len_t5=6, activation_fn="gelu-approximate",
    ).eval().requires_grad_(False)
    arguments = {
        "hidden_states": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([5.0]),
        "encoder_hidden_states": torch.randn(1, 4, 32), "text_embedding_mask": torch.ones(1, 4),
        "encoder_hidden_states_t5": torch.randn(1, 6, 32),
        "text_embedding_mask_t5": torch.ones(1, 6), "image_meta_size": torch.ones(1, 6),
        "style": torch.zeros(1, dtype=torch.long), "image_rotary_emb": (torch.ones(64, 16),
                                                                       torch.zeros(64, 16)),
    }
    try:
        stock = model(**arguments).sample
    except TypeError:
        pytest.skip("this diffusers calls HunyuanDiT in another way")
    handle = enable("sd15", model, density=1.0)
    assert "generic" in repr(handle)
    fast = model(**arguments).sample
    assert handle.report.summary()["sparse_calls"] == 2
    zoo.assert_near(fast, stock)


# errors


@pytest.mark.parametrize(("arguments", "options", "words"), [
    (("tile-sprase",), {}, ["unknown method 'tile-sprase'", "did you mean tile-sparse"]),
    (("nonsense",), {}, ["unknown method 'nonsense'", "balanced", "tile-sparse"]),
    (("tile-sparse",), {"densty": 0.3}, ["no option 'densty'", "did you mean density"]),
    ((), {"density": 0}, ["density=0 is not possible", "at most 1"]),
    ((), {"density": 1.5}, ["density=1.5"]),
    ((), {"dense_steps": -1}, ["dense_steps=-1"]),
    ((), {"dense_steps": 1.5}, ["dense_steps=1.5", "fraction"]),
    ((), {"tile": (8, 8)}, ["tile=(8, 8)", "(frames, height, width)"]),
    ((), {"reuse": 0}, ["reuse=0"]),
    ((), {"sink": -1}, ["sink=-1"]),
    ((), {"select_by": "best"}, ["select_by='best'", "top-k"]),
    (("tile-sparse", "random-blocks"), {}, ["one attention method at a time", "random-blocks"]),
    (("tile-sparse",), {"plan": {"fastdiff_plan": 1}}, ["either methods or plan"]),
    ((), {"plan": {"density": 0.3}}, ["not a plan"]),
    ((), {"plan": {"fastdiff_plan": 1, "methods": [{"density": 0.3}]}}, ["not a plan", "a list"]),
    ((), {"plan": "no-such-plan.json"}, ["no-such-plan.json", "does not exist"]),
])
@pytest.mark.parametrize("on", [False, True])
def test_bad_settings_change_nothing(wan, on, arguments, options, words):
    if on:
        enable("wan", wan)
    handle, traces = wan.fastdiff, zoo.fingerprint(wan)
    with pytest.raises(ValueError) as error:
        wan.enable_fastdiff(*arguments, **options)
    for word in words:
        assert word in str(error.value)
    assert zoo.fingerprint(wan) == traces
    assert wan.fastdiff.enabled is on
    assert not on or wan.fastdiff is handle


@pytest.mark.parametrize("target", [
    lambda: object(),
    lambda: torch.nn.Linear(2, 2),
    lambda: diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,), decoder_block_out_channels=(8,), num_encoder_blocks=(1,),
        num_decoder_blocks=(1,)),
    lambda: zoo.build("sd15").vae,
    lambda: zoo.build("wan").vae,
    lambda: zoo.build("sd15").text_encoder,
], ids=["object", "linear", "no-attention", "vae", "video-vae", "text-encoder"])
def test_what_has_no_denoiser_is_refused(target):
    target = target()
    with pytest.raises((TypeError, ValueError), match="Known families: .*Wan"):
        fastdiff.enable(target)


def test_attention_without_a_known_call_is_refused(wan):
    class Odd:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    for _, module in wan.transformer.named_modules():
        if hasattr(module, "set_processor"):
            module.processor = Odd()
    traces = zoo.fingerprint(wan)
    with pytest.raises(ValueError, match="cannot take over"):
        wan.enable_fastdiff()
    assert zoo.fingerprint(wan) == traces


def test_some_odd_processors_are_named(wan):
    class Odd:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    wan.transformer.blocks[0].attn1.processor = Odd()
    enable("wan", wan, strict=False)
    zoo.call("wan", wan)
    assert "left stock, no attention call to take over: blocks.0.attn1 (Odd)" in repr(wan.fastdiff)
    assert [r["layer"] for r in wan.fastdiff.report.rows()] == ["blocks.1.attn1"]


# strict mode and fallbacks


def _wan_inputs():
    return {"hidden_states": torch.randn(1, 16, 3, 10, 14), "timestep": torch.tensor([5]),
            "encoder_hidden_states": torch.randn(1, 24, 32), "return_dict": False}


def _masked_pixart():
    """A model and a call whose attention mask no policy can read."""
    model = zoo.build("pixart_sigma").transformer
    return model, {"hidden_states": torch.randn(1, 4, 18, 20), "timestep": torch.tensor([5]),
                   "encoder_hidden_states": torch.randn(1, 24, 32), "return_dict": False,
                   "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
                   "attention_mask": (torch.arange(90) < 80)[None].float()}


def test_strict_from_the_environment(monkeypatch):
    model, inputs = _masked_pixart()
    monkeypatch.setenv("FASTDIFF_STRICT", "1")
    enable("pixart_sigma", model, strict=None)
    with pytest.raises(DenseFallbackError):
        model(**inputs)
    monkeypatch.setenv("FASTDIFF_STRICT", "0")
    enable("pixart_sigma", model, strict=None)
    model(**inputs)


@pytest.mark.parametrize("strict", [False, True])
def test_unsupported_mask(strict, caplog):
    model, inputs = _masked_pixart()
    stock = model(**inputs)[0]
    handle = enable("pixart_sigma", model, strict=strict)
    if strict:
        with pytest.raises(DenseFallbackError, match="attention mask of shape"):
            model(**inputs)
        return
    with caplog.at_level(logging.WARNING, "fastdiff"):
        assert torch.equal(model(**inputs)[0], stock)
    (reason, count), = handle.report.summary()["fallbacks"].items()
    assert "attention mask of shape" in reason and count == 2
    assert len(caplog.records) == 1


def test_padding_mask_is_honoured():
    """The padded text of HunyuanVideo must have no say, in kept blocks and in pooled ones."""
    pipe = zoo.build("hunyuan_video")
    model = pipe.transformer
    mask = (torch.arange(24) < 11)[None]
    inputs = {"hidden_states": torch.randn(1, 4, 3, 10, 14), "timestep": torch.tensor([5]),
              "encoder_hidden_states": torch.randn(1, 24, 16), "encoder_attention_mask": mask,
              "pooled_projections": torch.randn(1, 32), "guidance": torch.tensor([1000.0]),
              "return_dict": False}
    stock = model(**inputs)[0]
    for density in (1.0, 0.3):
        enable("hunyuan_video", model, density=density)
        fast = model(**inputs)[0]
        if density == 1:
            zoo.assert_near(fast, stock)
        text = inputs["encoder_hidden_states"].clone()
        text[:, 11:] = 1e3
        zoo.assert_near(model(**{**inputs, "encoder_hidden_states": text})[0], fast)


# the clock

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler, "unipc": diffusers.UniPCMultistepScheduler,
    "pndm": diffusers.PNDMScheduler, "heun": diffusers.HeunDiscreteScheduler,
    "ancestral": diffusers.EulerAncestralDiscreteScheduler, "lcm": diffusers.LCMScheduler,
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("replaced", [False, True], ids=["before", "after"])
def test_steps_are_counted(name, replaced, selects):
    pipe = zoo.build("sd15")
    if replaced:
        enable("sd15", pipe)
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    if not replaced:
        enable("sd15", pipe)
    for _ in range(2):
        del selects[:]
        zoo.call("sd15", pipe, num_inference_steps=4)
        # Heun and PNDM call the model more than once for a step of the user
        steps = len(pipe.scheduler.timesteps)
        assert pipe.fastdiff.clock.steps == steps
        assert [s for s, _, layer in selects if layer == 0] == list(range(steps))
        assert pipe.fastdiff.clock.step == steps
    pipe.disable_fastdiff()
    assert type(pipe.scheduler) is SCHEDULERS[name]


def test_scheduler_replaced_between_runs(selects):
    pipe = zoo.build("sd15")
    enable("sd15", pipe)
    zoo.call("sd15", pipe, num_inference_steps=4)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    del selects[:]
    zoo.call("sd15", pipe, num_inference_steps=3)
    assert [s for s, _, layer in selects if layer == 0] == [0, 1, 2]
    assert pipe.fastdiff.report.summary()["sparse_calls"] == 21


@pytest.mark.parametrize("run", [False, True], ids=["not-run", "run"])
def test_replaced_scheduler_is_left_stock(run):
    pipe = zoo.build("sd15")
    first = pipe.scheduler
    keys = set(vars(first))
    enable("sd15", pipe)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(first.config)
    if run:
        zoo.call("sd15", pipe)
    pipe.disable_fastdiff()
    assert type(first) is diffusers.DDIMScheduler and set(vars(first)) == keys
    assert type(pipe.scheduler) is diffusers.EulerDiscreteScheduler


@pytest.mark.parametrize(("dense_steps", "wanted"), [(0, 0), (1, 1), (3, 3), (9, 4), (0.25, 1),
                                                     (0.5, 2), (1.0, 4), (0.0, 0)])
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_dense_steps(name, dense_steps, wanted):
    pipe = zoo.build(name)
    enable(name, pipe, dense_steps=dense_steps)
    zoo.call(name, pipe, num_inference_steps=4)
    total = pipe.fastdiff.report.summary()
    assert total["dense_calls"].get("dense step", 0) == 4 * wanted
    assert total["sparse_calls"] == 4 * (4 - wanted)
    assert not total["fallbacks"]


def test_dense_layers():
    pipe = zoo.build("flux")
    enable("flux", pipe, dense_layers=3)
    zoo.call("flux", pipe)
    assert [row["sparse_calls"] for row in pipe.fastdiff.report.rows()] == [0, 0, 0, 2]


def test_short_sequences_stay_dense():
    pipe = zoo.build("flux")
    enable("flux", pipe, min_tokens=10_000)
    stock = zoo.call("flux", zoo.build("flux"))
    assert torch.equal(zoo.call("flux", pipe), stock)
    reason, = pipe.fastdiff.report.summary()["dense_calls"]
    assert "min_tokens=10000" in reason


def test_density_above_break_even_stays_dense(wan):
    enable("wan", wan, density=0.8, max_density=0.7)
    assert torch.equal(zoo.call("wan", wan), zoo.call("wan", zoo.build("wan")))
    reason, = wan.fastdiff.report.summary()["dense_calls"]
    assert "0.8" in reason and "break-even 0.7" in reason


@pytest.mark.parametrize("reuse", [1, 2, 3, 10])
@pytest.mark.parametrize("name", ["wan", "flux", "sd15"])
def test_a_selection_is_made_once_in_reuse_steps(name, reuse, selects):
    pipe = zoo.build(name)
    enable(name, pipe, reuse=reuse)
    for _ in range(2):
        del selects[:]
        zoo.call(name, pipe, num_inference_steps=5)
        layers = len(pipe.fastdiff.report.rows())
        branches = 2 if name == "wan" else 1
        assert len(selects) == layers * branches * math.ceil(5 / reuse)
        assert {step for step, *_ in selects} == set(range(0, 5, reuse))
    assert name != "wan" or {branch for _, branch, _ in selects} == {"cond", "uncond"}


def test_reused_selections_do_not_leak():
    """Between runs, sizes and prompts: each run is as in a fresh process."""
    runs = [{}, {"grid": (2, 7, 5)}, {"prompt": "blue"}, {"seed": 4}, {}]
    fresh = []
    for changes in runs:
        pipe = zoo.build("wan")
        enable("wan", pipe, reuse=2)
        fresh.append(zoo.call("wan", pipe, num_inference_steps=3, **changes))
    pipe = zoo.build("wan")
    enable("wan", pipe, reuse=2)
    for changes, wanted in zip(runs, fresh, strict=True):
        assert torch.equal(zoo.call("wan", pipe, num_inference_steps=3, **changes), wanted)


def test_an_interrupted_run_leaves_nothing(wan):
    enable("wan", wan)
    wanted = zoo.call("wan", wan)

    def stop(pipe, step, timestep, arguments):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoo.call("wan", wan, callback_on_step_end=stop, num_inference_steps=3)
    assert torch.equal(zoo.call("wan", wan), wanted)
    assert wan.fastdiff.clock.branch is None


def test_random_blocks_can_be_repeated(wan):
    options = zoo.small_options("wan")
    wan.enable_fastdiff("random-blocks", **options)
    first, second = zoo.call("wan", wan), zoo.call("wan", wan)
    assert torch.equal(first, second)
    wan.enable_fastdiff("random-blocks", **{**options, "seed": 1})
    assert not torch.equal(zoo.call("wan", wan), first)


def test_a_policy_may_choose_dense(wan, monkeypatch):
    monkeypatch.setattr(TileSparse, "select", lambda *_: None)
    enable("wan", wan)
    assert torch.equal(zoo.call("wan", wan), zoo.call("wan", zoo.build("wan")))
    assert wan.fastdiff.report.summary()["dense_calls"] == {"the method chose dense": 8}


def test_a_subclass_of_a_method_does_not_take_its_name():
    class Mine(TileSparse):
        pass

    try:
        assert methods()["tile-sparse"] is TileSparse
    finally:
        REGISTRY["tile-sparse"] = TileSparse
    assert issubclass(Mine, TileSparse)


# copies, files, memory


def test_deepcopy_of_a_driven_model(wan):
    inputs = _wan_inputs()
    stock = wan.transformer(**inputs)[0]
    enable("wan", wan.transformer)
    fast = wan.transformer(**inputs)[0]
    twin = copy.deepcopy(wan.transformer)
    assert torch.equal(twin(**inputs)[0], fast)
    fastdiff.disable(twin)
    assert torch.equal(twin(**inputs)[0], stock)
    assert torch.equal(wan.transformer(**inputs)[0], fast)
    fastdiff.disable(wan.transformer)
    assert torch.equal(wan.transformer(**inputs)[0], stock)


def test_copied_scheduler_does_not_drive_the_clock(wan):
    handle = enable("wan", wan)
    other = copy.deepcopy(wan.scheduler)
    other.set_timesteps(7)
    assert handle.clock.steps == 0 and handle.clock.run == 0


def test_state_dict_has_no_new_keys(wan):
    keys = set(wan.transformer.state_dict())
    enable("wan", wan)
    zoo.call("wan", wan)
    assert set(wan.transformer.state_dict()) == keys


@pytest.mark.parametrize("name", ["wan", "sd15"])
def test_save_and_load(name, tmp_path):
    pipe, twin = zoo.build(name), zoo.build(name)
    stock = zoo.call(name, twin)
    enable(name, pipe)
    zoo.call(name, pipe)
    pipe.save_pretrained(tmp_path / "fast")
    twin.save_pretrained(tmp_path / "stock")
    for path in sorted((tmp_path / "stock").rglob("*.json")):
        other = tmp_path / "fast" / path.relative_to(tmp_path / "stock")
        assert other.read_text() == path.read_text(), path.name
    loaded = type(twin).from_pretrained(tmp_path / "fast", local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    assert not loaded.fastdiff.enabled
    assert torch.equal(zoo.call(name, loaded), stock)


def test_a_driven_pipeline_can_be_freed():
    pipe = zoo.build("wan")
    enable("wan", pipe, reuse=2)
    zoo.call("wan", pipe)
    alive = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert alive() is None


def test_nothing_outside_is_patched():
    import torch.nn.functional as F
    from diffusers.models import attention_dispatch

    before = (F.scaled_dot_product_attention, attention_dispatch.dispatch_attention_fn,
              dict(attention_dispatch._AttentionBackendRegistry._backends))
    pipe = zoo.build("sd3")
    enable("sd3", pipe)
    zoo.call("sd3", pipe)
    assert before == (F.scaled_dot_product_attention, attention_dispatch.dispatch_attention_fn,
                      dict(attention_dispatch._AttentionBackendRegistry._backends))


def test_a_mask_that_is_no_tensor_raises_in_strict_mode():
    from fastdiff import seam
    from fastdiff.layout import TokenLayout

    transformer = zoo.build("wan").transformer
    fastdiff.enable(transformer, min_tokens=1, strict=True)
    layer = transformer.blocks[0].attn1.__dict__[seam.LAYER]
    layer.denoiser.layout = TokenLayout((1, 4, 4))
    seam._current.layer, seam._current.context = layer, 0
    query = torch.randn(1, 16, 2, 16)
    with pytest.raises(DenseFallbackError, match="a mask of type object"):
        seam._dispatch(query, query, query, attn_mask=object())
    fastdiff.disable(transformer)
