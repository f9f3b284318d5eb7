"""Sparse-vDiT: its modes are what they say, its search keeps the paper's invariants."""

import dataclasses
import math

import pytest
import torch
import zoo

import fastdiff
from fastdiff.calibration.mode_search import Rules, Table, choose, eps_for, losses
from fastdiff.calibration.probe import Ledger, MassProbe, sparse
from fastdiff.clock import StepClock
from fastdiff.layout import TokenLayout
from fastdiff.policies.base import Context, Terms
from fastdiff.policies.modes import MODES, from_bits, mode_mask, patterns, to_bits
from fastdiff.policies.sparse_vdit import SparseVDiT

CPU = torch.device("cpu")
# a clip, one with text on both sides, a picture: odd sizes, ragged tiles
LAYOUTS = [TokenLayout((5, 7, 9)), TokenLayout((3, 5, 4), 7, 9), TokenLayout((1, 9, 11), 0, 5)]
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def found(layout: TokenLayout, width: float = 0.4, sink: int = 0, tile=(1, 3, 4)):
    return patterns(layout, tile, sink, width, CPU)


def masked(q, k, v, dense_mask):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask)
    return out.transpose(1, 2)


# modes


@each_layout
def test_multi_diagonal_is_permute_diagonal_unpermute(layout):
    one = found(layout)
    frames = layout.grid[0]
    grid = (~one.text).nonzero()[:, 0]
    cells = len(grid) // frames
    # the blocks of the grid in order of place, then frame
    order = grid.view(frames, cells).T.flatten()
    band = one.bands[1]
    far = (torch.arange(len(order))[:, None] - torch.arange(len(order))).abs()
    wanted = torch.zeros(one.blocks, one.blocks, dtype=torch.bool)
    wanted[order[:, None], order] = far < band
    wanted |= one.text[:, None] | one.text
    assert torch.equal(one.keep[MODES.index("m")], wanted)
    if frames == 1:
        assert torch.equal(one.keep[2], one.keep[3])


@each_layout
def test_diagonal_is_a_band_over_blocks_in_raster_order(layout):
    one = found(layout)
    grid = (~one.text).nonzero()[:, 0]
    number = torch.arange(len(grid))
    wanted = torch.zeros_like(one.keep[0])
    wanted[grid[:, None], grid] = (number[:, None] - number).abs() < one.bands[0]
    assert torch.equal(one.keep[2], wanted | one.text[:, None] | one.text)


@each_layout
def test_no_block_crosses_a_frame(layout):
    one = found(layout)
    lengths = one.offsets.diff()[~one.text]
    plane = layout.grid[1] * layout.grid[2]
    assert lengths.view(layout.grid[0], -1).sum(1).tolist() == [plane] * layout.grid[0]


@each_layout
def test_text_is_always_kept_and_no_row_is_empty(layout):
    one = found(layout, width=0.01)
    for mode in "dmv":
        mask = mode_mask(mode, (one.even,) if mode == "v" else (), one, 1)
        keep = mask.keep[0, 0]
        assert keep[:, one.text].all() and keep[one.text].all() and keep.any(1).all()


@each_layout
def test_a_width_of_one_and_all_stripes_are_dense(layout):
    one = found(layout, width=1.0)
    assert one.keep[2].all() and one.keep[3].all()
    everything = torch.ones(one.blocks, dtype=torch.bool)
    assert mode_mask("v", (everything,), one, 1).keep.all()


@each_layout
@pytest.mark.parametrize("width", [0.15, 0.3, 0.6])
def test_bands_are_the_widest_below_the_width(layout, width):
    one = found(layout, width)
    for number, band in zip((2, 3), one.bands, strict=True):
        assert one.kept[number] <= width + 1e-6 or band == 1
        wider = found(layout, min(1.0, float(one.kept[number]) + 0.35))
        assert wider.kept[number] >= one.kept[number]


def test_the_first_frame_is_kept_by_its_place_in_time():
    one = found(LAYOUTS[0], sink=1)
    cells = (~one.text).sum() // 5
    for mode in (2, 3):
        assert one.keep[mode][:, :cells].all()


@each_layout
def test_lists_and_density_agree_with_the_keep_map(layout):
    one = found(layout, 0.3)
    stripes = (one.even, torch.zeros(one.blocks, dtype=torch.bool))
    stripes[1][int((~one.text).nonzero()[-1])] = True
    mask = mode_mask("fvsdmv", stripes, one, 2)
    indices, counts = mask.lists()
    assert indices.shape[:3] == counts.shape == (2, 6, one.blocks)
    for h in range(6):
        for row in range(one.blocks):
            listed = indices[1, h, row, : counts[1, h, row]].tolist()
            assert sorted(listed) == mask.keep[1, h, row].nonzero()[:, 0].tolist()
    share = mask.offsets.diff().float() / layout.tokens
    torch.testing.assert_close(mask.density(), ((mask.keep.float() @ share) @ share).mean())


def test_bits_are_read_back():
    torch.manual_seed(0)
    blocks = torch.rand(131) < 0.3
    assert torch.equal(from_bits(to_bits(blocks), 131, CPU), blocks)


@each_layout
def test_stripes_are_the_blocks_of_most_mass(layout):
    """Head 0 looks at the last grid block, head 1 at the first."""
    base = SparseVDiT(density=0.4, tile=(1, 3, 4))
    one = found(layout)
    order = base.tiles(layout, torch.zeros(1), Context(layout, StepClock(), 0)).order
    grid = (~one.text).nonzero()[:, 0].tolist()
    q = torch.ones(1, layout.tokens, 2, 8)
    k = torch.zeros(1, layout.tokens, 2, 8)
    for head, block in enumerate((grid[-1], grid[0])):
        tokens = order[one.offsets[block]: one.offsets[block + 1]]
        k[:, tokens, head] = 4.0
    mass: dict = {}
    probe = MassProbe(base=base, mass=mass, seen={})
    out = probe.attend(q, k, q, Context(layout, StepClock(), 7), Terms())
    torch.testing.assert_close(out.output, masked(q, k, q, None))
    assert mass[7].shape == (2, one.grid_blocks)
    assert mass[7].argmax(1).tolist() == [one.grid_blocks - 1, 0]


# attention


def run_op(policy, layout, heads=5, batch=2, dim=16):
    """Output of the policy's masks through the real kernel, and what a dense mask gives."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(batch, layout.tokens, heads, dim) for _ in range(3))
    context = Context(layout, StepClock(), 0)
    out, density = sparse(policy, q, k, v, context, Terms())
    tiles = policy.tiles(layout, q, context)
    mask = policy.select(q, k, tiles, context)
    dense_mask = mask.to_dense()[..., tiles.inverse, :][..., tiles.inverse]
    return out, masked(q, k, v, dense_mask), density


@each_layout
def test_mixed_modes_in_one_launch_equal_masked_dense(layout):
    policy = SparseVDiT(modes="fdmvd", density=0.4, tile=(1, 3, 4))
    out, wanted, _ = run_op(policy, layout)
    torch.testing.assert_close(out, wanted)


@each_layout
def test_a_skipped_head_is_zero_and_costs_nothing(layout):
    policy = SparseVDiT(modes="fsd", density=0.4, tile=(1, 3, 4))
    out, wanted, density = run_op(policy, layout)
    assert (out[:, :, 1] == 0).all() and density[1] == 0
    keep = [0, 2, 3]
    torch.testing.assert_close(out[:, :, keep], wanted[:, :, keep])


def test_the_order_of_heads_changes_nothing():
    layout = LAYOUTS[0]
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, layout.tokens, 4, 16) for _ in range(3))
    def run(modes, order):
        policy = SparseVDiT(modes=modes, density=0.3, tile=(1, 3, 4))
        q_, k_, v_ = (x[:, :, order] for x in (q, k, v))
        return sparse(policy, q_, k_, v_, Context(layout, StepClock(), 0), Terms())[0]

    one, other = run("dmvf", [0, 1, 2, 3]), run("fvmd", [3, 2, 1, 0])
    assert torch.equal(one, other[:, :, [3, 2, 1, 0]])


# pipelines


def enable(pipe, **changes):
    knobs = {"dense_steps": 0, "min_tokens": 1, "max_density": 1.0, "sink": 0, "tile": (1, 2, 3)}
    return fastdiff.enable(pipe, SparseVDiT(**{**knobs, **changes}), strict=True)


@pytest.mark.parametrize("family", ["wan", "flux", "hunyuan_video"])
def test_density_one_and_full_heads_equal_stock(family):
    pipe = zoo.build(family)
    stock = zoo.call(family, pipe)
    for knobs in ({"density": 1.0}, {"modes": "f"}, {"modes": "dmv", "width": 1.0}):
        enable(pipe, **knobs)
        zoo.assert_near(zoo.call(family, pipe), stock)


@pytest.mark.parametrize("family", ["wan", "flux", "cogvideox"])
def test_a_batch_of_two_equals_two_runs(family):
    pipe = zoo.build(family)
    enable(pipe, modes="dmvs", density=0.3)
    both = zoo.call(family, pipe, prompt=["a red cat", "a blue dog"])
    one = zoo.call(family, pipe, prompt="a red cat", seed=0)
    two = zoo.call(family, pipe, prompt="a blue dog", seed=1)
    zoo.assert_near(both, torch.cat([one, two]))
    assert pipe.fastdiff.report.summary()["density"] < 0.6


def test_without_a_table_enabling_says_what_to_run_and_changes_nothing():
    pipe = zoo.build("wan")
    before = zoo.fingerprint(pipe)
    with pytest.raises(ValueError, match="fastdiff calibrate --method sparse-vdit"):
        enable(pipe)
    assert zoo.fingerprint(pipe) == before and not pipe.fastdiff.enabled


@pytest.mark.parametrize("knobs, told", [
    ({"modes": "dx"}, "letters out of fsdmv"), ({"modes": ""}, "letters"),
    ({"width": 0.0}, "over 0"), ({"tile": (2, 4, 4)}, "within one frame"),
])
def test_impossible_knobs_are_refused_with_what_is_accepted(knobs, told):
    with pytest.raises(ValueError, match=told):
        SparseVDiT(**knobs)


# the search


def a_table(heads: int = 40, seed: int = 0) -> Table:
    generator = torch.Generator().manual_seed(seed)
    error = torch.rand(heads, 3, generator=generator, dtype=torch.float64)
    density = torch.full((heads, 3), 0.1, dtype=torch.float64)
    return Table(error + 0.5 * density, torch.ones(heads, dtype=torch.float64) * 0.9, density,
                 torch.full((heads,), 1 / heads, dtype=torch.float64))


def test_eps_below_zero_keeps_every_head_full():
    assert set(choose(a_table(), -1.0, 1.0)) == {"f"}


def test_eps_infinite_without_penalty_is_the_argmin_of_the_errors():
    table = a_table()
    table = dataclasses.replace(table, sparse=table.sparse - 0.5 * table.density)
    modes = choose(table, math.inf, 1.0)
    for i, mode in enumerate(modes):
        everything = [*table.sparse[i].tolist(), table.skip[i].item()]
        assert mode == "dmvs"[everything.index(min(everything))]


def test_an_infinite_penalty_skips_every_head_that_may_be_skipped():
    table = a_table()
    heavy = dataclasses.replace(table, sparse=table.sparse + 1e9 * table.density)
    assert set(choose(heavy, math.inf, 1.0)) == {"s"}
    modes = choose(heavy, math.inf, 0.1)
    assert modes.count("s") == 4
    assert choose(heavy, math.inf, 0.0).count("s") == 0


def test_the_heads_that_gain_most_are_skipped():
    table = a_table()
    table = dataclasses.replace(table, skip=table.sparse.min(1).values - torch.linspace(0, 1, 40))
    modes = choose(table, math.inf, 0.1)
    assert [i for i, m in enumerate(modes) if m == "s"] == [36, 37, 38, 39]


@pytest.mark.parametrize("seed", range(5))
def test_a_larger_eps_never_raises_the_density(seed):
    table = a_table(seed=seed)
    densities = [table.of(choose(table, eps, 0.06)) for eps in torch.linspace(0, 1.2, 40).tolist()]
    assert densities == sorted(densities, reverse=True)


@pytest.mark.parametrize("density", [0.12, 0.25, 0.5, 0.9])
def test_bisection_meets_the_density(density):
    table = a_table()
    eps = eps_for(table, density, 0.03)
    assert density - 1 / 40 <= table.of(choose(table, eps, 0.03)) <= density + 1e-6


def test_a_density_below_the_bands_is_refused_with_the_least():
    with pytest.raises(ValueError, match="with every head sparse it is 0.1"):
        eps_for(a_table(), 0.05, 0.0)


def a_ledger(energy=(4.0, 0.0)) -> Ledger:
    ledger = Ledger()
    error = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    for layer in (0, 1):
        ledger.add(0, layer, [2, 1, 4, 4], error, torch.tensor(energy, dtype=torch.float64), 8.0,
                   torch.full((3, 2), 0.25, dtype=torch.float64))
    return ledger


def test_relative_and_raw_losses_are_the_formulas():
    relative, places = losses(a_ledger(), [0], Rules(penalty=0.5))
    assert places == [(0, 0), (0, 0), (0, 1), (0, 1)]
    assert relative.sparse[0].tolist() == [0.25 + 0.125, 0.5 + 0.125, 0.75 + 0.125]
    # a skipped head has relative error one, and density zero
    assert relative.skip.tolist() == [1.0] * 4
    raw, _ = losses(a_ledger(), [0], Rules(loss="raw", penalty=0.5))
    assert raw.sparse[0].tolist() == [1 / 8 + 0.125, 2 / 8 + 0.125, 3 / 8 + 0.125]
    assert raw.skip.tolist() == [0.5, 0.0, 0.5, 0.0]
    # the paper's trap: an output near zero is skipped by raw loss, not by the relative one
    assert choose(raw, 1.0, 1.0)[1] == "s" and choose(relative, 1.0, 1.0)[1] == "d"


def test_sums_over_prompts_are_one_table():
    total = a_ledger()
    total.merge(a_ledger())
    table, _ = losses(total, [0], Rules(penalty=0.0))
    once, _ = losses(a_ledger(), [0], Rules(penalty=0.0))
    assert torch.equal(table.sparse, once.sparse) and torch.equal(table.density, once.density)


@pytest.mark.parametrize("knobs, told", [
    ({"loss": "mse"}, "relative, raw"), ({"max_skip": 2.0}, "0 to 1"), ({"rounds": 0}, "1 or more"),
    ({"penalty": -1.0}, "0 or more"),
])
def test_impossible_rules_are_refused(knobs, told):
    with pytest.raises(ValueError, match=told):
        Rules(**knobs)


