"""Neighborhood attention: NATTEN's windows written out query by query, and both ways to run."""

# pyright: basic

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import context_of, gradients, kept, masked, qkv, run

from fastdiff.layout import TokenLayout
from fastdiff.policies.base import Terms
from fastdiff.policies.neighborhood import Neighborhood, aligned_stride, fit_window
from fastdiff.policies.windows import axis, cut_blocks, cut_tiles

paths = pytest.mark.parametrize("path", ["blocks", "gathered", "auto"])


def near(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def window_of(i, size, window, stride=1, dilation=1, causal=False):
    """The keys of query i, by the definition."""
    group, place = i % dilation, i // dilation
    length = len(range(group, size, dilation))
    if causal:
        leader = min(place // stride * stride + stride - 1, length - 1)
        keys = range(max(leader - window + 1, 0), place + 1)
    else:
        leader = min(place // stride * stride + stride // 2, length - 1)
        start = max(leader - window // 2, 0)
        if leader + window // 2 + window % 2 - 1 >= length:
            start = length - window
        keys = range(start, start + window)
    return {group + dilation * k for k in keys}


def wanted_pairs(layout, window, stride, dilation, causal="", lead=0):
    """bool [S, S]: windows of the grid, leading frames, text with everything."""
    seen = []
    for name, size, k, s, d in zip("thw", layout.grid, window, stride, dilation, strict=True):
        pairs = torch.zeros(size, size, dtype=torch.bool)
        for i in range(size):
            pairs[i, sorted(window_of(i, size, k, s, d, name in causal))] = True
        seen.append(pairs)
    t, h, w = seen
    grid = (t[:, None, None, :, None, None] & h[:, None, None, :, None] & w[:, None, None, :])
    grid = grid.reshape(layout.grid_tokens, layout.grid_tokens)
    grid[:, : lead * layout.grid[1] * layout.grid[2]] = True
    pairs = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    inside = slice(layout.before, layout.before + layout.grid_tokens)
    pairs[inside, inside] = grid
    return pairs


# one axis


@pytest.mark.parametrize("size", [1, 2, 5, 7, 8, 16, 23])
def test_windows_of_an_axis_are_nattens(size):
    for dilation in range(1, size + 1):
        for window in range(1, size // dilation + 1):
            for stride, causal in itertools.product(range(1, window + 1), (False, True)):
                found = axis(size, window, stride, dilation, causal)
                for u in range(size):
                    i = int(found.coordinate[u])
                    keys = found.coordinate[int(found.low[u]) : int(found.high[u])]
                    wanted = window_of(i, size, window, stride, dilation, causal)
                    assert set(keys.tolist()) == wanted
                assert sorted(found.coordinate.tolist()) == list(range(size))
                assert causal or found.pairs == size * window


def test_the_example_of_an_even_window_with_a_stride():
    found = axis(16, 8, 4)
    assert found.low[::4].tolist() == [0, 2, 6, 8]
    # windows as long as the stride cut the axis into blocks; the last one shifts inward
    assert axis(14, 4, 4).low.unique().tolist() == [0, 4, 8, 10]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 24), st.data())
def test_blocks_are_never_cut_by_a_window(size, data):
    dilation = data.draw(st.integers(1, size))
    window = data.draw(st.integers(1, size // dilation))
    found = axis(size, window, data.draw(st.integers(1, window)), dilation,
                 data.draw(st.booleans()))
    most, lead = data.draw(st.integers(1, 9)), data.draw(st.integers(0, size))
    block, keep = cut_blocks(found, most, lead)
    sees = torch.zeros(size, size, dtype=torch.bool)
    for u in range(size):
        sees[found.coordinate[u], found.coordinate[found.low[u] : found.high[u]]] = True
    assert torch.equal(keep[block][:, block], sees)
    assert int(torch.bincount(block).max()) <= most
    for number in range(int(block.max()) + 1):
        leading = (block == number).nonzero()[:, 0] < lead
        assert leading.all() or not leading.any()


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 24), st.data())
def test_tiles_gather_all_that_they_see(size, data):
    dilation = data.draw(st.integers(1, size))
    window = data.draw(st.integers(1, size // dilation))
    stride, causal = data.draw(st.integers(1, window)), data.draw(st.booleans())
    tiles = cut_tiles(axis(size, window, stride, dilation, causal), data.draw(st.integers(1, 9)))
    width = tiles.query.shape[1]
    for i in range(size):
        tile, inner = divmod(int(tiles.slot[i]), width)
        assert int(tiles.query[tile, inner]) == i
        keys = tiles.key[tile][tiles.sees[tile, inner]].tolist()
        wanted = window_of(i, size, window, stride, dilation, causal)
        assert sorted(keys) == sorted(wanted)


# attention


@st.composite
def cases(draw):
    grid = draw(st.tuples(*[st.integers(1, n) for n in (5, 7, 9)]))
    text = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    dilation = tuple(draw(st.integers(1, min(n, 3))) for n in grid)
    window = tuple(draw(st.integers(1, n // d)) for n, d in zip(grid, dilation, strict=True))
    stride = tuple(draw(st.integers(1, k)) for k in window)
    causal = draw(st.sampled_from(["", "", "t", "hw"]))
    tile = draw(st.sampled_from([None, (1, 2, 4), (2, 3, 3), (9, 9, 9)]))
    return TokenLayout(grid, *text), window, stride, dilation, causal, tile


@settings(max_examples=120, deadline=None)
@given(case=cases(), path=st.sampled_from(["blocks", "gathered", "auto"]), lead=st.integers(0, 2))
@example(case=(TokenLayout((1, 1, 1)), (1, 1, 1), (1, 1, 1), (1, 1, 1), "", None), path="auto",
         lead=0)
def test_equal_to_masked_dense(case, path, lead):
    layout, window, stride, dilation, causal, tile = case
    lead = min(lead, layout.grid[0])
    q, k, v = qkv(layout, 2, 2, 4, 1)
    policy = Neighborhood(window=window, stride=stride, dilation=dilation, causal=causal,
                          tile=tile, path=path, sink=lead)
    out, density = run(policy, q, k, v, layout)
    pairs = wanted_pairs(layout, window, stride, dilation, causal, lead)
    near(out, masked(q, k, v, pairs))
    assert density == pytest.approx(float(pairs.double().mean()), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(case=cases(), masked_text=st.booleans())
def test_windows_of_the_kernel_are_the_same(case, masked_text):
    layout, window, stride, _, causal, tile = case
    q, k, v = qkv(layout, 2, 2, 4, 1)
    policy = Neighborhood(window=window, stride=stride, causal=causal, tile=tile, path="windows")
    mask = None
    if masked_text:
        mask = torch.ones(2, layout.tokens, dtype=torch.bool)
        mask[0, : layout.before] = False
    out, density = run(policy, q, k, v, layout, 0, Terms(key_mask=mask, impl="reference"))
    pairs = wanted_pairs(layout, window, stride, (1, 1, 1), causal)
    near(out, masked(q, k, v, pairs if mask is None else pairs & mask[:, None, None]))
    assert density == pytest.approx(float(pairs.double().mean()), abs=1e-6)


def test_auto_takes_the_kernel_of_windows_where_it_runs():
    layout = TokenLayout((4, 8, 8), 0, 3)
    q, k, v = qkv(layout, 1)

    def attended(impl="auto", layer=0, **options):
        policy = Neighborhood(window=(2, 4, 4), stride=(1, 1, 1), **options)
        found = policy.attend(q, k, v, context_of(layout, layer), Terms(impl=impl))
        assert found is not None
        return found

    def ran(*args, **options):
        return attended(*args, **options).implementation

    def why(*args, **options):
        return attended(*args, **options).reason

    assert ran("reference") == "windows, reference"
    # not on a CPU, and not what it cannot compute
    assert ran() == ran("torch") == "gathered"
    assert ran("reference", sink=1) == ran("reference", path="gathered") == "gathered"
    assert "gluon: device cpu is not an NVIDIA GPU" in (why() or "")
    assert "got 'torch'" in (why("torch") or "")
    assert why("reference") is None and why(path="gathered") is None and why(sink=1) is None
    dilated = Neighborhood(window=(2, 4, 4), stride=(1, 1, 1), alternate=True)
    assert dilated.exact_window(layout, (2, 4, 4), 0) is not None
    assert dilated.exact_window(layout, (2, 4, 4), 1) is None
    asked = Neighborhood(window=(2, 5, 5), stride=(1, 1, 1), path="windows")
    with pytest.raises(ValueError, match="no implementation of window_attention"):
        run(asked, q, k, v, layout)
    with pytest.raises(ValueError, match="path='windows' has no gradients"):
        run(asked, q.requires_grad_(), k, v, layout, 0, Terms(impl="reference"))
    assert "has no gradients" in (why("reference") or "")


@paths
def test_key_mask_hides_text(path):
    layout = TokenLayout((3, 5, 6), 4, 5)
    q, k, v = qkv(layout, batch=2)
    mask = torch.ones(2, layout.tokens, dtype=torch.bool)
    mask[0, :2], mask[1, -4:] = False, False
    policy = Neighborhood(window=(2, 3, 4), stride=(1, 1, 2), path=path)
    out, _ = run(policy, q, k, v, layout, 0, Terms(key_mask=mask, scale=0.5))
    pairs = wanted_pairs(layout, (2, 3, 4), (1, 1, 2), (1, 1, 1))
    near(out, masked(q, k, v, pairs & mask[:, None, None], 0.5))


def test_no_nan_where_every_key_is_hidden():
    layout = TokenLayout((1, 4, 4), 0, 2)
    q, k, v = qkv(layout)
    mask = torch.zeros(1, layout.tokens, dtype=torch.bool)
    for path in ("blocks", "gathered"):
        policy = Neighborhood(window=(1, 2, 2), path=path)
        out, _ = run(policy, q, k, v, layout, 0, Terms(key_mask=mask))
        assert torch.equal(out, torch.zeros_like(out))


@paths
@pytest.mark.parametrize("grid", [(1, 9, 11), (5, 7, 9), (1, 1, 40)])
@pytest.mark.parametrize("options", [{"density": 1.0}, {"window": (1.0, 1.0, 1.0)}])
def test_window_over_everything_is_dense(path, grid, options):
    layout = TokenLayout(grid, 3, 2)
    q, k, v = qkv(layout, batch=2)
    out, density = run(Neighborhood(path=path, **options), q, k, v, layout)
    near(out, masked(q, k, v, torch.tensor(True)))
    assert density == pytest.approx(1)


@paths
def test_stride_as_long_as_the_window_is_attention_in_blocks(path):
    layout = TokenLayout((4, 6, 6))
    q, k, v = qkv(layout)
    out, _ = run(Neighborhood(window=(2, 3, 3), stride=(2, 3, 3), path=path), q, k, v, layout)

    def boxes(x):
        x = x.view(1, 2, 2, 2, 3, 2, 3, *x.shape[2:])
        return x.permute(0, 1, 3, 5, 2, 4, 6, 7, 8).reshape(8, 18, *x.shape[-2:])

    inside = masked(boxes(q), boxes(k), boxes(v), torch.tensor(True))
    near(boxes(out), inside)


@paths
def test_gradients_are_those_of_masked_dense(path):
    layout = TokenLayout((3, 5, 6), 2, 3)
    q, k, v = (x.requires_grad_() for x in qkv(layout, 2))
    policy = Neighborhood(window=(2, 3, 4), stride=(1, 2, 2), path=path)
    out, _ = run(policy, q, k, v, layout)
    pairs = wanted_pairs(layout, (2, 3, 4), (1, 2, 2), (1, 1, 1))
    found, wanted = gradients(out, q, k, v), gradients(masked(q, k, v, pairs), q, k, v)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_scores_in_parts_are_the_same(monkeypatch):
    import fastdiff.policies.gathered as gathered

    layout = TokenLayout((5, 7, 9), 1, 2)
    q, k, v = qkv(layout, batch=2)
    policy = Neighborhood(window=(3, 3, 5), stride=(1, 1, 1), path="gathered", tile=(2, 3, 3))
    whole, _ = run(policy, q, k, v, layout)
    monkeypatch.setattr(gathered, "SCORES", 1)
    near(run(policy, q, k, v, layout)[0], whole)


def test_low_precision_stays_near():
    layout = TokenLayout((3, 8, 8), 0, 5)
    q, k, v = qkv(layout, dtype=torch.float32)
    policy = Neighborhood(window=(3, 3, 3), stride=(1, 1, 1))
    exact, _ = run(policy, q, k, v, layout)
    low, _ = run(policy, q.bfloat16(), k.bfloat16(), v.bfloat16(), layout)
    assert low.dtype == torch.bfloat16
    assert (low - exact).norm() < 0.02 * exact.norm()


# knobs


@pytest.mark.parametrize("grid", [(21, 30, 52), (33, 45, 80), (1, 64, 64), (1, 1, 4096),
                                  (9, 16, 16)])
@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_density_becomes_a_window_of_whole_tiles(grid, density):
    layout = TokenLayout(grid, 0, 256 if grid == (33, 45, 80) else 0)
    policy = Neighborhood(density=density)
    query = torch.empty(1, 0, 1, 1)
    plan = policy._plan(query, context_of(layout))
    assert plan.gather is None, "the default stride follows the tiles"
    assert plan.tiles.lengths.mean() > 16
    found = float(plan.pattern.pairs)
    assert density / 1.4 < found < density * 1.4, found


def test_sequence_and_picture_and_clip():
    for grid, axes in (((1, 1, 64), 1), ((1, 16, 16), 2), ((8, 8, 8), 3)):
        policy = Neighborhood(window=(4, 4, 4), stride=(1, 1, 1))
        q, k, v = qkv(TokenLayout(grid), heads=1)
        _, density = run(policy, q, k, v, TokenLayout(grid))
        assert density == pytest.approx(4**axes / math.prod(grid))


def test_default_stride_lets_windows_begin_at_tiles():
    for tile, times in itertools.product((1, 2, 3, 4, 8), range(1, 9)):
        window = tile * times
        stride = aligned_stride(window, tile)
        assert stride % tile == 0 and stride <= window
        low = axis(tile * 24, window, stride).low
        assert (low % tile == 0).all(), (tile, window, stride)
    assert aligned_stride(2, 4) == 2


def test_fitted_window_is_even_over_the_axes():
    assert fit_window((8, 32, 32), (2, 4, 4), 1 / 8, (8, 32, 32), None) == (4, 16, 16)
    assert fit_window((1, 32, 32), (1, 4, 4), 1.0, (1, 32, 32), None) == (1, 32, 32)


def test_alternate_layers_reach_far():
    layout = TokenLayout((1, 12, 12))
    policy = Neighborhood(window=(1, 4, 4), stride=(1, 1, 1), alternate=True)
    q, k, _ = qkv(layout, heads=1)
    near_by, far = (kept(policy, q, k, layout, layer)[0, 0] for layer in (0, 1))
    assert torch.equal(near_by, wanted_pairs(layout, (1, 4, 4), (1, 1, 1), (1, 1, 1)))
    assert torch.equal(far, wanted_pairs(layout, (1, 4, 4), (1, 1, 1), (1, 3, 3)))
    assert torch.equal(kept(policy, q, k, layout, 2)[0, 0], near_by)


@pytest.mark.parametrize("options", [
    {"window": (3, 3)}, {"window": (0, 3, 3)}, {"window": (1.5, 0.5, 0.5)}, {"window": 3},
    {"stride": (0, 1, 1)}, {"dilation": (0, 1, 1)}, {"dilation": (1.0, 1, 1)}, {"causal": "x"},
    {"path": "flex"}, {"tail": True, "path": "gathered"}, {"tail": True, "path": "windows"},
    {"sink": 1, "path": "windows"}, {"dilation": (1, 2, 2), "path": "windows"},
    {"alternate": True, "path": "windows"},
    {"dilation": (1, 2, 2), "alternate": True}, {"stride": (1, 4, 1), "window": (1, 3, 3)},
])
def test_impossible_knobs_say_what_is_accepted(options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))}=.*accepted is"):
        Neighborhood(**options)


@pytest.mark.parametrize(("options", "told"), [
    ({"window": (3, 9, 9)}, r"window=9 .* axis 'h' .* 1 to 7, or a share"),
    ({"window": (3, 4, 9), "dilation": (1, 2, 1)}, r"dilation=2 .* 1 to 1 with a window of 4"),
    ({"window": (0.4, 1.0, 1.0), "stride": (3, 1, 1)}, r"stride=3 .* 't' .* 1 to 2"),
    ({"dilation": (9, 1, 1)}, r"dilation=9 .* 't' .* 1 to 5"),
])
def test_windows_that_do_not_fit_the_grid_say_what_does(options, told):
    layout = TokenLayout((5, 7, 9))
    q, k, v = qkv(layout)
    with pytest.raises(ValueError, match=told):
        run(Neighborhood(**options), q, k, v, layout)


def test_work_is_in_proportion_to_the_window():
    """Gathering one-token strides makes no map of all pairs."""
    layout = TokenLayout((8, 32, 32))
    policy = Neighborhood(window=(3, 7, 7), stride=(1, 1, 1))
    plan = policy._plan(torch.empty(1, 0, 1, 1), context_of(layout))
    assert plan.gather is not None
    t, h, w = (a.key.shape[1] for a in plan.gather.axes)
    assert t <= 3 + 3 and h <= 7 + 3 and w <= 7 + 3
    assert plan.density == pytest.approx(3 * 7 * 7 / layout.tokens)
