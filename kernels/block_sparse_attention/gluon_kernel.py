"""The Hopper kernel of block-sparse attention, in Gluon; importing this file imports triton.

One program holds a query tile of NC x 64 rows. A producer warp fetches tiles of K and V by TMA, NC
consumer warpgroups of 64 rows each run QK(j) on the tensor cores while PV(j - 1) is still under
way, and the softmax of j in its shadow. Barriers come in pairs (full, empty) for each buffer.

A key tile of BN rows is gathered from R = BN / SUB list entries. With USE_TAIL the tiles of pooled
keys come first, then the listed blocks, in one softmax.
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

SIZES = ["sob", "sos", "soh", "SQ", "SKV", "H", "GROUPS", "NQ", "NK", "M", "WORK", "TAIL_TILES"]
# why a tile of keys is masked: blocks that end within it, or keys that count for nobody
SHORT = gl.constexpr(1)
DIRTY = gl.constexpr(2)


@gluon.jit
def _place(w, NQ, H):
    """Row of the lists -> (batch, head, query block); heads outermost, K stays in L2."""
    i_bh = w // NQ
    return i_bh // H, i_bh % H, w % NQ


@gluon.jit
def _exact_tiles(n_kept, R: gl.constexpr, USE_TAIL: gl.constexpr):
    # without a tail a row of no keys still walks one tile, of which every column is masked
    n = (n_kept + R - 1) // R
    if not USE_TAIL:
        n = gl.maximum(n, 1)
    return n


@gluon.jit
def _query_start(i_q, q_offsets, BM: gl.constexpr, EQUAL_Q: gl.constexpr):
    if EQUAL_Q:
        return i_q * BM
    else:
        return gl.load(q_offsets + i_q)


@gluon.jit
def _entries(
    p_list, j, n_kept, k_offsets, dirty, SKV, R: gl.constexpr, SUB: gl.constexpr,
    EQUAL_K: gl.constexpr, MASK: gl.constexpr, USE_MASK: gl.constexpr,
):
    """First key rows of the list entries of tile `j`; beyond the list a row outside K, which TMA
    reads as zero. With them what the softmax must look at: SHORT blocks, blocks with masked keys.
    """
    starts = ()
    look = 0
    for r in gl.static_range(R):
        e = j * R + r
        i_k = gl.load(p_list + e, mask=e < n_kept, other=0)
        if EQUAL_K:
            start = i_k * SUB
            short = e >= n_kept
        else:
            start = gl.load(k_offsets + i_k)
            short = (gl.load(k_offsets + i_k + 1) - start < SUB) | (e >= n_kept)
        starts = starts + (gl.where(e < n_kept, start, SKV),)
        if MASK:
            look = look | gl.where(short, SHORT, 0)
        if USE_MASK:
            look = look | gl.where(gl.load(dirty + i_k) != 0, DIRTY, 0)
    return starts, look


@gluon.jit
def _producer(
    descs, smem, bars, lists, sizes, scale, BN: gl.constexpr, SUB: gl.constexpr, ST: gl.constexpr,
    NC: gl.constexpr, QST: gl.constexpr, EQUAL_Q: gl.constexpr, EQUAL_K: gl.constexpr,
    MASK: gl.constexpr, USE_MASK: gl.constexpr, USE_TAIL: gl.constexpr, USE_LSE: gl.constexpr,
    USE_ORDER: gl.constexpr, D: gl.constexpr, PINGPONG: gl.constexpr, POLYNOMIAL: gl.constexpr,
    WG: gl.constexpr,
):
    q_desc, k_desc, v_desc, o_desc, km_desc, vm_desc = descs
    q_smem, k_smem, v_smem, box, looks = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = bars
    indices, counts, taken, order, q_offsets, k_offsets, tail, masks, o_ptr, lse, strides = lists
    SQ, SKV, H, GROUPS, NQ, NK, M, WORK, TAIL_TILES, unscale = sizes
    R: gl.constexpr = BN // SUB
    BYTES: gl.constexpr = k_desc.block_type.nbytes * R
    i_kv = 0
    i_work = 0
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    item = gl.program_id(0)
    while item < WORK:
        w = item
        if USE_ORDER:
            w = gl.load(order + item)
        i_b, i_h, i_q = _place(w, NQ, H)
        i_kh = i_h // GROUPS
        n_kept = gl.load(counts + w)
        p_list = indices + w.to(gl.int64) * M
        q_start = _query_start(i_q, q_offsets, NC * 64, EQUAL_Q)
        i_qst = i_work % QST
        mbarrier.wait(q_empty.index(i_qst), ((i_work // QST) & 1) ^ 1)
        box.index(i_qst).store(gl.full([1], w, gl.int32, one))
        mbarrier.expect(q_full.index(i_qst), q_desc.block_type.nbytes * NC)
        for c in gl.static_range(NC):
            tma.async_copy_global_to_shared(
                q_desc, [i_b, q_start + c * 64, i_h, 0], q_full.index(i_qst),
                q_smem.index(i_qst * NC + c))
        i_work += 1
        if USE_TAIL:
            for j in range(0, TAIL_TILES):
                st = i_kv % ST
                phase = ((i_kv // ST) & 1) ^ 1
                mbarrier.wait(k_empty.index(st), phase)
                mbarrier.expect(k_full.index(st), BYTES)
                for r in gl.static_range(R):
                    tma.async_copy_global_to_shared(
                        km_desc, [i_b, j * BN + r * SUB, i_kh, 0], k_full.index(st),
                        k_smem.index(st).slice(r * SUB, SUB, 1))
                mbarrier.wait(v_empty.index(st), phase)
                mbarrier.expect(v_full.index(st), BYTES)
                for r in gl.static_range(R):
                    tma.async_copy_global_to_shared(
                        vm_desc, [i_b, j * BN + r * SUB, i_kh, 0], v_full.index(st),
                        v_smem.index(st).slice(r * SUB, SUB, 1))
                i_kv += 1
        for j in range(0, _exact_tiles(n_kept, R, USE_TAIL)):
            st = i_kv % ST
            phase = ((i_kv // ST) & 1) ^ 1
            # before the wait, which hides the way through the lists
            starts, look = _entries(
                p_list, j, n_kept, k_offsets, masks[1] + i_b * NK, SKV, R, SUB, EQUAL_K, MASK,
                USE_MASK)
            mbarrier.wait(k_empty.index(st), phase)
            if MASK or USE_MASK:
                looks.index(st).store(gl.full([1], look, gl.int32, one))
            mbarrier.expect(k_full.index(st), BYTES)
            for r in gl.static_range(R):
                tma.async_copy_global_to_shared(
                    k_desc, [i_b, starts[r], i_kh, 0], k_full.index(st),
                    k_smem.index(st).slice(r * SUB, SUB, 1))
            mbarrier.wait(v_empty.index(st), phase)
            mbarrier.expect(v_full.index(st), BYTES)
            for r in gl.static_range(R):
                tma.async_copy_global_to_shared(
                    v_desc, [i_b, starts[r], i_kh, 0], v_full.index(st),
                    v_smem.index(st).slice(r * SUB, SUB, 1))
            i_kv += 1
        item = take(taken, WORK)
    i_qst = i_work % QST
    mbarrier.wait(q_empty.index(i_qst), ((i_work // QST) & 1) ^ 1)
    box.index(i_qst).store(gl.full([1], WORK, gl.int32, one))
    mbarrier.arrive(q_full.index(i_qst), count=1)


@gluon.jit
def _mask_exact(
    s, j, p_list, n_kept, k_offsets, SKV, BN: gl.constexpr, SUB: gl.constexpr,
    EQUAL_K: gl.constexpr, sl: gl.constexpr,
):
    """Columns beyond the end of their block, of the list, or of K count for nobody."""
    col = gl.arange(0, BN, layout=gl.SliceLayout(0, sl))
    e = j * (BN // SUB) + col // SUB
    i_k = gl.load(p_list + e, mask=e < n_kept, other=0)
    if EQUAL_K:
        length = SKV - i_k * SUB
    else:
        length = gl.load(k_offsets + i_k + 1) - gl.load(k_offsets + i_k)
    length = gl.where(e < n_kept, length, 0)
    return gl.where((col % SUB < length)[None, :], s, LOWEST)


@gluon.jit
def _mask_keys(
    s, j, p_list, n_kept, k_offsets, SKV, i_b, key_mask, BN: gl.constexpr, SUB: gl.constexpr,
    EQUAL_K: gl.constexpr, sl: gl.constexpr,
):
    """Masked keys count for nobody."""
    col = gl.arange(0, BN, layout=gl.SliceLayout(0, sl))
    e = j * (BN // SUB) + col // SUB
    i_k = gl.load(p_list + e, mask=e < n_kept, other=0)
    if EQUAL_K:
        token = i_k * SUB + col % SUB
    else:
        token = gl.load(k_offsets + i_k) + col % SUB
    counts = gl.load(key_mask + i_b.to(gl.int64) * SKV + token, mask=token < SKV, other=0)
    return gl.where((counts != 0)[None, :], s, LOWEST)


@gluon.jit
def _mask(
    s, j, look, p_list, n_kept, k_offsets, SKV, i_b, key_mask, BN: gl.constexpr,
    SUB: gl.constexpr, EQUAL_K: gl.constexpr, MASK: gl.constexpr, USE_MASK: gl.constexpr,
    sl: gl.constexpr,
):
    """LOWEST for what must not count, where the producer saw any of it."""
    # the outer conditions are the compiler's
    if MASK:  # noqa: SIM102
        if (look & SHORT) != 0:
            s = _mask_exact(s, j, p_list, n_kept, k_offsets, SKV, BN, SUB, EQUAL_K, sl)
    if USE_MASK:  # noqa: SIM102
        if (look & DIRTY) != 0:
            s = _mask_keys(
                s, j, p_list, n_kept, k_offsets, SKV, i_b, key_mask, BN, SUB, EQUAL_K, sl)
    return s


@gluon.jit
def _adjust(
    s, j, look, row, lists, sizes, scale, BN: gl.constexpr, SUB: gl.constexpr,
    EQUAL_K: gl.constexpr, MASK: gl.constexpr, USE_MASK: gl.constexpr, USE_TAIL: gl.constexpr,
    sl: gl.constexpr,
):
    """Raise pooled keys by the log of their weight; LOWEST for what must not count."""
    i_b, i_row, n_kept, p_list = row
    indices, counts, taken, order, q_offsets, k_offsets, tail, masks, o_ptr, lse, strides = lists
    SQ, SKV, H, GROUPS, NQ, NK, M, WORK, TAIL_TILES, unscale = sizes
    if USE_TAIL:
        if j < TAIL_TILES:
            log_weight, keep = tail
            col = j * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, sl))
            raised = gl.load(log_weight + i_b * NK + col, mask=col < NK, other=LOWEST) * unscale
            kept = gl.load(keep + i_row.to(gl.int64) * NK + col, mask=col < NK, other=1)
            s += gl.where(kept == 0, gl.maximum(raised, LOWEST), LOWEST)[None, :]
        else:
            s = _mask(s, j - TAIL_TILES, look, p_list, n_kept, k_offsets, SKV, i_b, masks[0], BN,
                      SUB, EQUAL_K, MASK, USE_MASK, sl)
    else:
        s = _mask(s, j, look, p_list, n_kept, k_offsets, SKV, i_b, masks[0], BN, SUB, EQUAL_K,
                  MASK, USE_MASK, sl)
    return s


@gluon.jit
def _looked(looks, MASK: gl.constexpr, USE_MASK: gl.constexpr):
    """What the producer said of a tile of keys; nothing where no tile is ever masked."""
    if MASK or USE_MASK:
        return left(looks)
    else:
        return 0


@gluon.jit
def _consumer(
    descs, smem, bars, lists, sizes, scale, BN: gl.constexpr, SUB: gl.constexpr, ST: gl.constexpr,
    NC: gl.constexpr, QST: gl.constexpr, EQUAL_Q: gl.constexpr, EQUAL_K: gl.constexpr,
    MASK: gl.constexpr, USE_MASK: gl.constexpr, USE_TAIL: gl.constexpr, USE_LSE: gl.constexpr,
    USE_ORDER: gl.constexpr, D: gl.constexpr, PINGPONG: gl.constexpr, POLYNOMIAL: gl.constexpr,
    WG: gl.constexpr,
):
    q_desc, k_desc, v_desc, o_desc, km_desc, vm_desc = descs
    q_smem, k_smem, v_smem, box, looks = smem
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = bars
    indices, counts, taken, order, q_offsets, k_offsets, tail, masks, o_ptr, lse, strides = lists
    SQ, SKV, H, GROUPS, NQ, NK, M, WORK, TAIL_TILES, unscale = sizes
    BD: gl.constexpr = q_desc.block_type.shape[3]
    R: gl.constexpr = BN // SUB
    GUARD: gl.constexpr = MASK or USE_MASK or USE_TAIL
    dtype: gl.constexpr = q_desc.dtype
    sl: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    ol: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BD, 16])
    pl: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ol, k_width=2)
    row_o: gl.constexpr = gl.SliceLayout(1, ol)
    zero = gl.zeros([64, BN], gl.float32, sl)
    i_kv = 0
    i_work = 0
    turn_phase = 0
    mbarrier.wait(q_full.index(0), 0)
    w = left(box.index(0))
    while w < WORK:
        i_b, i_h, i_q = _place(w, NQ, H)
        n_kept = gl.load(counts + w)
        p_list = indices + w.to(gl.int64) * M
        row = (i_b, w, n_kept, p_list)
        n = TAIL_TILES + _exact_tiles(n_kept, R, USE_TAIL)
        i_qst = i_work % QST
        q_tile = q_smem.index(i_qst * NC + WG)
        q = q_tile.reshape([64, BD])
        i_work += 1

        # the first tile: no PV to overlap with
        st = i_kv % ST
        phase = (i_kv // ST) & 1
        mbarrier.wait(k_full.index(st), phase)
        if PINGPONG:
            mbarrier.wait(turn.index(WG), turn_phase)
            turn_phase ^= 1
        k = k_smem.index(st).reshape([BN, BD]).permute((1, 0))
        s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
        if PINGPONG:
            mbarrier.arrive(turn.index((WG + 1) % NC), count=1)
        s = warpgroup_mma_wait(0, deps=(s,))
        look = _looked(looks.index(st), MASK, USE_MASK)
        mbarrier.arrive(k_empty.index(st), count=1)
        s = _adjust(
            s, 0, look, row, lists, sizes, scale, BN, SUB, EQUAL_K, MASK, USE_MASK, USE_TAIL, sl)
        m = gl.max(s, 1) * scale
        p = exp2(s * scale - shift(m, GUARD)[:, None], POLYNOMIAL)
        sums = row_sum(p, BN)
        p16 = gl.convert_layout(p.to(dtype), pl)
        o = gl.zeros([64, BD], gl.float32, ol)
        i_kv += 1
        mbarrier.wait(k_full.index(i_kv % ST), (i_kv // ST) & 1, pred=n > 1)
        for j in range(1, n):
            before, before_phase = st, phase
            st = i_kv % ST
            phase = (i_kv // ST) & 1
            if PINGPONG:
                mbarrier.wait(turn.index(WG), turn_phase)
                turn_phase ^= 1
            k = k_smem.index(st).reshape([BN, BD]).permute((1, 0))
            s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), before_phase)
            o = warpgroup_mma(p16, v_smem.index(before).reshape([BN, BD]), o, is_async=True)
            if PINGPONG:
                mbarrier.arrive(turn.index((WG + 1) % NC), count=1)
            s = warpgroup_mma_wait(1, deps=(s,))
            look = _looked(looks.index(st), MASK, USE_MASK)
            mbarrier.arrive(k_empty.index(st), count=1)
            s = _adjust(
                s, j, look, row, lists, sizes, scale, BN, SUB, EQUAL_K, MASK, USE_MASK, USE_TAIL,
                sl)
            m_new = gl.maximum(m, gl.max(s, 1) * scale)
            base = shift(m_new, GUARD)
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
        if not EQUAL_Q:
            mbarrier.arrive(q_empty.index(i_qst), count=1)
        mbarrier.wait(v_full.index(st), phase)
        o = warpgroup_mma(p16, v_smem.index(st).reshape([BN, BD]), o, is_async=True)
        o, p16 = warpgroup_mma_wait(0, deps=(o, p16))
        mbarrier.arrive(v_empty.index(st), count=1)

        # a row that saw no key: zeros, and log 0
        total = gl.sum(sums, 1)
        m_row = gl.convert_layout(m, row_o)
        seen = m_row > NOTHING
        if not USE_TAIL:
            seen = seen & (n_kept > 0)
        b_l = gl.where(seen, gl.convert_layout(total, row_o), 1.0)
        o = o * gl.where(seen, 1.0 / b_l, 0.0)[:, None]
        q_start = _query_start(i_q, q_offsets, NC * 64, EQUAL_Q) + WG * 64
        rows = q_start + gl.arange(0, 64, layout=row_o)
        if EQUAL_Q:
            q_end = SQ
        else:
            q_end = gl.load(q_offsets + i_q + 1)
        if USE_LSE:
            b_lse = gl.where(seen, (m_row + gl.log2(b_l)) * 0.6931471805599453, -float("inf"))
            p_lse = lse + (i_b * H + i_h).to(gl.int64) * SQ + rows
            gl.store(p_lse, b_lse, mask=rows < q_end)
        if EQUAL_Q:
            # through this warpgroup's own Q tile, which nobody reads any more, in one bulk store
            q.store(o.to(dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(o_desc, [i_b, q_start, i_h, 0], q_tile)
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(i_qst), count=1)
        else:
            sob, sos, soh = strides
            cols = gl.arange(0, BD, layout=gl.SliceLayout(0, ol))
            p_o = o_ptr + i_b.to(gl.int64) * sob + i_h.to(gl.int64) * soh
            p_o = p_o + rows.to(gl.int64)[:, None] * sos + cols[None, :]
            gl.store(p_o, o.to(dtype), mask=(rows < q_end)[:, None] & (cols < D)[None, :])
        mbarrier.wait(q_full.index(i_work % QST), (i_work // QST) & 1)
        w = left(box.index(i_work % QST))


@gluon.jit(do_not_specialize=SIZES)
def block_sparse_attention_hopper_kernel(
    q_desc, k_desc, v_desc, o_desc, km_desc, vm_desc,
    indices, counts, taken, order, q_offsets, k_offsets, log_weight, keep, key_mask, dirty, o, lse,
    sob, sos, soh, SQ, SKV, H, GROUPS, NQ, NK, M, WORK, TAIL_TILES, unscale, scale,
    BN: gl.constexpr, SUB: gl.constexpr, ST: gl.constexpr, NC: gl.constexpr, QST: gl.constexpr,
    EQUAL_Q: gl.constexpr, EQUAL_K: gl.constexpr, MASK: gl.constexpr, USE_MASK: gl.constexpr,
    USE_TAIL: gl.constexpr, USE_LSE: gl.constexpr, USE_ORDER: gl.constexpr, D: gl.constexpr,
    PINGPONG: gl.constexpr, POLYNOMIAL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):
    BD: gl.constexpr = q_desc.block_type.shape[3]
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [NC * QST, 1, 64, 1, BD], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [ST, 1, BN, 1, BD], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [ST, 1, BN, 1, BD], v_desc.layout)
    box = gl.allocate_shared_memory(gl.int32, [QST, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    looks = gl.allocate_shared_memory(gl.int32, [ST, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [QST, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [QST, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [ST, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [ST, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [ST, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [ST, 1], bar)
    turn = gl.allocate_shared_memory(gl.int64, [NC, 1], bar)
    for i in gl.static_range(QST):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=NC)
    for i in gl.static_range(ST):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=NC)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=NC)
    for i in gl.static_range(NC):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()
    if PINGPONG:
        mbarrier.arrive(turn.index(0), count=1)
    # the argument tuples stand inline: bound to a name, their constexprs would become tensors
    gl.warp_specialize([
        (_consumer, ((q_desc, k_desc, v_desc, o_desc, km_desc, vm_desc),
                     (q_smem, k_smem, v_smem, box, looks),
                     (q_full, q_empty, k_full, k_empty, v_full, v_empty, turn),
                     (indices, counts, taken, order, q_offsets, k_offsets,
                      (log_weight, keep), (key_mask, dirty), o, lse, (sob, sos, soh)),
                     (SQ, SKV, H, GROUPS, NQ, NK, M, WORK, TAIL_TILES, unscale), scale, BN, SUB,
                     ST, NC, QST, EQUAL_Q, EQUAL_K, MASK, USE_MASK, USE_TAIL, USE_LSE,
                     USE_ORDER, D, PINGPONG, POLYNOMIAL, 0)),
        (_consumer, ((q_desc, k_desc, v_desc, o_desc, km_desc, vm_desc),
                     (q_smem, k_smem, v_smem, box, looks),
                     (q_full, q_empty, k_full, k_empty, v_full, v_empty, turn),
                     (indices, counts, taken, order, q_offsets, k_offsets,
                      (log_weight, keep), (key_mask, dirty), o, lse, (sob, sos, soh)),
                     (SQ, SKV, H, GROUPS, NQ, NK, M, WORK, TAIL_TILES, unscale), scale, BN, SUB,
                     ST, NC, QST, EQUAL_Q, EQUAL_K, MASK, USE_MASK, USE_TAIL, USE_LSE,
                     USE_ORDER, D, PINGPONG, POLYNOMIAL, 1)),
        (_producer, ((q_desc, k_desc, v_desc, o_desc, km_desc, vm_desc),
                     (q_smem, k_smem, v_smem, box, looks),
                     (q_full, q_empty, k_full, k_empty, v_full, v_empty, turn),
                     (indices, counts, taken, order, q_offsets, k_offsets,
                      (log_weight, keep), (key_mask, dirty), o, lse, (sob, sos, soh)),
                     (SQ, SKV, H, GROUPS, NQ, NK, M, WORK, TAIL_TILES, unscale), scale, BN, SUB,
                     ST, NC, QST, EQUAL_Q, EQUAL_K, MASK, USE_MASK, USE_TAIL, USE_LSE,
                     USE_ORDER, D, PINGPONG, POLYNOMIAL, 0)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])
