"""The Triton kernels of tile selection; importing this file imports triton."""

import triton
import triton.language as tl

from fastdiff.kernels.dot_kernel import dot


@triton.jit
def step_of_z(x, mean, rsqrt, BINS: tl.constexpr, REACH: tl.constexpr):
    z = (x - mean) * rsqrt
    step = tl.floor((z + REACH) * (BINS / (2 * REACH)))
    return tl.minimum(tl.maximum(step, 0.0), BINS - 1.0).to(tl.int32)


@triton.jit
def probe_scores(b_q, p_k, offsets, i_n, N, o_d, scale, skn, D: tl.constexpr, BN: tl.constexpr,
                 UPCAST: tl.constexpr):
    """Scores of the probes against BN mean keys, base 2, raised by the log of the tile length."""
    o_n = i_n + tl.arange(0, BN)
    m_n = o_n < N
    length = (tl.load(offsets + o_n + 1, mask=m_n, other=0)
              - tl.load(offsets + o_n, mask=m_n, other=0)).to(tl.float32)
    b_k = tl.load(p_k + o_n.to(tl.int64)[:, None] * skn + o_d[None, :],
                  mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
    raised = tl.where(length > 0, tl.log2(tl.maximum(length, 1.0)), -float("inf"))
    return dot(b_q, tl.trans(b_k), UPCAST) * scale + raised[None, :], o_n, m_n, length


@triton.jit(do_not_specialize=["S", "H", "GROUPS", "N"])
def tile_score_kernel(
    query, key_mean, offsets, always, dense_rows, x, stats, histogram,
    sqb, sqs, sqh, skb, skh, skn, S, H, GROUPS, N, scale,
    D: tl.constexpr, BD: tl.constexpr, PROBES: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr, BINS: tl.constexpr, REACH: tl.constexpr, EACH_ROW: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """ROWS tiles of queries, each by PROBES of its queries."""
    i_bh = tl.program_id(1)
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    o_d = tl.arange(0, BD)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < N
    o_p = tl.arange(0, ROWS * PROBES)
    i_tile = tl.program_id(0) * ROWS + o_p // PROBES
    m_p = i_tile < N
    start = tl.load(offsets + i_tile, mask=m_p, other=0)
    last = tl.load(offsets + i_tile + 1, mask=m_p, other=1) - start - 1
    if PROBES > 1:
        token = start + last * (o_p % PROBES) // (PROBES - 1)
    else:
        token = start + last // 2
    b_q = tl.load(query + i_b * sqb + i_h * sqh + token.to(tl.int64)[:, None] * sqs + o_d[None, :],
                  mask=m_p[:, None] & (o_d < D)[None, :], other=0.0)
    p_k = key_mean + i_b * skb + (i_h // GROUPS) * skh

    # the softmax of every probe
    b_m = tl.full([ROWS * PROBES], -float("inf"), tl.float32)
    b_l = tl.zeros([ROWS * PROBES], tl.float32)
    for i_n in range(0, N, BN):
        b_s, o_n, m_n, length = probe_scores(b_q, p_k, offsets, i_n, N, o_d, scale, skn, D, BN,
                                             UPCAST)
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_l = b_l * tl.exp2(b_m - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), 1)
        b_m = b_new

    # log of the mean over the probes; sums over the row for its mean and deviation
    b_shift = b_m + tl.log2(b_l * PROBES)
    p_x = x + (i_bh.to(tl.int64) * N + o_row[:, None]) * N
    b_w = tl.zeros([], tl.float32)
    b_1 = tl.zeros([ROWS], tl.float32)
    b_2 = tl.zeros([ROWS], tl.float32)
    for i_n in range(0, N, BN):
        b_s, o_n, m_n, length = probe_scores(b_q, p_k, offsets, i_n, N, o_d, scale, skn, D, BN,
                                             UPCAST)
        b_p = tl.exp2(b_s - b_shift[:, None])
        mass = tl.sum(tl.reshape(b_p, [ROWS, PROBES, BN]), 1)
        b_x = tl.log(tl.maximum(mass * (S / tl.maximum(length, 1.0))[None, :], 1e-20))
        free = tl.load(always + o_n, mask=m_n, other=1) == 0
        weight = tl.where(free, length, 0.0)
        b_w += tl.sum(weight, 0)
        b_1 += tl.sum(b_x * weight[None, :], 1)
        b_2 += tl.sum(b_x * b_x * weight[None, :], 1)
        tl.store(p_x + o_n[None, :], b_x, mask=m_row[:, None] & m_n[None, :])
    b_w = tl.maximum(b_w, 1.0)
    mean = b_1 / b_w
    rsqrt = 1.0 / tl.sqrt(tl.maximum(b_2 / b_w - mean * mean, 1e-12))
    p_stats = stats + (i_bh.to(tl.int64) * N + o_row) * 2
    tl.store(p_stats, mean, mask=m_row)
    tl.store(p_stats + 1, rsqrt, mask=m_row)

    if not EACH_ROW:
        # how many entries of this program fall into each step of z; a whole program waits for its x
        tl.debug_barrier()
        dense = tl.load(dense_rows + o_row, mask=m_row, other=1) != 0
        counted = tl.zeros([BINS], tl.int32)
        for i_n in range(0, N, BC):
            o_n = i_n + tl.arange(0, BC)
            m_n = o_n < N
            b_x = tl.load(p_x + o_n[None, :], mask=m_row[:, None] & m_n[None, :], other=0.0)
            step = step_of_z(b_x, mean[:, None], rsqrt[:, None], BINS, REACH)
            free = (tl.load(always + o_n, mask=m_n, other=1) == 0)[None, :] & ~dense[:, None]
            free = free & (o_n[None, :] != o_row[:, None]) & m_row[:, None]
            # what is not free goes to step 0 and is taken off again: older Tritons have no mask
            step = tl.where(free, step, 0)
            taken = tl.sum(tl.sum((~free).to(tl.int32), 1), 0)
            counted += tl.histogram(tl.reshape(step, [ROWS * BC]), BINS)
            counted -= tl.where(tl.arange(0, BINS) == 0, taken, 0)
        o_bin = tl.arange(0, BINS)
        tl.atomic_add(histogram + i_b * BINS + o_bin, counted, mask=counted > 0)


@triton.jit
def free_steps(
    p_x, always, i_n, N, i_q, dense, mean, rsqrt, BN: tl.constexpr, BINS: tl.constexpr,
    REACH: tl.constexpr,
):
    """Steps of z of BN entries of a row, -1 for those that are kept anyway."""
    o_n = i_n + tl.arange(0, BN)
    m_n = o_n < N
    b_x = tl.load(p_x + o_n, mask=m_n, other=0.0)
    free = (tl.load(always + o_n, mask=m_n, other=1) == 0) & (o_n != i_q) & ~dense
    return tl.where(free, step_of_z(b_x, mean, rsqrt, BINS, REACH), -1)


@triton.jit
def steps_from(
    b_step, least, p_x, always, N, i_q, dense, mean, rsqrt, BN: tl.constexpr, BINS: tl.constexpr,
    REACH: tl.constexpr, SINGLE: tl.constexpr,
):
    """How many free entries of a row have a step of at least `least`. b_step: the first BN."""
    n = tl.sum((b_step >= least).to(tl.int32), 0)
    if not SINGLE:
        for i_n in range(BN, N, BN):
            b_next = free_steps(p_x, always, i_n, N, i_q, dense, mean, rsqrt, BN, BINS, REACH)
            n += tl.sum((b_next >= least).to(tl.int32), 0)
    return n.to(tl.float32)


@triton.jit(do_not_specialize=["H", "N"])
def tile_list_kernel(
    x, stats, histogram, offsets, always, dense_rows, keep, indices, counts, pairs, H, N, density,
    BN: tl.constexpr, BINS: tl.constexpr, REACH: tl.constexpr, EACH_ROW: tl.constexpr,
    SINGLE: tl.constexpr, TURNS: tl.constexpr,
):
    """One row of the map: what it keeps, as bytes and as a list."""
    i_q = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b = i_bh // H
    i_row = i_bh.to(tl.int64) * N + i_q
    mean = tl.load(stats + i_row * 2)
    rsqrt = tl.load(stats + i_row * 2 + 1)
    dense = tl.load(dense_rows + i_q) != 0
    own = tl.load(offsets + i_q + 1) - tl.load(offsets + i_q)
    p_x = x + i_row * N
    if EACH_ROW:
        # bit by bit: a row is short and at hand, a histogram of it is not
        b_step = free_steps(p_x, always, 0, N, i_q, dense, mean, rsqrt, BN, BINS, REACH)
        room = tl.floor(density * N + 0.5) - N
        room += steps_from(b_step, 0, p_x, always, N, i_q, dense, mean, rsqrt, BN, BINS, REACH,
                           SINGLE)
        first = tl.zeros([], tl.int32)
        bit = tl.full([], BINS // 2, tl.int32)
        for _ in range(TURNS):
            above = steps_from(b_step, first + bit - 1, p_x, always, N, i_q, dense, mean, rsqrt,
                               BN, BINS, REACH, SINGLE)
            first += tl.where(above > room, bit, 0)
            bit = tl.maximum(bit >> 1, 1)
        # what the row still has room for, out of the step that does not fit whole
        left = room - steps_from(b_step, first, p_x, always, N, i_q, dense, mean, rsqrt, BN, BINS,
                                 REACH, SINGLE)
    else:
        counted = tl.load(histogram + i_b * BINS + tl.arange(0, BINS)).to(tl.float32)
        above = tl.cumsum(counted, 0, reverse=True)
        entries = H.to(tl.float32) * N * N
        room = density * entries - (entries - tl.sum(counted, 0))
        first = tl.sum((above > room).to(tl.int32), 0)
        left = 0.0
    n_left = tl.zeros([], tl.int32)

    n_kept = tl.zeros([], tl.int32)
    n_keys = tl.zeros([], tl.int32)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < N
        b_x = tl.load(p_x + o_n, mask=m_n, other=0.0)
        step = step_of_z(b_x, mean, rsqrt, BINS, REACH)
        must = (tl.load(always + o_n, mask=m_n, other=0) != 0) | dense | (o_n == i_q)
        kept = (step >= first) | must
        if EACH_ROW:
            edge = (step == first - 1) & ~must & m_n
            rank = n_left + tl.cumsum(edge.to(tl.int32), 0)
            kept = kept | (edge & (rank <= left))
            n_left += tl.sum(edge.to(tl.int32), 0)
        kept = kept & m_n
        place = n_kept + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(keep + i_row * N + o_n, kept.to(tl.uint8), mask=m_n)
        tl.store(indices + i_row * N + place, o_n, mask=kept)
        length = (tl.load(offsets + o_n + 1, mask=kept, other=0)
                  - tl.load(offsets + o_n, mask=kept, other=0))
        n_kept += tl.sum(kept.to(tl.int32), 0)
        n_keys += tl.sum(length, 0)
    tl.store(counts + i_row, n_kept)
    tl.atomic_add(pairs, n_keys.to(tl.int64) * own)
