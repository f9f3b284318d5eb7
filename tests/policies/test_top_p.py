"""TopP: shares of mass row by row, against a sort; and the ways to estimate mass."""

# pyright: basic

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import context_of, kept, masked, qkv, run

from fastdiff.kernels.block_pool import block_pool
from fastdiff.layout import TokenLayout, tiling
from fastdiff.policies.cuts import best_count, best_mass, mass_above
from fastdiff.policies.scoring import mean_mass, proxy_mass
from fastdiff.policies.tile_sparse import forced
from fastdiff.policies.top_p import SCORES, TopP, keep_share

CPU = torch.device("cpu")
LAYOUT = TokenLayout((4, 6, 7), 5, 3)
TILES = tiling(LAYOUT, (2, 2, 3), 0, CPU)
scores = pytest.mark.parametrize("score", SCORES)


def near(found, wanted, atol=1e-12):
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def masses(seed=0, batch=2, heads=2):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, TILES.blocks, TILES.blocks)
    return (torch.randn(shape, generator=generator) * 2).softmax(-1)


def ranked(values, candidate):
    return sorted(candidate.nonzero()[:, 0].tolist(), key=lambda i: -values[i])


# cuts


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 999), st.integers(1, 40), st.floats(0, 1.1))
def test_best_mass_is_the_shortest_prefix(seed, count, need):
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(3, count, generator=generator).softmax(-1)
    candidate = torch.rand(3, count, generator=generator) < 0.8
    found = best_mass(mass, candidate, torch.full((3, 1), need), (1,))
    for row in range(3):
        order = ranked(mass[row], candidate[row])
        total, wanted = 0.0, set()
        for i in order:
            # a sum this near to the need may fall on either side of it
            if total >= need - 1e-6:
                break
            wanted.add(i)
            total += float(mass[row, i])
        chosen = set(found[row].nonzero()[:, 0].tolist())
        assert chosen == set(order[: len(chosen)]) and abs(len(chosen) - len(wanted)) <= 1
        held = float(mass[row][found[row]].sum())
        assert need == 0 or held >= need - 1e-6 or chosen == set(order)
        above = mass_above(mass[row : row + 1], candidate[row : row + 1])[0]
        below = {i for i in range(count) if above[i] < need}
        assert below ^ chosen <= {*order[max(0, len(chosen) - 1) :][:2]}


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 999), st.integers(1, 40), st.integers(0, 50))
def test_best_count_is_top_k(seed, count, wanted):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, count, generator=generator)
    candidate = torch.rand(2, count, generator=generator) < 0.8
    found = best_count(values, candidate, torch.full((2, 1), wanted), (1,))
    for row in range(2):
        order = ranked(values[row], candidate[row])
        assert set(found[row].nonzero()[:, 0].tolist()) == set(order[:wanted])


def test_groups_of_several_dimensions_share_one_cut():
    values = torch.randn(2, 3, 4, 5)
    found = best_count(values, torch.tensor(True), torch.full((2, 1, 1, 1), 7), (1, 2, 3))
    flat = values.flatten(1).topk(7, dim=1).indices
    wanted = torch.zeros(2, 60, dtype=torch.bool).scatter(1, flat, True)
    assert torch.equal(found.flatten(1), wanted)


# shares


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.99])
def test_rows_hold_their_share_and_no_tile_too_many(p):
    mass = masses()
    keep = keep_share(mass, TILES, p, 0.25)
    must = forced(TILES)
    assert keep[..., must].all()
    assert (mass.masked_fill(~keep, 0).sum(-1) >= p - 1e-5).all()
    chosen = keep & ~must
    least = mass.masked_fill(~chosen, 9).amin(-1)
    # without the last one, and those that are as good, a row would hold less
    clear = mass.masked_fill(~(keep & (must | (mass > 1.008 * least[..., None]))), 0).sum(-1)
    assert ((clear < p + 1e-5) | ~chosen.any(-1)).all()
    # the best ones
    assert (least >= mass.masked_fill(keep, -1).amax(-1)).all()


def test_larger_share_never_keeps_less():
    mass, before = masses(1), torch.tensor(False)
    for p in torch.linspace(0.01, 1, 30).tolist():
        keep = keep_share(mass, TILES, p, 0.25)
        assert (keep | ~before).all()
        before = keep
    assert before.all()


def test_flat_rows_keep_more_than_peaked_ones():
    mass = masses(2, batch=1)
    mass[:, 1] = mass[:, 1].pow(4) / mass[:, 1].pow(4).sum(-1, keepdim=True)
    keep = keep_share(mass, TILES, 0.9, 0.25).float().mean((0, 2, 3))
    assert keep[0] > 1.5 * keep[1]


@pytest.mark.parametrize("layout", [TokenLayout((9, 16, 16)), TokenLayout((1, 32, 40), 8, 40)])
@pytest.mark.parametrize("density", [0.2, 0.4])
@scores
def test_density_is_met(layout, density, score):
    q, k, v = qkv(layout, 2, 2, 16, dtype=torch.float32)
    _, found = run(TopP(density=density, score=score), q, k, v, layout)
    assert abs(found - density) < 0.03


def test_each_sample_has_its_own_share():
    layout = TokenLayout((9, 16, 16))
    q, k, v = qkv(layout, 2, 2, 16, dtype=torch.float32)
    k[1] *= 4
    policy = TopP()
    tiles = policy.tiles(layout, q, context_of(layout))
    mask = policy.select(q[:, tiles.order], k[:, tiles.order], tiles, context_of(layout))
    assert mask is not None
    for keep in mask.keep:
        assert abs(float(keep.float().mean()) - 0.25) < 0.03


# estimates


def test_mean_mass_is_softmax_of_means():
    q, k, _ = qkv(LAYOUT, dtype=torch.float32)
    query_mean, key_mean = (block_pool(x, TILES.offsets, block=TILES.block)[0] for x in (q, k))
    found = mean_mass(query_mean, key_mean, TILES)
    for i, j in ((0, 3), (4, 4)):
        query = q[0, TILES.offsets[i] : TILES.offsets[i + 1], 1].mean(0)
        terms = torch.stack([
            (query @ k[0, a:b, 1].mean(0) / 8**0.5).exp() * (b - a)
            for a, b in zip(TILES.offsets, TILES.offsets[1:], strict=False)
        ])
        near(found[0, 1, i, j], terms[j] / terms.sum(), 1e-5)


@pytest.mark.parametrize("stride", [1, 4, 99])
def test_proxy_mass_is_the_best_pair_of_a_mean_head(stride):
    q, k, _ = qkv(LAYOUT, heads=4, kv_heads=2, dtype=torch.float32)
    found = proxy_mass(q, k, TILES, heads=2, stride=stride)
    assert found.shape == (1, 4, TILES.blocks, TILES.blocks)
    assert torch.equal(found[:, 0], found[:, 1]) and not torch.equal(found[:, 1], found[:, 2])
    query = q[0, :, :2].mean(1)
    # both heads of the group read the first key head
    key = k[0, :, 0]
    edges = list(zip(TILES.offsets.tolist(), TILES.offsets[1:].tolist(), strict=False))
    (a, b) = edges[2]
    terms = torch.stack([
        (query[a:b:stride] @ key[c:d:stride].T).max() / 8**0.5 + torch.tensor(d - c).log()
        for c, d in edges
    ])
    near(found[0, 0, 2], terms.softmax(0), 1e-5)


def test_proxy_in_parts_is_the_same(monkeypatch):
    import fastdiff.policies.scoring as scoring

    q, k, _ = qkv(LAYOUT, heads=4, dtype=torch.float32)
    whole = proxy_mass(q, k, TILES)
    monkeypatch.setattr(scoring, "SCORES", 1)
    near(proxy_mass(q, k, TILES), whole, 1e-6)


# attention


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(1, n) for n in (4, 6, 7)]), st.integers(0, 5), st.integers(0, 5),
       st.sampled_from(SCORES), st.sampled_from([None, 0.5, 0.9]))
def test_equal_to_masked_dense(grid, before, after, score, p):
    layout = TokenLayout(grid, before, after)
    q, k, v = qkv(layout, 2, 4, 4, 2)
    policy = TopP(score=score, p=p, tile=(2, 2, 3))
    out, density = run(policy, q, k, v, layout)
    pairs = kept(policy, q, k, layout)
    near(out, masked(q, k, v, pairs))
    assert density == pytest.approx(float(pairs.double().mean()), abs=1e-6)


@scores
@pytest.mark.parametrize("options", [{"p": 1.0}, {"density": 1.0}])
def test_everything_kept_is_dense(score, options):
    q, k, v = qkv(LAYOUT, 2)
    out, density = run(TopP(score=score, **options), q, k, v, LAYOUT)
    near(out, masked(q, k, v, torch.tensor(True)))
    assert density == pytest.approx(1)


@scores
def test_batch_of_two_is_two_runs(score):
    q, k, v = qkv(LAYOUT, 2)
    k[1] *= 4
    policy = TopP(score=score, tile=(2, 2, 3))
    both, _ = run(policy, q, k, v, LAYOUT)
    for i in range(2):
        alone, _ = run(policy, q[i : i + 1], k[i : i + 1], v[i : i + 1], LAYOUT)
        near(both[i : i + 1], alone)


@scores
@pytest.mark.parametrize("fill", [0.0, 1e4])
def test_equal_or_huge_keys_make_no_nan(score, fill):
    q, k, v = qkv(LAYOUT, dtype=torch.bfloat16)
    k[:] = fill
    out, density = run(TopP(score=score), q, k, v, LAYOUT)
    assert out.isfinite().all() and 0 < density <= 1


@pytest.mark.parametrize("options", [{"p": 0.0}, {"p": 1.5}, {"score": "max"}, {"probes": 0},
                                     {"proxy_heads": 0}, {"proxy_stride": 0}])
def test_impossible_knobs_say_what_is_accepted(options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))}=.*accepted is"):
        TopP(**options)
