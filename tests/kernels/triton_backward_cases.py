"""Cases for the Triton backward: interpreted on the CPU (few, small) or compiled on a GPU."""

import itertools

import pytest
import torch
from attention_cases import DTYPES, HEAD_DIMS, Case
from gradient_cases import check_gradients, gradients, towards

from fastdiff.kernels.block_sparse_attention import implementations
from fastdiff.kernels.block_sparse_attention.triton_backward import transposed

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

pytestmark = pytest.mark.skipif(
    bool(implementations(DEVICE, torch.float32, 64)["triton"]),
    reason="the Triton kernels can neither compile nor be interpreted here",
)


def small():
    """Each option alone and all together, in shapes an interpreter can walk."""
    for i, dim in enumerate((64, 72, 80, 96, 128, 256)):
        for dtype in (DTYPES[i % 3], DTYPES[(i + 1) % 3]):
            yield Case(1, 2, 1, 19, 27, dim, 16, 16, dtype, True, tail=True, seed=dim)
    yield Case(queries=32, keys=32)
    yield Case(queries=32, keys=32, all_kept=True, tail=True)
    yield Case(queries=33, keys=48, block_q=20, block_k=24, strided=True)
    yield Case(1, 3, 1, 50, 40, 16, 9, 16)
    yield Case(2, 4, 2, 23, 27, 16, 16, 16, torch.float32, True, True, True, seed=2)
    yield Case(2, 2, 2, 40, 40, 16, 16, 16, torch.float32, False, True, False, seed=3)
    # blocks wider than the kernels' tiles, and blocks of a single token
    yield Case(queries=140, keys=70, dim=16, heads=1, kv_heads=1, block_q=140, block_k=70)
    yield Case(queries=5, keys=7, dim=16, block_q=1, block_k=2, ragged=True, tail=True)


def large():
    options = itertools.product((False, True), repeat=3)
    for dtype, dim, (ragged, masked, tail) in itertools.product(DTYPES, HEAD_DIMS, options):
        if sum((ragged, masked, tail)) == 1:
            continue
        yield Case(2, 4, 2, 400, 500, dim, 128, 128, dtype, ragged, masked, tail)
    for dtype in DTYPES:
        yield Case(1, 2, 2, 1024, 1024, 128, 64, 64, dtype, all_kept=True, tail=True)
        yield Case(1, 2, 2, 1024, 1024, 64, 384, 384, dtype, strided=True)


@pytest.mark.parametrize("case", [*small(), *(large() if GPU else ())], ids=repr)
def test_gradients(case):
    check_gradients(case.build(DEVICE), "triton")


def test_without_a_gradient_of_lse():
    check_gradients(Case(queries=20, keys=40, tail=True).build(DEVICE), "triton", with_lse=False)


def test_repeating_gives_the_same_bits():
    args = Case(queries=40, keys=40, dim=16, masked=True, tail=True).build(DEVICE)
    first, second = (gradients(args, "triton", *towards(args)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_split_tail_adds_up(monkeypatch):
    from fastdiff.kernels.block_sparse_attention import triton_backward

    args = Case(1, 2, 1, 40, 30, 16, 16, 16, ragged=True, tail=True, seed=4).build(DEVICE)
    for programs in (1, 1000):
        monkeypatch.setattr(triton_backward, "PROGRAMS", programs)
        check_gradients(args, "triton")


@pytest.mark.parametrize("sorted_at_a_time", (1, 100, 1 << 26))
def test_transposed_lists(sorted_at_a_time, monkeypatch):
    from fastdiff.kernels.block_sparse_attention import triton_backward

    monkeypatch.setattr(triton_backward, "SORTED", sorted_at_a_time)
    args = Case(2, 3, 1, 90, 70, 16, 8, 9).build(DEVICE)
    indices, counts = args["indices"], args["counts"]
    NK = args["key_offsets"].numel() - 1
    lists, lengths = transposed(indices, counts, NK)
    NQ = counts.shape[2]
    assert lists.dtype == lengths.dtype == torch.int32
    assert lengths.numel() == 2 * 3 * NK
    for row, (length, listed) in enumerate(
        zip(lengths.flatten().tolist(), lists.view(-1, NQ).tolist(), strict=True)
    ):
        b, h, j = row // (3 * NK), row // NK % 3, row % NK
        wanted = [i for i in range(NQ) if j in indices[b, h, i, : counts[b, h, i]].tolist()]
        assert listed[:length] == wanted
