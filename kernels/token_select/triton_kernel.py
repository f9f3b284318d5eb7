"""The Triton kernels of token selection; importing this file imports triton."""

import triton
import triton.language as tl

from fastdiff.kernels.dot_kernel import dot


@triton.jit(do_not_specialize=["S", "K"])
def top_tokens_kernel(score, kept, dropped, ssb, sss, S, K, BLOCK: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK)
    m_s = o_s < S
    b_score = tl.load(score + i_b * ssb + o_s.to(tl.int64) * sss, mask=m_s, other=0.0)
    b_score = b_score.to(tl.float32)
    # integers in the order of the scores: both zeros are one, and NaN is above infinity
    b_score = tl.where(b_score == 0.0, 0.0, b_score)
    b_bits = b_score.to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    b_bits = tl.where(b_score != b_score, 0x7FFFFFFF, b_bits)

    # the highest value that is reached by at least K scores, bit by bit
    b_cut = tl.where(tl.sum((m_s & (b_bits >= 0)).to(tl.int32), 0) >= K, 0, -2147483648)
    for i in range(0, 31):
        b_try = b_cut + (1 << (30 - i))
        enough = tl.sum((m_s & (b_bits >= b_try)).to(tl.int32), 0) >= K
        b_cut = tl.where(enough, b_try, b_cut)

    b_over = m_s & (b_bits > b_cut)
    b_even = m_s & (b_bits == b_cut)
    # of those at the cut the first ones
    b_room = K - tl.sum(b_over.to(tl.int32), 0)
    b_keep = b_over | (b_even & (tl.cumsum(b_even.to(tl.int32), 0) <= b_room))
    b_place = tl.cumsum(b_keep.to(tl.int32), 0)
    tl.store(kept + i_b * K + b_place - 1, o_s.to(tl.int64), mask=b_keep)
    tl.store(dropped + i_b * (S - K) + o_s - b_place, o_s.to(tl.int64), mask=m_s & ~b_keep)


@triton.jit(do_not_specialize=["S", "K"])
def stand_ins_kernel(
    q,
    k,
    kept,
    dropped,
    place,
    sqb,
    sqs,
    skb,
    sks,
    S,
    K,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
    UNIT: tl.constexpr,
):
    # strides come in units, so that the compiler sees that rows are aligned
    sqb, sqs, skb, sks = sqb * UNIT, sqs * UNIT, skb * UNIT, sks * UNIT
    i_b = tl.program_id(1).to(tl.int64)
    i_m = tl.program_id(0) * BM
    o_m = i_m + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)

    # a kept token is its own
    m_k = o_m < K
    tl.store(place + i_b * S + tl.load(kept + i_b * K + o_m, mask=m_k, other=0),
             o_m.to(tl.int64), mask=m_k)
    if i_m < S - K:
        m_m = o_m < S - K
        b_row = tl.load(dropped + i_b * (S - K) + o_m, mask=m_m, other=0)
        p_q = q + i_b * sqb + b_row[:, None] * sqs + o_d[None, :]
        b_best = tl.full([BM], -float("inf"), tl.float32)
        b_at = tl.zeros([BM], tl.int32)
        for i_n in range(0, K, BN):
            m_n = i_n + o_n < K
            # beyond the last: any token, masked below
            b_column = tl.load(kept + i_b * K + i_n + o_n, mask=m_n, other=0)
            p_k = k + i_b * skb + b_column[:, None] * sks + o_d[None, :]
            b_s = tl.zeros([BM, BN], tl.float32)
            for i_d in range(0, C, BD):
                if C % BD == 0:
                    b_q = tl.load(p_q + i_d)
                    b_k = tl.load(p_k + i_d)
                else:
                    m_d = (i_d + o_d < C)[None, :]
                    b_q = tl.load(p_q + i_d, mask=m_d, other=0.0)
                    b_k = tl.load(p_k + i_d, mask=m_d, other=0.0)
                b_s += dot(b_q, tl.trans(b_k), UPCAST)
            b_s = tl.where(m_n[None, :], b_s, -float("inf"))
            b_top, b_first = tl.max(b_s, 1, return_indices=True,
                                    return_indices_tie_break_left=True)
            b_at = tl.where(b_top > b_best, i_n + b_first, b_at)
            b_best = tl.maximum(b_best, b_top)
        tl.store(place + i_b * S + b_row, b_at.to(tl.int64), mask=m_m)
