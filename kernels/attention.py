"""Grouped-query flash attention over [GEN keys | the first und_len UND keys].

    out[m, h] = sum_j softmax_j(q[m, h] . k[j, h // G] * D^-0.5) v[j, h // G],   G = Hq / Hk

The number of GEN keys is known to the host, that of UND keys is read on the device: one graph
serves every prompt length up to the buffer's capacity, and what lies past the length is not loaded.
Accumulation is float32 (online_softmax.py). A program's rows are (token, head of the group) pairs:
all heads of a group share the keys it loads.

Hopper GPUs have a kernel of their own (attention_hopper.py) for what models use, where its table
says that it is faster; this one, Triton's own, takes everything.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_hopper import TILES as HOPPER_TILES
from .attention_hopper import HopperTile, choice, launch_hopper, takes
from .online_softmax import Tile, check_heads, descriptor, is_flat, log2_scale, over_keys

__all__ = [
    "attention",
    "attention_hopper",
    "attention_triton",
]


# By bytes of an element. 64 x 64 with 4 warps and 3 stages, keys by TMA, is the fastest or within a
# percent of it at the sizes of D, E and S (H200). float32 runs on FMA units: a larger block spills.
TILES = {2: Tile(64, 64, 4, 3, tma=True), 4: Tile(16, 32, 8, 1)}


@triton.jit(do_not_specialize=["tokens", "gen_keys", "capacity"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, und_k_ptr, und_v_ptr, und_len_ptr, out_ptr,
    k_desc, v_desc, und_k_desc, und_v_desc,
    q_batch, q_row, k_batch, k_row, v_batch, v_row, und_k_batch, und_k_row, und_v_batch, und_v_row,
    out_batch, out_row, tokens, gen_keys, capacity, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    TAIL: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    kv_head, element = tl.program_id(1), tl.program_id(2)
    batch = element.to(tl.int64)
    und_len = tl.load(und_len_ptr + batch)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, DIM)
    token = row // GROUP
    inside = (token < tokens)[:, None]
    here = ((kv_head * GROUP + row % GROUP) * DIM)[:, None] + at[None, :]
    rows = token[:, None].to(tl.int64)
    q = tl.load(q_ptr + batch * q_batch + rows * q_row + here, mask=inside, other=0.0)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    k_ptr += batch * k_batch + kv_head * DIM
    v_ptr += batch * v_batch + kv_head * DIM
    acc, top, total = over_keys(
        acc, top, total, q, k_ptr, v_ptr, k_row, v_row, k_desc, v_desc,
        element * gen_keys, kv_head * DIM, gen_keys, token, scale, DIM, KEYS, TAIL, STAGES, TMA,
    )  # fmt: skip
    und_k_ptr += batch * und_k_batch + kv_head * DIM
    und_v_ptr += batch * und_v_batch + kv_head * DIM
    acc, top, total = over_keys(
        acc, top, total, q, und_k_ptr, und_v_ptr, und_k_row, und_v_row, und_k_desc, und_v_desc,
        element * capacity, kv_head * DIM, und_len, token, scale, DIM, KEYS, TAIL, STAGES, TMA,
    )  # fmt: skip
    out_ptr += batch * out_batch + rows * out_row + here
    tl.store(out_ptr, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def _check(q, k, v, und_k, und_v, und_len, out) -> None:
    check_heads(q, k, v)
    check_heads(q, und_k, und_v, out)
    assert k.shape == v.shape and k.shape[::2] == und_k.shape[::2], (k.shape, v.shape, und_k.shape)
    assert k.shape[1] >= 1, k.shape
    batch, _, heads, _ = q.shape
    assert und_k.shape == und_v.shape and und_k.shape[0] == batch, (q.shape, und_k.shape)
    assert heads % und_k.shape[2] == 0 and out.shape == q.shape, (q.shape, und_k.shape, out.shape)
    assert und_len.shape == (batch,) and und_len.is_contiguous(), und_len.shape
    assert und_len.dtype == torch.int32 and und_len.device == q.device, und_len.dtype


def attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    und_k: torch.Tensor,
    und_v: torch.Tensor,
    und_len: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """`attention` in one Triton launch; shapes as there.

    Without a tile, keys that TMA cannot read go by plain loads, to the same bits.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    _check(q, k, v, und_k, und_v, und_len, out)
    (batch, tokens, heads, dim), kv_heads = q.shape, k.shape[2]
    if tile is None:
        tile = TILES[q.element_size()]
        tile = tile._replace(tma=tile.tma and all(map(is_flat, (k, v, und_k, und_v))))
    group = heads // kv_heads
    if tokens * batch:
        _attention_kernel[(triton.cdiv(tokens * group, tile.rows), kv_heads, batch)](
            *(q, k, v, und_k, und_v, und_len, out),
            *(descriptor(x, tile.keys) if tile.tma else None for x in (k, v, und_k, und_v)),
            *(s for x in (q, k, v, und_k, und_v, out) for s in x.stride()[:2]),
            tokens,
            k.shape[1],
            und_k.shape[1],
            log2_scale(dim),
            GROUP=group,
            DIM=dim,
            ROWS=tile.rows,
            KEYS=tile.keys,
            TAIL=tile.tail,
            STAGES=tile.stages,
            TMA=tile.tma,
            num_warps=tile.warps,
        )
    return out


def attention_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    und_k: torch.Tensor,
    und_v: torch.Tensor,
    und_len: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    tile: HopperTile = HOPPER_TILES["hopper-2"],
) -> torch.Tensor:
    """`attention` in one launch on a Hopper GPU: bfloat16, head_dim 128; shapes as there."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    _check(q, k, v, und_k, und_v, und_len, out)
    launch_hopper(q, k, v, und_k, und_v, und_len, out, tile=tile)
    return out


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    und_k: torch.Tensor,
    und_v: torch.Tensor,
    und_len: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [B, M, Hq, D], k, v [B, N, Hk, D], und_k, und_v [B, C, Hk, D] -> [B, M, Hq, D].

    und_len [B] int32 on the device, 0 to C, which is not checked. Batch and row may be strided,
    heads are packed; N >= 1. What runs is a matter of the GPU, the shapes, strides and the dtype.
    """
    way = "triton"
    if takes(q, k, v, und_k, und_v):
        batch, tokens, heads, _ = q.shape
        way = choice(tokens, batch * heads, heads // k.shape[2])
    if way == "triton":
        return attention_triton(q, k, v, und_k, und_v, und_len, out=out)
    tile = HOPPER_TILES[way]
    return attention_hopper(q, k, v, und_k, und_v, und_len, out=out, tile=tile)
