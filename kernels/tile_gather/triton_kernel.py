"""The Triton kernel of gathering into tiles; importing this file imports triton."""

import triton
import triton.language as tl


@triton.jit
def gather_tile(
    x, out, mean, weight, order, mask, i_b, i_h, i_n, start, end, sxb, sxs, sxh, S, H, N,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, POOL: tl.constexpr,
    USE_MASK: tl.constexpr,
):
    """One tile of one head of one tensor."""
    o_t = tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_sum = tl.zeros([BD], tl.float32)
    n_valid = tl.zeros([], tl.float32)
    p_x = x + i_b * sxb + i_h * sxh + o_d[None, :]
    p_out = out + ((i_b * S) * H + i_h) * D + o_d[None, :]
    for i_t in range(start, end, BT):
        m_t = i_t + o_t < end
        token = tl.load(order + i_t + o_t, mask=m_t, other=0)
        m_td = m_t[:, None] & m_d[None, :]
        b_x = tl.load(p_x + token[:, None] * sxs, mask=m_td, other=0.0)
        place = (i_t + o_t).to(tl.int64)
        tl.store(p_out + place[:, None] * H * D, b_x, mask=m_td)
        if POOL:
            m_v = m_t
            b_v = b_x.to(tl.float32)
            if USE_MASK:
                m_v &= tl.load(mask + i_b * S + token, mask=m_t, other=0) != 0
                b_v = tl.where(m_v[:, None], b_v, 0.0)
            b_sum += tl.sum(b_v, 0)
            n_valid += tl.sum(m_v.to(tl.float32), 0)
    if POOL:
        b_mean = b_sum / tl.maximum(n_valid, 1.0)
        tl.store(mean + ((i_b * H + i_h) * N + i_n) * D + o_d, b_mean.to(mean.dtype.element_ty),
                 mask=m_d)
        if i_h == 0:
            tl.store(weight + i_b * N + i_n, n_valid)


@triton.jit(do_not_specialize=["B", "S", "H", "HK", "N"])
def tile_gather_fwd_kernel(
    query, key, value, q, k, v, key_mean, value_mean, weight, order, offsets, mask,
    sqb, sqs, sqh, skb, sks, skh, svb, svs, svh, B, S, H, HK, N,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, USE_MASK: tl.constexpr,
):
    """Programs along axis 1: the heads of the query, then of the key, then of the value."""
    i_n = tl.program_id(0)
    i_row = tl.program_id(1)
    start = tl.load(offsets + i_n)
    end = tl.load(offsets + i_n + 1)
    if i_row < B * H:
        i_b = (i_row // H).to(tl.int64)
        i_h = (i_row % H).to(tl.int64)
        gather_tile(query, q, key_mean, weight, order, mask, i_b, i_h, i_n, start, end,
                    sqb, sqs, sqh, S, H, N, D, BD, BT, False, USE_MASK)
    elif i_row < B * H + B * HK:
        i_b = ((i_row - B * H) // HK).to(tl.int64)
        i_h = ((i_row - B * H) % HK).to(tl.int64)
        gather_tile(key, k, key_mean, weight, order, mask, i_b, i_h, i_n, start, end,
                    skb, sks, skh, S, HK, N, D, BD, BT, True, USE_MASK)
    else:
        i_b = ((i_row - B * H - B * HK) // HK).to(tl.int64)
        i_h = ((i_row - B * H - B * HK) % HK).to(tl.int64)
        gather_tile(value, v, value_mean, weight, order, mask, i_b, i_h, i_n, start, end,
                    svb, svs, svh, S, HK, N, D, BD, BT, True, USE_MASK)
