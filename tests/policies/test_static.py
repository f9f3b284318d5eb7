"""Radial and bands: static masks against their definitions, token by token."""

# pyright: basic

import itertools

import pytest
import torch
from oracle import context_of, kept, masked, qkv, run

from fastdiff.layout import TokenLayout
from fastdiff.policies.bands import BANDS, Bands, band_keep
from fastdiff.policies.radial import Radial, radial_keep
from fastdiff.policies.spans import Cut, leading_frames, spans_of, strip

CPU = torch.device("cpu")
LAYOUTS = [TokenLayout((5, 4, 6), 3, 2), TokenLayout((7, 3, 5)), TokenLayout((1, 9, 8), 0, 4),
           TokenLayout((1, 1, 50))]
methods = pytest.mark.parametrize("policy", [
    Radial(), Bands(), Bands(band="frames"), Bands(band="pixels"), Bands(width=0.5),
    Radial(width=0.5), Radial(tile=(2, 2, 3)), Bands(tile=(2, 2, 3)), Bands(sink=2)])


def near(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def selected(policy, query, tiles, context):
    mask = policy.select(query, query, tiles, context)
    assert mask is not None
    return mask


def places(layout):
    token = torch.arange(layout.grid_tokens)
    plane = layout.grid[1] * layout.grid[2]
    return token // plane, token % plane


def radial_pairs(layout, band):
    """The paper's mask between grid tokens, bool [G, G]; band: tokens of the widest band."""
    frame, pixel = places(layout)
    time = (frame[:, None] - frame).abs()
    place = (pixel[:, None] - pixel).abs()
    reach = 2 ** time.clamp_min(1).double().log2().floor()
    near_by = (reach <= band) & (place + 1 <= band / reach)
    skip = (reach / band).ceil()
    return near_by | ((time % skip == 0) & (place == 0))


def band_pairs(layout, band, half_width):
    frame, pixel = places(layout)
    plane = layout.grid[1] * layout.grid[2]
    index = frame * plane + pixel if band == "frames" else pixel * layout.grid[0] + frame
    return (index[:, None] - index).abs() < half_width


def any_pair(spans, pairs):
    """Which grid blocks hold a kept pair, bool [blocks, blocks]."""
    layout, tiles = spans.layout, spans.tiles
    order = tiles.order[layout.before : layout.before + layout.grid_tokens] - layout.before
    lengths = tiles.lengths[spans.grid_blocks].long()
    block = torch.repeat_interleave(torch.arange(lengths.numel()), lengths)
    found = torch.zeros(lengths.numel(), lengths.numel(), dtype=torch.bool)
    for i, j in itertools.product(range(lengths.numel()), repeat=2):
        found[i, j] = pairs[order[block == i]][:, order[block == j]].any()
    return found


def check_blocks(spans, keep, pairs, exact):
    wanted = spans.whole(any_pair(spans, pairs))
    assert not (wanted & ~keep).any(), "a kept pair is lost"
    if exact:
        assert torch.equal(keep, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [0.02, 0.1, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("tile", ["strip", (1, 2, 3), (2, 2, 3)])
def test_radial_keeps_every_block_of_the_papers_mask(layout, width, tile):
    exact = tile == "strip"
    tile = strip(layout.grid, 8) if tile == "strip" else tile
    spans = spans_of(Cut(layout, tile, 0, CPU))
    band = width * layout.grid[1] * layout.grid[2]
    check_blocks(spans, radial_keep(spans, width, 0.5), radial_pairs(layout, band), exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("width", [0.05, 0.4, 1.0, 2.2])
@pytest.mark.parametrize("tile", ["strip", (1, 2, 3), (2, 2, 3)])
def test_bands_keep_every_block_of_the_band(layout, band, width, tile):
    exact = tile == "strip"
    tile = strip(layout.grid, 8) if tile == "strip" else tile
    spans = spans_of(Cut(layout, tile, 0, CPU))
    half_width = width * layout.grid[1] * layout.grid[2]
    check_blocks(spans, band_keep(spans, band, width, 0.5), band_pairs(layout, band, half_width),
                 exact)


@methods
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_to_masked_dense(policy, layout):
    q, k, v = qkv(layout, 2, 4, 4, 2)
    out, density = run(policy, q, k, v, layout)
    pairs = kept(policy, q, k, layout)
    near(out, masked(q, k, v, pairs))
    assert density == pytest.approx(float(pairs.double().mean()), abs=1e-6)
    text = torch.ones(layout.tokens, dtype=torch.bool)
    text[layout.before : layout.before + layout.grid_tokens] = False
    assert pairs[..., text].all() and pairs[..., text, :].all()
    assert pairs.diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("policy", [Radial(density=1.0), Bands(density=1.0), Bands(width=99.0),
                                    Radial(width=99.0), Bands(band="pixels", density=1.0)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_kept_is_dense(policy, layout):
    q, k, v = qkv(layout, 2)
    out, density = run(policy, q, k, v, layout)
    near(out, masked(q, k, v, torch.tensor(True)))
    assert density == pytest.approx(1)


@pytest.mark.parametrize("policy", [Radial, Bands])
@pytest.mark.parametrize("grid", [(21, 30, 52), (9, 16, 16), (1, 64, 64)])
@pytest.mark.parametrize("density", [0.15, 0.25, 0.5])
def test_density_is_met(policy, grid, density):
    layout = TokenLayout(grid, 0, 40)
    policy = policy(density=density)
    query = torch.zeros(1, layout.tokens, 1, 1)
    tiles = policy.tiles(layout, query, context_of(layout))
    assert tiles.lengths.mean() > 30
    found = float(selected(policy, query, tiles, context_of(layout)).density())
    assert abs(found - density) < 0.05, found


def test_sink_frames_are_kept_where_they_are():
    layout = TokenLayout((6, 4, 5), 2, 0)
    q, k, _ = qkv(layout)
    for policy in (Radial(sink=1, density=0.05), Bands(sink=1, density=0.05, band="pixels")):
        pairs = kept(policy, q, k, layout)
        assert pairs[..., 2:22].all()
        assert not pairs[..., 22:42].all()
    assert leading_frames(None, layout, 0.25) == 0 and leading_frames(None, layout, 0.7) == 1


def test_each_head_of_each_sample_takes_the_band_that_suits_it():
    """Keys and queries made so that a head looks at its own frame, or at its own pixel."""
    layout = TokenLayout((6, 6, 6))
    frame, pixel = places(layout)
    code = torch.linalg.qr(torch.randn(36, 36))[0] * 30
    q = torch.zeros(2, layout.tokens, 2, 36)
    q[0, :, 0] = q[1, :, 1] = code[frame]
    q[0, :, 1] = q[1, :, 0] = code[pixel]
    policy = Bands(density=0.3, tile=(1, 1, 6))
    context = context_of(layout)
    tiles = policy.tiles(layout, q, context)
    ordered = q[:, tiles.order]
    mask = selected(policy, ordered, tiles, context)
    frames, pixels = (
        selected(Bands(density=0.3, tile=(1, 1, 6), band=band), q, tiles, context).keep[0, 0]
        for band in BANDS
    )
    assert not torch.equal(frames, pixels)
    assert torch.equal(mask.keep, torch.stack([
        torch.stack([frames, pixels]), torch.stack([pixels, frames])]))


def test_strips_are_whole_rows():
    assert strip((21, 30, 52), 128) == (1, 2, 52)
    assert strip((1, 7, 10), 64) == (1, 4, 10)
    assert strip((2, 4, 300), 64) == (1, 1, 60)
    assert strip((1, 1, 5), 64) == (1, 1, 5)


def test_static_lists_are_made_once():
    layout = TokenLayout((3, 4, 6))
    policy = Radial()
    q, _, _ = qkv(layout)
    tiles = policy.tiles(layout, q, context_of(layout))
    one, two = (selected(policy, q, tiles, context_of(layout)) for _ in range(2))
    assert one.lists()[0].data_ptr() == two.lists()[0].data_ptr()
    assert policy.tiles(layout, q, context_of(layout)) is tiles


@pytest.mark.parametrize(("policy", "options"), [
    (Radial, {"width": 0.0}), (Bands, {"width": -1.0}), (Bands, {"band": "time"}),
    (Bands, {"samples": 0})])
def test_impossible_knobs_say_what_is_accepted(policy, options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))}=.*accepted is"):
        policy(**options)
