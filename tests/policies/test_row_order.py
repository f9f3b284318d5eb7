"""Which selections say in what order a GPU begins their rows."""

# pyright: basic

import pytest
import torch
import zoo

from fastdiff import TileSparse, attention
from fastdiff.kernels.row_order import late_first
from fastdiff.layout import TokenLayout, even_blocks, tiling
from fastdiff.policies import methods
from fastdiff.policies import row_order as module
from fastdiff.policies.row_order import row_order

CPU = torch.device("cpu")
FLUX = TokenLayout((1, 32, 32), before=128)


@pytest.fixture
def gpu(monkeypatch):
    """The CPU passes for a GPU of 12 multiprocessors."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(module, "_multiprocessors", lambda device: 12)
    module._with_text.cache_clear()
    yield
    module._with_text.cache_clear()


@pytest.mark.parametrize("layout", [FLUX, TokenLayout((2, 16, 16), 0, 70), TokenLayout((4, 8, 8))])
@pytest.mark.parametrize("cut", ["even", "tiles"])
def test_text_blocks_are_the_dense_rows(layout, cut):
    tiles = even_blocks(layout, 64, 1, CPU) if cut == "even" else tiling(layout, (1, 8, 8), 1, CPU)
    wanted = tiles.dense_rows.nonzero().flatten().tolist()
    assert list(tiles.text_blocks) == wanted and bool(wanted) == (layout.before + layout.after > 0)


def test_a_cpu_needs_no_order():
    tiles = even_blocks(FLUX, 64, 0, CPU)
    assert row_order(torch.ones(1, 2, tiles.blocks), tiles, 0.25, uneven=True) is None


def test_text_rows_are_known_beforehand(gpu):
    tiles = even_blocks(FLUX, 64, 0, CPU)
    counts = torch.full((1, 3, tiles.blocks), round(0.25 * tiles.blocks))
    counts[..., list(tiles.text_blocks)] = tiles.blocks
    garbage = torch.zeros_like(counts)
    first = row_order(garbage, tiles, 0.25, uneven=False)
    assert first is not None and torch.equal(first, late_first(counts, 12))
    assert not torch.equal(first, torch.arange(counts.numel()))
    # made once
    assert row_order(garbage, tiles, 0.25, uneven=False) is first


def test_even_rows_need_no_order(gpu):
    tiles = even_blocks(TokenLayout((4, 16, 16)), 64, 0, CPU)
    counts = torch.full((1, 3, tiles.blocks), 4)
    assert row_order(counts, tiles, 0.25, uneven=False) is None


def test_uneven_rows_are_looked_at(gpu):
    tiles = even_blocks(TokenLayout((4, 16, 16)), 64, 0, CPU)
    counts = torch.ones(1, 3, tiles.blocks, dtype=torch.int32)
    counts[0, 2, -1] = 16
    found = row_order(counts, tiles, 0.25, uneven=True)
    assert found is not None and found[0] == counts.numel() - 1


@pytest.mark.parametrize("policy, uneven", [
    (TileSparse(), False), (TileSparse(select_by="threshold"), True),
    (methods()["top-p"](), True), (methods()["vmoba"](), True), (methods()["radial"](), False)])
def test_methods_whose_rows_differ(policy, uneven):
    assert policy.uneven == uneven


def test_the_kernel_gets_the_order(monkeypatch):
    made, got = [], []
    real = attention.block_sparse_attention

    def order(counts, tiles, density, uneven):
        made.append(torch.randperm(counts.numel()).int())
        return made[-1]

    def kernel(*args, order=None, **options):
        got.append(order)
        return real(*args, order=order, **options)

    monkeypatch.setattr(attention, "row_order", order)
    monkeypatch.setattr(attention, "block_sparse_attention", kernel)
    pipe = zoo.build("flux")
    pipe.enable_fastdiff(**zoo.small_options("flux"))
    found = zoo.call("flux", pipe)
    assert got and all(a is b for a, b in zip(got, made, strict=True))
    monkeypatch.setattr(attention, "row_order", lambda *_, **__: None)
    assert torch.equal(zoo.call("flux", pipe), found) and got[-1] is None
