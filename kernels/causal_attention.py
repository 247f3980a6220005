"""Causal grouped-query flash attention, for the prompt's tower.

    out[i, h] = sum_{j <= i} softmax_j(q[i, h] . k[j, h // G] D^-0.5) v[j, h // G],   G = Hq / Hk

q [n, Hq, D], k, v [n, Hk, D] -> [n, Hq, D], float32 accumulation (online_softmax.py). A program's
rows are (token, head of the group) pairs; only the blocks on the diagonal are masked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .online_softmax import Tile, check_heads, log2_scale, over_blocks

# (at most so many tokens, 2-byte tile): 7.3, 40.1 and 325 us at 160, 1024 and 4096 tokens (H200, 32
# and 8 heads of 128). float32 runs on FMA units: a larger block spills its registers.
TILES = ((512, Tile(64, 32, 4, 4)), (2048, Tile(64, 64, 4, 3)), (1 << 31, Tile(128, 64, 8, 3)))
FLOAT32 = Tile(16, 32, 8, 1)


def tile_for(tokens: int, size: int) -> Tile:
    """Settings for that many tokens of elements of that many bytes."""
    return next(tile for limit, tile in TILES if tokens <= limit) if size == 2 else FLOAT32


@triton.jit(do_not_specialize=["tokens"])
def _causal_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, q_row, k_row, v_row, out_row, tokens, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # The last rows see the most keys: they start first.
    block, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    row = block * ROWS + tl.arange(0, ROWS)
    token = row // GROUP
    inside = (token < tokens)[:, None]
    here = ((kv_head * GROUP + row % GROUP) * DIM)[:, None] + tl.arange(0, DIM)[None, :]
    rows = token[:, None].to(tl.int64)
    q = tl.load(q_ptr + rows * q_row + here, mask=inside, other=0.0)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    k_ptr += kv_head * DIM
    v_ptr += kv_head * DIM
    seen_by_all = (block * ROWS // GROUP + 1) // KEYS * KEYS
    seen = tl.minimum(((block + 1) * ROWS - 1) // GROUP + 1, tokens)
    acc, top, total = over_blocks(
        acc, top, total, q, k_ptr, v_ptr, k_row, v_row, None, None, 0, 0,
        0, seen_by_all, token, scale, DIM, KEYS, STAGES, False, False, False,
    )  # fmt: skip
    acc, top, total = over_blocks(
        acc, top, total, q, k_ptr, v_ptr, k_row, v_row, None, None, 0, 0,
        seen_by_all, seen, token, scale, DIM, KEYS, 1, True, True, False,
    )  # fmt: skip
    out_ptr += rows * out_row + here
    tl.store(out_ptr, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """q [n, Hq, D], k, v [n, Hk, D] -> [n, Hq, D]: token i attends to tokens 0 to i.

    Rows may be strided, heads are packed.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    check_heads(q, k, v, out)
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    assert k.shape == v.shape and k.shape[0] == tokens, (q.shape, k.shape, v.shape)
    assert out.shape == q.shape and heads % kv_heads == 0, (out.shape, q.shape, k.shape)
    tile = tile or tile_for(tokens, q.element_size())
    group = heads // kv_heads
    if tokens:
        _causal_kernel[(triton.cdiv(tokens * group, tile.rows), kv_heads)](
            *(q, k, v, out),
            *(x.stride(0) for x in (q, k, v, out)),
            tokens,
            log2_scale(dim),
            GROUP=group,
            DIM=dim,
            ROWS=tile.rows,
            KEYS=tile.keys,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
    return out
