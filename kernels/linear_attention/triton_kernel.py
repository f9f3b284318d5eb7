"""The Triton kernels of linear attention; importing this file imports triton."""

import triton
import triton.language as tl

from fastdiff.kernels.dot_kernel import dot


@triton.jit
def feature(b_u):
    """elu(u) + 1 in float32."""
    b_u = b_u.to(tl.float32)
    return tl.where(b_u > 0, b_u + 1.0, tl.math.exp2(tl.minimum(b_u, 0.0) * 1.4426950408889634))


@triton.jit(do_not_specialize=["S", "H", "LENGTH"])
def linear_state_kernel(
    k,
    v,
    state,
    total,
    skb,
    sks,
    skh,
    svb,
    svs,
    svh,
    S,
    H,
    LENGTH,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    UPCAST: tl.constexpr,
    UNIT: tl.constexpr,
):
    """phi(k)^T v and the sum of phi(k) over one stretch of LENGTH tokens."""
    # strides come in units, so that the compiler sees rows of 40 or 72 elements as aligned
    skb, sks, skh = skb * UNIT, sks * UNIT, skh * UNIT
    svb, svs, svh = svb * UNIT, svs * UNIT, svh * UNIT
    i_s = tl.program_id(0)
    i_v = tl.program_id(1)
    i_bh = tl.program_id(2)
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    o_t = tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    o_v = i_v * BV + tl.arange(0, BV)
    m_d = o_d < D
    m_v = o_v < D
    start = i_s * LENGTH
    p_k = k + i_b * skb + i_h * skh + o_d[None, :]
    p_v = v + i_b * svb + i_h * svh + o_v[None, :]
    b_state = tl.zeros([BD, BV], tl.float32)
    b_total = tl.zeros([BD], tl.float32)
    for i_t in range(start, tl.minimum(start + LENGTH, S), BT):
        token = (i_t + o_t).to(tl.int64)
        m_t = token < S
        m_k = m_t[:, None] & m_d[None, :]
        b_k = tl.load(p_k + token[:, None] * sks, mask=m_k, other=0.0)
        # phi(0) is 1, so what is not there must be cleared after it
        b_f = tl.where(m_k, feature(b_k), 0.0)
        b_v = tl.load(p_v + token[:, None] * svs, mask=m_t[:, None] & m_v[None, :], other=0.0)
        b_state += dot(tl.trans(b_f.to(b_k.dtype)), b_v, UPCAST)
        b_total += tl.sum(b_f, 0)
    i_row = (i_s * tl.num_programs(2) + i_bh).to(tl.int64)
    p_state = state + i_row * D * D + o_d[:, None] * D + o_v[None, :]
    tl.store(p_state, b_state, mask=m_d[:, None] & m_v[None, :])
    if i_v == 0:
        tl.store(total + i_row * D + o_d, b_total, mask=m_d)


@triton.jit(do_not_specialize=["S", "H"])
def linear_output_kernel(
    q,
    state,
    mean,
    out,
    sqb,
    sqs,
    sqh,
    sob,
    sos,
    soh,
    S,
    H,
    eps,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    UPCAST: tl.constexpr,
    UNIT: tl.constexpr,
):
    """phi(q) state / (phi(q) . mean + eps) for BT queries."""
    sqb, sqs, sqh = sqb * UNIT, sqs * UNIT, sqh * UNIT
    sob, sos, soh = sob * UNIT, sos * UNIT, soh * UNIT
    i_t = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    token = (i_t * BT + tl.arange(0, BT)).to(tl.int64)
    m_t = token < S
    m_q = m_t[:, None] & m_d[None, :]
    p_q = q + i_b * sqb + i_h * sqh + token[:, None] * sqs + o_d[None, :]
    b_q = tl.load(p_q, mask=m_q, other=0.0)
    b_f = tl.where(m_q, feature(b_q), 0.0)
    b_mean = tl.load(mean + i_bh.to(tl.int64) * D + o_d, mask=m_d, other=0.0)
    b_norm = 1.0 / (tl.sum(b_f * b_mean[None, :], 1) + eps)
    b_f = b_f.to(b_q.dtype)
    for i_v in range(0, D, BV):
        o_v = i_v + tl.arange(0, BV)
        m_v = o_v < D
        p_state = state + i_bh.to(tl.int64) * D * D + o_d[:, None] * D + o_v[None, :]
        b_state = tl.load(p_state, mask=m_d[:, None] & m_v[None, :], other=0.0)
        b_o = dot(b_f, b_state, UPCAST) * b_norm[:, None]
        p_o = out + i_b * sob + i_h * soh + token[:, None] * sos + o_v[None, :]
        tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_t[:, None] & m_v[None, :])
