"""Block-sparse attention: its meaning by hand, and every implementation that runs on the CPU."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import DTYPES, HEAD_DIMS, Case, check
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.kernels.block_sparse_attention import (
    block_sparse_attention,
    implementations,
    probe,
)

IMPLS = ("reference", "torch")


def by_hand(impl, indices, counts, **options):
    """Two queries in two blocks, three keys in blocks of 2 and 1; scores q*k, values 1, 10, 100."""
    indices = torch.tensor([[indices]], dtype=torch.int32)
    counts = torch.tensor([[counts]], dtype=torch.int32)
    return block_sparse_attention(
        torch.tensor([1.0, 2.0]).view(1, 2, 1, 1),
        torch.tensor([0.0, math.log(2), math.log(3)]).view(1, 3, 1, 1),
        torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1),
        indices,
        counts,
        torch.tensor([0, 1, 2], dtype=torch.int32),
        torch.tensor([0, 2, 3], dtype=torch.int32),
        block_q=1,
        block_k=2,
        return_lse=True,
        impl=impl,
        **options,
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_lists_choose_the_keys(impl):
    # query 1 sees keys 0 and 1 with weights 1 and 2; query 2 sees key 2 alone
    out, lse = by_hand(impl, [[0, 99], [1, -5]], [1, 1])
    torch.testing.assert_close(out.flatten(), torch.tensor([21 / 3, 100.0]))
    torch.testing.assert_close(lse.flatten(), torch.tensor([math.log(3), 2 * math.log(3)]))


@pytest.mark.parametrize("impl", IMPLS)
def test_scale_multiplies_the_scores(impl):
    out, _ = by_hand(impl, [[0, 1], [1, 0]], [2, 2], scale=2.0)
    wanted = [(1 + 4 * 10 + 9 * 100) / 14, (1 + 16 * 10 + 81 * 100) / 98]
    torch.testing.assert_close(out.flatten(), torch.tensor(wanted))


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_keys_never_count(impl):
    mask = torch.tensor([[True, False, False]])
    out, lse = by_hand(impl, [[0, 1], [1, 0]], [2, 1], key_mask=mask)
    assert out.flatten().tolist() == [1.0, 0.0]
    assert lse.flatten().tolist() == [0.0, -math.inf]


@pytest.mark.parametrize("impl", IMPLS)
def test_tail_adds_the_other_blocks_as_one_weighted_key(impl):
    # query 1 keeps block 1 (weight 3) and meets block 0 as two keys of score log 5, value 7
    # query 2 keeps nothing: block 0 counts 2 * 25, block 1 has weight 0
    tail = (
        torch.tensor([math.log(5), 9.0]).view(1, 1, 2, 1),
        torch.tensor([7.0, 1000.0]).view(1, 1, 2, 1),
        torch.tensor([[2.0, 0.0]]),
        torch.tensor([[[[False, True], [False, False]]]]),
    )
    out, lse = by_hand(impl, [[1, 7], [7, 7]], [1, 0], tail=tail)
    torch.testing.assert_close(out.flatten(), torch.tensor([(300 + 70) / 13, 7.0]))
    torch.testing.assert_close(lse.flatten(), torch.tensor([math.log(13), math.log(50)]))


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_see_is_zero(impl):
    out, lse = by_hand(impl, [[0, 0], [0, 0]], [0, 0])
    assert not out.any()
    assert torch.equal(lse, torch.full((1, 1, 2), -math.inf))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_head_dims(dim, dtype):
    check(Case(dim=dim, dtype=dtype, keys=50, ragged=True, tail=True).build(), "torch")


@pytest.mark.parametrize("tail", (False, True), ids=("", "tail"))
@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
@pytest.mark.parametrize("ragged", (False, True), ids=("equal", "ragged"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(dtype, ragged, masked, tail):
    case = Case(2, 4, 2, 77, 101, 40, 24, 20, dtype, ragged, masked, tail, strided=True, seed=3)
    check(case.build(), "torch")


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    queries=st.integers(1, 70),
    keys=st.integers(1, 70),
    block_q=st.integers(1, 33),
    block_k=st.integers(1, 33),
    ragged=st.booleans(),
    masked=st.booleans(),
    tail=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(batch, kv_heads, queries, keys, block_q, block_k, ragged, masked, tail, seed):
    case = Case(batch, 2, kv_heads, queries, keys, 16, block_q, block_k)
    case.ragged, case.masked, case.tail, case.seed = ragged, masked, tail, seed
    check(case.build(), "torch")


@pytest.mark.parametrize("impl", IMPLS)
def test_all_blocks_kept_is_dense_attention(impl):
    args = Case(heads=4, keys=75, queries=90, all_kept=True, tail=True).build()
    found = block_sparse_attention(**args, impl=impl)
    q, k, v = (args[name].transpose(1, 2) for name in ("query", "key", "value"))
    dense = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(found, dense.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_batch_of_two_is_two_runs(impl):
    args = Case(batch=2, keys=90, masked=True, tail=True, ragged=True).build()
    both = block_sparse_attention(**args, impl=impl)
    for i in range(2):
        one = dict(args)
        for name in ("query", "key", "value", "indices", "counts", "key_mask"):
            one[name] = args[name][i : i + 1]
        one["tail"] = tuple(x[i : i + 1] for x in args["tail"])
        alone = block_sparse_attention(**one, impl=impl)
        torch.testing.assert_close(alone, both[i : i + 1], rtol=1e-5, atol=1e-5)


def test_tail_of_identical_keys_is_exact():
    # when all keys of a block are equal, its mean loses nothing
    args = Case(keys=64, ragged=False).build()
    for name in ("key", "value"):
        args[name] = args[name][:, ::16].repeat_interleave(16, 1).contiguous()
    keep = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    keep[..., 0] = True
    args["indices"] = torch.zeros(1, 2, 4, 1, dtype=torch.int32)
    args["counts"] = torch.ones(1, 2, 4, dtype=torch.int32)
    means = (args[name][:, ::16].transpose(1, 2) for name in ("key", "value"))
    args["tail"] = (*means, torch.full((1, 4), 16.0), keep)
    found = block_sparse_attention(**args, impl="torch")
    q, k, v = (args[name].transpose(1, 2) for name in ("query", "key", "value"))
    dense = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5)


def test_inputs_are_left_alone():
    args = Case(masked=True, tail=True).build()
    before = {name: args[name].clone() for name in ("query", "key", "value", "indices")}
    block_sparse_attention(**args, impl="torch")
    for name, x in before.items():
        torch.testing.assert_close(args[name], x, rtol=0, atol=0, equal_nan=True)


def test_naming_an_implementation_never_falls_back():
    args = Case(dtype=torch.float64).build()
    with pytest.raises(ValueError, match=r"triton: .*float64"):
        block_sparse_attention(**args, impl="triton")
    with pytest.raises(ValueError, match="must be 'auto' or one of"):
        block_sparse_attention(**args, impl="fastest")


def test_refusals_name_the_offender():
    args = Case().build()
    with pytest.raises(ValueError, match="counts must be torch.int32"):
        block_sparse_attention(**{**args, "counts": args["counts"].long()})
    with pytest.raises(ValueError, match="scale must be positive"):
        block_sparse_attention(**args, scale=0.0)
    with pytest.raises(ValueError, match="does not fit"):
        block_sparse_attention(**{**args, "key": args["key"][:, :, :, :32],
                                  "value": args["value"][:, :, :, :32]})  # fmt: skip


    with pytest.raises(ValueError, match="key_offsets must be contiguous"):
        offsets = args["key_offsets"].repeat_interleave(2)[::2]
        block_sparse_attention(**{**args, "key_offsets": offsets})
    with pytest.raises(ValueError, match="devices differ"):
        block_sparse_attention(**{**args, "value": args["value"].to("meta")})


def test_auto_on_the_cpu_is_torch():
    args = Case().build()
    chosen, named = (block_sparse_attention(**args, impl=impl) for impl in ("auto", "torch"))
    torch.testing.assert_close(chosen, named, rtol=0, atol=0)
    reasons = implementations("cpu", torch.float32, 64)
    assert list(reasons) == ["gluon", "triton", "torch", "reference"] and reasons["torch"] == []
    assert probe("torch", "cpu") is None
