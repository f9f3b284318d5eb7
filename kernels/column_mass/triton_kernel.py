"""The two Triton kernels of column mass; importing this file imports triton.

Both do as little as they can for a score beside its exponential: one multiply-add and one addition,
and a maximum for denominators. Tiles that are whole are not masked.
"""

import triton
import triton.language as tl

from fastdiff.kernels.dot_kernel import dot

SIZES = ["SQ", "SK", "H", "GROUPS"]


@triton.jit
def rows(p, o_n, SIZE, o_d, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a tile, zeros beyond SIZE and D; without the masks that nothing needs."""
    if MASKED:
        return tl.load(p, mask=(o_n < SIZE)[:, None] & (o_d < D)[None, :], other=0.0)
    elif D == BD:
        return tl.load(p)
    else:
        return tl.load(p, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def lse_step(b_q, b_k, o_n, SK, b_max, b_sum, scale, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    # the maximum is that of the bare product: scale is positive, and one multiply-add applies both
    b_s = dot(b_q, tl.trans(b_k), UPCAST)
    if MASKED:
        b_s = tl.where((o_n < SK)[None, :], b_s, -float("inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.math.exp2(b_s * scale - (b_new * scale)[:, None])
    return b_new, b_sum * tl.math.exp2((b_max - b_new) * scale) + tl.sum(b_p, 1)


@triton.jit(do_not_specialize=SIZES)
def row_lse_kernel(
    q,
    k,
    out,
    sqb,
    sqs,
    sqh,
    skb,
    sks,
    skh,
    SQ,
    SK,
    H,
    GROUPS,
    scale,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
    UNIT: tl.constexpr,
):
    # strides come in units, so that the compiler sees rows of 40 or 72 elements as aligned
    sqb, sqs, sqh = sqb * UNIT, sqs * UNIT, sqh * UNIT
    skb, sks, skh = skb * UNIT, sks * UNIT, skh * UNIT
    i_bh = tl.program_id(1)
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)

    p_q = q + i_b * sqb + i_h * sqh + o_m[:, None].to(tl.int64) * sqs + o_d[None, :]
    b_q = rows(p_q, o_m, SQ, o_d, D, BD, True)
    p_k = k + i_b * skb + (i_h // GROUPS) * skh + o_n[:, None].to(tl.int64) * sks + o_d[None, :]

    b_max = tl.full([BM], -float("inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    whole = SK // BN * BN
    for _ in range(0, whole, BN):
        b_k = rows(p_k, o_n, SK, o_d, D, BD, False)
        b_max, b_sum = lse_step(b_q, b_k, o_n, SK, b_max, b_sum, scale, False, UPCAST)
        p_k += BN * sks
    if whole < SK:
        b_k = rows(p_k, whole + o_n, SK, o_d, D, BD, True)
        b_max, b_sum = lse_step(b_q, b_k, whole + o_n, SK, b_max, b_sum, scale, True, UPCAST)
    b_out = (b_max * scale + tl.math.log2(b_sum)) * 0.6931471805599453
    tl.store(out + i_bh.to(tl.int64) * SQ + o_m, b_out, mask=o_m < SQ)


@triton.jit
def mass_step(p_q, p_lse, p_weight, o_m, SQ, b_k, b_top, o_d, scale, D: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, WEIGHTED: tl.constexpr,
              SHIFT: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    """Sums [BM // 16, 8, BN] of the terms of a tile of queries."""
    b_q = rows(p_q, o_m, SQ, o_d, D, BD, MASKED)
    if MASKED:
        b_bias = -tl.load(p_lse, mask=o_m < SQ, other=float("inf"))
    else:
        b_bias = -tl.load(p_lse)
    if WEIGHTED:
        if MASKED:
            b_bias += tl.load(p_weight, mask=o_m < SQ, other=0.0) - b_top
        else:
            b_bias += tl.load(p_weight) - b_top
    b_bias = b_bias * 1.4426950408889634 + SHIFT
    b_p = tl.math.exp2(dot(b_q, tl.trans(b_k), UPCAST) * scale + b_bias[:, None])
    # rows r and r + 8 of a matrix instruction belong to one thread: it adds them by itself
    return tl.sum(tl.reshape(b_p, [BM // 16, 2, 8, BN]), 1)


@triton.jit(do_not_specialize=SIZES)
def column_mass_kernel(
    q,
    k,
    lse,
    weight,
    top,
    out,
    sqb,
    sqs,
    sqh,
    skb,
    sks,
    skh,
    SQ,
    SK,
    H,
    GROUPS,
    scale,
    # the log of the weight of all queries where they have none of their own
    uniform,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SHIFT: tl.constexpr,
    UPCAST: tl.constexpr,
    UNIT: tl.constexpr,
):
    sqb, sqs, sqh = sqb * UNIT, sqs * UNIT, sqh * UNIT
    skb, sks, skh = skb * UNIT, sks * UNIT, skh * UNIT
    i_bh = tl.program_id(1)
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    o_m = tl.arange(0, BM)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)

    p_k = k + i_b * skb + (i_h // GROUPS) * skh + o_n[:, None].to(tl.int64) * sks + o_d[None, :]
    b_k = rows(p_k, o_n, SK, o_d, D, BD, True)
    p_q = q + i_b * sqb + i_h * sqh + o_m[:, None].to(tl.int64) * sqs + o_d[None, :]
    p_lse = lse + i_bh.to(tl.int64) * SQ + o_m
    p_weight = weight + i_bh.to(tl.int64) * SQ + o_m
    b_top = 0.0
    if WEIGHTED:
        b_top = tl.load(top + i_bh)
        # where all queries are left out every bias is -inf, and must not become NaN
        b_top = tl.where(b_top == -float("inf"), 0.0, b_top)

    # queries stand in rows and sums stay where their terms are, so no lane ever waits for another
    b_sum = tl.zeros([BM // 16, 8, BN], tl.float32)
    whole = SQ // BM * BM
    for _ in range(0, whole, BM):
        b_sum += mass_step(p_q, p_lse, p_weight, o_m, SQ, b_k, b_top, o_d, scale, D, BM, BN, BD,
                           WEIGHTED, SHIFT, False, UPCAST)
        p_q += BM * sqs
        p_lse += BM
        p_weight += BM
    if whole < SQ:
        b_sum += mass_step(p_q, p_lse, p_weight, whole + o_m, SQ, b_k, b_top, o_d, scale, D, BM,
                           BN, BD, WEIGHTED, SHIFT, True, UPCAST)
    b_all = tl.sum(tl.sum(b_sum, 0), 0)
    b_out = (tl.math.log2(b_all) - SHIFT) * 0.6931471805599453 + (b_top if WEIGHTED else uniform)
    tl.store(out + i_bh.to(tl.int64) * SK + o_n, b_out, mask=o_n < SK)
