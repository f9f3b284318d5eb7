"""Gradients of block-sparse attention: by hand, against the reference, and what is refused."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import DTYPES, Case
from gradient_cases import NAMES, check_gradients, gradients, towards
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.kernels.block_sparse_attention import backward, block_sparse_attention


@pytest.mark.parametrize("impl", ("reference", "torch"))
def test_by_hand(impl):
    # one query of 1 over keys 0 and log 2: probabilities 1/3 and 2/3 over values 1 and 10, output 7
    args = Case(1, 1, 1, 1, 2, 1, 1, 2, torch.float64, all_kept=True).build()
    args["query"] = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    args["key"] = torch.tensor([0.0, math.log(2)], dtype=torch.float64).view(1, 2, 1, 1)
    args["value"] = torch.tensor([1.0, 10.0], dtype=torch.float64).view(1, 2, 1, 1)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    dq, dk, dv = gradients(args, impl, one, None)
    torch.testing.assert_close(dv.flatten(), torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    # scores' gradients: 1/3 * (1 - 7) and 2/3 * (10 - 7)
    torch.testing.assert_close(dk.flatten(), torch.tensor([-2.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(dq.flatten(), torch.tensor([2 * math.log(2)], dtype=torch.float64))
    # LSE alone: the gradients of scores are the probabilities
    dq, dk, dv = gradients(args, impl, 0 * one, one.view(1, 1, 1))
    torch.testing.assert_close(dk.flatten(), torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    assert not dv.any()


@pytest.mark.parametrize("ragged", (False, True), ids=("equal", "ragged"))
@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
@pytest.mark.parametrize("tail", (False, True), ids=("", "tail"))
def test_gradcheck(ragged, masked, tail):
    args = Case(2, 2, 1, 7, 9, 3, 3, 4, torch.float64, ragged, masked, tail, seed=1).build()
    leaves = [args[name].nan_to_num().requires_grad_() for name in NAMES[:3]]
    if tail:
        leaves += [x.requires_grad_() for x in args["tail"][:2]]

    def attend(*leaves):
        given = {**args, **dict(zip(NAMES[:3], leaves, strict=False))}
        if tail:
            given["tail"] = (*leaves[3:], *args["tail"][2:])
        out, lse = block_sparse_attention(**given, return_lse=True, impl="torch")
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(attend, leaves)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.sampled_from((1, 2, 4)),
    queries=st.integers(1, 70),
    keys=st.integers(1, 70),
    block_q=st.integers(1, 33),
    block_k=st.integers(1, 33),
    flags=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 99),
)
def test_torch_is_the_reference_in_float64(
    batch, kv_heads, queries, keys, block_q, block_k, flags, seed
):
    ragged, masked, tail, strided = flags
    args = Case(
        batch, 4, kv_heads, queries, keys, 8, block_q, block_k, torch.float64,
        ragged, masked, tail, strided=strided, seed=seed,
    ).build()  # fmt: skip
    wanted = gradients(args, "reference", *towards(args))
    found = gradients(args, "torch", *towards(args))
    for name, x, y in zip(NAMES, found, wanted, strict=False):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dim", (64, 72, 80, 96, 128, 256))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_precision(dtype, dim):
    case = Case(2, 4, 2, 77, 101, dim, 24, 20, dtype, True, True, True, strided=True, seed=3)
    check_gradients(case.build(), "torch")


def test_all_blocks_kept_is_dense_attention():
    args = Case(heads=4, queries=90, keys=75, all_kept=True, tail=True).build()
    grad, _ = towards(args)
    dq, dk, dv, *means = gradients(args, "torch", grad, None)
    leaves = [args[name].requires_grad_() for name in NAMES[:3]]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    dense = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    for found, wanted in zip((dq, dk, dv), torch.autograd.grad(dense, leaves, grad), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    # nothing is left to the tail
    assert not any(x.any() for x in means)


def test_nothing_to_see_has_no_gradient():
    args = Case(tail=False).build()
    args["counts"].zero_()
    assert not any(x.any() for x in gradients(args, "torch", *towards(args)))


@pytest.mark.parametrize("size", [{"batch": 0}, {"queries": 0}, {"keys": 0}], ids=str)
@pytest.mark.parametrize("tail", (False, True))
def test_nothing_at_all(size, tail):
    args = Case(tail=tail, **size).build()
    for x in gradients(args, "torch", *towards(args)):
        assert not x.any()


def test_masked_keys_get_zero():
    args = Case(masked=True, ragged=True, tail=True).build()
    _, dk, dv, *_ = gradients(args, "torch", *towards(args))
    assert not dk[~args["key_mask"]].any() and not dv[~args["key_mask"]].any()


def test_only_what_is_asked_for():
    args = Case(tail=True).build()
    value = args["value"].requires_grad_()
    out: Any = block_sparse_attention(**args, impl="torch")
    out.sum().backward()
    assert value.grad is not None and args["query"].grad is None
    with torch.no_grad():
        out = block_sparse_attention(**args, impl="torch")
    assert not out.requires_grad


def test_what_has_no_gradient_is_refused():
    args = Case(tail=True).build()
    args["query"].requires_grad_()
    tail = (*args["tail"][:2], args["tail"][2].clone().requires_grad_(), args["tail"][3])
    with pytest.raises(ValueError, match="weight requires grad, but it is a count"):
        block_sparse_attention(**{**args, "tail": tail})
    out: Any = block_sparse_attention(**args, impl="torch")
    (first,) = torch.autograd.grad(out.square().sum(), args["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    with pytest.raises(ValueError, match="json has no backward; these have: .*torch_impl"):
        backward.differentiable(__import__("json"))
