"""Grouped-query flash attention over [GEN keys | the first und_len UND keys] for Hopper GPUs.

The formula is attention.py's. Persistent programs, one an SM: a producer warp loads by TMA,
warpgroups of 64 rows, pairs of (token, head of the group), each do

    s' = q k'^T,  acc += p v  (both in flight),  p' = softmax(s') while acc is still summed

on their own and take turns in issuing products, so that one's softmax runs beside the other's
products. Accumulation is float32; weights are rounded to v's dtype for the second product. What
does not fill a block of keys goes first, in blocks put together from boxes of 64 keys, GEN's then
UND's; the last box of either would read past its end: GEN's is filled with zeros by TMA, UND's ends
at und_len, and what it repeats counts for nothing. So no key at or past und_len is ever loaded.
It is Gluon, which Triton's interpreter cannot run: the maths that CI runs are attention.py's.
Source: FlashAttention-3 (Shah et al. 2024).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .gpu import is_hopper, processors
from .hopper_roles import BOX, DIM, KEYS_LAYOUT, ROWS, SWIZZLE, consume, produce
from .nearest import nearest
from .online_softmax import log2_scale


class HopperTile(NamedTuple):
    """Consumers (warpgroups) and their registers a thread, keys of a block, blocks in flight."""

    consumers: int
    keys: int
    stages: int
    registers: int


TILES = {"hopper-2": HopperTile(2, 128, 2, 240), "hopper-3": HopperTile(3, 64, 4, 160)}

# Which one runs, or "triton" (attention.py's kernel), by (queries, heads over the batch, heads of a
# group); elsewhere the nearest row in log scale. `cosmos3-fast bench --tune` prints rows. H200,
# bf16, a request's keys: microseconds of hopper-2, hopper-3, triton. Without turns hopper-2 takes
# 291 at (3093, 32, 4); 64 keys a block were slower there, too.
ATTENTION_CHOICE = {
    (16, 4, 4): "triton",  # 12.3, 15.5, 11.8
    (16, 8, 4): "triton",  # 12.4, 15.8, 12.1
    (16, 16, 4): "hopper-2",  # 12.9, 16.1, 13.4
    (16, 32, 4): "hopper-2",  # 13.4, 16.5, 14.1
    (406, 4, 4): "triton",  # 13.0, 16.2, 12.5
    (406, 8, 4): "hopper-2",  # 13.7, 16.8, 14.0
    (406, 16, 4): "hopper-2",  # 13.9, 17.0, 14.3
    (406, 32, 4): "hopper-2",  # 14.6, 17.6, 16.4
    (1576, 4, 4): "hopper-2",  # 30.8, 43.0, 31.3
    (1576, 8, 4): "hopper-2",  # 31.4, 43.3, 39.0
    (1576, 16, 4): "hopper-3",  # 58.5, 46.1, 75.3
    (1576, 32, 4): "hopper-3",  # 114.6, 87.6, 115.1
    (1966, 4, 4): "hopper-2",  # 30.8, 42.9, 31.5
    (1966, 8, 4): "hopper-2",  # 32.3, 43.9, 40.1
    (1966, 16, 4): "hopper-2",  # 59.1, 84.7, 76.5
    (1966, 32, 4): "hopper-2",  # 118.0, 130.8, 158.1
    (2752, 4, 4): "hopper-2",  # 44.6, 64.7, 53.6
    (2752, 8, 4): "hopper-3",  # 83.2, 65.7, 95.0
    (2752, 16, 4): "hopper-2",  # 128.5, 129.7, 159.6
    (2752, 32, 4): "hopper-2",  # 257.4, 260.9, 324.5
    (2752, 64, 4): "hopper-2",  # 488.9, 543.6, 621.7
    (3093, 4, 4): "hopper-2",  # 44.5, 64.6, 53.7
    (3093, 8, 4): "hopper-3",  # 83.8, 68.4, 102.7
    (3093, 16, 4): "hopper-2",  # 134.4, 135.8, 168.3
    (3093, 32, 4): "hopper-2",  # 267.6, 273.4, 342.0
    (3093, 64, 4): "hopper-2",  # 544.4, 555.2, 696.5
}

_ROWS, _DIM = gl.constexpr(ROWS), gl.constexpr(DIM)


@gluon.jit(do_not_specialize=["tiles", "blocks", "groups", "gen_keys", "tokens"])
def _hopper_kernel(
    q_desc, k_desc, v_desc, gen_k_desc, gen_v_desc, und_k_desc, und_v_desc, out_ptr, und_len_ptr,
    tiles, blocks, groups, gen_keys, tokens, out_batch, out_row, scale,
    GROUP: gl.constexpr, PACK: gl.constexpr, KEYS: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(
        dtype, [CONSUMERS, 1, _ROWS // PACK, PACK, _DIM], q_desc.layout
    )
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, KEYS, _DIM], KEYS_LAYOUT)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, KEYS, _DIM], KEYS_LAYOUT)
    q_bars = gl.allocate_shared_memory(gl.int64, [2 * CONSUMERS, 1], BARRIER)
    k_bars = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], BARRIER)
    v_bars = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], BARRIER)
    turn_bars = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turn_bars.index(i), count=1)
    for i in gl.static_range(2 * CONSUMERS):
        mbarrier.init(q_bars.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_bars.index(i), count=1)
        mbarrier.init(v_bars.index(i), count=1)
        mbarrier.init(k_bars.index(STAGES + i), count=CONSUMERS)
        mbarrier.init(v_bars.index(STAGES + i), count=CONSUMERS)
    fence_async_shared()  # before a TMA load arrives at one of them
    loads = (
        q_smem, k_smem, v_smem, q_bars, k_bars, v_bars, q_desc, k_desc, v_desc,
        gen_k_desc, gen_v_desc, und_k_desc, und_v_desc, und_len_ptr, tiles, blocks, groups, gen_keys
    )  # fmt: skip
    products = (
        q_smem, k_smem, v_smem, q_bars, k_bars, v_bars, turn_bars, out_ptr, und_len_ptr,
        tiles, blocks, groups, gen_keys, tokens, out_batch, out_row, scale,
    )  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (products, 0, PACK, KEYS, CONSUMERS, STAGES)),
                (consume, (products, 1, PACK, KEYS, CONSUMERS, STAGES)),
                (produce, (loads, GROUP, PACK, KEYS, CONSUMERS, STAGES)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [
                (consume, (products, 0, PACK, KEYS, CONSUMERS, STAGES)),
                (consume, (products, 1, PACK, KEYS, CONSUMERS, STAGES)),
                (consume, (products, 2, PACK, KEYS, CONSUMERS, STAGES)),
                (produce, (loads, GROUP, PACK, KEYS, CONSUMERS, STAGES)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )


def takes(q: torch.Tensor, *keys: torch.Tensor) -> bool:
    """Whether the kernel can run: a Hopper GPU, bfloat16, head_dim 128, what TMA can read."""

    def aligned(x: torch.Tensor) -> bool:
        return all(n % 16 == 0 for n in (x.data_ptr(), *(2 * s for s in x.stride()[:3])))

    fits = q.is_cuda and q.dtype == torch.bfloat16 and q.shape[3] == DIM
    return fits and is_hopper(q.device.index) and all(map(aligned, (q, *keys)))


def packed(group: int) -> int:
    """Heads of a group whose rows share a tile: all of them, or one if they do not fill it."""
    return group if ROWS % group == 0 else 1


@functools.lru_cache(4096)
def choice(tokens: int, heads: int, group: int) -> str:
    """A name of TILES or "triton"; heads are counted over the batch, `group` of them share keys."""
    return nearest(ATTENTION_CHOICE, (tokens, heads, group))


def _descriptor(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(SWIZZLE, 16, len(block))
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def launch_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    und_k: torch.Tensor,
    und_v: torch.Tensor,
    und_len: torch.Tensor,
    out: torch.Tensor,
    *,
    tile: HopperTile,
) -> None:
    """`attention` into out; shapes as there, and what `takes` says."""
    assert takes(q, k, v, und_k, und_v), (q.device, q.dtype, q.shape, q.stride(), k.stride())
    (batch, tokens, heads, dim), group = q.shape, q.shape[2] // k.shape[2]
    if not tokens * batch:
        return
    if not und_k.shape[1]:  # TMA has no empty tensors; none of its keys is read
        und_k, und_v = k, v
    programs, pack = processors(q.device.index), packed(group)
    blocks = triton.cdiv(tokens * pack, tile.consumers * ROWS)
    tiles = blocks * (heads // pack) * batch
    k, v, und_k, und_v = (x.flatten(2) for x in (k, v, und_k, und_v))
    _hopper_kernel[(min(tiles, programs),)](
        _descriptor(q, [1, ROWS // pack, pack, dim]),
        *(_descriptor(x, [1, tile.keys, dim]) for x in (k, v)),
        *(_descriptor(x, [1, BOX, SWIZZLE // 2]) for x in (k, v, und_k, und_v)),
        out,
        und_len,
        tiles,
        blocks,
        heads // pack,
        k.shape[1],
        tokens,
        *out.stride()[:2],
        log2_scale(dim),
        GROUP=group,
        PACK=pack,
        KEYS=tile.keys,
        CONSUMERS=tile.consumers,
        STAGES=tile.stages,
        REGISTERS=tile.registers,
        num_warps=4,
    )
