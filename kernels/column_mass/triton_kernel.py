"""The Triton kernel of column mass; importing this file imports triton."""

import triton
import triton.language as tl

SIZES = ["SQ", "SK", "H", "GROUPS_Q", "GROUPS_K"]


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    # the interpreter multiplies bfloat16 as if it were integers
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="tf32x3")
    else:
        return tl.dot(a, b)


@triton.jit(do_not_specialize=SIZES)
def column_mass_fwd_kernel(
    q,
    k,
    bias,
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
    GROUPS_Q,
    GROUPS_K,
    scale,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    USE_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    UNIT: tl.constexpr,
):
    # strides come in units, so that the compiler sees rows of 40 or 72 elements as aligned
    sqb, sqs, sqh = sqb * UNIT, sqs * UNIT, sqh * UNIT
    skb, sks, skh = skb * UNIT, sks * UNIT, skh * UNIT
    i_n = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    o_m = tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    m_n = o_n < SK

    # [BN, BD]
    p_k = k + i_b * skb + (i_h // GROUPS_K) * skh + o_n[:, None].to(tl.int64) * sks + o_d[None, :]
    b_k = tl.load(p_k, mask=m_n[:, None] & m_d[None, :], other=0.0)
    p_q = q + i_b * sqb + (i_h // GROUPS_Q) * sqh + o_m[:, None].to(tl.int64) * sqs + o_d[None, :]
    p_bias = bias + i_bh.to(tl.int64) * SQ + o_m

    b_max = tl.full([BN], -float("inf"), tl.float32)
    b_sum = tl.zeros([BN], tl.float32)
    for i_m in range(0, SQ, BM):
        m_m = i_m + o_m < SQ
        # [BM, BD]
        b_q = tl.load(p_q + tl.cast(i_m, tl.int64) * sqs, mask=m_m[:, None] & m_d[None, :],
                      other=0.0)
        b_s = dot(b_k, tl.trans(b_q), UPCAST) * scale
        if USE_BIAS:
            b_bias = tl.load(p_bias + i_m, mask=m_m, other=-float("inf"))
            b_s += (b_bias * 1.4426950408889634)[None, :]
        b_s = tl.where(m_m[None, :], b_s, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        # a key that every query left out has maximum -inf, and -inf minus -inf is NaN
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_sum = b_sum * tl.math.exp2(b_max - b_shift) + tl.sum(
            tl.math.exp2(b_s - b_shift[:, None]), 1
        )
        b_max = b_new
    b_empty = b_sum == 0.0
    b_out = (b_max + tl.math.log2(tl.where(b_empty, 1.0, b_sum))) * 0.6931471805599453
    b_out = tl.where(b_empty, -float("inf"), b_out)
    tl.store(out + i_bh.to(tl.int64) * SK + o_n, b_out, mask=m_n)
