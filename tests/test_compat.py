"""FastDiff beside what else changes a model: in any order, and disabled equals never enabled."""

# diffusers exports its classes lazily and annotates arguments narrowly; no type is checked here
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import random
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import zoo
from diffusers.models import attention_dispatch as dispatch
from diffusers.models.attention_processor import AttnProcessor2_0

import fastdiff  # noqa: F401 - adds the pipeline methods

peft = pytest.importorskip("peft")


def enable(name, pipe, **changes):
    pipe.enable_fastdiff("tile-sparse", **zoo.small_options(name, **changes))


@pytest.fixture(autouse=True)
def _stock_backend():
    # set_attention_backend also changes the choice of the whole process
    before = dispatch._AttentionBackendRegistry._active_backend
    yield
    dispatch._AttentionBackendRegistry._active_backend = before


@pytest.fixture(params=["wan", "flux", "sd15"])
def name(request):
    return request.param


def prefix(name):
    return "unet" if name == "sd15" else "transformer"


def lora(name, pipe, seed=0):
    """Random weights for every query, key and value projection of self-attention."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path, module in zoo.denoiser(pipe).named_modules():
        kind = path.rpartition(".")[2]
        if kind in ("to_q", "to_k", "to_v") and isinstance(module, torch.nn.Linear):
            for side, shape in (("A", (4, module.in_features)), ("B", (module.out_features, 4))):
                weight = torch.randn(shape, generator=generator) * 0.3
                found[f"{prefix(name)}.{path}.lora_{side}.weight"] = weight
    return found


def total(pipe):
    return pipe.fastdiff.report.summary()


Action = Callable[[str, Any], None]
FIRST_BLOCK = diffusers.FirstBlockCacheConfig(threshold=10.0)


def _broadcast(pipe):
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe._current_timestep,
    )


def _offload(name, pipe):
    cpu = torch.device("cpu")
    try:
        zoo.denoiser(pipe).enable_group_offload(
            onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    except AttributeError:
        if torch.accelerator.current_accelerator() is None:
            pytest.skip("this diffusers offloads groups to an accelerator only")
        raise


# what else a user does, in the order that makes sense; FastDiff comes in between
STORIES: dict[str, list[Action]] = {
    "lora": [
        lambda name, pipe: pipe.load_lora_weights(lora(name, pipe), adapter_name="one"),
        lambda name, pipe: pipe.set_adapters("one", 0.5),
        lambda name, pipe: pipe.unload_lora_weights(),
        lambda name, pipe: pipe.load_lora_weights(lora(name, pipe, 1), adapter_name="two"),
    ],
    "fuse": [
        lambda name, pipe: zoo.denoiser(pipe).fuse_qkv_projections(),
        lambda name, pipe: zoo.denoiser(pipe).unfuse_qkv_projections(),
        lambda name, pipe: zoo.denoiser(pipe).fuse_qkv_projections(),
    ],
    "backend": [
        lambda name, pipe: zoo.denoiser(pipe).set_attention_backend("_native_math"),
        lambda name, pipe: zoo.denoiser(pipe).set_attention_backend("native"),
    ],
    "first-block-cache": [
        lambda name, pipe: zoo.denoiser(pipe).enable_cache(FIRST_BLOCK),
        lambda name, pipe: zoo.denoiser(pipe).disable_cache(),
        lambda name, pipe: zoo.denoiser(pipe).enable_cache(FIRST_BLOCK),
    ],
    "attention-broadcast": [
        lambda name, pipe: zoo.denoiser(pipe).enable_cache(_broadcast(pipe)),
        lambda name, pipe: zoo.denoiser(pipe).disable_cache(),
    ],
    "group-offload": [_offload],
    "scheduler": [
        lambda name, pipe: setattr(pipe, "scheduler", type(pipe.scheduler).from_config(
            pipe.scheduler.config)),
    ],
}
FAMILIES = {"first-block-cache": ("wan", "flux"), "attention-broadcast": ("wan", "flux"),
            "backend": ("wan", "flux"), "fuse": ("wan", "flux", "sd15", "sd3", "cogvideox",
                                                "pixart_sigma", "sdxl")}


def _orders():
    """Each story alone, with FastDiff switched on and off between its steps at random places."""
    for story, actions in STORIES.items():
        for family in FAMILIES.get(story, ("wan", "flux", "sd15")):
            for seed in range(4):
                draw = random.Random(f"{story} {family} {seed}")
                script: list[object] = [*actions]
                for move in draw.choices(["on", "on", "other", "off", "run"], k=4):
                    script.insert(draw.randrange(len(script) + 1), move)
                yield pytest.param(family, script, id=f"{story}-{family}-{seed}")


@pytest.mark.parametrize(("family", "script"), _orders())
def test_disabled_is_never_enabled_in_any_order(family, script):
    pipe, twin = zoo.build(family), zoo.build(family)
    for move in script:
        if callable(move):
            move(family, pipe)
            move(family, twin)
        elif move == "on":
            enable(family, pipe)
        elif move == "other":
            enable(family, pipe, density=0.2, tile=None, reuse=2, tail=False)
        elif move == "off":
            pipe.disable_fastdiff()
        else:
            # as far as both have run, both remember the same things
            zoo.call(family, pipe)
            zoo.call(family, twin)
            if pipe.fastdiff.enabled:
                assert total(pipe)["sparse_calls"] > 0
    enabled_at_end = pipe.fastdiff.enabled
    if enabled_at_end:
        zoo.call(family, pipe)
        zoo.call(family, twin)
        assert total(pipe)["sparse_calls"] > 0
    pipe.disable_fastdiff()
    assert torch.equal(zoo.call(family, pipe), zoo.call(family, twin))
    assert zoo.fingerprint(pipe) == zoo.fingerprint(twin)


@pytest.mark.parametrize("family", FAMILIES["fuse"])
@pytest.mark.parametrize("ran", [False, True])
def test_unfused_after_disable(family, ran):
    """diffusers keeps the processors from before the fusion, and puts them back."""
    pipe, twin = zoo.build(family), zoo.build(family)
    enable(family, pipe)
    for one in (pipe, twin):
        zoo.denoiser(one).fuse_qkv_projections()
    if ran:
        zoo.call(family, pipe)
        zoo.call(family, twin)
    pipe.disable_fastdiff()
    for one in (pipe, twin):
        zoo.denoiser(one).unfuse_qkv_projections()
    assert torch.equal(zoo.call(family, pipe), zoo.call(family, twin))
    assert zoo.fingerprint(pipe) == zoo.fingerprint(twin)


@pytest.mark.parametrize("family", FAMILIES["fuse"])
def test_fused_projections_stay_sparse(family):
    pipe = zoo.build(family)
    enable(family, pipe)
    before = zoo.call(family, pipe)
    calls = total(pipe)["sparse_calls"]
    for step in ("fuse_qkv_projections", "unfuse_qkv_projections"):
        getattr(zoo.denoiser(pipe), step)()
        after = zoo.call(family, pipe)
        assert total(pipe)["sparse_calls"] == calls, step
        assert not total(pipe)["fallbacks"]
        assert (after - before).norm() < 1e-2 * before.norm()


def test_replaced_processors_are_taken_over():
    pipe = zoo.build("sd15")
    enable("sd15", pipe)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    zoo.call("sd15", pipe)
    assert total(pipe)["sparse_calls"] == 14
    pipe.disable_fastdiff()
    kinds = {type(p) for p in pipe.unet.attn_processors.values()}
    assert kinds == {AttnProcessor2_0}


def test_lora_works_while_enabled(name):
    pipe = zoo.build(name)
    enable(name, pipe, density=1.0)
    plain = zoo.call(name, pipe)
    twin = zoo.build(name)
    for one in (pipe, twin):
        one.load_lora_weights(lora(name, one), adapter_name="one")
    styled = zoo.call(name, pipe)
    assert total(pipe)["sparse_calls"] > 0 and not total(pipe)["fallbacks"]
    zoo.assert_near(styled, zoo.call(name, twin))
    assert (styled - plain).abs().max() > 1e-3
    pipe.unload_lora_weights()
    assert torch.equal(zoo.call(name, pipe), plain)


@pytest.mark.parametrize("family", ["wan", "flux"])
def test_dense_calls_use_the_chosen_backend(family):
    pipe, twin = zoo.build(family), zoo.build(family)
    enable(family, pipe, dense_steps=1.0)
    seen = []
    registry = dispatch._AttentionBackendRegistry._backends
    stock = registry[dispatch.AttentionBackendName._NATIVE_MATH]
    registry[dispatch.AttentionBackendName._NATIVE_MATH] = (
        lambda *args, **kwargs: seen.append(1) or stock(*args, **kwargs))
    try:
        for one in (pipe, twin):
            zoo.denoiser(one).set_attention_backend("_native_math")
        wanted = zoo.call(family, twin)
        stock_calls = len(seen)
        assert torch.equal(zoo.call(family, pipe), wanted)
        assert len(seen) == 2 * stock_calls > 0
    finally:
        registry[dispatch.AttentionBackendName._NATIVE_MATH] = stock


@pytest.mark.parametrize("family", ["wan", "flux"])
@pytest.mark.parametrize("cache", ["first-block-cache", "attention-broadcast"])
def test_caches_work_while_enabled(family, cache):
    """With density 1 the cache decides as it does beside stock attention."""
    pipe, twin = zoo.build(family), zoo.build(family)
    enable(family, pipe, density=1.0)
    plain = zoo.call(family, pipe, num_inference_steps=4)
    calls = total(pipe)["sparse_calls"]
    for one in (pipe, twin):
        STORIES[cache][0](family, one)
    cached = zoo.call(family, pipe, num_inference_steps=4)
    assert 0 < total(pipe)["sparse_calls"] < calls
    zoo.assert_near(cached, zoo.call(family, twin, num_inference_steps=4))
    assert pipe.fastdiff.clock.step == 4
    zoo.denoiser(pipe).disable_cache()
    assert torch.equal(zoo.call(family, pipe, num_inference_steps=4), plain)


def test_group_offload_while_enabled(name):
    pipe = zoo.build(name)
    enable(name, pipe)
    plain = zoo.call(name, pipe)
    _offload(name, pipe)
    assert torch.equal(zoo.call(name, pipe), plain)
    assert total(pipe)["sparse_calls"] > 0


@pytest.mark.parametrize("enabled_first", [True, False])
def test_accelerate_hooks(name, enabled_first):
    """The hooks behind model and sequential CPU offload, with the CPU as the executing device."""
    accelerate = pytest.importorskip("accelerate")
    pipe, twin = zoo.build(name), zoo.build(name)
    if enabled_first:
        enable(name, pipe)
    for one in (pipe, twin):
        accelerate.cpu_offload_with_hook(zoo.denoiser(one), "cpu")
    if not enabled_first:
        enable(name, pipe)
    for _ in range(2):
        fast = zoo.call(name, pipe)
        assert total(pipe)["sparse_calls"] > 0
        # what pipelines do after a run with offload
        accelerate.hooks.remove_hook_from_module(zoo.denoiser(pipe), recurse=True)
        accelerate.cpu_offload_with_hook(zoo.denoiser(pipe), "cpu")
    stock = zoo.call(name, twin)
    assert not torch.equal(fast, stock)
    pipe.disable_fastdiff()
    assert torch.equal(zoo.call(name, pipe), stock)
    for one in (pipe, twin):
        accelerate.hooks.remove_hook_from_module(zoo.denoiser(one), recurse=True)
    assert zoo.fingerprint(pipe) == zoo.fingerprint(twin)


def test_model_cpu_offload(name):
    pipe = zoo.build(name)
    enable(name, pipe)
    plain = zoo.call(name, pipe)
    try:
        pipe.enable_model_cpu_offload(device="cpu")
    except (RuntimeError, AttributeError) as error:
        pytest.skip(f"needs an accelerator: {error}")
    for _ in range(2):
        assert torch.equal(zoo.call(name, pipe), plain)
        assert total(pipe)["sparse_calls"] > 0
    pipe.disable_fastdiff()
    assert torch.equal(zoo.call(name, pipe), zoo.call(name, zoo.build(name)))


def test_skip_layer_guidance_reads_swapped_processors():
    """diffusers looks processors up by their exact class."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    pipe = zoo.build("flux")
    enable("flux", pipe)
    for processor in pipe.transformer.attn_processors.values():
        AttentionProcessorRegistry.get(type(processor))
