"""VMoBA: the invariants of the paper, against masks and selections written out here."""

# pyright: basic

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import context_of, gradients, kept, masked, qkv, run

from fastdiff.layout import TokenLayout
from fastdiff.policies.base import Terms
from fastdiff.policies.chunks import auto_box, chunk_means, chunks_of
from fastdiff.policies.routes import GROUPS, own_chunk, route_threshold, route_top_k
from fastdiff.policies.vmoba import PRESETS, VMoBA

CPU = torch.device("cpu")
layers = pytest.mark.parametrize("layer", [0, 1, 2])
groups = pytest.mark.parametrize("group", sorted(GROUPS))
forms = pytest.mark.parametrize("form", ["exact", "tiles"])
LAYOUT = TokenLayout((5, 7, 9), 3, 4)


def dense(query, key, value):
    return masked(query, key, value, torch.tensor(True))


def near(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def grid_part(kept_pairs, layout):
    grid = slice(layout.before, layout.before + layout.grid_tokens)
    return kept_pairs[..., grid, grid]


def chunk_of_token(layout, box):
    """The chunk of each grid token in raster order, as the paper tells it."""
    frames, height, width = layout.grid
    if box[0] != int(box[0]):
        run_length = max(1, int(box[0] * height * width))
        return torch.arange(layout.grid_tokens) // run_length
    names = {}
    found = []
    for t in range(frames):
        for h in range(height):
            for w in range(width):
                place = (t // int(box[0]), h // box[1], w // box[2])
                found.append(names.setdefault(place, len(names)))
    return torch.tensor(found)


# partition


@pytest.mark.parametrize("grid", [(4, 4, 6), (5, 7, 9), (1, 12, 9), (1, 1, 50), (3, 1, 8)])
@pytest.mark.parametrize("box", [(2, 4, 6), (2.5, 4, 6), (4, 2, 3), (2, 2, 3), (0.3, 9, 9)])
@pytest.mark.parametrize("text", [(0, 0), (5, 0), (3, 70)])
def test_partition_is_a_bijection_into_the_chunks(grid, box, text):
    layout = TokenLayout(grid, *text)
    chunks = chunks_of(layout, box, None, 16, CPU)
    order, inverse = chunks.tiles.order, chunks.tiles.inverse
    assert sorted(order.tolist()) == list(range(layout.tokens))
    assert torch.equal(order[inverse], torch.arange(layout.tokens))
    raster = order[chunks.grid] - layout.before
    wanted = chunk_of_token(layout, box)
    # equal but for the numbers of the chunks
    pairs = set(zip(chunks.of_token.tolist(), wanted[raster].tolist(), strict=True))
    assert len(pairs) == len(chunks.lengths) == int(wanted.max()) + 1
    assert torch.bincount(chunks.of_token).tolist() == list(chunks.lengths)
    # blocks do not cross chunks, and those of a chunk stand together
    for number, chunk in enumerate(chunks.of_block.tolist()):
        begin, end = chunks.tiles.offsets[chunks.grid_blocks.start + number :][:2].tolist()
        held = chunks.of_token[begin - layout.before : end - layout.before]
        assert set(held.tolist()) == {chunk}
        start = int(chunks.first[chunk]) - chunks.grid_blocks.start
        assert 0 <= number - start < int(chunks.count[chunk]) <= chunks.longest


def test_chunks_of_a_divisible_grid_are_the_papers():
    layout = TokenLayout((21, 30, 52))
    policy = VMoBA(preset="wan-480p")
    query = torch.empty(1, 0, 1, 1)
    found = [policy.chunks(layout, query, layer).lengths for layer in range(3)]
    assert [len(lengths) for lengths in found] == [7, 24, 72]
    assert [set(lengths) for lengths in found] == [{4680}, {1365}, {455}]
    layout, policy = TokenLayout((21, 45, 80)), VMoBA(preset="wan-720p")
    found = [policy.chunks(layout, query, layer).lengths for layer in range(3)]
    assert [(len(n), set(n)) for n in found] == [(7, {10800}), (40, {1890}), (36, {2100})]


def test_auto_chunks_are_about_as_many_as_the_papers():
    for grid in [(21, 30, 52), (21, 45, 80), (33, 45, 80), (9, 16, 16), (20, 28, 52)]:
        for axes, low, high in [(1, 5, 9), (2, 15, 60), (3, 36, 144)]:
            count = len(chunks_of(TokenLayout(grid), auto_box(grid, axes), None, 64, CPU).lengths)
            assert low <= count <= high, (grid, axes, count)
    # an image has no frames to cut: runs of its tokens
    assert 7 <= len(chunks_of(TokenLayout((1, 32, 32)), auto_box((1, 32, 32), 1), None, 64,
                              CPU).lengths) <= 8


def test_mean_of_a_short_chunk_uses_its_true_length():
    layout = TokenLayout((5, 2, 3), 2, 1)
    chunks = chunks_of(layout, (2, 2, 3), None, 64, CPU)
    assert chunks.lengths == (12, 12, 6)
    key = torch.randn(1, layout.tokens, 2, 4, dtype=torch.float64)
    means = chunk_means(key[:, chunks.tiles.order], chunks)
    grid = key[:, 2:32]
    near(means[0, :, 2], grid[0, 24:].mean(0))
    near(means[0, :, 0], grid[0, :12].mean(0))


def test_chunk_means_are_float32():
    chunks = chunks_of(TokenLayout((3, 4, 4)), (1, 4, 4), None, 64, CPU)
    key = torch.randn(1, 48, 1, 8).bfloat16()
    means = chunk_means(key, chunks)
    assert means.dtype == torch.float32
    wanted = key.float().view(1, 3, 16, 1, 8).mean(2).transpose(1, 2)
    torch.testing.assert_close(means, wanted, rtol=0, atol=1e-6)


# selection, against a plain reading of the paper


def slow_top_k(gate, own, group, k):
    """Own entries first, then the best of the group, up to k a query on average."""
    route = torch.zeros_like(gate, dtype=torch.bool)
    batch, heads, queries, count = gate.shape
    for b in range(batch):
        for where in groups_of(group, heads, queries, count):
            entries = [(h, s, c) for h, s, c in where if not own[s, c]]
            entries.sort(key=lambda e: -float(gate[(b, *e)]))
            budget = round(k * len(where) / count) - (len(where) - len(entries))
            for e in entries[: max(0, budget)]:
                route[(b, *e)] = True
    return route


def slow_threshold(gate, own, group, tau):
    route = torch.zeros_like(gate, dtype=torch.bool)
    batch, heads, queries, count = gate.shape
    for b in range(batch):
        for where in groups_of(group, heads, queries, count):
            values = {e: float(gate[(b, *e)]) for e in where}
            low, high = min(values.values()), max(values.values())
            spread = high - low if high - low > 1e-6 else 1.0
            normal = {e: (v - low) / spread for e, v in values.items()}
            total = sum(normal.values()) + 1e-6
            held = sum(v for (h, s, c), v in normal.items() if own[s, c])
            others = sorted((e for e in where if not own[e[1], e[2]]), key=lambda e: -normal[e])
            need, taken = max(0.0, tau - held / total), 0.0
            for i, e in enumerate(others):
                if i > 0 and taken / total >= need:
                    break
                route[(b, *e)] = True
                taken += normal[e]
    return route


def groups_of(group, heads, queries, count):
    every = [(h, s, c) for h in range(heads) for s in range(queries) for c in range(count)]
    key = {"query": lambda e: e[:2], "block": lambda e: (e[0], e[2]), "head": lambda e: e[0],
           "overall": lambda e: 0}[group]
    found: dict = {}
    for e in every:
        found.setdefault(key(e), []).append(e)
    return found.values()


def gates(seed=0, batch=2, heads=2, queries=24, count=6):
    generator = torch.Generator().manual_seed(seed)
    of_query = torch.arange(queries) * count // queries
    gate = torch.randn(batch, heads, queries, count, generator=generator)
    return gate, own_chunk(of_query, count)


@groups
@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_top_k_is_the_papers(group, k):
    gate, own = gates()
    assert torch.equal(route_top_k(gate, own, group, k - 1), slow_top_k(gate, own, group, k))


@groups
@pytest.mark.parametrize("tau", [0.0, 0.15, 0.25, 0.5, 0.8, 0.99])
def test_threshold_is_the_papers(group, tau):
    gate, own = gates(1)
    found = route_threshold(gate, own, group, tau)
    assert torch.equal(found, slow_threshold(gate, own, group, tau))


@groups
def test_larger_threshold_never_takes_less(group):
    gate, own = gates(2)
    before = torch.zeros_like(gate, dtype=torch.bool)
    for tau in torch.linspace(0, 1.2, 25).tolist():
        found = route_threshold(gate, own, group, tau)
        assert (found | ~before).all(), tau
        before = found


@groups
@pytest.mark.parametrize("tau", [1.0, 1.5])
def test_threshold_of_one_takes_everything(group, tau):
    gate, own = gates(3)
    assert (route_threshold(gate, own, group, tau) | own).all()


def test_threshold_of_zero_takes_one_besides_the_own_chunk():
    gate, own = gates(4)
    assert (route_threshold(gate, own, "query", 0.0).sum(-1) == 1).all()
    flat = torch.zeros_like(gate)
    assert (route_threshold(flat, own, "query", 0.0).sum(-1) == 1).all()


@groups
@pytest.mark.parametrize("rule", ["top-k", "threshold"])
def test_scale_of_the_gate_changes_nothing(group, rule):
    gate, own = gates(5)
    choose = route_top_k if rule == "top-k" else route_threshold
    level = 2 if rule == "top-k" else 0.4
    assert torch.equal(choose(gate * 8, own, group, level), choose(gate, own, group, level))


@groups
@pytest.mark.parametrize("rule", ["top-k", "threshold"])
def test_samples_do_not_compete(group, rule):
    gate, own = gates(6, batch=3)
    # the second sample would win every shared budget
    gate[1] *= 100
    choose = route_top_k if rule == "top-k" else route_threshold
    level = 2 if rule == "top-k" else 0.4
    alone = torch.cat([choose(one[None], own, group, level) for one in gate])
    assert torch.equal(choose(gate, own, group, level), alone)


@groups
@pytest.mark.parametrize("rule", ["top-k", "threshold"])
def test_no_own_entry_is_routed_and_nothing_is_nan(group, rule):
    gate, own = gates(7)
    choose = route_top_k if rule == "top-k" else route_threshold
    for level in (0, 1, 3):
        assert not (choose(gate, own, group, level) & own).any()


# attention


@st.composite
def cases(draw):
    grid = tuple(draw(st.tuples(*[st.integers(1, n) for n in (6, 7, 9)])))
    before, after = draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))
    heads = draw(st.sampled_from([(2, 2), (4, 2), (1, 1)]))
    options = {
        "group": draw(st.sampled_from(sorted(GROUPS))),
        "select_by": draw(st.sampled_from(["top-k", "threshold"])),
        "density": draw(st.sampled_from([0.05, 0.3, 0.7])),
    }
    if draw(st.booleans()):
        options |= {"frames_chunk": draw(st.sampled_from([1, 2, 1.5, 0.4])),
                    "plane_chunk": draw(st.tuples(st.integers(1, 8), st.integers(1, 8))),
                    "box_chunk": draw(st.tuples(*[st.integers(1, 5)] * 3))}
    return TokenLayout(grid, before, after), heads, options, draw(st.integers(0, 2))


@settings(max_examples=40, deadline=None)
@given(case=cases(), seed=st.integers(0, 99))
@example(case=(TokenLayout((1, 1, 1), 0, 0), (1, 1), {}, 2), seed=0)
def test_exact_is_masked_dense(case, seed):
    layout, (heads, kv_heads), options, layer = case
    q, k, v = qkv(layout, 2, heads, 4, kv_heads, seed)
    policy = VMoBA(**options)
    out, density = run(policy, q, k, v, layout, layer)
    pairs = kept(policy, q, k, layout, layer)
    near(out, masked(q, k, v, pairs))
    assert density == pytest.approx(float(pairs.double().mean()), abs=1e-6)
    # whole chunks, the own one among them; text for and from all
    chunks = policy.chunks(layout, q, layer)
    raster = torch.empty(layout.grid_tokens, dtype=torch.int64)
    raster[chunks.tiles.order[chunks.grid] - layout.before] = chunks.of_token
    grid = grid_part(pairs, layout)
    for chunk in range(len(chunks.lengths)):
        inside = raster == chunk
        assert (grid[..., inside].all(-1) == grid[..., inside].any(-1)).all()
        assert grid[..., inside, :][..., inside].all()
    text = torch.ones(layout.tokens, dtype=torch.bool)
    text[layout.before : layout.before + layout.grid_tokens] = False
    assert pairs[..., text].all() and pairs[..., text, :].all()


@layers
@groups
def test_selection_reaches_the_attention(layer, group):
    q, k, v = qkv(LAYOUT, heads=2, seed=3)
    policy = VMoBA(group=group, top_k=(2, 3, 4))
    chunks = policy.chunks(LAYOUT, q, layer)
    means = chunk_means(k[:, chunks.tiles.order], chunks).float()
    gate = q[:, chunks.tiles.order][:, chunks.grid].transpose(1, 2).float() @ means.mT
    own = own_chunk(chunks.of_token, gate.shape[-1])
    wanted = slow_top_k(gate, own, group, (2, 3, 4)[layer]) | own
    pairs = kept(policy, q, k, LAYOUT, layer)[:, :, chunks.tiles.order][..., chunks.tiles.order]
    assert torch.equal(pairs[:, :, chunks.grid, chunks.grid], wanted[..., chunks.of_token])


@layers
@forms
@pytest.mark.parametrize("options", [{"top_k": (99, 99, 99)}, {"density": 1.0},
                                     {"select_by": "threshold", "tau": 1.0},
                                     {"select_by": "threshold", "density": 1.0}])
def test_everything_chosen_is_dense(layer, form, options):
    q, k, v = qkv(LAYOUT, batch=2)
    for group in GROUPS:
        out, density = run(VMoBA(form=form, group=group, **options), q, k, v, LAYOUT, layer)
        near(out, dense(q, k, v))
        assert density == pytest.approx(1)


@forms
def test_one_chunk_is_dense(form):
    q, k, v = qkv(LAYOUT)
    policy = VMoBA(form=form, frames_chunk=9, top_k=(1, 1, 1))
    out, _ = run(policy, q, k, v, LAYOUT, 0)
    near(out, dense(q, k, v))


@layers
@forms
def test_k_of_one_is_the_own_chunk_alone(layer, form):
    layout = TokenLayout((5, 7, 9))
    q, k, v = qkv(layout)
    policy = VMoBA(form=form, top_k=(1, 1, 1))
    _, density = run(policy, q, k, v, layout, layer)
    lengths = policy.chunks(layout, q, layer).lengths
    assert density == pytest.approx(sum(n * n for n in lengths) / layout.tokens**2)


@layers
def test_k_may_leave_the_own_chunk_out(layer):
    q, k, _ = qkv(LAYOUT)
    within = kept(VMoBA(top_k=(3, 3, 3)), q, k, LAYOUT, layer)
    beside = kept(VMoBA(top_k=(2, 2, 2), include_self_in_k=False), q, k, LAYOUT, layer)
    assert torch.equal(within, beside)


@layers
@forms
@groups
@pytest.mark.parametrize("select_by", ["top-k", "threshold"])
def test_batch_of_two_is_two_runs(layer, form, group, select_by):
    q, k, v = qkv(LAYOUT, batch=2)
    k[1] *= 5
    policy = VMoBA(form=form, group=group, select_by=select_by)
    both, _ = run(policy, q, k, v, LAYOUT, layer)
    for i in range(2):
        alone, _ = run(policy, q[i : i + 1], k[i : i + 1], v[i : i + 1], LAYOUT, layer)
        near(both[i : i + 1], alone)


@layers
def test_text_takes_no_part_in_the_choice(layer):
    q, k, _ = qkv(LAYOUT)
    other_q, other_k = q.clone(), k.clone()
    for x in (other_q, other_k):
        x[:, :3], x[:, -4:] = 9.0, -9.0
    one, two = (kept(VMoBA(), *x, LAYOUT, layer) for x in ((q, k), (other_q, other_k)))
    assert torch.equal(grid_part(one, LAYOUT), grid_part(two, LAYOUT))


@pytest.mark.parametrize("select_by", ["top-k", "threshold"])
@groups
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_density_is_met(select_by, group, density):
    layout = TokenLayout((6, 12, 12), 0, 20)
    q, k, v = qkv(layout, heads=4, dtype=torch.float32)
    for layer in (1, 2):
        policy = VMoBA(select_by=select_by, group=group, density=density)
        _, found = run(policy, q, k, v, layout, layer)
        # a query takes whole chunks
        step = 1 / len(policy.chunks(layout, q, layer).lengths)
        assert abs(found - density) < max(0.03, step), (layer, found)


@layers
def test_key_mask_hides_text(layer):
    q, k, v = qkv(LAYOUT, batch=2)
    mask = torch.ones(2, LAYOUT.tokens, dtype=torch.bool)
    mask[1, -3:] = False
    policy = VMoBA()
    out, _ = run(policy, q, k, v, LAYOUT, layer, Terms(key_mask=mask))
    wanted = masked(q, k, v, kept(policy, q, k, LAYOUT, layer) & mask[:, None, None])
    near(out, wanted)


def test_scale_is_used():
    q, k, v = qkv(LAYOUT)
    policy = VMoBA()
    out, _ = run(policy, q, k, v, LAYOUT, 2, Terms(scale=0.7))
    near(out, masked(q, k, v, kept(policy, q, k, LAYOUT, 2), 0.7))


@pytest.mark.parametrize("fill", [0.0, 1e4])
@groups
@pytest.mark.parametrize("select_by", ["top-k", "threshold"])
def test_equal_or_huge_keys_make_no_nan(fill, group, select_by):
    q, k, v = qkv(LAYOUT, dtype=torch.bfloat16)
    k[:] = fill
    for form in ("exact", "tiles"):
        policy = VMoBA(group=group, select_by=select_by, form=form)
        out, density = run(policy, q, k, v, LAYOUT, 2)
        assert out.isfinite().all() and 0 < density <= 1


@layers
@pytest.mark.parametrize("select_by", ["top-k", "threshold"])
def test_gradients_are_those_of_masked_dense(layer, select_by):
    """Through attention; the choice itself has none."""
    q, k, v = (x.requires_grad_() for x in qkv(LAYOUT, 2, 4, 8, 2))
    policy = VMoBA(select_by=select_by)
    out, _ = run(policy, q, k, v, LAYOUT, layer)
    with torch.no_grad():
        pairs = kept(policy, q, k, LAYOUT, layer)
    found, wanted = gradients(out, q, k, v), gradients(masked(q, k, v, pairs), q, k, v)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@groups
@pytest.mark.parametrize("options", [{}, {"select_by": "threshold", "tau": 0.3},
                                     {"select_by": "threshold"}])
def test_heads_in_parts_are_the_same(monkeypatch, group, options):
    import fastdiff.policies.routed as routed
    import fastdiff.policies.vmoba as vmoba

    q, k, v = qkv(LAYOUT, heads=4, kv_heads=2)
    policy = VMoBA(group=group, **options)
    whole, density = run(policy, q, k, v, LAYOUT, 2)
    monkeypatch.setattr(routed, "GATHERED", 1)
    monkeypatch.setattr(vmoba, "GATES", 1)
    out, found = run(policy, q, k, v, LAYOUT, 2)
    near(out, whole)
    assert found == pytest.approx(density)


@groups
@pytest.mark.parametrize("select_by", ["top-k", "threshold"])
def test_tiles_keep_whole_chunks_and_their_own(group, select_by):
    q, k, _ = qkv(LAYOUT, batch=2)
    for layer in range(3):
        policy = VMoBA(form="tiles", group=group, select_by=select_by)
        context = context_of(LAYOUT, layer)
        tiles = policy.tiles(LAYOUT, q, context)
        mask = policy.select(q[:, tiles.order], k[:, tiles.order], tiles, context)
        chunks = policy.chunks(LAYOUT, q, layer)
        assert mask is not None
        kept_pairs = mask.to_dense()[:, :, chunks.grid, chunks.grid]
        for chunk in range(len(chunks.lengths)):
            inside = chunks.of_token == chunk
            assert (kept_pairs[..., inside].all(-1) == kept_pairs[..., inside].any(-1)).all()
            assert kept_pairs[..., inside, :][..., inside].all()


# knobs


def test_layers_take_turns():
    assert [VMoBA().axes(layer) for layer in range(6)] == [1, 2, 3, 1, 2, 3]
    assert [VMoBA(cycle=(2, 0, 1)).axes(n) for n in range(6)] == [1, 1, 3, 1, 1, 3]
    assert [VMoBA(dense_layers=2).axes(n) for n in range(2, 6)] == [1, 2, 3, 1]


def test_presets_are_the_papers():
    policy = VMoBA(preset="wan-480p")
    assert policy.top_k == (2, 6, 18) and policy.frames_chunk == 3
    assert policy.plane_chunk == (5, 13) and policy.box_chunk == (7, 5, 13)
    assert policy.select_by == "top-k" and policy.group == "query" and policy.dense_steps == 0.25
    assert VMoBA(preset="wan-720p", top_k=(1, 2, 3)).top_k == (1, 2, 3)
    assert set(PRESETS) == {"wan-480p", "wan-720p"}
    options = {k: v for k, v in policy.to_dict().items() if k != "method"}
    assert VMoBA(**options) == policy


def test_density_of_equal_chunks_is_k_of_them():
    layout = TokenLayout((7, 5, 13))
    q, k, v = qkv(layout, dtype=torch.float32)
    policy = VMoBA(frames_chunk=1, top_k=(2, 6, 18))
    assert run(policy, q, k, v, layout, 0)[1] == pytest.approx(2 / 7)


@pytest.mark.parametrize("options", [
    {"form": "fast"}, {"select_by": "p"}, {"group": "layer"}, {"preset": "wan-8k"},
    {"cycle": (0, 0, 0)}, {"cycle": (1, 1)}, {"cycle": (-1, 1, 1)}, {"plane_chunk": (0, 3)},
    {"box_chunk": (1, 2)}, {"box_chunk": 4}, {"frames_chunk": 0}, {"top_k": (0, 1, 1)},
    {"top_k": 3}, {"tau": -0.1}, {"sink": 1}, {"tail": True}, {"reuse": 2},
])
def test_impossible_knobs_say_what_is_accepted(options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))}=.*accepted is"):
        VMoBA(**options)


def test_memory_is_bounded_by_kept_pairs():
    """No map of all pairs: the gate is tokens x chunks."""
    layout = TokenLayout((8, 32, 32))
    q, k, v = qkv(layout, heads=1, dtype=torch.float32)
    policy = VMoBA(density=0.1)
    biggest = 0
    stock = torch.Tensor.gather

    def gather(self, *args, **kwargs):
        nonlocal biggest
        out = stock(self, *args, **kwargs)
        biggest = max(biggest, out.numel())
        return out

    torch.Tensor.gather = gather
    try:
        run(policy, q, k, v, layout, 2)
    finally:
        torch.Tensor.gather = stock
    chunks = len(policy.chunks(layout, q, 2).lengths)
    most = layout.tokens * (math.ceil(0.1 * chunks) + 2) * 8 + chunks * 64 * 8
    assert 0 < biggest <= most < layout.tokens**2
