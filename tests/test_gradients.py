"""Training through the op: gradients of a sparse model, in eager and in compiled code."""

# diffusers exports its classes lazily and annotates arguments narrowly; no type is checked here
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch._dynamo.utils import counters

import fastdiff
from fastdiff import gradients, layout, policies, seam
from fastdiff.attention import DenseFallbackError
from fastdiff.policies.base import Attended
from fastdiff.report import RECENT, LayerReport


def inputs():
    generator = torch.Generator().manual_seed(1)
    return {"hidden_states": torch.randn(1, 16, 3, 10, 14, generator=generator),
            "timestep": torch.tensor([5]), "return_dict": False,
            "encoder_hidden_states": torch.randn(1, 24, 32, generator=generator)}


def enable(model, **changes):
    return fastdiff.enable(model, "tile-sparse", **zoo.small_options("wan", **changes))


def learn(model, *args, **kwargs):
    """The output, and the gradients of its squared sum, by parameter name."""
    model.zero_grad()
    out = model(*args, **(kwargs or inputs()))[0]
    out.float().square().sum().backward()
    named = getattr(model, "_orig_mod", model).named_parameters()
    return out.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same(found, wanted):
    assert found[1].keys() == wanted[1].keys()
    zoo.assert_near(found[0], wanted[0])
    for name, grad in wanted[1].items():
        zoo.assert_near(found[1][name], grad)


def test_all_tiles_kept_gives_stock_gradients():
    model = zoo.wan_transformer()
    stock = learn(model)
    handle = enable(model, density=1.0)
    assert_same(learn(model), stock)
    total = handle.report.summary()
    assert total["sparse_calls"] == 2 and not total["fallbacks"]


@pytest.mark.parametrize("name", ["flux", "sd15", "sd3", "cogvideox"])
def test_other_families(name):
    pipe, calls = zoo.build(name), []
    model = zoo.denoiser(pipe)
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    zoo.call(name, pipe)
    hook.remove()
    args, kwargs = calls[0]
    model.requires_grad_(True)
    stock = learn(model, *args, **kwargs)
    handle = fastdiff.enable(pipe, "tile-sparse", **zoo.small_options(name, density=1.0))
    assert_same(learn(model, *args, **kwargs), stock)
    total = handle.report.summary()
    assert total["sparse_calls"] > 0 and not total["fallbacks"]


@pytest.mark.parametrize("tail", [False, True])
def test_sparse_gradients_are_those_of_the_reference(tail):
    model = zoo.wan_transformer()
    stock = learn(model)
    handle = enable(model, tail=tail)
    found = learn(model)
    handle._session.impl = "reference"
    assert_same(found, learn(model))
    name = "blocks.0.attn1.to_q.weight"
    assert not torch.allclose(found[1][name], stock[1][name])


def test_only_the_values_are_trained():
    model = zoo.wan_transformer().requires_grad_(False)
    model.blocks[0].attn1.to_v.requires_grad_(True)
    stock = learn(model)
    enable(model, density=1.0)
    assert_same(learn(model), stock)


def test_gradient_checkpointing():
    model = zoo.wan_transformer().train()
    handle = enable(model)
    plain = learn(model)
    model.enable_gradient_checkpointing()
    assert_same(learn(model), plain)
    assert handle.report.summary()["sparse_calls"] == 2 + 4


@pytest.mark.parametrize("grad", [False, True])
def test_autocast(grad):
    model = zoo.wan_transformer()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        stock = model(**inputs())[0]
        enable(model, density=1.0)
        found = model(**inputs())[0]
    assert found.dtype == stock.dtype == torch.bfloat16
    # two roundings of the largest; attention in another order is 0.09 away
    torch.testing.assert_close(found, stock, rtol=0, atol=0.03)
    if grad:
        found.float().sum().backward()
        assert model.blocks[0].attn1.to_q.weight.grad.any()


def test_eager_code_needs_no_ops(monkeypatch):
    model = zoo.wan_transformer()
    with torch.no_grad():
        stock = model(**inputs())[0]
    handle = enable(model)
    monkeypatch.setattr(seam, "attention", None)
    monkeypatch.setattr(seam, "attention_with_gradients", None)
    with torch.no_grad():
        found = model(**inputs())[0]
    assert torch.equal(model(**inputs())[0], found) and not torch.equal(found, stock)
    assert handle.report.summary()["sparse_calls"] == 4


def test_a_method_without_gradients_is_not_trained_in_silence(monkeypatch):
    def attend(self, query, key, value, context, terms):
        q, k, v = (x.detach().transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return Attended(out, torch.tensor(1.0))

    monkeypatch.setattr(fastdiff.TileSparse, "attend", attend)
    model = zoo.wan_transformer()
    stock = learn(model)
    handle = enable(model, strict=False)
    assert_same(learn(model), stock)
    (reason, count), = handle.report.summary()["fallbacks"].items()
    assert "tile-sparse computes attention without them" in reason and count == 2
    enable(model, strict=True)
    with pytest.raises(DenseFallbackError, match="gradients are wanted"):
        learn(model)


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    model = zoo.wan_transformer()
    enable(model, density=0.3)
    target = torch.randn(1, 16, 3, 10, 14)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = F.mse_loss(model(**inputs())[0], target)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_long_training_keeps_the_report_small():
    layer = LayerReport("layer")
    densities = [(i % 7) / 7 for i in range(5000)]
    for i, density in enumerate(densities):
        layer.sparse(torch.tensor(density), 10.0 + i, 0.0)
        layer.timed(0.5)
    kept = len(layer.densities)
    assert kept < 2 * RECENT and layer.densities == pytest.approx(densities[-kept:])
    assert layer.density == pytest.approx(sum(densities) / 5000)
    kept_flops = sum(d * (10.0 + i) for i, d in enumerate(densities))
    assert layer.flops == pytest.approx((kept_flops, sum(10.0 + i for i in range(5000))))
    assert layer.seconds == pytest.approx(2500)
    assert layer.sparse_calls == 5000 and len(layer._clock) < 2 * RECENT


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_whole(backend):
    model = zoo.wan_transformer()
    handle = enable(model)
    eager = learn(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        assert_same(learn(compiled), eager)
    assert handle.report.summary()["sparse_calls"] == 6
    assert not counters["graph_break"]
    model.requires_grad_(False)
    with torch.no_grad():
        zoo.assert_near(compiled(**inputs())[0], eager[0])


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_forward_without_backward_leaves_nothing(backend, monkeypatch):
    alive = []

    def watched(*args):
        out = watched.attend(*args)
        alive.append(weakref.ref(out))
        return out

    watched.attend = gradients.attend
    monkeypatch.setattr(gradients, "attend", watched)
    model = zoo.wan_transformer()
    enable(model)
    out = torch.compile(model, backend=backend, fullgraph=True)(**inputs())[0]
    assert len(alive) == 2 and all(ref() is not None for ref in alive)
    del out
    gc.collect()
    assert all(ref() is None for ref in alive)


# sparse-vdit wants a plan, and its patterns are remembered in the same way as those of bands
@pytest.mark.parametrize("name", sorted(policies.methods().keys() - {"sparse-vdit"}))
def test_training_after_inference_mode(name):
    """What a call in inference mode leaves behind for later calls must not keep them from it."""
    layout.forget()
    model = zoo.wan_transformer()
    handle = fastdiff.enable(model, name, **zoo.small_options("wan"))
    with torch.inference_mode():
        model(**inputs())
    out, grads = learn(model)
    assert out.isfinite().all() and grads
    assert handle.report.summary()["sparse_calls"] == 4
