"""The inward window: which keys a query sees, and attention inside it on odd grids."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.policies.inward_window import (
    choose_tile,
    exact_window,
    gathered_window,
    inward_axis,
    tiled_window,
    trained_window,
    window_plan,
)

CPU = torch.device("cpu")


def seen(axis):
    """bool [size, size]: which place sees which, in raster order."""
    place = torch.arange(axis.size)
    return (axis.low[:, None] <= place) & (place < axis.high[:, None])


def masked_dense(q, k, v, plan, scale=None):
    """The specification: dense attention in raster order under the window's mask."""
    frames = plan.layout.grid[0]
    h, w = (seen(axis) for axis in plan.axes)
    plane = (h[:, None, :, None] & w[None, :, None, :]).flatten(2).flatten(0, 1)
    mask = plane.repeat(frames, frames)
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask,
                                         scale=scale)
    return out.transpose(1, 2), mask


def test_every_start_is_the_papers():
    for size in range(1, 40):
        for half in range(25):
            window = 2 * half + 1
            axis = inward_axis(size, window)
            for place, (low, high) in enumerate(zip(axis.low, axis.high, strict=True)):
                if window >= size:
                    assert (low, high) == (0, size)
                    continue
                assert low == min(max(place - half, 0), size - window)
                assert high - low == window
                if half <= place < size - half:
                    assert (place - low, high - 1 - place) == (half, half)


@given(size=st.integers(1, 60), window=st.integers(1, 40), slide=st.integers(2, 9))
def test_windows_that_neighbours_share(size, window, slide):
    axis = inward_axis(size, window, slide)
    lengths = (axis.high - axis.low).unique()
    assert lengths.numel() == 1
    if lengths.item() < size:
        assert lengths.item() % slide == 0
        assert abs(lengths.item() - window) <= slide / 2 or lengths.item() == slide
    place = torch.arange(size)
    assert (axis.low <= place).all() and (place < axis.high).all()
    assert (axis.low.diff() >= 0).all()
    # one window for the whole group
    assert (axis.low == axis.low[place // slide * slide]).all()


def test_windows_of_the_published_sizes():
    assert trained_window((30, 52)) == (31, 53)
    assert trained_window((45, 80)) == (45, 81)
    # share of the blocks that is computed; of blocks of 128 in raster order it is 0.481 at first
    for grid, native, share in (((21, 68, 120), (30, 52), 0.2051),
                                ((21, 90, 160), (45, 80), 0.2563),
                                ((21, 135, 240), (45, 80), 0.1139)):
        plan = window_plan(grid, trained_window(native), "tile", 128, CPU)
        blocks = plan.counts.numel()
        computed = plan.counts.double().mean().item() / blocks
        assert plan.tile[0] == grid[0] and computed == pytest.approx(share, abs=1e-4)
        assert not plan.single
        # blocks are nearly full, and no list is longer than the blocks of a window
        assert plan.layout.tokens / blocks > 0.98 * 126
        assert plan.indices.shape == (blocks, int(plan.counts.max()))


@settings(max_examples=25, deadline=None)
@given(grid=st.tuples(st.integers(1, 4), st.integers(2, 11), st.integers(2, 13)),
       native=st.tuples(st.integers(1, 9), st.integers(1, 9)),
       block=st.sampled_from([8, 16, 33]), slide=st.sampled_from(["tile", "token"]))
def test_blocks_equal_masked_dense_attention(grid, native, block, slide):
    plan = window_plan(grid, trained_window(native), slide, block, CPU)
    generator = torch.Generator().manual_seed(math.prod(grid))
    q, k, v = torch.randn(3, 2, math.prod(grid), 2, 8, generator=generator, dtype=torch.float64)
    out, lse = tiled_window(q, k, v, plan, scale=0.4)
    wanted, mask = masked_dense(q, k, v, plan, scale=0.4)
    torch.testing.assert_close(out, wanted)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.4
    scores = scores.masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1).transpose(1, 2), rtol=1e-5,
                               atol=1e-5)
    # every query sees as many keys, and the plan knows how many
    counts = mask.sum(1)
    assert counts.unique().numel() == 1
    assert plan.density == pytest.approx(counts[0].item() / mask.shape[0])
    torch.testing.assert_close(gathered_window(q, k, v, plan, scale=0.4), wanted)


def test_exact_windows_have_the_published_count_of_keys():
    plan = window_plan((3, 14, 20), trained_window((6, 9)), "token", 24, CPU)
    assert plan.single and plan.density == (7 * 9) / (14 * 20)
    shared = window_plan((3, 14, 20), trained_window((6, 9)), "tile", 24, CPU)
    assert shared.density == pytest.approx(plan.density)


@pytest.mark.parametrize("native", [(6, 9), (4, 20), (14, 5)])
def test_the_kernel_of_windows_has_the_same_ones(monkeypatch, native):
    """Its plain reference, on the arguments that a GPU would get."""
    from fastdiff.policies import inward_window

    plan = window_plan((3, 14, 20), trained_window(native), "token", 24, CPU)
    q, k, v = torch.randn(3, 1, 840, 2, 8)
    monkeypatch.setattr(inward_window, "chosen", lambda *qkv: "reference")
    monkeypatch.setattr(inward_window, "gathered_window", None)
    torch.testing.assert_close(exact_window(q, k, v, plan), masked_dense(q, k, v, plan)[0])


def test_it_says_why_windows_are_gathered():
    plan = window_plan((3, 14, 20), trained_window((6, 9)), "token", 24, CPU)
    q, k, v = torch.randn(3, 1, 840, 2, 8)
    told = []
    out = exact_window(q, k, v, plan, tell=told.append)
    torch.testing.assert_close(out, gathered_window(q, k, v, plan))
    assert len(told) == 1 and told[0].startswith("no implementation of window_attention")


def test_a_grid_no_larger_than_the_window_is_dense():
    plan = window_plan((2, 5, 6), trained_window((6, 6)), "tile", 16, CPU)
    assert plan.full
    assert not window_plan((2, 7, 6), trained_window((5, 6)), "tile", 8, CPU).full


def test_small_windows_slide_by_tokens_unless_asked():
    small = window_plan((9, 32, 32), (17, 17), "auto", 128, CPU)
    large = window_plan((21, 68, 120), (31, 53), "auto", 128, CPU)
    assert small.single and not large.single


def test_tiles_hold_all_frames_where_they_fit():
    assert choose_tile((21, 68, 120), (31, 53), 128)[0] == 21
    frames, height, width = choose_tile((33, 135, 240), (45, 81), 128)
    assert frames * height * width <= 128 and frames in (33, 17, 11, 9, 7)


def test_large_tensors_go_in_groups_of_heads(monkeypatch):
    from fastdiff.policies import inward_window

    plan = window_plan((2, 7, 9), (3, 5), "tile", 16, CPU)
    q, k, v = torch.randn(3, 2, 126, 5, 8)
    whole = tiled_window(q, k, v, plan)
    monkeypatch.setattr(inward_window, "MOST_NUMBERS", 126 * 2 * 8 * 2)
    for found, wanted in zip(tiled_window(q, k, v, plan), whole, strict=True):
        torch.testing.assert_close(found, wanted)
