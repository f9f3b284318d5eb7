"""torch.compile: one graph, the same picture, and switching on and off is seen."""

# diffusers exports its classes lazily and annotates arguments narrowly; no type is checked here
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import pytest
import torch
import zoo
from torch._dynamo.utils import counters

import fastdiff

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Backend:
    """Runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def enable(name, target, **changes):
    return fastdiff.enable(target, "tile-sparse", **zoo.small_options(name, **changes))


def compiled(name, pipe, backend):
    """The pipeline with its denoiser compiled whole; any graph break raises."""
    part = "unet" if name in ("sd15", "sdxl") else "transformer"
    setattr(pipe, part, torch.compile(getattr(pipe, part), fullgraph=True, backend=backend))
    return pipe


@pytest.mark.parametrize("name", ["wan", "flux", "sd3", "sd15", "cogvideox", "hunyuan_video"])
def test_one_graph_for_all_steps(name):
    pipe, backend = zoo.build(name), Backend()
    enable(name, pipe)
    eager = zoo.call(name, pipe, num_inference_steps=3)
    calls = pipe.fastdiff.report.summary()["sparse_calls"]
    compiled(name, pipe, backend)
    for _ in range(2):
        assert torch.equal(zoo.call(name, pipe, num_inference_steps=3), eager)
        assert pipe.fastdiff.report.summary()["sparse_calls"] == calls
        assert len(pipe.fastdiff.report.rows()) == len({r["index"] for r in
                                                        pipe.fastdiff.report.rows()})
    assert backend.graphs == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", ["wan", "flux", "sd3"])
def test_dense_and_sparse_steps_share_the_graph(name):
    pipe, backend = zoo.build(name), Backend()
    enable(name, pipe, dense_steps=2, reuse=2)
    eager = zoo.call(name, pipe, num_inference_steps=4)
    compiled(name, pipe, backend)
    assert torch.equal(zoo.call(name, pipe, num_inference_steps=4), eager)
    total = pipe.fastdiff.report.summary()
    assert total["sparse_calls"] == total["dense_calls"]["dense step"] > 0
    assert backend.graphs == 1


@pytest.mark.parametrize("name", ["wan", "flux", "sd3"])
def test_switching_a_compiled_model(name):
    """Compiled stock, then on, off, and on again: each is what it is without the compiler."""
    backend = Backend()
    pipe, twin = compiled(name, zoo.build(name), backend), zoo.build(name)
    stock = zoo.call(name, twin)
    enable(name, twin)
    fast = zoo.call(name, twin)
    assert torch.equal(zoo.call(name, pipe), stock)
    for _ in range(2):
        enable(name, pipe)
        assert torch.equal(zoo.call(name, pipe), fast)
        assert pipe.fastdiff.report.summary()["sparse_calls"] > 0
        pipe.disable_fastdiff()
        assert torch.equal(zoo.call(name, pipe), stock)
    assert backend.graphs <= 4


@pytest.mark.parametrize("name", ["wan", "sd3"])
def test_other_options_are_seen(name):
    backend = Backend()
    pipe, twin = compiled(name, zoo.build(name), backend), zoo.build(name)
    for density in (0.3, 0.8, 1.0):
        for one in (pipe, twin):
            enable(name, one, density=density)
        assert torch.equal(zoo.call(name, pipe), zoo.call(name, twin))
        assert (pipe.fastdiff.report.summary()["density"]
                == twin.fastdiff.report.summary()["density"])
    assert backend.graphs <= 3


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_a_new_size_costs_a_graph_and_no_more(name):
    pipe, twin, backend = zoo.build(name), zoo.build(name), Backend()
    for one in (pipe, twin):
        enable(name, one)
    compiled(name, pipe, backend)
    grids = [zoo.GRIDS[name], (1, 8, 9) if name == "flux" else (2, 7, 5)]
    for grid in [*grids, *grids]:
        assert torch.equal(zoo.call(name, pipe, grid=grid), zoo.call(name, twin, grid=grid))
    assert backend.graphs <= 3


@pytest.mark.parametrize(("name", "most"), [("wan", 1), ("flux", 3)])
def test_repeated_blocks(name, most):
    pipe, twin, backend = zoo.build(name), zoo.build(name), Backend()
    for one in (pipe, twin):
        enable(name, one)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    assert torch.equal(zoo.call(name, pipe), zoo.call(name, twin))
    rows = pipe.fastdiff.report.rows()
    assert [r["layer"] for r in rows] == [r["layer"] for r in twin.fastdiff.report.rows()]
    assert [r["sparse_calls"] for r in rows] == [r["sparse_calls"] for r in
                                                 twin.fastdiff.report.rows()]
    assert backend.graphs <= most


def test_aot_autograd_keeps_the_op():
    pipe = zoo.build("wan")
    enable("wan", pipe)
    eager = zoo.call("wan", pipe)
    compiled("wan", pipe, "aot_eager")
    zoo.assert_near(zoo.call("wan", pipe), eager)
    assert pipe.fastdiff.report.summary()["sparse_calls"] == 8


def test_strict_mode_inside_a_graph():
    model = torch.compile(zoo.wan_transformer(), fullgraph=True, backend="eager")
    model.requires_grad_(False)
    inputs = {"hidden_states": torch.randn(1, 16, 3, 10, 14), "timestep": torch.tensor([5]),
              "encoder_hidden_states": torch.randn(1, 24, 32), "return_dict": False}
    stock = model(**inputs)[0]
    handle = enable("wan", model)
    assert not torch.equal(model(**inputs)[0], stock)
    assert handle.report.summary()["sparse_calls"] == 2
    fastdiff.disable(model)
    assert torch.equal(model(**inputs)[0], stock)


def test_operator_is_well_formed():
    from fastdiff.attention import Layer, Session, attention
    from fastdiff.clock import StepClock

    class Denoiser:
        def grid_from_ids(self, ids):
            return (1, 6, 5)

    policy = fastdiff.TileSparse(density=0.5, min_tokens=1, max_density=1.0, tile=(1, 2, 2))
    layer = Layer("layer", Denoiser(), Session(policy, StepClock()))
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 34, 2, 16).unbind(0)
    torch.library.opcheck(
        attention, (query, key, value, None, None, layer.number, [1, 6, 5, 4, 0], None, "sdpa"),
        test_utils=("test_schema", "test_faketensor"),
    )
