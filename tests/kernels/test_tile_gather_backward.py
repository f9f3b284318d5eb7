"""Gradients of gathering into tiles, against the plain operations it stands for."""

import pytest
import torch
from attention_cases import ragged_offsets

from fastdiff.kernels.block_pool import block_pool
from fastdiff.kernels.tile_gather import tile_gather


@pytest.mark.parametrize("masked", (False, True))
def test_gradients(masked):
    g = torch.Generator().manual_seed(0)
    new = {"generator": g, "dtype": torch.float64}
    q = torch.randn(2, 23, 4, 3, **new).requires_grad_()
    k, v = (torch.randn(2, 23, 2, 3, **new).requires_grad_() for _ in range(2))
    order, offsets = torch.randperm(23, generator=g), ragged_offsets(23, 6, g)
    mask = torch.rand(2, 23, generator=g) < 0.6 if masked else None
    found = tile_gather(q, k, v, order, offsets, block=6, mask=mask)
    assert not found.weight.requires_grad

    places = None if mask is None else mask[:, order]
    tokens = [x[:, order] for x in (q, k, v)]
    means = [block_pool(x, offsets, block=6, mask=places, impl="reference")[0] for x in tokens[1:]]
    towards = [torch.randn(x.shape, **new) for x in found[:5]]
    wanted = torch.autograd.grad([*tokens, *means], (q, k, v), towards)
    got = torch.autograd.grad(found[:5], (q, k, v), towards, retain_graph=True)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y)
    # a mean alone, as where the values' tokens need nothing
    (alone,) = torch.autograd.grad(found.key_mean, k, towards[3])
    assert alone.any() and (mask is None or not alone[~mask].any())
