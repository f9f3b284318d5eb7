"""The Triton kernel of the order of rows; importing this file imports triton."""

import triton
import triton.language as tl


@triton.jit
def _late(counts, i, N, total, begun, workers, BLOCK: tl.constexpr):
    """Whether rows i to i + BLOCK are late, and their whole length; all sums are exact."""
    o_n = i + tl.arange(0, BLOCK)
    m_n = o_n < N
    b_n = tl.load(counts + o_n, mask=m_n, other=0).to(tl.int64)
    b_left = (total - begun - tl.cumsum(b_n, 0)).to(tl.float64) / workers
    b_late = m_n & (b_n.to(tl.float64) > b_left + total.to(tl.float64) / N)
    return b_late.to(tl.int32), tl.sum(b_n, 0)


@triton.jit(do_not_specialize=["N", "workers"])
def late_first_kernel(counts, order, N, workers, BLOCK: tl.constexpr):
    o_n = tl.arange(0, BLOCK)
    total = tl.zeros([], tl.int64)
    for i in range(0, N, BLOCK):
        total += tl.sum(tl.load(counts + i + o_n, mask=i + o_n < N, other=0).to(tl.int64), 0)

    n_late = tl.zeros([], tl.int32)
    begun = tl.zeros([], tl.int64)
    for i in range(0, N, BLOCK):
        b_late, length = _late(counts, i, N, total, begun, workers, BLOCK)
        n_late += tl.sum(b_late, 0)
        begun += length

    n_seen = tl.zeros([], tl.int32)
    begun = tl.zeros([], tl.int64)
    for i in range(0, N, BLOCK):
        b_late, length = _late(counts, i, N, total, begun, workers, BLOCK)
        # late rows up to each, this one included
        b_rank = n_seen + tl.cumsum(b_late, 0)
        b_place = tl.where(b_late != 0, b_rank - 1, n_late + i + o_n - b_rank)
        tl.store(order + b_place, i + o_n, mask=i + o_n < N)
        n_seen += tl.sum(b_late, 0)
        begun += length
