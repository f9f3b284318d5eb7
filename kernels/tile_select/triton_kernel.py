"""The Triton kernels of tile selection; importing this file imports triton."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastdiff.kernels.dot_kernel import dot


@triton.jit
def step_of_z(x, mean, rsqrt, BINS: tl.constexpr, REACH: tl.constexpr):
    z = (x - mean) * rsqrt
    step = tl.floor((z + REACH) * (BINS / (2 * REACH)))
    return tl.minimum(tl.maximum(step, 0.0), BINS - 1.0).to(tl.int32)


@triton.jit
def probe_scores(b_q, p_k, i_n, N, o_d, scale, skn, D: tl.constexpr, BD: tl.constexpr,
                 BN: tl.constexpr, UPCAST: tl.constexpr):
    """Scores of the probes against BN mean keys, base 2."""
    o_n = i_n + tl.arange(0, BN)
    m_n = o_n < N
    m_nd = m_n[:, None]
    if D != BD:
        m_nd = m_nd & (o_d < D)[None, :]
    b_k = tl.load(p_k + o_n.to(tl.int64)[:, None] * skn + o_d[None, :], mask=m_nd, other=0.0)
    b_s = dot(b_q, tl.trans(b_k), UPCAST) * scale
    return tl.where(m_n[None, :], b_s, -float("inf")), o_n, m_n


@triton.jit
def log_mass(b_mass, S, FAST: tl.constexpr):
    """Log of a mean probability, relative to attention spread evenly over all tokens. FAST: by the
    special function unit, in a fifth of the instructions."""
    b_mass = tl.maximum(b_mass * S, 1e-20)
    if FAST:
        return libdevice.fast_logf(b_mass)
    else:
        return tl.log(b_mass)


@triton.jit
def moments(b_w, b_1, b_2):
    """Mean, and one over the deviation, of sums of weight, x and x squared."""
    b_w = tl.maximum(b_w, 1.0)
    mean = b_1 / b_w
    return mean, 1.0 / tl.sqrt(tl.maximum(b_2 / b_w - mean * mean, 1e-12))


@triton.jit
def free_weight(offsets, always, o_n, m_n):
    """Tokens of each tile that a row may leave, 0 for tiles in `always`."""
    length = (tl.load(offsets + o_n + 1, mask=m_n, other=0)
              - tl.load(offsets + o_n, mask=m_n, other=0)).to(tl.float32)
    return tl.where(tl.load(always + o_n, mask=m_n, other=1) == 0, length, 0.0)


@triton.jit(do_not_specialize=["S", "H", "GROUPS", "N"])
def tile_score_kernel(
    query, key_mean, offsets, always, dense_rows, x, stats, histogram, pairs,
    sqb, sqs, sqh, skb, skh, skn, S, H, GROUPS, N, scale,
    D: tl.constexpr, BD: tl.constexpr, PROBES: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr, BINS: tl.constexpr, REACH: tl.constexpr, EACH_ROW: tl.constexpr,
    UPCAST: tl.constexpr, FAST: tl.constexpr,
):
    """ROWS tiles of queries, each by PROBES of its queries: the mean probability of a token of each
    tile of keys. Its log would be taken by every lane that shares a row here, so others take it.

    Counted as many times as its tile has tokens, a mean key has exp2(score) for each of them: the
    length matters for the sum alone.
    """
    # of 16 rows, two share a thread: probes lie there and in neighbouring lanes, to be added
    PAIR: tl.constexpr = 2 if PROBES > 1 else 1
    LANES: tl.constexpr = PROBES // PAIR
    TILES: tl.constexpr = 8 // LANES
    i_bh = tl.program_id(1)
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    # for the next launch; a fill would be one of its own. The outer condition is the compiler's
    if EACH_ROW:  # noqa: SIM102
        if tl.program_id(0) + i_bh == 0:
            tl.store(pairs, 0)
    o_d = tl.arange(0, BD)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < N
    o_p = tl.arange(0, ROWS * PROBES)
    if PAIR == 2:
        i_tile = o_p // 16 * TILES + o_p % 8 // LANES
        i_probe = o_p % 16 // 8 * LANES + o_p % LANES
    else:
        i_tile = o_p
        i_probe = o_p * 0
    i_tile += tl.program_id(0) * ROWS
    m_p = i_tile < N
    start = tl.load(offsets + i_tile, mask=m_p, other=0)
    last = tl.load(offsets + i_tile + 1, mask=m_p, other=1) - start - 1
    if PROBES > 1:
        token = start + last * i_probe // (PROBES - 1)
    else:
        token = start + last // 2
    b_q = tl.load(query + i_b * sqb + i_h * sqh + token.to(tl.int64)[:, None] * sqs + o_d[None, :],
                  mask=m_p[:, None] & (o_d < D)[None, :], other=0.0)
    p_k = key_mean + i_b * skb + (i_h // GROUPS) * skh

    # the softmax of every probe
    b_m = tl.full([ROWS * PROBES], -float("inf"), tl.float32)
    b_l = tl.zeros([ROWS * PROBES], tl.float32)
    for i_n in range(0, N, BN):
        b_s, o_n, m_n = probe_scores(b_q, p_k, i_n, N, o_d, scale, skn, D, BD, BN, UPCAST)
        length = (tl.load(offsets + o_n + 1, mask=m_n, other=0)
                  - tl.load(offsets + o_n, mask=m_n, other=0)).to(tl.float32)
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None]) * length[None, :]
        b_l = b_l * tl.exp2(b_m - b_new) + tl.sum(b_p, 1)
        b_m = b_new

    b_shift = b_m + tl.log2(b_l * PROBES)
    p_x = x + (i_bh.to(tl.int64) * N + o_row[:, None]) * N
    for i_n in range(0, N, BN):
        b_s, o_n, m_n = probe_scores(b_q, p_k, i_n, N, o_d, scale, skn, D, BD, BN, UPCAST)
        b_p = tl.exp2(b_s - b_shift[:, None])
        if PAIR == 2:
            b_p = tl.sum(tl.reshape(b_p, [ROWS // TILES, 2, TILES, LANES, BN]), 1)
            b_p = tl.reshape(tl.sum(b_p, 2), [ROWS, BN])
        tl.store(p_x + o_n[None, :], b_p, mask=m_row[:, None] & m_n[None, :])

    if not EACH_ROW:
        # moments of the rows, then how many of their entries fall into each step of z; a whole
        # program waits for its x
        tl.debug_barrier()
        b_w = tl.zeros([], tl.float32)
        b_1 = tl.zeros([ROWS], tl.float32)
        b_2 = tl.zeros([ROWS], tl.float32)
        for i_n in range(0, N, BC):
            o_n = i_n + tl.arange(0, BC)
            m_n = o_n < N
            weight = free_weight(offsets, always, o_n, m_n)
            b_x = log_mass(tl.load(p_x + o_n[None, :], mask=m_row[:, None] & m_n[None, :],
                                   other=0.0), S, FAST)
            b_w += tl.sum(weight, 0)
            b_1 += tl.sum(b_x * weight[None, :], 1)
            b_2 += tl.sum(b_x * b_x * weight[None, :], 1)
        mean, rsqrt = moments(b_w, b_1, b_2)
        p_stats = stats + (i_bh.to(tl.int64) * N + o_row) * 2
        tl.store(p_stats, mean, mask=m_row)
        tl.store(p_stats + 1, rsqrt, mask=m_row)
        dense = tl.load(dense_rows + o_row, mask=m_row, other=1) != 0
        counted = tl.zeros([BINS], tl.int32)
        for i_n in range(0, N, BC):
            o_n = i_n + tl.arange(0, BC)
            m_n = o_n < N
            b_x = log_mass(tl.load(p_x + o_n[None, :], mask=m_row[:, None] & m_n[None, :],
                                   other=0.0), S, FAST)
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
def row_logs(p_x, i_n, N, S, BN: tl.constexpr, FAST: tl.constexpr):
    """x of BN entries of a row."""
    o_n = i_n + tl.arange(0, BN)
    return log_mass(tl.load(p_x + o_n, mask=o_n < N, other=0.0), S, FAST)


@triton.jit
def row_moments(b_x, p_x, offsets, always, N, S, BN: tl.constexpr, SINGLE: tl.constexpr,
                FAST: tl.constexpr):
    """Mean and one over the deviation of a row. b_x: its first BN entries."""
    o_n = tl.arange(0, BN)
    b_w = free_weight(offsets, always, o_n, o_n < N)
    b_1 = b_w * b_x
    b_2 = b_1 * b_x
    if not SINGLE:
        for i_n in range(BN, N, BN):
            weight = free_weight(offsets, always, i_n + o_n, i_n + o_n < N)
            b_next = row_logs(p_x, i_n, N, S, BN, FAST)
            b_w += weight
            b_1 += weight * b_next
            b_2 += weight * b_next * b_next
    return moments(tl.sum(b_w, 0), tl.sum(b_1, 0), tl.sum(b_2, 0))


@triton.jit
def free_steps(
    b_x, always, i_n, N, i_q, dense, mean, rsqrt, BN: tl.constexpr, BINS: tl.constexpr,
    REACH: tl.constexpr,
):
    """Steps of z of BN entries of a row, -1 for those that are kept anyway."""
    o_n = i_n + tl.arange(0, BN)
    free = (tl.load(always + o_n, mask=o_n < N, other=1) == 0) & (o_n != i_q) & ~dense
    return tl.where(free, step_of_z(b_x, mean, rsqrt, BINS, REACH), -1)


@triton.jit
def steps_from(
    b_step, least, p_x, always, N, S, i_q, dense, mean, rsqrt, BN: tl.constexpr,
    BINS: tl.constexpr, REACH: tl.constexpr, SINGLE: tl.constexpr, FAST: tl.constexpr,
):
    """How many free entries of a row have a step of at least `least`. b_step: the first BN."""
    n = tl.sum((b_step >= least).to(tl.int32), 0)
    if not SINGLE:
        for i_n in range(BN, N, BN):
            b_next = row_logs(p_x, i_n, N, S, BN, FAST)
            b_next = free_steps(b_next, always, i_n, N, i_q, dense, mean, rsqrt, BN, BINS, REACH)
            n += tl.sum((b_next >= least).to(tl.int32), 0)
    return n.to(tl.float32)


@triton.jit(do_not_specialize=["S", "H", "N"])
def tile_list_kernel(
    x, stats, histogram, offsets, always, dense_rows, keep, indices, counts, pairs, S, H, N,
    density, BN: tl.constexpr, BINS: tl.constexpr, REACH: tl.constexpr, EACH_ROW: tl.constexpr,
    SINGLE: tl.constexpr, TURNS: tl.constexpr, FAST: tl.constexpr,
):
    """One row of the map: what it keeps, as bytes and as a list."""
    i_q = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b = i_bh // H
    i_row = i_bh.to(tl.int64) * N + i_q
    dense = tl.load(dense_rows + i_q) != 0
    own = tl.load(offsets + i_q + 1) - tl.load(offsets + i_q)
    p_x = x + i_row * N
    b_first = row_logs(p_x, 0, N, S, BN, FAST)
    if EACH_ROW:
        mean, rsqrt = row_moments(b_first, p_x, offsets, always, N, S, BN, SINGLE,
                                  FAST)
        # bit by bit: a row is short and at hand, a histogram of it is not
        b_step = free_steps(b_first, always, 0, N, i_q, dense, mean, rsqrt, BN, BINS, REACH)
        room = tl.floor(density * N + 0.5) - N
        room += steps_from(b_step, 0, p_x, always, N, S, i_q, dense, mean, rsqrt, BN, BINS, REACH,
                           SINGLE, FAST)
        first = tl.zeros([], tl.int32)
        bit = tl.full([], BINS // 2, tl.int32)
        for _ in range(TURNS):
            above = steps_from(b_step, first + bit - 1, p_x, always, N, S, i_q, dense, mean, rsqrt,
                               BN, BINS, REACH, SINGLE, FAST)
            first += tl.where(above > room, bit, 0)
            bit = tl.maximum(bit >> 1, 1)
        # what the row still has room for, out of the step that does not fit whole
        left = room - steps_from(b_step, first, p_x, always, N, S, i_q, dense, mean, rsqrt, BN,
                                 BINS, REACH, SINGLE, FAST)
    else:
        # those that the histogram was made with
        mean = tl.load(stats + i_row * 2)
        rsqrt = tl.load(stats + i_row * 2 + 1)
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
        b_x = b_first
        if not SINGLE:
            b_x = row_logs(p_x, i_n, N, S, BN, FAST)
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
