"""Block pooling: by hand, and torch against the reference."""

import pytest
import torch
from attention_cases import DTYPES, equal_offsets, ragged_offsets
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.kernels.block_pool import block_pool


@pytest.mark.parametrize("impl", ("reference", "torch"))
def test_means_and_weights_by_hand(impl):
    x = torch.tensor([1.0, 2.0, 30.0, 50.0]).view(1, 4, 1, 1)
    offsets = torch.tensor([0, 2, 2, 4], dtype=torch.int32)
    mean, weight = block_pool(x, offsets, block=2, impl=impl)
    assert mean.flatten().tolist() == [1.5, 0.0, 40.0]
    assert weight.tolist() == [[2.0, 0.0, 2.0]]
    mask = torch.tensor([[True, False, False, False]])
    mean, weight = block_pool(x, offsets, block=2, mask=mask, impl=impl)
    assert mean.flatten().tolist() == [1.0, 0.0, 0.0]
    assert weight.tolist() == [[1.0, 0.0, 0.0]]


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 60),
    block=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    ragged=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_torch_equals_reference(tokens, block, dtype, ragged, masked, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, tokens, 8, generator=g).to(dtype).transpose(1, 2)
    offsets = ragged_offsets(tokens, block, g) if ragged else equal_offsets(tokens, block)
    mask = None
    if masked:
        mask = torch.rand(2, tokens, generator=g) < 0.6
        x[~mask] = torch.nan
    mean, weight = block_pool(x, offsets, block=block, mask=mask)
    wanted, wanted_weight = block_pool(
        x.double(), offsets, block=block, mask=mask, impl="reference"
    )
    assert mean.dtype == dtype and torch.equal(weight, wanted_weight)
    bound = torch.finfo(dtype).eps * 4
    torch.testing.assert_close(mean.double(), wanted, rtol=bound, atol=bound)


def test_gradient_by_hand():
    x = torch.tensor([1.0, 2.0, 30.0, 50.0]).view(1, 4, 1, 1).requires_grad_()
    offsets = torch.tensor([0, 1, 1, 4], dtype=torch.int32)
    mask = torch.tensor([[True, True, False, True]])
    mean, weight = block_pool(x, offsets, block=3, mask=mask)
    assert mean.flatten().tolist() == [1.0, 0.0, 26.0] and not weight.requires_grad
    (mean.flatten() * torch.tensor([10.0, 100.0, 6.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [10.0, 3.0, 0.0, 3.0]


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("ragged", (False, True))
def test_gradient_is_that_of_the_reference(ragged, masked):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 41, 3, 4, generator=g, dtype=torch.float64).requires_grad_()
    offsets = ragged_offsets(41, 9, g) if ragged else equal_offsets(41, 8)
    mask = torch.rand(2, 41, generator=g) < 0.5 if masked else None
    assert torch.autograd.gradcheck(lambda x: block_pool(x, offsets, block=9, mask=mask)[0], x)
    towards = torch.randn(2, 3, len(offsets) - 1, 4, generator=g, dtype=torch.float64)
    found, wanted = (
        torch.autograd.grad(
            block_pool(x, offsets, block=9, mask=mask, impl=impl)[0], x, towards
        )[0]
        for impl in ("torch", "reference")
    )
    torch.testing.assert_close(found, wanted)


def test_refusals():
    x, offsets = torch.zeros(1, 4, 1, 8), torch.tensor([0, 4])
    with pytest.raises(ValueError, match="offsets must be int32"):
        block_pool(x, offsets, block=4)
    with pytest.raises(ValueError, match="impl must be"):
        block_pool(x, offsets.int(), block=4, impl="fastest")
