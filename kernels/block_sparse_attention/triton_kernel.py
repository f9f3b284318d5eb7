"""The Triton kernel of block-sparse attention; importing this file imports triton."""

import triton
import triton.language as tl

from fastdiff.kernels.dot_kernel import dot

SIZES = ["SQ", "SKV", "H", "GROUPS", "NQ", "NK", "M"]


@triton.jit
def fold(b_s, b_v, b_m, b_l, b_o, scale, GUARD: tl.constexpr, UPCAST: tl.constexpr):
    """One step of the online softmax: scores [BM, BN], values [BN, BD]; maxima are in base 2."""
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale)
    # a row that has seen no key yet has maximum -inf, and -inf minus -inf is NaN
    b_shift = tl.where(b_m_new == -float("inf"), 0.0, b_m_new) if GUARD else b_m_new
    # one multiply-add an element
    b_p = tl.math.exp2(b_s * scale - b_shift[:, None])
    b_alpha = tl.math.exp2(b_m - b_shift)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    b_o = b_o * b_alpha[:, None] + dot(b_p.to(b_v.dtype), b_v, UPCAST)
    return b_m_new, b_l, b_o


@triton.jit(do_not_specialize=SIZES)
def block_sparse_attention_fwd_kernel(
    q,
    k,
    v,
    o,
    lse,
    indices,
    counts,
    order,
    q_offsets,
    k_offsets,
    key_mask,
    k_mean,
    v_mean,
    weight,
    keep,
    sqb,
    sqs,
    sqh,
    skb,
    sks,
    skh,
    svb,
    svs,
    svh,
    sob,
    sos,
    soh,
    skmb,
    skmh,
    skmn,
    svmb,
    svmh,
    svmn,
    SQ,
    SKV,
    H,
    GROUPS,
    NQ,
    NK,
    M,
    scale,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS_Q: tl.constexpr,
    PARTS_K: tl.constexpr,
    FULL_Q: tl.constexpr,
    FULL_K: tl.constexpr,
    EQUAL_K: tl.constexpr,
    USE_MASK: tl.constexpr,
    USE_TAIL: tl.constexpr,
    USE_LSE: tl.constexpr,
    USE_ORDER: tl.constexpr,
    UPCAST: tl.constexpr,
    UNIT: tl.constexpr,
):
    # strides come in units, so that the compiler sees rows of 40 or 72 elements as aligned
    sqb, sqs, sqh = sqb * UNIT, sqs * UNIT, sqh * UNIT
    skb, sks, skh = skb * UNIT, sks * UNIT, skh * UNIT
    svb, svs, svh = svb * UNIT, svs * UNIT, svh * UNIT
    sob, sos, soh = sob * UNIT, sos * UNIT, soh * UNIT
    skmb, skmh, skmn = skmb * UNIT, skmh * UNIT, skmn * UNIT
    svmb, svmh, svmn = svmb * UNIT, svmh * UNIT, svmn * UNIT

    i_q = tl.program_id(0) // PARTS_Q
    i_part = tl.program_id(0) % PARTS_Q
    i_bh = tl.program_id(1)
    if USE_ORDER:
        i_row = tl.load(order + i_bh * NQ + i_q)
        i_bh = i_row // NQ
        i_q = i_row % NQ
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    i_kh = i_h // GROUPS
    i_row = i_bh.to(tl.int64) * NQ + i_q

    if FULL_Q:
        q_start = i_q * BLOCK_Q + i_part * BM
        q_end = q_start + BM
    else:
        q_start = tl.load(q_offsets + i_q) + i_part * BM
        q_end = tl.load(q_offsets + i_q + 1)
    if q_start < q_end:
        o_m = tl.arange(0, BM)
        o_n = tl.arange(0, BN)
        o_d = tl.arange(0, BD)
        m_d = o_d < D
        m_m = q_start + o_m < q_end
        q_start64 = q_start.to(tl.int64)

        # [BM, BD]
        p_q = q + i_b * sqb + i_h * sqh + q_start64 * sqs + o_m[:, None] * sqs + o_d[None, :]
        if FULL_Q and D == BD:
            b_q = tl.load(p_q)
        else:
            b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)

        b_m = tl.full([BM], -float("inf"), tl.float32)
        b_l = tl.zeros([BM], tl.float32)
        b_o = tl.zeros([BM, BD], tl.float32)
        p_k = k + i_b * skb + i_kh * skh + o_n[:, None] * sks + o_d[None, :]
        p_v = v + i_b * svb + i_kh * svh + o_n[:, None] * svs + o_d[None, :]
        p_index = indices + i_row * M
        n_kept = tl.load(counts + i_row)

        for i in range(0, n_kept * PARTS_K):
            i_k = tl.load(p_index + i // PARTS_K)
            i_sub = (i % PARTS_K) * BN
            if EQUAL_K:
                k_start = i_k * BLOCK_K + i_sub
                k_end = i_k * BLOCK_K + BLOCK_K
            else:
                k_start = tl.load(k_offsets + i_k) + i_sub
                k_end = tl.load(k_offsets + i_k + 1)
            k_start64 = k_start.to(tl.int64)
            # [BN, BD]
            if FULL_K and not USE_MASK:
                if D == BD:
                    b_k = tl.load(p_k + k_start64 * sks)
                    b_v = tl.load(p_v + k_start64 * svs)
                else:
                    b_k = tl.load(p_k + k_start64 * sks, mask=m_d[None, :], other=0.0)
                    b_v = tl.load(p_v + k_start64 * svs, mask=m_d[None, :], other=0.0)
                b_s = dot(b_q, tl.trans(b_k), UPCAST)
                b_m, b_l, b_o = fold(b_s, b_v, b_m, b_l, b_o, scale, False, UPCAST)
            else:
                m_n = k_start + o_n < k_end
                if USE_MASK:
                    m_n &= tl.load(key_mask + i_b * SKV + k_start64 + o_n, mask=m_n, other=0) != 0
                m_nd = m_n[:, None] & m_d[None, :]
                b_k = tl.load(p_k + k_start64 * sks, mask=m_nd, other=0.0)
                b_v = tl.load(p_v + k_start64 * svs, mask=m_nd, other=0.0)
                b_s = dot(b_q, tl.trans(b_k), UPCAST)
                b_s = tl.where(m_n[None, :], b_s, -float("inf"))
                b_m, b_l, b_o = fold(b_s, b_v, b_m, b_l, b_o, scale, True, UPCAST)

        if USE_TAIL:
            p_k = k_mean + i_b * skmb + i_kh * skmh + o_n[:, None] * skmn + o_d[None, :]
            p_v = v_mean + i_b * svmb + i_kh * svmh + o_n[:, None] * svmn + o_d[None, :]
            # with every block kept there is no tail to walk
            n_tail = tl.where(n_kept < NK, NK, 0)
            for i_n in range(0, n_tail, BN):
                m_n = i_n + o_n < NK
                b_w = tl.load(weight + i_b * NK + i_n + o_n, mask=m_n, other=0.0)
                m_n &= tl.load(keep + i_row * NK + i_n + o_n, mask=m_n, other=1) == 0
                m_n &= b_w > 0
                i_n64 = tl.cast(i_n, tl.int64)
                m_nd = m_n[:, None] & m_d[None, :]
                b_k = tl.load(p_k + i_n64 * skmn, mask=m_nd, other=0.0)
                b_v = tl.load(p_v + i_n64 * svmn, mask=m_nd, other=0.0)
                b_s = dot(b_q, tl.trans(b_k), UPCAST)
                b_s += (tl.math.log2(tl.where(m_n, b_w, 1.0)) / scale)[None, :]
                b_s = tl.where(m_n[None, :], b_s, -float("inf"))
                b_m, b_l, b_o = fold(b_s, b_v, b_m, b_l, b_o, scale, True, UPCAST)

        # no key at all: zeros, and log 0
        m_empty = b_l == 0.0
        b_o = b_o / tl.where(m_empty, 1.0, b_l)[:, None]
        p_o = o + i_b * sob + i_h * soh + q_start64 * sos + o_m[:, None] * sos + o_d[None, :]
        tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
        if USE_LSE:
            b_lse = (b_m + tl.math.log2(tl.where(m_empty, 1.0, b_l))) * 0.6931471805599453
            b_lse = tl.where(m_empty, -float("inf"), b_lse)
            tl.store(lse + i_bh.to(tl.int64) * SQ + q_start64 + o_m, b_lse, mask=m_m)
