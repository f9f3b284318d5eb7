"""Fewer keys and values: what they are, where it acts, and that it comes out again."""

# diffusers exports its classes lazily and annotates arguments narrowly; no type is checked here
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff.attention import DenseFallbackError
from fastdiff.layout import TokenLayout
from fastdiff.tokens.at_edm import AtEdm
from fastdiff.tokens.kv_downsample import KVDownsample, downsample

ALWAYS = {"min_tokens": 0, "guard": False}
FAMILIES = ("sd15", "sdxl", "sd3", "flux", "pixart_sigma", "wan", "cogvideox", "ltx",
            "hunyuan_video")


def calls(pipe):
    return pipe.fastdiff.report.methods["kv-downsample"]["calls over fewer keys"]


def attend(q, k, v, bias=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2)


def test_cells_by_hand():
    layout = TokenLayout((1, 2, 3), before=1)
    key = torch.arange(7.0).view(1, 7, 1, 1)
    k, v, bias = downsample(key, key * 10, None, layout, 2, "mean", True)
    # text 0; a cell of tokens 1, 2, 4, 5; a cell of 3 and 6 that the border cuts
    assert k.flatten().tolist() == [0.0, 3.0, 4.5] and v.flatten().tolist() == [0.0, 30.0, 45.0]
    assert bias is not None
    torch.testing.assert_close(bias.exp().flatten(), torch.tensor([1.0, 4.0, 2.0]))
    k, _, bias = downsample(key, key, None, layout, 2, "nearest", False)
    assert bias is not None
    assert k.flatten().tolist() == [0.0, 1.0, 3.0] and bias.flatten().tolist() == [0.0, 0.0, 0.0]


@settings(max_examples=30, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)),
    before=st.integers(0, 3), after=st.integers(0, 3), factor=st.integers(1, 4),
    pool=st.sampled_from(["mean", "nearest"]), seed=st.integers(0, 99),
)
def test_equal_tokens_in_a_cell_are_one_token_exactly(grid, before, after, factor, pool, seed):
    """The correction makes attention over cells equal to attention over their equal tokens."""
    torch.manual_seed(seed)
    layout = TokenLayout(grid, before, after)
    frames, height, width = grid
    cells = (frames, -(-height // factor), -(-width // factor))

    def tensor():
        small = torch.randn(2, *cells, 2, 8, dtype=torch.float64)
        big = small.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        text = torch.randn(2, before + after, 2, 8, dtype=torch.float64)
        middle = big[:, :, :height, :width].flatten(1, 3)
        return torch.cat((text[:, :before], middle, text[:, before:]), 1)

    q = torch.randn(2, layout.tokens, 2, 8, dtype=torch.float64)
    k, v = tensor(), tensor()
    found = attend(q, *downsample(k, v, None, layout, factor, pool, True))
    torch.testing.assert_close(found, attend(q, k, v))
    mask = torch.rand(2, layout.tokens) < 0.7
    mask[:, 0] = True
    if pool == "mean":
        dirty_k, dirty_v = (x.masked_fill(~mask[..., None, None], torch.nan) for x in (k, v))
        fewer = downsample(dirty_k, dirty_v, mask[:, None, None], layout, factor, pool, True)
        found = attend(q, *fewer)
        torch.testing.assert_close(found, attend(q, k, v, mask[:, None, None]))


def test_no_mask_where_every_key_stands_for_as_many():
    layout = TokenLayout((2, 4, 6))
    k, v = torch.randn(2, 1, 48, 2, 8)
    fewer, _, bias = downsample(k, v, None, layout, 2, "mean", True)
    assert bias is None and fewer.shape == (1, 12, 2, 8)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_acts_in_every_family_and_leaves_no_trace(name):
    pipe = zoo.build(name)
    stock, before = zoo.call(name, pipe), zoo.fingerprint(pipe)
    fastdiff.enable(pipe, KVDownsample(factor=1, **ALWAYS), strict=True)
    assert torch.equal(zoo.call(name, pipe), stock)
    fastdiff.enable(pipe, KVDownsample(**ALWAYS), strict=True)
    found = zoo.call(name, pipe)
    assert found.isfinite().all() and not torch.equal(found, stock)
    layers = sum(n.rpartition(".")[2] in ("attn1", "attn") and "refiner" not in n
                 for n, m in zoo.denoiser(pipe).named_modules() if hasattr(m, "processor"))
    branches = 1 if name in (*zoo.BATCHED_CFG, "flux", "hunyuan_video") else 2
    assert calls(pipe) == layers * 2 * branches
    pipe.disable_fastdiff()
    assert torch.equal(zoo.call(name, pipe), stock)
    assert zoo.fingerprint(pipe) == before


def test_min_tokens_and_dense_steps():
    pipe = zoo.build("sd15")
    stock = zoo.call("sd15", pipe)
    fastdiff.enable(pipe, KVDownsample(min_tokens=109, guard=False), strict=True)
    assert torch.equal(zoo.call("sd15", pipe), stock)
    # 108 tokens on the outer level, 30 on the inner
    fastdiff.enable(pipe, KVDownsample(min_tokens=108, guard=False), strict=True)
    assert not torch.equal(zoo.call("sd15", pipe), stock)
    assert calls(pipe) == 3 * 2
    fastdiff.enable(pipe, KVDownsample(min_tokens=108, guard=False, dense_steps=0.5), strict=True)
    zoo.call("sd15", pipe, num_inference_steps=4)
    assert calls(pipe) == 3 * 2


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_a_batch_of_two_is_two_runs(name):
    pipe = zoo.build(name)
    fastdiff.enable(pipe, KVDownsample(**ALWAYS), strict=True)
    prompts = ["a red cat", "two blue dogs"]
    both = zoo.call(name, pipe, prompt=prompts)
    for i, prompt in enumerate(prompts):
        zoo.assert_near(both[i:i + 1], zoo.call(name, pipe, seed=i, prompt=[prompt]))


def test_beside_pruning_it_takes_the_layers_that_kept_their_grid():
    pipe = zoo.build("sdxl")
    methods = AtEdm(guard=False, early_steps=0), KVDownsample(**ALWAYS)
    found = []
    for order in (methods, methods[::-1]):
        fastdiff.enable(pipe, *order, strict=True)
        found.append(zoo.call("sdxl", pipe))
        # first layers of four blocks, two steps; the second layers have 52 tokens and no grid
        assert calls(pipe) == 8
        assert pipe.fastdiff.report.methods["at-edm"]["blocks pruned"] == 8
    assert torch.equal(*found)
    stock = zoo.call("sdxl", zoo.build("sdxl"))
    pipe.disable_fastdiff()
    assert torch.equal(zoo.call("sdxl", pipe), stock)


def test_beside_block_sparse_attention_fewer_keys_win():
    pipe = zoo.build("wan")
    knobs = {k: v for k, v in zoo.small_options("wan").items() if k != "strict"}
    fastdiff.enable(pipe, fastdiff.TileSparse(**knobs), KVDownsample(**ALWAYS), strict=True)
    zoo.call("wan", pipe)
    assert calls(pipe) == 8 and pipe.fastdiff.report.summary()["sparse_calls"] == 0


def test_the_guard(tmp_path, monkeypatch):
    from fastdiff.tokens import costs

    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    costs.forget()
    pipe = zoo.build("sd3")
    stock = zoo.call("sd3", pipe)
    monkeypatch.setattr(costs.Verdict, "pays", property(lambda self: False))
    fastdiff.enable(pipe, KVDownsample(min_tokens=0), strict=True)
    assert torch.equal(zoo.call("sd3", pipe), stock)
    told = pipe.fastdiff.report.methods["kv-downsample"]
    assert told["calls with every key: would not pay"] == 6
    assert str(told["90 tokens, 2 heads"]).startswith("every key (")
    monkeypatch.setattr(costs.Verdict, "pays", property(lambda self: True))
    assert not torch.equal(zoo.call("sd3", pipe), stock)
    costs.forget()


def test_unknown_grid_is_told():
    pipe = zoo.build("ltx")
    handle = fastdiff.enable(pipe.transformer, KVDownsample(**ALWAYS), strict=True)
    inputs = {"hidden_states": torch.randn(1, 24, 8),
              "encoder_hidden_states": torch.randn(1, 5, 32), "timestep": torch.tensor([5]),
              "encoder_attention_mask": torch.ones(1, 5)}
    with pytest.raises(DenseFallbackError, match="the latent grid of this model is not known"):
        pipe.transformer(**inputs, video_coords=torch.randn(1, 3, 24))
    assert handle.enabled


@pytest.mark.parametrize("knob", [{"factor": 0}, {"pool": "max"}, {"min_tokens": -1},
                                  {"dense_steps": 2.0}])
def test_values_are_refused(knob):
    with pytest.raises(ValueError, match=f"{next(iter(knob))}=.* is not possible"):
        KVDownsample(**knob)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["wan", "sd3"])
def test_one_graph_for_each_phase(name):
    graphs = []
    pipe, twin = zoo.build(name), zoo.build(name)
    for one in (pipe, twin):
        fastdiff.enable(one, KVDownsample(dense_steps=1, **ALWAYS), strict=True)
    pipe.transformer = torch.compile(
        pipe.transformer, fullgraph=True, backend=lambda g, _: graphs.append(g) or g.forward)
    eager = zoo.call(name, twin, num_inference_steps=3)
    assert torch.equal(zoo.call(name, pipe, num_inference_steps=3), eager)
    assert len(graphs) == 2
    stock = zoo.call(name, zoo.build(name))
    pipe.disable_fastdiff()
    assert torch.equal(zoo.call(name, pipe), stock)
