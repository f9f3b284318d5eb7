"""The Triton kernel of token permutation; importing this file imports triton."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["S"])
def permute_tokens_fwd_kernel(
    x, out, order, sxb, sxs, S, ROW: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr,
    UNIT: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = place < S
    token = tl.load(order + place, mask=m_t, other=0).to(tl.int64)
    # strides come in units, so that the compiler sees rows as aligned
    p_x = x + i_b * (sxb * UNIT) + token[:, None] * (sxs * UNIT)
    p_out = out + (i_b * S + place[:, None]) * ROW
    for i_r in range(0, ROW, BR):
        o_r = i_r + tl.arange(0, BR)
        m = m_t[:, None] & (o_r < ROW)[None, :]
        tl.store(p_out + o_r[None, :], tl.load(p_x + o_r[None, :], mask=m), mask=m)
