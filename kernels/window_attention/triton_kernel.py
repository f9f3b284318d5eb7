"""The Triton kernel of window attention; importing this file imports triton."""

import triton
import triton.language as tl

from fastdiff.kernels.dot_kernel import dot

SIZES = ["T", "H", "W", "TILES_H", "TILES_W", "BEFORE", "S", "HEADS", "GROUPS"]


@triton.jit
def fold(b_s, b_v, b_m, b_l, b_o, UPCAST: tl.constexpr):
    """One step of the online softmax: scores [BM, BN] (base 2) and values [BN, BD]."""
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
    # a row that has seen no key yet has maximum -inf, and -inf minus -inf is NaN
    b_shift = tl.where(b_m_new == -float("inf"), 0.0, b_m_new)
    b_p = tl.math.exp2(b_s - b_shift[:, None])
    b_alpha = tl.math.exp2(b_m - b_shift)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    b_o = b_o * b_alpha[:, None] + dot(b_p.to(b_v.dtype), b_v, UPCAST)
    return b_m_new, b_l, b_o


@triton.jit
def axis(low, high, base, first, size, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Of the tile that starts at `first`: where its keys begin, how many boxes they fill, and the
    run that all its queries see. Bounds never fall, so first and last query decide."""
    last = tl.minimum(first + QUERIES, size) - 1
    begin = tl.load(low + base + first)
    end = tl.load(high + base + last)
    inner = tl.load(low + base + last)
    outer = tl.load(high + base + first)
    return begin, (end - begin + KEYS - 1) // KEYS, inner, outer


@triton.jit
def cost(start, low, high, KEYS: tl.constexpr):
    """[BM, KEYS]: 0 where a row sees the coordinate, minus infinity elsewhere."""
    at = start + tl.arange(0, KEYS)[None, :]
    return tl.where((at >= low[:, None]) & (at < high[:, None]), 0.0, -float("inf"))


@triton.jit(do_not_specialize=SIZES)
def window_attention_fwd_kernel(
    q, k, v, o, low, high, key_mask,
    sqb, sqs, sqh, skb, sks, skh, svb, svs, svh, sob, sos, soh,
    T, H, W, TILES_H, TILES_W, BEFORE, S, HEADS, GROUPS, scale,
    QT: tl.constexpr, QH: tl.constexpr, QW: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    USE_MASK: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr,
):
    # strides come in units, so that the compiler sees rows of 40 or 72 elements as aligned
    sqb, sqs, sqh = sqb * UNIT, sqs * UNIT, sqh * UNIT
    skb, sks, skh = skb * UNIT, sks * UNIT, skh * UNIT
    svb, svs, svh = svb * UNIT, svs * UNIT, svh * UNIT
    sob, sos, soh = sob * UNIT, sos * UNIT, soh * UNIT

    i_tile = tl.program_id(0)
    i_b = (tl.program_id(1) // HEADS).to(tl.int64)
    i_h = (tl.program_id(1) % HEADS).to(tl.int64)
    i_kh = i_h // GROUPS
    q_t = i_tile // (TILES_H * TILES_W) * QT
    q_h = i_tile // TILES_W % TILES_H * QH
    q_w = i_tile % TILES_W * QW
    k_t, n_t, in_t, out_t = axis(low, high, 0, q_t, T, QT, KT)
    k_h, n_h, in_h, out_h = axis(low, high, T, q_h, H, QH, KH)
    k_w, n_w, in_w, out_w = axis(low, high, T + H, q_w, W, QW, KW)

    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    r_t = q_t + o_m // (QH * QW)
    r_h = q_h + o_m // QW % QH
    r_w = q_w + o_m % QW
    m_m = (r_t < T) & (r_h < H) & (r_w < W)
    # rows beyond the grid repeat its last ones, and are not stored
    r_t, r_h, r_w = tl.minimum(r_t, T - 1), tl.minimum(r_h, H - 1), tl.minimum(r_w, W - 1)
    low_t, high_t = tl.load(low + r_t), tl.load(high + r_t)
    low_h, high_h = tl.load(low + T + r_h), tl.load(high + T + r_h)
    low_w, high_w = tl.load(low + T + H + r_w), tl.load(high + T + H + r_w)
    token = (BEFORE + (r_t * H + r_h) * W + r_w).to(tl.int64)

    # [BM, BD]
    p_q = q + i_b * sqb + i_h * sqh + token[:, None] * sqs + o_d[None, :]
    b_q = tl.load(p_q, mask=m_d[None, :], other=0.0)
    b_m = tl.full([BM], -float("inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BD], tl.float32)
    p_k = k + i_b * skb + i_kh * skh + o_d[None, :]
    p_v = v + i_b * svb + i_kh * svh + o_d[None, :]

    for i in range(0, n_t * n_h * n_w):
        s_t = k_t + i // (n_h * n_w) * KT
        s_h = k_h + i // n_w % n_h * KH
        s_w = k_w + i % n_w * KW
        # columns beyond the grid repeat its last ones, and no window holds them
        c_t = tl.minimum(s_t + o_n // (KH * KW), T - 1)
        c_h = tl.minimum(s_h + o_n // KW % KH, H - 1)
        c_w = tl.minimum(s_w + o_n % KW, W - 1)
        column = (BEFORE + (c_t * H + c_h) * W + c_w).to(tl.int64)
        # [BN, BD]
        if D == BD:
            b_k = tl.load(p_k + column[:, None] * sks)
            b_v = tl.load(p_v + column[:, None] * svs)
        else:
            b_k = tl.load(p_k + column[:, None] * sks, mask=m_d[None, :], other=0.0)
            b_v = tl.load(p_v + column[:, None] * svs, mask=m_d[None, :], other=0.0)
        b_s = dot(b_q, tl.trans(b_k), UPCAST) * scale
        whole = (s_t >= in_t) & (s_t + KT <= out_t) & (s_h >= in_h) & (s_h + KH <= out_h)
        whole = whole & (s_w >= in_w) & (s_w + KW <= out_w)
        if not whole:
            # each axis on its own: a thread then looks at a few coordinates, not at every pair
            b_4 = tl.reshape(b_s, [BM, KT, KH, KW])
            b_4 += tl.reshape(cost(s_t, low_t, high_t, KT), [BM, KT, 1, 1])
            b_4 += tl.reshape(cost(s_h, low_h, high_h, KH), [BM, 1, KH, 1])
            b_4 += tl.reshape(cost(s_w, low_w, high_w, KW), [BM, 1, 1, KW])
            b_s = tl.reshape(b_4, [BM, BN])
        if USE_MASK:
            m_n = tl.load(key_mask + i_b * S + column) != 0
            b_s = tl.where(m_n[None, :], b_s, -float("inf"))
        b_m, b_l, b_o = fold(b_s, b_v, b_m, b_l, b_o, UPCAST)

    # what is not in the grid, seen by all
    n_before = (BEFORE + BN - 1) // BN
    end = BEFORE + T * H * W
    n_after = (S - end + BN - 1) // BN
    for i in range(0, n_before + n_after):
        first = tl.where(i < n_before, i * BN, end + (i - n_before) * BN)
        column = first + o_n
        m_n = column < tl.where(i < n_before, BEFORE, S)
        if USE_MASK:
            m_n &= tl.load(key_mask + i_b * S + column, mask=m_n, other=0) != 0
        column = column.to(tl.int64)
        m_nd = m_n[:, None] & m_d[None, :]
        b_k = tl.load(p_k + column[:, None] * sks, mask=m_nd, other=0.0)
        b_v = tl.load(p_v + column[:, None] * svs, mask=m_nd, other=0.0)
        b_s = dot(b_q, tl.trans(b_k), UPCAST) * scale
        b_s = tl.where(m_n[None, :], b_s, -float("inf"))
        b_m, b_l, b_o = fold(b_s, b_v, b_m, b_l, b_o, UPCAST)

    # no key at all: zeros
    b_o = b_o / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
    p_o = o + i_b * sob + i_h * soh + token[:, None] * sos + o_d[None, :]
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
