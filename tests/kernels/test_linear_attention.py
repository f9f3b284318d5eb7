"""Linear attention: by hand, its symmetries, and every implementation against float64."""

import importlib.util

import pytest
import torch
from attention_cases import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_process import run_apart

from fastdiff.kernels.linear_attention import implementations, linear_attention

IMPLS = ("reference", "torch")


def case(batch=2, queries=37, keys=50, heads=3, dim=24, dtype=torch.float32, seed=0,
         strided=False):
    g = torch.Generator().manual_seed(seed)

    def randn(s):
        if strided:
            whole = torch.randn(batch, heads + 1, s + 3, dim + 8, generator=g).to(dtype)
            return whole[:, 1:, 2:-1, :dim].transpose(1, 2)
        return torch.randn(batch, s, heads, dim, generator=g).to(dtype)

    return randn(queries), randn(keys), randn(keys)


def check(arguments, impl):
    """Compare with float64; returns (error, allowed).

    Allowed: the eager low-precision computation's own error, and one rounding of features, state
    and output to the input's dtype, each at most eps / 2 of the largest value, twice over.
    """
    truth = linear_attention(*(x.double() for x in arguments), impl="reference")
    eager = linear_attention(*arguments, impl="reference")
    found = linear_attention(*arguments, impl=impl)
    assert found.dtype == arguments[0].dtype and found.is_contiguous()
    own = (eager.double() - truth).abs().max().item()
    largest = arguments[2].abs().max().double().item()
    allowed = own + (2 * torch.finfo(found.dtype).eps + 1e-5) * largest
    error = (found.double() - truth).abs().max().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
    return error, allowed


@pytest.mark.parametrize("impl", IMPLS)
def test_by_hand(impl):
    # features of 0 and 1 are 1 and 2; of -log 2 it is 1/2
    query = torch.tensor([0.0]).view(1, 1, 1, 1)
    key = torch.tensor([1.0, -torch.tensor(2.0).log().item()]).view(1, 2, 1, 1)
    value = torch.tensor([10.0, 20.0]).view(1, 2, 1, 1)
    found = linear_attention(query, key, value, eps=0.0, impl=impl)
    torch.testing.assert_close(found.item(), (2 * 10 + 0.5 * 20) / 2.5)
    found = linear_attention(query, key, value, eps=0.75, impl=impl)
    torch.testing.assert_close(found.item(), 15.0 / (1.25 + 0.75))


@pytest.mark.parametrize("impl", IMPLS)
def test_very_negative_queries_keep_their_digits(impl):
    """Their features are far below 1, and next to one another all the same."""
    query, key, value = case()
    check((query - 18, key, value), impl)
    truth, found = (linear_attention(query.to(dtype) - 18, key.to(dtype), value.to(dtype), eps=0.0,
                                     impl=impl) for dtype in (torch.float64, torch.float32))
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_key_twice_changes_nothing(impl):
    query, key, value = case(dtype=torch.float64)
    twice = [torch.cat((x, x), 1) for x in (key, value)]
    torch.testing.assert_close(linear_attention(query, *twice, impl=impl),
                               linear_attention(query, key, value, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_values_are_returned(impl):
    query, key, value = case(dtype=torch.float64)
    value = value[:, :1].expand_as(value)
    found = linear_attention(query, key, value, eps=0.0, impl=impl)
    torch.testing.assert_close(found, value[:, :1].expand_as(query))


@settings(max_examples=25, deadline=None)
@given(queries=st.integers(1, 70), keys=st.integers(1, 70), dim=st.sampled_from([1, 8, 40]),
       dtype=st.sampled_from(DTYPES), strided=st.booleans(), seed=st.integers(0, 99))
def test_torch_equals_the_reference(queries, keys, dim, dtype, strided, seed):
    check(case(2, queries, keys, 3, dim, dtype, seed, strided), "torch")


def test_gradients_go_through_torch():
    arguments = [x.requires_grad_() for x in case(1, 5, 6, 2, 3, torch.float64)]
    assert torch.autograd.gradcheck(lambda q, k, v: linear_attention(q, k, v), arguments)


def test_refusals():
    query, key, value = case()
    with pytest.raises(ValueError, match="does not fit"):
        linear_attention(query[:1], key, value)
    with pytest.raises(ValueError, match="one \\[B, S, H, D\\]"):
        linear_attention(query, key, value[:, :-1])
    with pytest.raises(ValueError, match="at least one key"):
        linear_attention(query, key[:, :0], value[:, :0])
    with pytest.raises(ValueError, match="eps must be"):
        linear_attention(query, key, value, eps=-1.0)
    with pytest.raises(ValueError, match="impl must be"):
        linear_attention(query, key, value, impl="fastest")
    with pytest.raises(ValueError, match="dtypes differ"):
        linear_attention(query, key.half(), value.half())
    assert implementations("cpu", torch.float32, 24)["torch"] == []


TRITON = """
import torch, sys
sys.path.insert(0, "tests/kernels")
from attention_cases import poisoned
from test_linear_attention import case, check
from fastdiff.kernels.linear_attention import linear_attention
device = "cuda" if torch.cuda.is_available() else "cpu"
sizes = [(37, 50, 3, 24), (130, 65, 2, 64), (20, 140, 2, 72), (17, 16, 1, 160), (1, 1, 1, 16)]
if device == "cuda":
    sizes += [(4096, 4096, 10, 64), (1000, 3001, 8, 128), (16384, 16384, 8, 40)]
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for i, (nq, nk, h, d) in enumerate(sizes):
        arguments = [x.to(device) for x in case(2, nq, nk, h, d, dtype, i, strided=i % 2 == 1)]
        with poisoned():
            check(arguments, "triton")
arguments[0].requires_grad_()
try:
    linear_attention(*arguments, impl="triton")
except ValueError as error:
    assert "no backward" in str(error)
    print("all right")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton():
    """Interpreted in a process of its own, or compiled where a GPU is."""
    done = run_apart(TRITON)
    assert done.returncode == 0 and "all right" in done.stdout, done.stderr[-3000:]
