"""What the warps of attention_hopper's kernel do: one loads, warpgroups multiply.

Barriers come in pairs, "full" ones first, then "empty" ones; the phase that is waited for is the
number of times a barrier was used before, modulo 2.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS = 64  # of a consumer: what the wgmma of a warpgroup takes
DIM = 128
BOX = 64  # keys of a box
SWIZZLE = 128  # bytes: the inner extent of a TMA message

_ROWS, _DIM, _BOX = gl.constexpr(ROWS), gl.constexpr(DIM), gl.constexpr(BOX)
_PANEL = gl.constexpr(SWIZZLE // 2)  # columns of a message
KEYS_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(SWIZZLE, 16, 2))
_O_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16]))
_P_LAYOUT = gl.constexpr(gl.DotOperandLayout(0, _O_LAYOUT.value, 2))
# 8 neighbouring columns of a row to a lane: a warp stores whole rows, of the 16 that it has.
_OUT_LAYOUT = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [2, 0], [4, 0], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [0, 32], [0, 64], [1, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[ROWS, DIM],
    )
)


@gluon.jit
def _place(tile, blocks, groups, gen_keys, und_len_ptr, KEYS: gl.constexpr):
    """Of a tile: block of rows, group of heads, batch, und_len; whole blocks of GEN keys, boxes of
    the rest of them, blocks made of boxes.
    """
    BOXES: gl.constexpr = KEYS // _BOX
    batch = tile // (blocks * groups)
    rest = tile % (blocks * groups)
    und_len = gl.load(und_len_ptr + batch)
    gen_boxes = (gen_keys % KEYS + _BOX - 1) // _BOX
    boxes = gen_boxes + (und_len + _BOX - 1) // _BOX
    tails = (boxes + BOXES - 1) // BOXES
    return rest % blocks, rest // blocks, batch, und_len, gen_keys // KEYS, gen_boxes, tails


@gluon.jit
def _load_keys(
    smem, full, whole_desc, gen_desc, und_desc, batch, column, j, und_len, whole, gen_boxes, tails,
    KEYS: gl.constexpr,
):  # fmt: skip
    """Start the loads of block j, boxes first, into smem [KEYS, DIM]; `full` counts their bytes."""
    BOXES: gl.constexpr = KEYS // _BOX
    PANELS: gl.constexpr = _DIM // _PANEL
    mbarrier.expect(full, KEYS * _DIM * 2)
    if j >= tails:
        one = smem._reinterpret(smem.dtype, [1, KEYS, _DIM], whole_desc.layout)
        tma.async_copy_global_to_shared(whole_desc, [batch, (j - tails) * KEYS, column], full, one)
    else:
        boxes = smem._reinterpret(smem.dtype, [PANELS * BOXES, 1, _BOX, _PANEL], gen_desc.layout)
        for i in gl.static_range(BOXES):
            box = j * BOXES + i
            for panel in gl.static_range(PANELS):
                piece = boxes.index(panel * BOXES + i)
                at = column + panel * _PANEL
                if box < gen_boxes:
                    first = whole * KEYS + box * _BOX
                    tma.async_copy_global_to_shared(gen_desc, [batch, first, at], full, piece)
                else:  # may begin before key 0: zeros
                    first = gl.minimum((box - gen_boxes) * _BOX, und_len - _BOX)
                    tma.async_copy_global_to_shared(und_desc, [batch, first, at], full, piece)


@gluon.jit
def produce(
    shared, GROUP: gl.constexpr, PACK: gl.constexpr, KEYS: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: every load of the program."""
    (
        q_smem, k_smem, v_smem, q_bars, k_bars, v_bars, q_desc, k_desc, v_desc,
        gen_k_desc, gen_v_desc, und_k_desc, und_v_desc, und_len_ptr, tiles, blocks, groups, gen_keys
    ) = shared  # fmt: skip
    count = 0  # blocks of keys so far
    rounds = 0  # tiles so far
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block, group, batch, und_len, whole, gen_boxes, tails = _place(
            tile, blocks, groups, gen_keys, und_len_ptr, KEYS
        )
        column = group * PACK // GROUP * _DIM
        for j in range(0, tails + whole):
            stage = count % STAGES
            lap = (count // STAGES) & 1
            mbarrier.wait(k_bars.index(STAGES + stage), lap ^ 1)
            _load_keys(
                k_smem.index(stage), k_bars.index(stage), k_desc, gen_k_desc, und_k_desc,
                batch, column, j, und_len, whole, gen_boxes, tails, KEYS,
            )  # fmt: skip
            if j == 0:
                for c in gl.static_range(CONSUMERS):
                    mbarrier.wait(q_bars.index(CONSUMERS + c), (rounds & 1) ^ 1)
                    mbarrier.expect(q_bars.index(c), _ROWS * _DIM * 2)
                    at = [batch, (block * CONSUMERS + c) * (_ROWS // PACK), group * PACK, 0]
                    tma.async_copy_global_to_shared(q_desc, at, q_bars.index(c), q_smem.index(c))
            mbarrier.wait(v_bars.index(STAGES + stage), lap ^ 1)
            _load_keys(
                v_smem.index(stage), v_bars.index(stage), v_desc, gen_v_desc, und_v_desc,
                batch, column, j, und_len, whole, gen_boxes, tails, KEYS,
            )  # fmt: skip
            count += 1
        rounds += 1  # noqa: SIM113 - Gluon has no enumerate


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _mask(s, j, gen_keys, und_len, whole, gen_boxes, KEYS: gl.constexpr, LAYOUT: gl.constexpr):
    """Scores s [ROWS, KEYS] of block j, made of boxes: -inf where a key does not count."""
    column = gl.arange(0, KEYS, layout=gl.BlockedLayout([1], [32], [4], [0]))
    box, i = j * (KEYS // _BOX) + column // _BOX, column % _BOX
    first = (box - gen_boxes) * _BOX
    und = gl.minimum(first, und_len - _BOX) + i >= first
    gen = whole * KEYS + box * _BOX + i < gen_keys
    bias = gl.where(gl.where(box < gen_boxes, gen, und), 0.0, -float("inf"))
    return s + gl.expand_dims(gl.convert_layout(bias, gl.SliceLayout(0, LAYOUT)), 0)


@gluon.jit
def _step(
    s, acc, top, total, q, k_smem, v_smem, k_bars, v_bars, turn_bars, count, steps, scale,
    j, gen_keys, und_len, whole, gen_boxes,
    C: gl.constexpr, KEYS: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    MASK: gl.constexpr,
):  # fmt: skip
    """Add to acc [ROWS, DIM] what weights s [ROWS, KEYS] give of the block before; s, top, total of
    this block. Each tile takes one step less than it has blocks.
    """
    p = gl.convert_layout(s.to(v_smem.dtype), _P_LAYOUT)
    stage, before = count % STAGES, (count - 1) % STAGES
    k, v = k_smem.index(stage).permute((1, 0)), v_smem.index(before)
    mbarrier.wait(k_bars.index(stage), (count // STAGES) & 1)
    mbarrier.wait(turn_bars.index(C), (steps & 1) ^ (1 if C == 0 else 0))
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    empty = gl.zeros([_ROWS, KEYS], gl.float32, S_LAYOUT)
    s = warpgroup_mma(q, k, empty, use_acc=False, is_async=True)
    mbarrier.wait(v_bars.index(before), ((count - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v, acc, is_async=True)
    mbarrier.arrive(turn_bars.index((C + 1) % CONSUMERS))
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_bars.index(STAGES + stage))
    if MASK:
        s = _mask(s, j, gen_keys, und_len, whole, gen_boxes, KEYS, S_LAYOUT)
    new_top = gl.maximum(top, gl.max(s, 1) * scale)
    kept = _exp2(top - new_top)
    s = _exp2(s * scale - gl.expand_dims(new_top, 1))
    total = total * kept + gl.sum(s, 1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_bars.index(STAGES + before))
    kept = gl.convert_layout(kept, gl.SliceLayout(1, _O_LAYOUT))
    return s, acc * gl.expand_dims(kept, 1), new_top, total


@gluon.jit
def consume(
    shared, C: gl.constexpr, PACK: gl.constexpr, KEYS: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: rows [C ROWS, C ROWS + ROWS) of every tile, those past the last token only
    computed.
    """
    (
        q_smem, k_smem, v_smem, q_bars, k_bars, v_bars, turn_bars, out_ptr, und_len_ptr,
        tiles, blocks, groups, gen_keys, tokens, out_batch, out_row, scale,
    ) = shared  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    count = 0  # blocks of keys so far
    steps = 0
    rounds = 0  # tiles so far
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block, group, batch, und_len, whole, gen_boxes, tails = _place(
            tile, blocks, groups, gen_keys, und_len_ptr, KEYS
        )
        q = q_smem.index(C)._reinterpret(q_smem.dtype, [_ROWS, _DIM], KEYS_LAYOUT)
        mbarrier.wait(q_bars.index(C), rounds & 1)
        stage = count % STAGES
        k = k_smem.index(stage).permute((1, 0))
        mbarrier.wait(k_bars.index(stage), (count // STAGES) & 1)
        empty = gl.zeros([_ROWS, KEYS], gl.float32, S_LAYOUT)
        s = warpgroup_mma(q, k, empty, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_bars.index(STAGES + stage))
        if tails > 0:
            s = _mask(s, 0, gen_keys, und_len, whole, gen_boxes, KEYS, S_LAYOUT)
        top = gl.max(s, 1) * scale
        s = _exp2(s * scale - gl.expand_dims(top, 1))
        total = gl.sum(s, 1)
        acc = gl.zeros([_ROWS, _DIM], gl.float32, _O_LAYOUT)
        count += 1
        for j in range(1, tails):
            s, acc, top, total = _step(
                s, acc, top, total, q, k_smem, v_smem, k_bars, v_bars, turn_bars, count, steps,
                scale, j, gen_keys, und_len, whole, gen_boxes, C, KEYS, CONSUMERS, STAGES, True,
            )  # fmt: skip
            count += 1
            steps += 1
        for j in range(gl.maximum(1, tails), tails + whole):
            s, acc, top, total = _step(
                s, acc, top, total, q, k_smem, v_smem, k_bars, v_bars, turn_bars, count, steps,
                scale, j, gen_keys, und_len, whole, gen_boxes, C, KEYS, CONSUMERS, STAGES, False,
            )  # fmt: skip
            count += 1
            steps += 1
        mbarrier.arrive(q_bars.index(CONSUMERS + C))
        p = gl.convert_layout(s.to(v_smem.dtype), _P_LAYOUT)
        before = (count - 1) % STAGES
        v = v_smem.index(before)
        mbarrier.wait(v_bars.index(before), ((count - 1) // STAGES) & 1)
        acc = warpgroup_mma(p, v, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_bars.index(STAGES + before))
        total = gl.convert_layout(total, gl.SliceLayout(1, _O_LAYOUT))
        result = (acc * gl.expand_dims(1.0 / total, 1)).to(out_ptr.dtype.element_ty)
        result = gl.convert_layout(result, _OUT_LAYOUT)
        row = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, _OUT_LAYOUT))
        at = gl.arange(0, _DIM, layout=gl.SliceLayout(0, _OUT_LAYOUT))
        token = (block * CONSUMERS + C) * (_ROWS // PACK) + row // PACK
        rows = token.to(gl.int64) * out_row + (group * PACK + row % PACK) * _DIM
        here = out_ptr + batch.to(gl.int64) * out_batch
        here = here + gl.expand_dims(rows, 1) + gl.expand_dims(at, 0)
        gl.store(here, result, mask=gl.expand_dims(token < tokens, 1))
        rounds += 1  # noqa: SIM113 - Gluon has no enumerate
