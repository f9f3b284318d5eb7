"""Bottleneck sampling beside what else a user switches on."""

# diffusers exports its classes lazily and annotates arguments narrowly
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import diffusers
import pytest
import torch
import zoo
from test_compat import lora
from torch._dynamo.utils import counters

import fastdiff
from fastdiff.pipelines.bottleneck import BottleneckSampling, Stage
from fastdiff.policies.tile_sparse import TileSparse

STAGES = (Stage(1, 2), Stage(0.5, 3, 0.9), Stage(1, 2, 0.7))
STEPS = 7


def staged(**changes):
    return BottleneckSampling(**{"stages": STAGES, "force": True, **changes})


def sparse(name, **changes):
    options = zoo.small_options(name, **changes)
    strict = options.pop("strict")
    return TileSparse(**options), {"strict": strict}


def _grids(pipe):
    """The grid of every denoiser forward, as the policy sees it."""
    denoiser = pipe.fastdiff._denoisers[0]
    seen = []

    def look(module, args, kwargs):
        layout, ids = denoiser.layout, denoiser.ids
        seen.append(layout.grid if ids is None else denoiser.grid_from_ids(ids))

    zoo.denoiser(pipe).register_forward_pre_hook(look, with_kwargs=True)
    return seen


@pytest.mark.parametrize("name", ["wan", "flux", "sd3", "cogvideox", "ltx", "hunyuan_video"])
def test_sparse_attention_sees_the_grid_of_the_stage(name):
    pipe = zoo.build(name)
    policy, options = sparse(name)
    fastdiff.enable(pipe, staged(), policy, **options)
    seen = _grids(pipe)
    out = zoo.call(name, pipe)
    assert out.isfinite().all()
    assert {seen[0], seen[-1]} == {zoo.GRIDS[name]} and len(set(seen)) == 2
    low = next(grid for grid in seen if grid != seen[0])
    assert all(abs(n - full / 2) <= 1 for n, full in zip(low[1:], seen[0][1:], strict=True))
    assert low[0] == seen[0][0]
    total = pipe.fastdiff.report.summary()
    assert total["sparse_calls"] > 0 and not total["fallbacks"]


def test_full_density_in_stages_equals_stages_alone():
    pipe = zoo.build("wan")
    fastdiff.enable(pipe, staged())
    alone = zoo.call("wan", pipe)
    policy, options = sparse("wan", density=1.0)
    fastdiff.enable(pipe, staged(), policy, **options)
    zoo.assert_near(zoo.call("wan", pipe), alone)


def test_dense_steps_count_the_steps_of_the_whole_run():
    pipe = zoo.build("wan")
    policy, options = sparse("wan", dense_steps=3)
    fastdiff.enable(pipe, staged(), policy, **options)
    zoo.call("wan", pipe)
    total = pipe.fastdiff.report.summary()
    dense, calls = total["dense_calls"]["dense step"], total["sparse_calls"]
    assert dense / (dense + calls) == pytest.approx(3 / STEPS)


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_first_block_cache_starts_anew_at_every_border(name, monkeypatch):
    """A threshold so high that every step but the first would take the cache, of another size."""
    pipe = zoo.build(name)
    model = zoo.denoiser(pipe)
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
    resets = []
    stock = model._reset_stateful_cache
    monkeypatch.setattr(model, "_reset_stateful_cache", lambda: (resets.append(1), stock()))
    fastdiff.enable(pipe, staged())
    assert zoo.call(name, pipe).isfinite().all()
    assert len(resets) >= 2


def test_a_cache_that_cannot_begin_anew_is_refused_before_the_first_step():
    pipe = zoo.build("wan")
    pipe.transformer.enable_cache(diffusers.FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 901), is_guidance_distilled=True,
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=lambda: pipe.current_timestep))
    fastdiff.enable(pipe, BottleneckSampling(stages=STAGES, force=True))
    with pytest.raises(ValueError, match="FasterCache is enabled on transformer.*disable_cache"):
        zoo.call("wan", pipe)
    fastdiff.enable(pipe, BottleneckSampling(stages=[Stage(1, 2)]))
    zoo.call("wan", pipe)


def test_lora():
    pipe = zoo.build("flux")
    fastdiff.enable(pipe, staged())
    plain = zoo.call("flux", pipe)
    pipe.load_lora_weights(lora("flux", pipe), adapter_name="one")
    assert not torch.equal(zoo.call("flux", pipe), plain)
    pipe.unload_lora_weights()
    assert torch.equal(zoo.call("flux", pipe), plain)


@pytest.mark.parametrize("name", ["flux", "sd15"])
def test_offload_hooks(name):
    accelerate = pytest.importorskip("accelerate")
    pipe = zoo.build(name)
    fastdiff.enable(pipe, staged())
    plain = zoo.call(name, pipe)
    accelerate.cpu_offload_with_hook(zoo.denoiser(pipe), "cpu")
    for _ in range(2):
        assert torch.equal(zoo.call(name, pipe), plain)


class Backend:
    """Runs graphs as they are, and counts those that compute.

    The hook that reads the grid is traced on its own: a division of integers, no tensor.
    """

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += any(isinstance(x, torch.nn.Parameter) for x in inputs)
        return graph.forward


def _short(pipe):
    """With one block of each kind: what is traced grows with every block, what is tested not."""
    model = pipe.transformer
    for blocks in ("blocks", "transformer_blocks", "single_transformer_blocks"):
        if hasattr(model, blocks):
            setattr(model, blocks, getattr(model, blocks)[:1])
    return pipe


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name, in_place", [
    ("flux", False), ("ltx", True)])
def test_one_graph_for_each_size(name, in_place):
    pipe, backend = _short(zoo.build(name)), Backend()
    fastdiff.enable(pipe, staged())
    eager = zoo.call(name, pipe)
    if in_place:
        pipe.transformer.compile(fullgraph=True, backend=backend)
    else:
        pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=backend)
    for _ in range(2):
        zoo.assert_near(zoo.call(name, pipe), eager)
    assert backend.graphs == 2
    assert not counters["graph_break"]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["wan"])
def test_sparse_and_staged_and_compiled(name):
    pipe, backend = _short(zoo.build(name)), Backend()
    policy, options = sparse(name)
    fastdiff.enable(pipe, staged(), policy, **options)
    eager = zoo.call(name, pipe)
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=backend)
    for _ in range(2):
        zoo.assert_near(zoo.call(name, pipe), eager)
    assert backend.graphs == 2


@pytest.mark.parametrize("name", ["flux", "sdxl", "wan"])
def test_saving_and_swapping_while_enabled(name, tmp_path):
    """The pipeline saves under its own name, and shares its parts as ever."""
    pipe = zoo.build(name)
    fastdiff.enable(pipe, staged())
    zoo.call(name, pipe)
    pipe.save_config(tmp_path)
    assert pipe.config["_class_name"] == type(pipe).__name__
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    assert not other.fastdiff.enabled
