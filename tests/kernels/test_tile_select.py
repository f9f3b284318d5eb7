"""Tile selection: what is always kept, the budget, the lists, and who is found."""

import pytest
import torch
from attention_cases import equal_offsets
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.kernels.block_pool import block_pool
from fastdiff.kernels.tile_select import tile_select
from fastdiff.kernels.tile_select.torch_impl import log_mass


def problem(batch=1, heads=2, kv_heads=2, tokens=200, dim=16, block=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, tokens, heads, dim, generator=g)
    k = torch.randn(batch, tokens, kv_heads, dim, generator=g)
    offsets = equal_offsets(tokens, block)
    mean, _ = block_pool(k, offsets, block=block)
    none = torch.zeros(len(offsets) - 1, dtype=torch.bool)
    return q, mean, offsets, none


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2), groups=st.integers(1, 2), kv_heads=st.integers(1, 2),
    tokens=st.integers(1, 230), density=st.floats(0.01, 1), probes=st.integers(1, 9),
    each_row=st.booleans(), seed=st.integers(0, 99),
)
def test_budget_and_lists(batch, groups, kv_heads, tokens, density, probes, each_row, seed):
    q, mean, offsets, always = problem(batch, groups * kv_heads, kv_heads, tokens, seed=seed)
    blocks = len(offsets) - 1
    always[0] = True
    dense = torch.zeros_like(always)
    dense[-1] = True
    found = tile_select(q, mean, offsets, always, dense, density=density, probes=probes,
                        each_row=each_row)
    must = torch.eye(blocks, dtype=torch.bool) | always | dense[:, None]
    assert found.keep[..., must].all()
    if each_row:
        asked = must.sum(-1).clamp_min(int(density * blocks + 0.5))
        assert (found.counts == asked).all()
    for sample in found.keep if not each_row else ():
        # never above the budget, unless what must be kept already is
        assert sample.float().mean() <= max(density, float(must.float().mean())) + 1e-6
    assert torch.equal(found.counts, found.keep.sum(-1).int())
    for keep, indices, count in zip(found.keep.reshape(-1, blocks),
                                    found.indices.reshape(-1, blocks),
                                    found.counts.flatten(), strict=True):
        assert indices[:count].tolist() == keep.nonzero().flatten().tolist()
    length = offsets.diff().long()
    assert found.pairs == ((found.keep * length).sum(-1) * length).sum()


def test_the_budget_is_used():
    q, mean, offsets, none = problem(tokens=64 * 16, heads=4, kv_heads=4)
    for density in (0.1, 0.25, 0.5, 0.9):
        kept = tile_select(q, mean, offsets, none, none, density=density).keep.float().mean()
        assert density - 0.02 < kept <= density + 1e-6


@pytest.mark.parametrize("each_row", (False, True))
def test_a_nan_keeps_to_its_own_rows(each_row):
    q, mean, offsets, none = problem(tokens=160, heads=2)
    options = {"density": 0.4, "each_row": each_row}
    clean = tile_select(q, mean, offsets, none, none, **options)
    q[0, 0, 1] = torch.nan
    found = tile_select(q, mean, offsets, none, none, **options)
    assert found.keep.diagonal(dim1=-2, dim2=-1).all()
    if each_row:
        assert torch.equal(found.counts, clean.counts)
        assert torch.equal(found.keep[0, 0], clean.keep[0, 0])


def test_samples_choose_for_themselves():
    q, mean, offsets, none = problem(batch=2)
    both = tile_select(q, mean, offsets, none, none, density=0.4).keep
    for i in range(2):
        one = tile_select(q[i : i + 1], mean[i : i + 1], offsets, none, none, density=0.4).keep
        assert torch.equal(both[i], one[0])


def test_finds_the_tile_that_is_looked_for():
    q, mean, offsets, none = problem(tokens=160, heads=1, kv_heads=1)
    mean[0, 0, 7] = 3 * q[0, :16, 0].mean(0) / q[0, :16, 0].mean(0).norm()
    q = q.clone()
    q[0, :16, 0] = mean[0, 0, 7]
    keep = tile_select(q, mean, offsets, none, none, density=0.2).keep
    assert keep[0, 0, 0, 7] and keep[0, 0].diagonal().all()


def test_mass_is_the_log_of_the_probes_softmax():
    q, mean, offsets, _ = problem(tokens=100, heads=2, kv_heads=1, dim=8)
    lengths = offsets.diff()
    x = log_mass(q, mean, offsets, 3)
    tile, first = 2, int(offsets[2])
    probes = [first, first + 7, first + 15]
    scores = q[0, probes, 1].double() @ mean[0, 0].double().T / 8**0.5 + lengths.double().log()
    wanted = (scores.softmax(-1).mean(0) * 100 / lengths).log()
    torch.testing.assert_close(x[0, 1, tile].double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("change", "words"), [
    ({"density": 0.0}, "density must be over 0"),
    ({"probes": 0}, "probes 1 or more"),
    ({"impl": "best"}, "impl must be"),
    ({"always": torch.zeros(2, dtype=torch.bool)}, "always must be bool"),
    ({"key_mean": torch.zeros(1, 3, 13, 16)}, "key_mean must be"),
])
def test_refuses(change, words):
    q, mean, offsets, none = problem()
    arguments = {"query": q, "key_mean": mean, "offsets": offsets, "always": none,
                 "dense_rows": none, "density": 0.5}
    with pytest.raises(ValueError, match=words):
        tile_select(**{**arguments, **change})
