"""The Triton kernel of block pooling; importing this file imports triton."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["S", "H", "N"])
def block_pool_fwd_kernel(
    x,
    offsets,
    mask,
    mean,
    weight,
    sxb,
    sxs,
    sxh,
    S,
    H,
    N,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    USE_MASK: tl.constexpr,
):
    i_n = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    o_t = tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    start = tl.load(offsets + i_n)
    end = tl.load(offsets + i_n + 1)
    b_sum = tl.zeros([BD], tl.float32)
    n_valid = tl.zeros([], tl.float32)
    for i_t in range(start, end, BT):
        i_t64 = tl.cast(i_t, tl.int64)
        m_t = i_t + o_t < end
        if USE_MASK:
            m_t &= tl.load(mask + i_b * S + i_t64 + o_t, mask=m_t, other=0) != 0
        # [BT, BD]
        p_x = x + i_b * sxb + i_h * sxh + i_t64 * sxs + o_t[:, None] * sxs + o_d[None, :]
        b_x = tl.load(p_x, mask=m_t[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        b_sum += tl.sum(b_x, 0)
        n_valid += tl.sum(m_t.to(tl.float32), 0)
    b_mean = b_sum / tl.maximum(n_valid, 1.0)
    p_mean = mean + (i_bh.to(tl.int64) * N + i_n) * D + o_d
    tl.store(p_mean, b_mean.to(mean.dtype.element_ty), mask=m_d)
    if i_h == 0:
        tl.store(weight + i_b * N + i_n, n_valid)
