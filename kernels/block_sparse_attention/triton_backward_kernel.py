"""The Triton kernels of the backward of block-sparse attention; importing this imports triton.

s are scores in base 2, p probabilities, dp and ds the gradients of p and of the scaled scores.
"""

import triton
import triton.language as tl

from fastdiff.kernels.dot_kernel import dot

SIZES = ["SQ", "SKV", "H", "GROUPS", "NQ", "NK", "M"]
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(p, m_r, m_d, FULL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """A tile [rows, BD]; zeros where there is no such row or column."""
    if FULL and D == BD:
        return tl.load(p)
    elif FULL:
        return tl.load(p, mask=m_d[None, :], other=0.0)
    else:
        return tl.load(p, mask=m_r[:, None] & m_d[None, :], other=0.0)


@triton.jit
def load_shift(p, m_r):
    """LSE in base 2. A query without keys, or no query, gets +inf: all its p are then zero."""
    b_lse = tl.load(p, mask=m_r, other=-float("inf"))
    return tl.where(b_lse == -float("inf"), float("inf"), b_lse * LOG2E)


@triton.jit(do_not_specialize=SIZES)
def block_sparse_attention_bwd_dq_kernel(
    q, k, v, o, do, lse, dlse, delta, dq, indices, counts, q_offsets, k_offsets, key_mask, k_mean,
    v_mean, weight, keep, sqb, sqs, sqh, skb, sks, skh, svb, svs, svh, sob, sos, soh, sdb, sds,
    sdh, SQ, SKV, H, GROUPS, NQ, NK, M, scale, D: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS_Q: tl.constexpr, PARTS_K: tl.constexpr, FULL_Q: tl.constexpr, FULL_K: tl.constexpr,
    EQUAL_K: tl.constexpr, USE_MASK: tl.constexpr, USE_TAIL: tl.constexpr, USE_DLSE: tl.constexpr,
    UPCAST: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dq of one query tile, over its list; also delta = rowsum(o * do) - dlse for the others."""
    sqb, sqs, sqh = sqb * UNIT, sqs * UNIT, sqh * UNIT
    skb, sks, skh = skb * UNIT, sks * UNIT, skh * UNIT
    svb, svs, svh = svb * UNIT, svs * UNIT, svh * UNIT
    sob, sos, soh = sob * UNIT, sos * UNIT, soh * UNIT
    sdb, sds, sdh = sdb * UNIT, sds * UNIT, sdh * UNIT

    i_q = tl.program_id(0) // PARTS_Q
    i_part = tl.program_id(0) % PARTS_Q
    i_bh = tl.program_id(1)
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
        r_m = q_start.to(tl.int64) + o_m
        o_lse = i_bh.to(tl.int64) * SQ + r_m

        # [BM, BD]
        p_q = q + i_b * sqb + i_h * sqh + r_m[:, None] * sqs + o_d[None, :]
        p_o = o + i_b * sob + i_h * soh + r_m[:, None] * sos + o_d[None, :]
        p_do = do + i_b * sdb + i_h * sdh + r_m[:, None] * sds + o_d[None, :]
        b_q = load_rows(p_q, m_m, m_d, FULL_Q, D, BD)
        b_do = load_rows(p_do, m_m, m_d, FULL_Q, D, BD)
        b_o = load_rows(p_o, m_m, m_d, FULL_Q, D, BD)
        b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
        if USE_DLSE:
            b_delta -= tl.load(dlse + o_lse, mask=m_m, other=0.0)
        tl.store(delta + o_lse, b_delta, mask=m_m)
        b_shift = load_shift(lse + o_lse, m_m)

        b_dq = tl.zeros([BM, BD], tl.float32)
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
            m_n = k_start + o_n < k_end
            if USE_MASK:
                m_n &= tl.load(key_mask + i_b * SKV + k_start64 + o_n, mask=m_n, other=0) != 0
            # [BN, BD]
            CLEAN: tl.constexpr = FULL_K and not USE_MASK
            b_k = load_rows(p_k + k_start64 * sks, m_n, m_d, CLEAN, D, BD)
            b_v = load_rows(p_v + k_start64 * svs, m_n, m_d, CLEAN, D, BD)
            b_s = dot(b_q, tl.trans(b_k), UPCAST) * (scale * LOG2E)
            b_p = tl.math.exp2(b_s - b_shift[:, None])
            if not CLEAN:
                b_p = tl.where(m_n[None, :], b_p, 0.0)
            b_dp = dot(b_do, tl.trans(b_v), UPCAST)
            b_ds = b_p * (b_dp - b_delta[:, None])
            b_dq += dot(b_ds.to(b_k.dtype), b_k, UPCAST)

        if USE_TAIL:
            o_mean = (i_b * (H // GROUPS) + i_kh) * NK
            # with every block kept there is no tail to walk
            n_tail = tl.where(n_kept < NK, NK, 0)
            for i_n in range(0, n_tail, BN):
                r_n = i_n + o_n
                m_n = r_n < NK
                b_w = tl.load(weight + i_b * NK + r_n, mask=m_n, other=0.0)
                m_n &= tl.load(keep + i_row * NK + r_n, mask=m_n, other=1) == 0
                m_n &= b_w > 0
                o_nd = (o_mean + r_n)[:, None] * D + o_d[None, :]
                b_k = load_rows(k_mean + o_nd, m_n, m_d, False, D, BD)
                b_v = load_rows(v_mean + o_nd, m_n, m_d, False, D, BD)
                b_s = dot(b_q, tl.trans(b_k), UPCAST) * (scale * LOG2E)
                b_s += tl.math.log2(tl.where(m_n, b_w, 1.0))[None, :]
                b_p = tl.where(m_n[None, :], tl.math.exp2(b_s - b_shift[:, None]), 0.0)
                b_dp = dot(b_do, tl.trans(b_v), UPCAST)
                b_ds = b_p * (b_dp - b_delta[:, None])
                b_dq += dot(b_ds.to(b_k.dtype), b_k, UPCAST)

        p_dq = dq + ((i_b * SQ + r_m) * H + i_h)[:, None] * D + o_d[None, :]
        b_dq = (b_dq * scale).to(dq.dtype.element_ty)
        tl.store(p_dq, b_dq, mask=m_m[:, None] & m_d[None, :])


@triton.jit
def add_queries(
    b_k, b_v, b_dk, b_dv, b_bias, m_n, p_q, p_do, p_lse, p_delta, m_m, m_d, scale,
    FULL_Q: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One query tile's share of the gradients [BN, BD] of a tile of keys and values."""
    b_q = load_rows(p_q, m_m, m_d, FULL_Q, D, BD)
    b_do = load_rows(p_do, m_m, m_d, FULL_Q, D, BD)
    b_shift = load_shift(p_lse, m_m)
    b_delta = tl.load(p_delta, mask=m_m, other=0.0)
    # [BN, BM]
    b_s = dot(b_k, tl.trans(b_q), UPCAST) * (scale * LOG2E)
    if TAIL:
        b_s = tl.where(m_n[:, None], b_s + b_bias[:, None], -float("inf"))
    b_p = tl.math.exp2(b_s - b_shift[None, :])
    b_dv += dot(b_p.to(b_do.dtype), b_do, UPCAST)
    b_dp = dot(b_v, tl.trans(b_do), UPCAST)
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dk += dot(b_ds.to(b_q.dtype), b_q, UPCAST)
    return b_dk, b_dv


@triton.jit(do_not_specialize=SIZES)
def block_sparse_attention_bwd_dkv_kernel(
    q, k, v, do, lse, delta, dk, dv, indices, counts, q_offsets, k_offsets, key_mask, sqb, sqs,
    sqh, skb, sks, skh, svb, svs, svh, sdb, sds, sdh, SQ, SKV, H, GROUPS, NQ, NK, scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BLOCK_Q: tl.constexpr,
    PARTS_Q: tl.constexpr, PARTS_K: tl.constexpr, FULL_Q: tl.constexpr, EQUAL_Q: tl.constexpr,
    USE_MASK: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile, over the query blocks that list its block.

    indices: [B, H, NK, NQ], counts: [B, H, NK]. What a key row computes reaches no other row, so
    rows that are no key need no mask before they are stored.
    """
    sqb, sqs, sqh = sqb * UNIT, sqs * UNIT, sqh * UNIT
    skb, sks, skh = skb * UNIT, sks * UNIT, skh * UNIT
    svb, svs, svh = svb * UNIT, svs * UNIT, svh * UNIT
    sdb, sds, sdh = sdb * UNIT, sds * UNIT, sdh * UNIT

    i_k = tl.program_id(0) // PARTS_K
    HK = H // GROUPS
    i_b = (tl.program_id(1) // HK).to(tl.int64)
    i_kh = (tl.program_id(1) % HK).to(tl.int64)
    k_start = tl.load(k_offsets + i_k) + (tl.program_id(0) % PARTS_K) * BN
    k_end = tl.load(k_offsets + i_k + 1)
    if k_start < k_end:
        o_m = tl.arange(0, BM)
        o_d = tl.arange(0, BD)
        m_d = o_d < D
        r_n = k_start.to(tl.int64) + tl.arange(0, BN)
        m_n = r_n < k_end
        m_real = m_n
        if USE_MASK:
            m_real = m_n & (tl.load(key_mask + i_b * SKV + r_n, mask=m_n, other=0) != 0)
        # [BN, BD]
        p_k = k + i_b * skb + i_kh * skh + r_n[:, None] * sks + o_d[None, :]
        p_v = v + i_b * svb + i_kh * svh + r_n[:, None] * svs + o_d[None, :]
        b_k = load_rows(p_k, m_real, m_d, False, D, BD)
        b_v = load_rows(p_v, m_real, m_d, False, D, BD)
        b_dk = tl.zeros([BN, BD], tl.float32)
        b_dv = tl.zeros([BN, BD], tl.float32)
        for i_g in range(0, GROUPS):
            i_h = i_kh * GROUPS + i_g
            i_bh = i_b * H + i_h
            p_index = indices + (i_bh * NK + i_k) * NQ
            n_seen = tl.load(counts + i_bh * NK + i_k)
            p_q = q + i_b * sqb + i_h * sqh + o_m[:, None] * sqs + o_d[None, :]
            p_do = do + i_b * sdb + i_h * sdh + o_m[:, None] * sds + o_d[None, :]
            for i in range(0, n_seen * PARTS_Q):
                i_q = tl.load(p_index + i // PARTS_Q)
                i_sub = (i % PARTS_Q) * BM
                if EQUAL_Q:
                    q_start = i_q * BLOCK_Q + i_sub
                    q_end = i_q * BLOCK_Q + BLOCK_Q
                else:
                    q_start = tl.load(q_offsets + i_q) + i_sub
                    q_end = tl.load(q_offsets + i_q + 1)
                q_start64 = q_start.to(tl.int64)
                o_lse = i_bh * SQ + q_start64 + o_m
                b_dk, b_dv = add_queries(
                    b_k, b_v, b_dk, b_dv, None, None,
                    p_q + q_start64 * sqs, p_do + q_start64 * sds, lse + o_lse, delta + o_lse,
                    q_start + o_m < q_end, m_d, scale, FULL_Q, False, D, BD, UPCAST,
                )  # fmt: skip

        if USE_MASK:
            b_dk = tl.where(m_real[:, None], b_dk, 0.0)
            b_dv = tl.where(m_real[:, None], b_dv, 0.0)
        o_nd = ((i_b * SKV + r_n) * HK + i_kh)[:, None] * D + o_d[None, :]
        m_nd = m_n[:, None] & m_d[None, :]
        tl.store(dk + o_nd, (b_dk * scale).to(dk.dtype.element_ty), mask=m_nd)
        tl.store(dv + o_nd, b_dv.to(dv.dtype.element_ty), mask=m_nd)


@triton.jit(do_not_specialize=[*SIZES, "SPLITS"])
def block_sparse_attention_bwd_tail_kernel(
    q, do, lse, delta, k_mean, v_mean, weight, keep, q_offsets, dk_mean, dv_mean, sqb,
    sqs, sqh, sdb, sds, sdh, SQ, H, GROUPS, NQ, NK, SPLITS, scale, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BLOCK_Q: tl.constexpr,
    PARTS_Q: tl.constexpr, FULL_Q: tl.constexpr, EQUAL_Q: tl.constexpr, UPCAST: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of mean keys and values, over one of SPLITS parts of the query blocks.

    dk_mean, dv_mean: float32 [SPLITS, B, Hk, NK, D], to be added up.
    """
    sqb, sqs, sqh = sqb * UNIT, sqs * UNIT, sqh * UNIT
    sdb, sds, sdh = sdb * UNIT, sds * UNIT, sdh * UNIT

    HK = H // GROUPS
    i_bkh = tl.program_id(1).to(tl.int64)
    i_b = i_bkh // HK
    i_kh = i_bkh % HK
    i_split = tl.program_id(2).to(tl.int64)
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    r_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = r_n < NK
    b_w = tl.load(weight + i_b * NK + r_n, mask=m_n, other=0.0)
    m_real = b_w > 0
    b_bias = tl.math.log2(tl.where(m_real, b_w, 1.0))
    # [BN, BD]
    o_nd = (i_bkh * NK + r_n)[:, None] * D + o_d[None, :]
    b_k = load_rows(k_mean + o_nd, m_real, m_d, False, D, BD)
    b_v = load_rows(v_mean + o_nd, m_real, m_d, False, D, BD)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    first = (NQ * i_split // SPLITS).to(tl.int32)
    last = (NQ * (i_split + 1) // SPLITS).to(tl.int32)
    for i_g in range(0, GROUPS):
        i_h = i_kh * GROUPS + i_g
        i_bh = i_b * H + i_h
        p_q = q + i_b * sqb + i_h * sqh + o_m[:, None] * sqs + o_d[None, :]
        p_do = do + i_b * sdb + i_h * sdh + o_m[:, None] * sds + o_d[None, :]
        for i in range(first * PARTS_Q, last * PARTS_Q):
            i_q = i // PARTS_Q
            i_sub = (i % PARTS_Q) * BM
            if EQUAL_Q:
                q_start = i_q * BLOCK_Q + i_sub
                q_end = i_q * BLOCK_Q + BLOCK_Q
            else:
                q_start = tl.load(q_offsets + i_q) + i_sub
                q_end = tl.load(q_offsets + i_q + 1)
            p_keep = keep + (i_bh * NQ + i_q) * NK + r_n
            m_seen = m_real & (tl.load(p_keep, mask=m_n, other=1) == 0)
            q_start64 = tl.cast(q_start, tl.int64)
            o_lse = i_bh * SQ + q_start64 + o_m
            b_dk, b_dv = add_queries(
                b_k, b_v, b_dk, b_dv, b_bias, m_seen,
                p_q + q_start64 * sqs, p_do + q_start64 * sds, lse + o_lse, delta + o_lse,
                q_start + o_m < q_end, m_d, scale, FULL_Q, True, D, BD, UPCAST,
            )  # fmt: skip

    o_split = i_split * tl.num_programs(1) * NK * D
    m_nd = m_n[:, None] & m_d[None, :]
    tl.store(dk_mean + o_split + o_nd, b_dk * scale, mask=m_nd)
    tl.store(dv_mean + o_split + o_nd, b_dv, mask=m_nd)
