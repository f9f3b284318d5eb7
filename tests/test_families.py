"""What must hold for each of the nine families, end to end through the pipeline's own call."""

# diffusers exports its classes lazily and annotates arguments narrowly; no type is checked here
# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

import math

import pytest
import torch
import zoo

from fastdiff import attention
from fastdiff.clock import StepClock
from fastdiff.layout import TokenLayout
from fastdiff.policies.base import Context
from fastdiff.policies.tile_sparse import TileSparse

# how many attention calls over the grid one forward makes
LAYERS = {"sd15": 7, "sdxl": 8, "sd3": 3, "sd35": 4, "flux": 4, "pixart_sigma": 2, "wan": 2,
          "cogvideox": 2, "ltx": 2, "hunyuan_video": 3}
# forwards of a step: Wan runs the guidance branches one after the other
FORWARDS = {"wan": 2}
TEXT_BEFORE = {"flux": zoo.TEXT, "cogvideox": zoo.TEXT}
# SD3 joins the tokens of CLIP and of T5
TEXT_AFTER = {"sd3": 2 * zoo.TEXT, "sd35": 2 * zoo.TEXT, "hunyuan_video": zoo.TEXT}

families = pytest.mark.parametrize("name", [*zoo.NAMES, "sd35"])


class Pair:
    """One pipeline to drive, and what stock makes of the same weights."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pipe = zoo.build(name)
        self.twin = zoo.build(name)
        self._stock: dict = {}

    def stock(self, **changes):
        key = repr(sorted(changes.items()))
        if key not in self._stock:
            self._stock[key] = zoo.call(self.name, self.twin, **changes)
        return self._stock[key]

    def fast(self, options, **changes):
        """Latents of an enabled run, and the totals of its report; the pipeline is stock again."""
        self.pipe.enable_fastdiff("tile-sparse", **zoo.small_options(self.name, **options))
        try:
            latents = zoo.call(self.name, self.pipe, **changes)
            return latents, self.pipe.fastdiff.report
        finally:
            self.pipe.disable_fastdiff()


@pytest.fixture(scope="module")
def pairs():
    made: dict[str, Pair] = {}

    def pair(name):
        if name not in made:
            made[name] = Pair(name)
        return made[name]

    return pair


@pytest.fixture
def selections(monkeypatch):
    """Every selection made: (query, key, tiles, context, mask)."""
    seen = []
    stock = TileSparse.select

    def select(self, query, key, tiles, context):
        mask = stock(self, query, key, tiles, context)
        seen.append((query, key, tiles, context, mask))
        return mask

    monkeypatch.setattr(TileSparse, "select", select)
    return seen


def layouts(name):
    """The layouts that a run of this family must show to the policy."""
    frames, height, width = zoo.GRIDS["sd3" if name == "sd35" else name]
    if name == "sd15":
        half = (1, math.ceil(height / 2), math.ceil(width / 2))
        return {((1, height, width), 0, 0), (half, 0, 0)}
    joint = ((frames, height, width), TEXT_BEFORE.get(name, 0), TEXT_AFTER.get(name, 0))
    return {joint, (joint[0], 0, 0)} if name == "sd35" else {joint}


@families
def test_sparse_runs_in_every_layer(name, pairs):
    pair = pairs(name)
    latents, report = pair.fast({})
    rows = report.rows()
    assert len(rows) == LAYERS[name]
    for row in rows:
        assert row["sparse_calls"] == 2 * FORWARDS.get(name, 1), row["layer"]
        assert row["density"] < 1, row["layer"]
        assert not row["dense_calls"] and not row["fallbacks"]
        assert row["implementation"] == "torch"
        assert row["flops"] < row["stock_flops"]
    assert latents.isfinite().all()
    assert latents.shape == pair.stock().shape
    assert not torch.equal(latents, pair.stock())


@families
def test_sparse_stays_near_stock(name, pairs, monkeypatch):
    """Models so small hardly feel their attention: the measure is attention in another order."""
    pair = pairs(name)
    stock = pair.stock()
    error = (pair.fast({})[0] - stock).norm()
    sparse = attention.block_sparse_attention

    monkeypatch.setattr(attention, "block_sparse_attention",
                        lambda *args, **options: torch.flip(sparse(*args, **options), (1,)))
    assert error < 0.7 * (pair.fast({})[0] - stock).norm()


@families
def test_run_is_reproducible(name, pairs):
    first, _ = pairs(name).fast({})
    second, _ = pairs(name).fast({})
    assert torch.equal(first, second)


@families
@pytest.mark.parametrize("method", ["threshold", "top-p", "top-k"])
def test_density_one_is_dense(name, method, pairs):
    pair = pairs(name)
    latents, report = pair.fast({"density": 1.0, "select_by": method})
    total = report.summary()
    assert total["sparse_calls"] == 2 * LAYERS[name] * FORWARDS.get(name, 1)
    assert not total["dense_calls"] and not total["fallbacks"]
    assert total["density"] == pytest.approx(1)
    zoo.assert_near(latents, pair.stock())


def _odd_grids():
    for name in zoo.NAMES:
        if name in zoo.VIDEO:
            # LTX asks for sizes of 8 tokens
            plane = (8, 16) if name == "ltx" else (7, 5)
            yield from ((name, (frames, *plane)) for frames in (1, 2, 7))
        else:
            yield from ((name, (1, *plane)) for plane in ((7, 13), (9, 8), (17, 5)))


@pytest.mark.parametrize(("name", "grid"), _odd_grids())
def test_any_size(name, grid, pairs):
    pair = pairs(name)
    latents, report = pair.fast({"density": 1.0}, grid=grid)
    assert report.summary()["sparse_calls"] == 2 * LAYERS[name] * FORWARDS.get(name, 1)
    zoo.assert_near(latents, pair.stock(grid=grid))
    latents, report = pair.fast({"density": 0.3, "tile": None}, grid=grid)
    assert latents.isfinite().all()
    assert not report.summary()["fallbacks"]


@families
def test_low_precision_is_no_worse_than_stock(name, pairs):
    exact = pairs(name).stock().double()
    pipe = zoo.build(name).to(dtype=torch.bfloat16)
    stock = zoo.call(name, pipe).double()
    pipe.enable_fastdiff("tile-sparse", **zoo.small_options(name, density=1.0))
    latents = zoo.call(name, pipe)
    assert pipe.fastdiff.report.summary()["sparse_calls"] > 0
    assert (latents.double() - exact).norm() < 1.5 * (stock - exact).norm()


@families
def test_dense_by_setting_is_stock_bit_for_bit(name, pairs):
    latents, report = pairs(name).fast({"dense_steps": 1.0})
    total = report.summary()
    assert total["sparse_calls"] == 0
    assert total["dense_calls"] == {"dense step": 2 * LAYERS[name] * FORWARDS.get(name, 1)}
    assert torch.equal(latents, pairs(name).stock())


@families
def test_disabled_is_never_enabled(name, pairs):
    pair = pairs(name)
    pair.fast({})
    assert torch.equal(zoo.call(name, pair.pipe), pair.stock())
    assert zoo.fingerprint(pair.pipe) == zoo.fingerprint(pair.twin)


@families
def test_other_pipelines_are_untouched(name, pairs):
    pair = pairs(name)
    before = pair.stock()
    traces = zoo.fingerprint(pair.twin)
    pair.pipe.enable_fastdiff("tile-sparse", **zoo.small_options(name))
    try:
        zoo.call(name, pair.pipe)
        assert torch.equal(zoo.call(name, pair.twin), before)
        assert zoo.fingerprint(pair.twin) == traces
    finally:
        pair.pipe.disable_fastdiff()


@families
@pytest.mark.parametrize("tail", [True, False])
def test_batch_of_two_is_two_runs(name, tail, pairs):
    prompts = ["a red cat", "blue"]
    both, _ = pairs(name).fast({"tail": tail}, prompt=prompts)
    one, _ = pairs(name).fast({"tail": tail}, prompt=prompts[:1])
    two, _ = pairs(name).fast({"tail": tail}, prompt=prompts[1:], seed=1)
    zoo.assert_near(both, torch.cat([one, two]))


@families
def test_policy_sees_the_right_layout(name, pairs, selections):
    pairs(name).fast({})
    seen = {(c.layout.grid, c.layout.before, c.layout.after) for *_, c, _ in selections}
    assert seen == layouts(name)
    for query, key, tiles, context, mask in selections:
        assert query.shape[1] == key.shape[1] == context.layout.tokens
        assert mask.keep.shape == (query.shape[0], query.shape[2], tiles.blocks, tiles.blocks)


@families
@pytest.mark.parametrize("method", ["threshold", "top-p", "top-k"])
def test_text_and_own_tile_are_always_kept(name, method, pairs, selections):
    pairs(name).fast({"density": 0.01, "select_by": method})
    assert selections
    for *_, tiles, context, mask in selections:
        layout = context.layout
        kept = mask.to_dense()[:, :, tiles.inverse][..., tiles.inverse]
        text = [*range(layout.before), *range(layout.before + layout.grid_tokens, layout.tokens)]
        assert kept[..., text].all()
        assert kept[..., text, :].all()
        assert kept.diagonal(dim1=-2, dim2=-1).all()


@families
def test_sink_frames_are_always_kept(name, pairs, selections):
    pairs(name).fast({"density": 0.01, "sink": 1})
    for *_, tiles, context, mask in selections:
        layout = context.layout
        if layout.grid[0] == 1:
            continue
        kept = mask.to_dense()[:, :, tiles.inverse][..., tiles.inverse]
        plane = layout.grid[1] * layout.grid[2]
        assert kept[..., layout.before : layout.before + plane].all()


def test_the_first_frame_is_kept_where_it_is_cheap():
    """Without `sink`: where a frame takes at most a quarter of the density."""
    context = Context(TokenLayout((8, 4, 4)), StepClock(), 0)
    for frames, kept in ((8, True), (7, False)):
        tiles = TileSparse(density=0.5).tiles(TokenLayout((frames, 4, 4)), torch.empty(0), context)
        found = torch.repeat_interleave(tiles.always, tiles.lengths.long())[tiles.inverse]
        assert found[:16].all() == kept and found.any() == kept


def test_operations_are_those_of_the_pairs_and_of_the_means(pairs):
    pair = pairs("wan")
    _, report = pair.fast({"tail": True})
    config, tokens = pair.pipe.transformer.config, math.prod(zoo.GRIDS["wan"])
    whole = 4 * tokens**2 * config.num_attention_heads * config.attention_head_dim
    tile = zoo.small_options("wan")["tile"]
    blocks = math.prod(math.ceil(n / t) for n, t in zip(zoo.GRIDS["wan"], tile, strict=True))
    for row in report.rows():
        assert row["stock_flops"] == row["sparse_calls"] * whole
        share = row["density"] + blocks / tokens
        assert row["flops"] == pytest.approx(row["stock_flops"] * share)


def _with_other_text(pipe):
    """The text of every forward changed, and nothing else."""

    def change(module, args, kwargs):
        text = kwargs["encoder_hidden_states"]
        return args, {**kwargs, "encoder_hidden_states": text.flip(-1)}

    return zoo.denoiser(pipe).register_forward_pre_hook(change, with_kwargs=True)


@pytest.mark.parametrize("name", zoo.JOINT)
def test_text_stands_where_the_layout_says(name, pairs, selections):
    pair = pairs(name)
    pair.fast({})
    plain = selections[0]
    del selections[:]
    hook = _with_other_text(pair.pipe)
    try:
        pair.fast({})
    finally:
        hook.remove()
    other = selections[0]
    tiles, layout = plain[2], plain[3].layout
    assert layout.before or layout.after
    grid = slice(layout.before, layout.before + layout.grid_tokens)
    key, changed = (one[1][:, tiles.inverse] for one in (plain, other))
    assert torch.equal(key[:, grid], changed[:, grid])
    for text in (slice(0, layout.before), slice(grid.stop, layout.tokens)):
        assert text.start == text.stop or not torch.equal(key[:, text], changed[:, text])


@pytest.mark.parametrize("name", zoo.JOINT)
def test_text_has_its_effect_at_the_lowest_density(name, pairs):
    pair = pairs(name)
    plain, _ = pair.fast({"density": 0.01, "tail": False})
    hook = _with_other_text(pair.pipe)
    try:
        other, _ = pair.fast({"density": 0.01, "tail": False})
    finally:
        hook.remove()
    assert (plain - other).abs().max() > 1e-4


@families
def test_tile_order_keeps_neighbours_together(name, pairs, selections):
    pairs(name).fast({})
    for *_, tiles, context, _ in selections:
        layout = context.layout
        frames, height, width = layout.grid
        tile = zoo.small_options(name)["tile"]
        for number, (begin, end) in enumerate(zip(tiles.offsets, tiles.offsets[1:], strict=False)):
            place = tiles.order[begin:end] - layout.before
            if bool(tiles.dense_rows[number]):
                continue
            axes = (place // (height * width), place // width % height, place % width)
            assert all(int(a.max() - a.min()) < t for a, t in zip(axes, tile, strict=True))
