"""Cases for the Triton kernels: interpreted on the CPU (few, small) or compiled on a GPU (more)."""

import itertools

import pytest
import torch
from attention_cases import (
    DTYPES,
    HEAD_DIMS,
    Case,
    check,
    equal_offsets,
    poisoned,
    ragged_offsets,
)

from fastdiff.kernels.block_pool import block_pool
from fastdiff.kernels.block_sparse_attention import implementations, probe
from fastdiff.kernels.tile_gather import tile_gather
from fastdiff.kernels.tile_select import tile_select
from fastdiff.kernels.token_permute import permute_tokens

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

pytestmark = pytest.mark.skipif(
    bool(implementations(DEVICE, torch.float32, 64)["triton"]),
    reason="the Triton kernels can neither compile nor be interpreted here",
)


def small():
    """Each option alone and all together, in shapes an interpreter can walk."""
    for i, dtype in enumerate(DTYPES):
        for dim in (40, 72) if i else (16, 64, 160):
            yield Case(1, 2, 1, 37, 50, dim, 16, 16, dtype, True, tail=True)
    yield Case(queries=32, keys=32)
    yield Case(queries=32, keys=32, all_kept=True, tail=True)
    yield Case(queries=33, keys=48, block_q=20, block_k=24, strided=True)
    yield Case(2, 2, 1, 85, 70, 16, 16, 16, ragged=True, tail=True, seed=6)
    yield Case(1, 3, 1, 50, 40, 16, 9, 16)
    yield Case(2, 2, 2, 40, 40, 16, 16, 16, torch.float32, True, True, True, seed=2)
    yield Case(2, 2, 2, 40, 40, 16, 16, 16, torch.float32, False, True, False, seed=3)
    yield Case(2, 2, 1, 85, 70, 16, 16, 16, ragged=True, tail=True, ordered=True)
    # blocks wider than the kernel's tile, and blocks of a single token
    yield Case(queries=200, keys=150, dim=16, heads=1, kv_heads=1, block_q=200, block_k=75)
    yield Case(queries=300, keys=150, dim=16, kv_heads=1, block_q=150, block_k=75, ordered=True)
    yield Case(queries=5, keys=7, dim=16, block_q=1, block_k=2, ragged=True, tail=True)


def large():
    options = itertools.product((False, True), repeat=3)
    for dtype, dim, (ragged, masked, tail) in itertools.product(DTYPES, HEAD_DIMS, options):
        if sum((ragged, masked, tail)) == 1:
            continue
        yield Case(2, 4, 2, 700, 900, dim, 128, 128, dtype, ragged, masked, tail)
    for dtype in DTYPES:
        yield Case(1, 2, 2, 1024, 1024, 128, 64, 64, dtype, all_kept=True, tail=True)
        yield Case(1, 2, 2, 1024, 1024, 64, 384, 384, dtype, strided=True)
        yield Case(2, 4, 2, 1700, 900, 128, 128, 128, dtype, tail=True, ordered=True)


@pytest.mark.parametrize("case", [*small(), *(large() if GPU else ())], ids=repr)
def test_attention(case):
    check(case.build(DEVICE), "triton")


def test_probe():
    assert probe("triton", DEVICE) is None


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_pool(dtype, masked):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 50, 2, 40, generator=g).to(dtype).to(DEVICE)
    mask = (torch.rand(2, 50, generator=g) < 0.6).to(DEVICE) if masked else None
    for offsets in (ragged_offsets(50, 20, g), equal_offsets(50, 16)):
        args = (x, offsets.to(DEVICE))
        mean, weight = block_pool(*args, block=20, mask=mask, impl="triton")
        wanted, wanted_weight = block_pool(
            x.double(), args[1], block=20, mask=mask, impl="reference"
        )
        assert torch.equal(weight, wanted_weight)
        bound = torch.finfo(dtype).eps * 4
        torch.testing.assert_close(mean.double(), wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tile_gather(dtype, masked):
    g = torch.Generator().manual_seed(2)
    tokens = 37
    q = torch.randn(2, tokens, 4, 40, generator=g).to(dtype).to(DEVICE)
    k, v = (torch.randn(2, tokens, 2, 40, generator=g).to(dtype).to(DEVICE) for _ in range(2))
    order = torch.randperm(tokens, generator=g).to(DEVICE)
    mask = (torch.rand(2, tokens, generator=g) < 0.6).to(DEVICE) if masked else None
    for offsets in (ragged_offsets(tokens, 20, g), equal_offsets(tokens, 16)):
        options = {"order": order, "offsets": offsets.to(DEVICE), "block": 20, "mask": mask}
        with poisoned():
            found = tile_gather(q, k, v, **options, impl="triton")
        wanted = tile_gather(q, k, v, **options, impl="torch")
        for x, y in zip(found, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(permute_tokens(q, order, impl="triton"), q[:, order])


@pytest.mark.parametrize("case", [(1, 2, 2, 137, 16, 16, 8), (2, 4, 2, 50, 40, 20, 4),
                                  (1, 1, 1, 96, 64, 16, 1), (1, 2, 1, 75, 24, 9, 2),
                                  (1, 2, 1, 75, 24, 9, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tile_select(dtype, case):
    batch, heads, kv_heads, tokens, dim, block, probes = case
    g = torch.Generator().manual_seed(3)
    q = torch.randn(batch, tokens, heads, dim, generator=g).to(dtype).to(DEVICE)
    offsets = equal_offsets(tokens, block).to(DEVICE)
    blocks = len(offsets) - 1
    mean = torch.randn(batch, kv_heads, blocks, dim, generator=g).to(dtype).to(DEVICE)
    always, dense = (torch.arange(blocks, device=DEVICE) == n for n in (1, blocks - 1))
    cuts = [(0.3, False), (0.3, True), (0.6, False), (1.0, False), (1.0, True)]
    # an interpreter is slow, and the dtype is forgotten where scores are cut
    for density, each_row in cuts if GPU or dtype == torch.float32 else cuts[:2]:
        options = {"density": density, "probes": probes, "each_row": each_row}
        with poisoned():
            found = tile_select(q, mean, offsets, always, dense, **options, impl="triton")
        wanted = tile_select(q, mean, offsets, always, dense, **options, impl="torch")
        # a score on the border of two steps may fall either way
        assert (found.keep != wanted.keep).float().mean() <= 0.01
        listed = torch.arange(blocks, device=DEVICE) < found.counts[..., None]
        kept = torch.zeros_like(found.keep).scatter_(
            -1, torch.where(listed, found.indices, 0).long(), listed)
        kept[..., 0] |= found.keep[..., 0]
        assert torch.equal(kept, found.keep)
        assert torch.equal(found.counts, found.keep.sum(-1).int())
        length = offsets.diff().long()
        assert found.pairs == ((found.keep * length).sum(-1) * length).sum()


def test_tile_select_rounds_as_the_host_does():
    """0.145 of 100 tiles are 14 in its precision, and 15 in float32."""
    q, mean = (torch.randn(shape, device=DEVICE) for shape in ((1, 100, 1, 16), (1, 1, 100, 16)))
    offsets, none = torch.arange(101).int().to(DEVICE), torch.zeros(100).bool().to(DEVICE)
    found = tile_select(q, mean, offsets, none, none, density=0.145, each_row=True, impl="triton")
    assert (found.counts == 14).all()


def test_lists_need_not_be_contiguous():
    g = torch.Generator().manual_seed(5)
    q, k = (torch.randn(1, 40, 2, 16, generator=g).to(DEVICE) for _ in range(2))
    order, offsets = torch.randperm(40, generator=g).to(DEVICE), equal_offsets(40, 16).to(DEVICE)

    def apart(x: torch.Tensor) -> torch.Tensor:
        return torch.stack((x, torch.zeros_like(x)), 1)[:, 0]

    assert torch.equal(permute_tokens(q, apart(order), impl="triton"), q[:, order])
    for a, b in zip(block_pool(k, apart(offsets), block=16, impl="triton"),
                    block_pool(k, offsets, block=16, impl="torch"), strict=True):
        torch.testing.assert_close(a, b)
    gathered = tile_gather(q, k, k, order, offsets, block=16, impl="torch")
    found = tile_gather(q, k, k, apart(order), apart(offsets), block=16, impl="triton")
    for a, b in zip(found, gathered, strict=True):
        torch.testing.assert_close(a, b)
    some = torch.tensor([False, True, False], device=DEVICE)
    options = {"density": 0.5, "impl": "triton"}
    near = tile_select(q, gathered.key_mean, offsets, some, some, **options)
    far = tile_select(q, gathered.key_mean, *map(apart, (offsets, some, some)), **options)
    assert torch.equal(near.keep, far.keep)
    with pytest.raises(ValueError, match="last dimension is not contiguous"):
        tile_select(q.mT.contiguous().mT, gathered.key_mean, offsets, some, some, density=0.5,
                    impl="triton")


def test_tile_select_of_rows_in_parts(monkeypatch):
    from fastdiff.kernels.tile_select import triton_impl

    monkeypatch.setattr(triton_impl, "ROW", 16)
    test_tile_select(torch.float32, (1, 2, 1, 317, 16, 8, 4))
