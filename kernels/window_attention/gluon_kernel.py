"""The Hopper kernel of window attention, in Gluon; importing this file imports triton.

One program holds a box of 128 queries. A producer warp fetches boxes of 128 keys by TMA, straight
from raster order: a 5-D tensor map reads a box of the grid from any corner, zeros beyond the grid.
Two warpgroups of 64 queries run QK(j) while PV(j - 1) is still under way, and the softmax of j in
its shadow. The schedule is that of block-sparse attention; docs/kernels.md has the reasons.

Boxes of the window come first, then the tokens outside the grid. A box that not every query of the
tile sees whole is masked between QK and softmax, by a branch that others do not take.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastdiff.kernels.hopper_kernel import LOWEST, NOTHING, exp2, left, row_sum, shift, take

# T, TH: where the bounds of height and width begin. H, W: sides. LT, LH, LW: last coordinates.
# TILES, PLANE, ROW: tiles of queries of a head, of a frame and of a row of tiles. BEFORE, END, S:
# tokens before the grid, up to its end, in all. N_BEFORE, N_TEXT: tiles of the keys before the
# grid, and of all outside it. The host computes them: what a kernel derives at its start spills.
SIZES = ["T", "TH", "H", "W", "LT", "LH", "LW", "TILES", "PLANE", "ROW", "BEFORE", "END", "S",
         "N_BEFORE", "N_TEXT", "GROUPS", "WORK"]


@gluon.jit
def _axis(low, high, base, first, most, QUERIES: gl.constexpr):
    """Of the tile that starts at `first`: the run of keys that any of its queries sees, and the run
    that all see. Bounds never fall, so first and last query decide."""
    last = gl.minimum(first + QUERIES - 1, most)
    begin = gl.load(low + base + first)
    end = gl.load(high + base + last)
    inner = gl.load(low + base + last)
    outer = gl.load(high + base + first)
    return begin, end, inner, outer


@gluon.jit
def _tile(
    w, sizes, low, high, QT: gl.constexpr, QH: gl.constexpr, QW: gl.constexpr, KT: gl.constexpr,
    KH: gl.constexpr, KW: gl.constexpr,
):
    """Of a work item: head, first query, the runs of keys on each axis, tiles of keys in the grid
    and in all. Heads outermost, K stays in L2."""
    grid, tiles, parts, GROUPS, WORK = sizes
    TILES, PLANE, ROW = tiles
    T, TH, H, W, LT, LH, LW = grid
    i_h = w // TILES
    i_tile = w % TILES
    q_t = i_tile // PLANE * QT
    q_h = i_tile % PLANE // ROW * QH
    q_w = i_tile % ROW * QW
    run_t = _axis(low, high, 0, q_t, LT, QT)
    run_h = _axis(low, high, T, q_h, LH, QH)
    run_w = _axis(low, high, TH, q_w, LW, QW)
    n_t = (run_t[1] - run_t[0] + KT - 1) // KT
    n_h = (run_h[1] - run_h[0] + KH - 1) // KH
    n_w = (run_w[1] - run_w[0] + KW - 1) // KW
    n_boxes = n_t * n_h * n_w
    return i_h, (q_t, q_h, q_w), (run_t, run_h, run_w), n_boxes, n_boxes + parts[4]


@gluon.jit
def _next(at, runs, KT: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr):
    """The corner of the next box of keys, width fastest."""
    s_t, s_h, s_w = at
    run_t, run_h, run_w = runs
    s_w += KW
    over = s_w >= run_w[1]
    s_w = gl.where(over, run_w[0], s_w)
    s_h = gl.where(over, s_h + KH, s_h)
    over = s_h >= run_h[1]
    s_h = gl.where(over, run_h[0], s_h)
    s_t = gl.where(over, s_t + KT, s_t)
    return s_t, s_h, s_w


@gluon.jit
def _text(i, sizes, BN: gl.constexpr):
    """Of tile `i` of the tokens outside the grid: the first token, and where its part ends."""
    grid, tiles, parts, GROUPS, WORK = sizes
    BEFORE, END, S, N_BEFORE, N_TEXT = parts
    first = gl.where(i < N_BEFORE, i * BN, END + (i - N_BEFORE) * BN)
    return first, gl.where(i < N_BEFORE, BEFORE, S)


@gluon.jit
def _fetch(
    grid_desc, text_desc, at, i, n_boxes, i_h, sizes, full, empty, smem, st, phase,
    BN: gl.constexpr,
):
    """One tile of keys or values into buffer `st`, once that is free."""
    mbarrier.wait(empty.index(st), phase)
    mbarrier.expect(full.index(st), grid_desc.block_type.nbytes)
    if i < n_boxes:
        s_t, s_h, s_w = at
        tma.async_copy_global_to_shared(
            grid_desc, [s_t, s_h, s_w, i_h, 0], full.index(st), smem.index(st))
    else:
        first, end = _text(i - n_boxes, sizes, BN)
        BD: gl.constexpr = grid_desc.block_type.shape[4]
        tma.async_copy_global_to_shared(
            text_desc, [0, 0, first, i_h, 0], full.index(st),
            smem.index(st).reshape([1, 1, BN, 1, BD]))


@gluon.jit
def _producer(
    descs, smem, bars, pointers, sizes, scale,
    QT: gl.constexpr, QH: gl.constexpr, QW: gl.constexpr,
    KT: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr,
    CT: gl.constexpr, CH: gl.constexpr, CW: gl.constexpr,
    BN: gl.constexpr, ST: gl.constexpr, QST: gl.constexpr, USE_MASK: gl.constexpr,
    POLYNOMIAL: gl.constexpr, WG: gl.constexpr,
):
    q_desc, k_desc, v_desc, o_desc, kt_desc, vt_desc = descs
    q_smem, k_smem, v_smem, box = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    low, high, key_mask, masked, taken = pointers
    grid, tiles, parts, GROUPS, WORK = sizes
    i_kv = 0
    i_work = 0
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    w = gl.program_id(0)
    while w < WORK:
        i_h, first, runs, n_boxes, n = _tile(w, sizes, low, high, QT, QH, QW, KT, KH, KW)
        q_t, q_h, q_w = first
        i_kh = i_h // GROUPS
        i_qst = i_work % QST
        mbarrier.wait(q_empty.index(i_qst), ((i_work // QST) & 1) ^ 1)
        box.index(i_qst).store(gl.full([1], w, gl.int32, one))
        mbarrier.expect(q_full.index(i_qst), q_desc.block_type.nbytes * 2)
        for c in gl.static_range(2):
            tma.async_copy_global_to_shared(
                q_desc, [q_t + c * CT, q_h + c * CH, q_w + c * CW, i_h, 0], q_full.index(i_qst),
                q_smem.index(i_qst * 2 + c))
        i_work += 1
        at = (runs[0][0], runs[1][0], runs[2][0])
        for j in range(0, n):
            st = i_kv % ST
            phase = ((i_kv // ST) & 1) ^ 1
            _fetch(k_desc, kt_desc, at, j, n_boxes, i_kh, sizes, k_full, k_empty, k_smem, st,
                   phase, BN)
            _fetch(v_desc, vt_desc, at, j, n_boxes, i_kh, sizes, v_full, v_empty, v_smem, st,
                   phase, BN)
            at = _next(at, runs, KT, KH, KW)
            i_kv += 1
        # whoever is done takes the next item: windows at borders differ in length
        w = take(taken, WORK)
    i_qst = i_work % QST
    mbarrier.wait(q_empty.index(i_qst), ((i_work // QST) & 1) ^ 1)
    box.index(i_qst).store(gl.full([1], WORK, gl.int32, one))
    mbarrier.arrive(q_full.index(i_qst), count=1)


@gluon.jit
def _cost(start, low, high, KEYS: gl.constexpr):
    """[64, KEYS]: 0 where a row sees the coordinate, LOWEST elsewhere."""
    at = start + gl.arange(0, KEYS, layout=gl.SliceLayout(0, low.type.layout.parent))
    seen = (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])
    return gl.where(seen, 0.0, LOWEST)


@gluon.jit
def _raise(s, cost, KT: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr, sl: gl.constexpr):
    """Scores [64, BN] with the cost of one axis of their box added, broadcast over the others."""
    BN: gl.constexpr = s.shape[1]
    s = s.reshape([64, KT, KH, KW]) + cost
    return gl.convert_layout(s.reshape([64, BN]), sl, assert_trivial=True)


@gluon.jit
def _row_bounds(
    low, high, base, first, most, INNER: gl.constexpr, SIDE: gl.constexpr,
    OFFSET: gl.constexpr, layout: gl.constexpr,
):
    """First key and end of every row of a warpgroup on one axis; rows beyond it repeat the last."""
    row = gl.arange(0, 64, layout=layout)
    at = gl.minimum(first + OFFSET + row // INNER % SIDE, most)
    return gl.load(low + base + at), gl.load(high + base + at)


@gluon.jit
def _mask_keys(
    s, token, key_mask, sl: gl.constexpr,
):
    counts = gl.load(key_mask + token) != 0
    return gl.where(counts[None, :], s, LOWEST)


@gluon.jit
def _adjust(
    s, j, n_boxes, at, runs, rows, sizes, key_mask, masked,
    KT: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr, BN: gl.constexpr,
    USE_MASK: gl.constexpr, sl: gl.constexpr,
):
    """LOWEST for keys that a row does not see."""
    grid, tiles, parts, GROUPS, WORK = sizes
    T, TH, H, W, LT, LH, LW = grid
    BEFORE, END, S, N_BEFORE, N_TEXT = parts
    col = gl.arange(0, BN, layout=gl.SliceLayout(0, sl))
    if j < n_boxes:
        s_t, s_h, s_w = at
        run_t, run_h, run_w = runs
        low_t, high_t, low_h, high_h, low_w, high_w = rows
        # an axis on its own: a thread then looks at a few coordinates, not at every pair
        if (s_t < run_t[2]) | (s_t + KT > run_t[3]):
            cost = _cost(s_t, low_t, high_t, KT).expand_dims(2).expand_dims(3)
            s = _raise(s, cost, KT, KH, KW, sl)
        if (s_h < run_h[2]) | (s_h + KH > run_h[3]):
            cost = _cost(s_h, low_h, high_h, KH).expand_dims(1).expand_dims(3)
            s = _raise(s, cost, KT, KH, KW, sl)
        if (s_w < run_w[2]) | (s_w + KW > run_w[3]):
            cost = _cost(s_w, low_w, high_w, KW).expand_dims(1).expand_dims(2)
            s = _raise(s, cost, KT, KH, KW, sl)
        # the outer branch is taken when compiling
        if USE_MASK:  # noqa: SIM102
            if masked != 0:
                c_t = gl.minimum(s_t + col // (KH * KW), LT)
                c_h = gl.minimum(s_h + col // KW % KH, LH)
                c_w = gl.minimum(s_w + col % KW, LW)
                s = _mask_keys(s, BEFORE + (c_t * H + c_h) * W + c_w, key_mask, sl)
    else:
        first, end = _text(j - n_boxes, sizes, BN)
        if first + BN > end:
            s = gl.where((first + col < end)[None, :], s, LOWEST)
        if USE_MASK:
            s = _mask_keys(s, gl.minimum(first + col, S - 1), key_mask, sl)
    return s


@gluon.jit
def _consumer(
    descs, smem, bars, pointers, sizes, scale,
    QT: gl.constexpr, QH: gl.constexpr, QW: gl.constexpr,
    KT: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr,
    CT: gl.constexpr, CH: gl.constexpr, CW: gl.constexpr,
    BN: gl.constexpr, ST: gl.constexpr, QST: gl.constexpr, USE_MASK: gl.constexpr,
    POLYNOMIAL: gl.constexpr, WG: gl.constexpr,
):
    q_desc, k_desc, v_desc, o_desc, kt_desc, vt_desc = descs
    q_smem, k_smem, v_smem, box = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    low, high, key_mask, masked_p, taken = pointers
    grid, tiles, parts, GROUPS, WORK = sizes
    T, TH, H, W, LT, LH, LW = grid
    BD: gl.constexpr = q_desc.block_type.shape[4]
    # sides of the box of this warpgroup's 64 queries
    RT: gl.constexpr = q_desc.block_type.shape[0]
    RH: gl.constexpr = q_desc.block_type.shape[1]
    RW: gl.constexpr = q_desc.block_type.shape[2]
    dtype: gl.constexpr = q_desc.dtype
    sl: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    ol: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BD, 16])
    pl: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ol, k_width=2)
    row_o: gl.constexpr = gl.SliceLayout(1, ol)
    zero = gl.zeros([64, BN], gl.float32, sl)
    # the scores as [row, frame, height, width] of a box of keys, and the rows of each axis' mask
    box_layout: gl.constexpr = zero.reshape([64, KT, KH, KW]).type.layout
    rows_t: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, box_layout)))
    rows_h: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, gl.SliceLayout(3, box_layout)))
    rows_w: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, gl.SliceLayout(2, box_layout)))
    masked = 0
    if USE_MASK:
        masked = gl.load(masked_p)
    i_kv = 0
    i_work = 0
    mbarrier.wait(q_full.index(0), 0)
    w = left(box.index(0))
    while w < WORK:
        i_h, q_first, runs, n_boxes, n = _tile(w, sizes, low, high, QT, QH, QW, KT, KH, KW)
        q_t, q_h, q_w = q_first
        low_t, high_t = _row_bounds(
            low, high, 0, q_t, LT, RH * RW, RT, WG * CT, rows_t)
        low_h, high_h = _row_bounds(
            low, high, T, q_h, LH, RW, RH, WG * CH, rows_h)
        low_w, high_w = _row_bounds(
            low, high, TH, q_w, LW, 1, RW, WG * CW, rows_w)
        rows = (low_t, high_t, low_h, high_h, low_w, high_w)
        at = (runs[0][0], runs[1][0], runs[2][0])
        i_qst = i_work % QST
        q_tile = q_smem.index(i_qst * 2 + WG)
        q = q_tile.reshape([64, BD])
        i_work += 1

        # the first tile: no PV to overlap with
        st = i_kv % ST
        phase = (i_kv // ST) & 1
        mbarrier.wait(k_full.index(st), phase)
        k = k_smem.index(st).reshape([BN, BD]).permute((1, 0))
        s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_empty.index(st), count=1)
        s = _adjust(s, 0, n_boxes, at, runs, rows, sizes, key_mask, masked, KT, KH, KW, BN,
                    USE_MASK, sl)
        m = gl.max(s, 1) * scale
        p = exp2(s * scale - shift(m, True)[:, None], POLYNOMIAL)
        sums = row_sum(p, BN)
        p16 = gl.convert_layout(p.to(dtype), pl)
        o = gl.zeros([64, BD], gl.float32, ol)
        i_kv += 1
        mbarrier.wait(k_full.index(i_kv % ST), (i_kv // ST) & 1, pred=n > 1)
        for j in range(1, n):
            before, before_phase = st, phase
            st = i_kv % ST
            phase = (i_kv // ST) & 1
            at = _next(at, runs, KT, KH, KW)
            k = k_smem.index(st).reshape([BN, BD]).permute((1, 0))
            s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), before_phase)
            o = warpgroup_mma(p16, v_smem.index(before).reshape([BN, BD]), o, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            mbarrier.arrive(k_empty.index(st), count=1)
            s = _adjust(s, j, n_boxes, at, runs, rows, sizes, key_mask, masked, KT, KH, KW, BN,
                        USE_MASK, sl)
            m_new = gl.maximum(m, gl.max(s, 1) * scale)
            base = shift(m_new, True)
            alpha = gl.exp2(m - base)
            p = exp2(s * scale - base[:, None], POLYNOMIAL)
            alpha_l = gl.convert_layout(alpha, gl.SliceLayout(1, sums.type.layout))
            sums = sums * alpha_l[:, None] + row_sum(p, BN)
            m = m_new
            i_kv += 1
            # this wait for the next K keeps the assembler from lifting the PV wait over the softmax
            mbarrier.wait(k_full.index(i_kv % ST), (i_kv // ST) & 1, pred=j + 1 < n)
            o, p16 = warpgroup_mma_wait(0, deps=(o, p16))
            mbarrier.arrive(v_empty.index(before), count=1)
            o = o * gl.convert_layout(alpha, row_o)[:, None]
            p16 = gl.convert_layout(p.to(dtype), pl)
        mbarrier.wait(v_full.index(st), phase)
        o = warpgroup_mma(p16, v_smem.index(st).reshape([BN, BD]), o, is_async=True)
        o, p16 = warpgroup_mma_wait(0, deps=(o, p16))
        mbarrier.arrive(v_empty.index(st), count=1)

        # a row that saw no key: zeros
        seen = gl.convert_layout(m, row_o) > NOTHING
        total = gl.convert_layout(gl.sum(sums, 1), row_o)
        o = o * gl.where(seen, 1.0 / gl.where(seen, total, 1.0), 0.0)[:, None]
        # through this warpgroup's own Q tile, which nobody reads any more, in one bulk store; what
        # lies beyond the grid is cut off
        q.store(o.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(
            o_desc, [q_t + WG * CT, q_h + WG * CH, q_w + WG * CW, i_h, 0], q_tile)
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(i_qst), count=1)
        mbarrier.wait(q_full.index(i_work % QST), (i_work // QST) & 1)
        w = left(box.index(i_work % QST))


@gluon.jit(do_not_specialize=SIZES)
def window_attention_hopper_kernel(
    q_desc, k_desc, v_desc, o_desc, kt_desc, vt_desc, low, high, key_mask, masked, taken,
    T, TH, H, W, LT, LH, LW, TILES, PLANE, ROW, BEFORE, END, S, N_BEFORE, N_TEXT, GROUPS, WORK,
    scale,
    QT: gl.constexpr, QH: gl.constexpr, QW: gl.constexpr,
    KT: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr,
    CT: gl.constexpr, CH: gl.constexpr, CW: gl.constexpr,
    BN: gl.constexpr, ST: gl.constexpr, QST: gl.constexpr, USE_MASK: gl.constexpr,
    POLYNOMIAL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):
    """Q and C: sides of the box of all queries, and where the second warpgroup's half of it starts.
    K: sides of a box of keys."""
    q_smem = gl.allocate_shared_memory(
        q_desc.dtype, [2 * QST] + q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [ST] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [ST] + v_desc.block_type.shape, v_desc.layout)
    box = gl.allocate_shared_memory(gl.int32, [QST, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [QST, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [QST, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [ST, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [ST, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [ST, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [ST, 1], bar)
    for i in gl.static_range(QST):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(ST):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    # the argument tuples stand inline: bound to a name, their constexprs would become tensors
    gl.warp_specialize([
        (_consumer, ((q_desc, k_desc, v_desc, o_desc, kt_desc, vt_desc),
                     (q_smem, k_smem, v_smem, box),
                     (q_full, q_empty, k_full, k_empty, v_full, v_empty),
                     (low, high, key_mask, masked, taken),
                     ((T, TH, H, W, LT, LH, LW), (TILES, PLANE, ROW),
                      (BEFORE, END, S, N_BEFORE, N_TEXT), GROUPS, WORK), scale,
                     QT, QH, QW, KT, KH, KW, CT, CH, CW, BN, ST, QST, USE_MASK, POLYNOMIAL, 0)),
        (_consumer, ((q_desc, k_desc, v_desc, o_desc, kt_desc, vt_desc),
                     (q_smem, k_smem, v_smem, box),
                     (q_full, q_empty, k_full, k_empty, v_full, v_empty),
                     (low, high, key_mask, masked, taken),
                     ((T, TH, H, W, LT, LH, LW), (TILES, PLANE, ROW),
                      (BEFORE, END, S, N_BEFORE, N_TEXT), GROUPS, WORK), scale,
                     QT, QH, QW, KT, KH, KW, CT, CH, CW, BN, ST, QST, USE_MASK, POLYNOMIAL, 1)),
        (_producer, ((q_desc, k_desc, v_desc, o_desc, kt_desc, vt_desc),
                     (q_smem, k_smem, v_smem, box),
                     (q_full, q_empty, k_full, k_empty, v_full, v_empty),
                     (low, high, key_mask, masked, taken),
                     ((T, TH, H, W, LT, LH, LW), (TILES, PLANE, ROW),
                      (BEFORE, END, S, N_BEFORE, N_TEXT), GROUPS, WORK), scale,
                     QT, QH, QW, KT, KH, KW, CT, CH, CW, BN, ST, QST, USE_MASK, POLYNOMIAL, 0)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])
