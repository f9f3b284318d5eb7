"""Token permutation: exact, both ways."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.kernels.token_permute import permute_tokens, unpermute_tokens


@pytest.mark.parametrize("impl", ("reference", "torch"))
def test_by_hand(impl):
    x = torch.tensor([10, 11, 12]).view(1, 3, 1, 1)
    order = torch.tensor([2, 0, 1])
    assert permute_tokens(x, order, impl=impl).flatten().tolist() == [12, 10, 11]
    assert unpermute_tokens(x, order, impl=impl).flatten().tolist() == [11, 12, 10]


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(0, 50),
    kind=st.sampled_from((torch.int32, torch.int64)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 99),
)
def test_round_trip_is_exact(tokens, kind, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, tokens, 8, generator=g).to(dtype).transpose(1, 2)
    order = torch.randperm(tokens, generator=g).to(kind)
    there = permute_tokens(x, order)
    assert torch.equal(there, permute_tokens(x, order, impl="reference"))
    torch.testing.assert_close(unpermute_tokens(there, order), x, rtol=0, atol=0)
    assert torch.equal(unpermute_tokens(x, order), unpermute_tokens(x, order, impl="reference"))


@pytest.mark.parametrize("impl", ("reference", "torch"))
@pytest.mark.parametrize("move", (permute_tokens, unpermute_tokens))
def test_gradients(move, impl):
    x = torch.randn(2, 5, 3, 2, dtype=torch.float64, requires_grad=True)
    order = torch.tensor([2, 0, 1, 4, 3])
    assert torch.autograd.gradcheck(lambda x: move(x, order, impl=impl), x)
    assert torch.autograd.gradgradcheck(lambda x: move(x, order, impl=impl), x)


def test_order_must_fit():
    with pytest.raises(ValueError, match="one entry per token"):
        permute_tokens(torch.zeros(1, 4, 1, 8), torch.arange(3))
    with pytest.raises(ValueError, match="int32 or int64"):
        permute_tokens(torch.zeros(1, 4, 1, 8), torch.arange(4).float())
