"""SwiGLU's first half in one kernel: out = silu(x Wg^T) * (x Wu^T).

    gate = round(x Wg^T)    up = round(x Wu^T)    out = round(round(gate / (1 + exp(-gate))) * up)

x [M, H], weight [2 I, H] = [Wg; Wu] -> out [M, I]; sums are float32. The [M, 2 I] of the product
never goes to memory. Roundings are those of torch.mm with `silu_mul` after it, which is what runs
where it is the faster, and wherever TMA cannot read the tensors.

The kernel is Hopper's: persistent; one warp loads by TMA, each of two warpgroups multiplies 64
rows of a tile by 128 columns of Wg and the same of Wu at once (wgmma m64n256k16), so that a thread
holds both factors of its results. The producer is tiles ahead while an epilogue runs.
Source: the division of labour of CUTLASS's warp-specialised persistent GEMM.
"""

from __future__ import annotations

import functools

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .gpu import is_hopper, processors
from .nearest import nearest
from .silu_mul import silu_mul

# Rows of a tile (two warpgroups), results of one in a row, depth of a stage, stages: 224 KiB.
ROWS, COLUMNS, DEPTH, STAGES = 128, 128, 64, 4
REGISTERS = 240, 24  # of a consumer's thread, of the producer's
GROUP = 16  # tiles of rows that share a pass over the weight, at most; 64 is 2 to 3 % slower

# Which one runs, by (rows, I) at H = 4096; elsewhere the nearest row in log scale.
# `cosmos3-fast bench --tune` prints rows. H200 under its power limit, microseconds of "fused", of
# torch.mm with silu_mul ("pair"), in turn in one run. Few tiles fill the GPU's turns badly.
GATE_UP_CHOICE = {
    (16, 1536): "pair",  # 41.6, 12.6
    (16, 3072): "pair",  # 42.3, 17.7
    (16, 6144): "pair",  # 42.8, 30.3
    (16, 12288): "pair",  # 71.7, 52.6
    (406, 1536): "pair",  # 42.4, 22.2
    (406, 3072): "pair",  # 42.9, 31.8
    (406, 6144): "pair",  # 82.7, 58.6
    (406, 12288): "pair",  # 147.1, 127.8
    (812, 3072): "pair",  # 87.0, 66.8
    (812, 6144): "pair",  # 144.8, 132.3
    (812, 12288): "pair",  # 293.7, 267.7
    (1576, 1536): "pair",  # 87.2, 56.0
    (1576, 3072): "pair",  # 139.3, 112.9
    (1576, 6144): "pair",  # 249.3, 241.8
    (1576, 12288): "pair",  # 525.0, 508.7
    (1966, 1536): "pair",  # 90.4, 76.4
    (1966, 3072): "fused",  # 157.2, 162.9
    (1966, 6144): "fused",  # 293.1, 308.7
    (1966, 12288): "fused",  # 595.6, 614.6
    (2752, 1536): "fused",  # 98.3, 104.3
    (2752, 3072): "fused",  # 210.5, 224.6
    (2752, 6144): "fused",  # 403.4, 428.1
    (2752, 12288): "fused",  # 834.4, 903.8
    (3093, 1536): "pair",  # 136.7, 111.2
    (3093, 3072): "pair",  # 246.6, 236.5
    (3093, 6144): "pair",  # 497.0, 476.8
    (3093, 12288): "fused",  # 952.5, 962.8
    (5504, 1536): "fused",  # 210.6, 226.6
    (5504, 3072): "fused",  # 418.4, 445.5
    (5504, 6144): "fused",  # 811.5, 880.2
    (5504, 12288): "fused",  # 1644.2, 1769.9
    (6186, 1536): "pair",  # 242.2, 235.6
    (6186, 3072): "fused",  # 467.2, 495.8
    (6186, 6144): "fused",  # 933.8, 985.7
    (6186, 12288): "fused",  # 1857.1, 1978.2
}

# Two results of a thread: the formula above, 16 instructions. exp(-g) = 2^(-g log2 e); the
# product of two bfloat16 values is rounded once.
_TWO_RESULTS = gl.constexpr("""{
.reg .b32 g, u, a, b, c, d;
cvt.rn.bf16x2.f32 g, $2, $1;
cvt.rn.bf16x2.f32 u, $4, $3;
shl.b32 a, g, 16;
and.b32 b, g, 0xffff0000;
mul.f32 c, a, 0fBFB8AA3B;
mul.f32 d, b, 0fBFB8AA3B;
ex2.approx.ftz.f32 c, c;
ex2.approx.ftz.f32 d, d;
add.f32 c, c, 0f3F800000;
add.f32 d, d, 0f3F800000;
rcp.approx.ftz.f32 c, c;
rcp.approx.ftz.f32 d, d;
mul.f32 a, a, c;
mul.f32 b, b, d;
cvt.rn.bf16x2.f32 g, b, a;
mul.rn.bf16x2 $0, g, u;
}""")


@gluon.jit
def _place(tile, m_tiles, n_tiles, group):
    """(tile of rows, tile of columns): rows fastest, in groups of `group`."""
    first = tile // (group * n_tiles) * group
    height = gl.minimum(m_tiles - first, group)
    inside = tile % (group * n_tiles)
    return first + inside % height, inside // height


@gluon.jit
def _after(stage, phase, STAGES: gl.constexpr):
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _produce(
    x_desc, weight_desc, x_tiles, weight_tiles, full, free, m_tiles, n_tiles, depth, group,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        m, n = _place(tile, m_tiles, n_tiles, group)
        for k in range(0, depth, DEPTH):
            mbarrier.wait(free.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, (ROWS + 2 * COLUMNS) * DEPTH * 2)
            tma.async_copy_global_to_shared(x_desc, [m * ROWS, k], bar, x_tiles.index(stage))
            at = [0, n * COLUMNS, k]
            tma.async_copy_global_to_shared(weight_desc, at, bar, weight_tiles.index(stage))
            stage, phase = _after(stage, phase, STAGES)


@gluon.jit
def _multiply(
    acc, x_tiles, weight_tiles, stage, use_acc,
    HALF: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """Issue the product of a stage; on return the one before it is done."""
    x = x_tiles.index(stage).slice(HALF * (ROWS // 2), ROWS // 2)
    weight = weight_tiles.index(stage).reshape([2 * COLUMNS, DEPTH]).permute([1, 0])
    acc = warpgroup_mma(x, weight, acc, use_acc=use_acc, is_async=True)
    return warpgroup_mma_wait(1, deps=[acc])


@gluon.jit
def _consume(
    out_desc, x_tiles, weight_tiles, out_tiles, full, free, m_tiles, n_tiles, depth, group,
    HALF: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * COLUMNS, 16])
    stage = 0
    phase = 0
    out_tile = out_tiles.index(HALF)
    for tile in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        m, n = _place(tile, m_tiles, n_tiles, group)
        acc = gl.zeros([ROWS // 2, 2 * COLUMNS], gl.float32, LAYOUT)
        mbarrier.wait(full.index(stage), phase)
        acc = _multiply(acc, x_tiles, weight_tiles, stage, False, HALF, ROWS, COLUMNS, DEPTH)
        before = stage
        stage, phase = _after(stage, phase, STAGES)
        for _ in range(DEPTH, depth, DEPTH):
            mbarrier.wait(full.index(stage), phase)
            acc = _multiply(acc, x_tiles, weight_tiles, stage, True, HALF, ROWS, COLUMNS, DEPTH)
            mbarrier.arrive(free.index(before), count=1)
            before = stage
            stage, phase = _after(stage, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index(before), count=1)
        gate, up = acc.reshape([ROWS // 2, 2, COLUMNS]).permute([0, 2, 1]).split()
        y = gl.inline_asm_elementwise(
            _TWO_RESULTS, "=r,r,r,r,r", [gate, up], dtype=gl.bfloat16, is_pure=True, pack=2
        )
        tma.store_wait(0)  # of the tile before: its memory is used again
        out_tile.store(y)
        fence_async_shared()
        at = [m * ROWS + HALF * (ROWS // 2), n * COLUMNS]
        tma.async_copy_shared_to_global(out_desc, at, out_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["m_tiles", "n_tiles", "group"])
def _gate_up_silu_kernel(
    x_desc, weight_desc, out_desc, m_tiles, n_tiles, depth, group,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    x_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, ROWS, DEPTH], x_desc.layout)
    weight_tiles = gl.allocate_shared_memory(
        gl.bfloat16, [STAGES, 2, COLUMNS, DEPTH], weight_desc.layout
    )
    out_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS // 2, COLUMNS], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                out_desc, x_tiles, weight_tiles, out_tiles, full, free, m_tiles, n_tiles, depth,
                group, gl.constexpr(0), ROWS, COLUMNS, DEPTH, STAGES,
            )),
            (_consume, (
                out_desc, x_tiles, weight_tiles, out_tiles, full, free, m_tiles, n_tiles, depth,
                group, gl.constexpr(1), ROWS, COLUMNS, DEPTH, STAGES,
            )),
            (_produce, (
                x_desc, weight_desc, x_tiles, weight_tiles, full, free, m_tiles, n_tiles, depth,
                group, ROWS, COLUMNS, DEPTH, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@functools.cache
def _layout(*block: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)


def _descriptor(x: torch.Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block), _layout(*block))


def _readable(x: torch.Tensor) -> bool:
    """Whether TMA takes a matrix: packed rows that begin at multiples of 16 bytes."""
    aligned = (x.data_ptr() | x.stride(0) * x.element_size()) % 16 == 0
    return aligned and x.stride(1) == 1 and x.numel() > 0


def _check(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    assert x.shape[1] == weight.shape[1] and weight.shape[0] % 2 == 0, (x.shape, weight.shape)
    assert out.shape == (x.shape[0], weight.shape[0] // 2), (out.shape, x.shape, weight.shape)
    assert x.dtype == weight.dtype == out.dtype, (x.dtype, weight.dtype, out.dtype)
    assert x.device == weight.device == out.device, (x.device, weight.device, out.device)


def gate_up_silu_fused(
    x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor | None = None, group: int = GROUP
) -> torch.Tensor:
    """`gate_up_silu` in one launch: bfloat16 on a Hopper GPU, weight contiguous, rows of x and out
    packed and at multiples of 16 bytes.
    """
    (rows, depth), inner = x.shape, weight.shape[0] // 2
    out = x.new_empty((rows, inner)) if out is None else out
    _check(x, weight, out)
    assert x.dtype == torch.bfloat16 and weight.is_contiguous(), (x.dtype, weight.stride())
    assert all(map(_readable, (x, weight, out))), (x.stride(), weight.stride(), out.stride())
    m_tiles, n_tiles = triton.cdiv(rows, ROWS), triton.cdiv(inner, COLUMNS)
    turns = triton.cdiv(m_tiles * n_tiles, processors(x.device.index))
    _gate_up_silu_kernel[(triton.cdiv(m_tiles * n_tiles, turns),)](
        _descriptor(x, ROWS, DEPTH),
        _descriptor(weight.view(2, inner, depth), 2, COLUMNS, DEPTH),
        _descriptor(out, ROWS // 2, COLUMNS),
        m_tiles,
        n_tiles,
        depth,
        triton.cdiv(m_tiles, triton.cdiv(m_tiles, group)),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        STAGES=STAGES,
        REGISTERS=REGISTERS[0],
        PRODUCER_REGISTERS=REGISTERS[1],
        num_warps=4,
    )
    return out


def gate_up_silu_pair(
    x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`gate_up_silu` by torch.mm and `silu_mul`; any dtype."""
    return silu_mul(torch.mm(x, weight.t()), out=out)


@functools.lru_cache(4096)
def choice(rows: int, inner: int) -> str:
    """ "fused" or "pair": the row of GATE_UP_CHOICE nearest to (rows, I) in log scale."""
    return nearest(GATE_UP_CHOICE, (rows, inner))


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether one launch can do it: a Hopper GPU, bfloat16, what TMA can read."""
    if x.dtype != torch.bfloat16 or x.device.type != "cuda" or not is_hopper(x.device.index):
        return False
    flat = _readable(x) and _readable(weight) and weight.is_contiguous()
    return flat and weight.shape[0] // 2 % 8 == 0


def is_fused(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `gate_up_silu` is one launch for these: by GPU, dtype and the table's nearest row."""
    return takes(x, weight) and choice(x.shape[0], weight.shape[0] // 2) == "fused"


def gate_up_silu(
    x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [M, H], weight [2 I, H] (gate, then up) -> silu(x Wg^T) * (x Wu^T) [M, I] of their dtype.

    Rows of x and out may be strided. What runs is a matter of shapes, dtype and GPU alone.
    """
    if is_fused(x, weight) and (out is None or _readable(out)):
        return gate_up_silu_fused(x, weight, out=out)
    return gate_up_silu_pair(x, weight, out=out)
