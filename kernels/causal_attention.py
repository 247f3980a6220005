"""Causal grouped-query flash attention, for the prompt's tower.

    out[i, h] = sum_{j <= i} softmax_j(q[i, h] . k[j, h // G] D^-0.5) v[j, h // G],   G = Hq / Hk

q [n, Hq, D], k, v [n, Hk, D] -> [n, Hq, D], float32 accumulation (online_softmax.py). A program's
rows are (token, head of the group) pairs; only the blocks on the diagonal are masked. The programs
with the most keys start first, over all heads.

H200, bf16, head_dim 128: microseconds of this kernel and of torch's fastest attention (cuDNN, its
plan made before), in one run, by tokens and heads:

    tokens   160        256       512         1024        2048        3072        4096
    32/8     6.3, 9.7   7.6, 9.9  11.6, 13.9  24.9, 32.3  77.8, 82.2  175, 167    312, 286
    16/4     5.9, 9.1   7.0, 9.5  9.7, 13.3   18.3, 20.6  40.2, 53.4  87.2, 94.4  147, 158
    8/2      5.6, 8.7   6.6, 8.7  9.3, 12.8   15.1, 19.8  31.7, 33.6  50.1, 61.3  71.5, 94.5

cuDNN is not taken where it is ahead: it makes a plan for every new number of tokens, in 28 to 30
ms, and would save 1 in the 35 layers of a prompt of 4096. torch's flash attention needs no plans
and takes 517.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .online_softmax import check_heads, descriptor, is_flat, log2_scale, over_blocks


class CausalTile(NamedTuple):
    """Rows (token-head pairs) and keys of a block, warps, pipeline stages, keys loaded by TMA, the
    blocks on the diagonal after the pipelined loop instead of at its end.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool = False
    split: bool = False


# (at most so many tokens, 2-byte tile), the fastest of 26 on an H200; up to 256 tokens, TMA would
# save 0.3 us of the GPU and cost 12 of the host, for which a short prompt waits. One loop saves up
# to 1.6 us below 2048 tokens, its branch costs up to 7 % at 3072. float32 runs on FMA units: a
# larger block spills its registers.
TILES = (
    (256, CausalTile(64, 64, 4, 3)),
    (2560, CausalTile(64, 64, 4, 3, tma=True)),
    (1 << 31, CausalTile(64, 64, 4, 3, tma=True, split=True)),
)
FLOAT32 = CausalTile(16, 32, 8, 1, split=True)


def tile_for(tokens: int, size: int) -> CausalTile:
    """Settings for that many tokens of elements of that many bytes."""
    return next(tile for limit, tile in TILES if tokens <= limit) if size == 2 else FLOAT32


@triton.jit(do_not_specialize=["tokens"])
def _causal_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, k_desc, v_desc, q_row, k_row, v_row, out_row, tokens, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    kv_head, block = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
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
    # Every row sees all keys before the diagonal, and one of its first block: no row's top stays
    # -inf.
    diagonal = block * ROWS // GROUP // KEYS * KEYS
    seen = tl.minimum(((block + 1) * ROWS - 1) // GROUP + 1, tokens)
    start = 0
    if SPLIT:
        acc, top, total = over_blocks(
            acc, top, total, q, k_ptr, v_ptr, k_row, v_row, k_desc, v_desc, 0, kv_head * DIM,
            0, diagonal, token, scale, DIM, KEYS, STAGES, False, False, TMA,
        )  # fmt: skip
        start = diagonal
    acc, top, total = over_blocks(
        acc, top, total, q, k_ptr, v_ptr, k_row, v_row, k_desc, v_desc, 0, kv_head * DIM,
        start, seen, token, scale, DIM, KEYS, 1 if SPLIT else STAGES, not TMA, True, TMA, diagonal,
    )  # fmt: skip
    out_ptr += rows * out_row + here
    tl.store(out_ptr, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    tile: CausalTile | None = None,
) -> torch.Tensor:
    """q [n, Hq, D], k, v [n, Hk, D] -> [n, Hq, D]: token i attends to tokens 0 to i.

    Rows may be strided, heads are packed. A NaN in v may reach tokens of the same block in front of
    it. Without a tile, keys that TMA cannot read go by plain loads, to the same bits.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    check_heads(q, k, v, out)
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    assert k.shape == v.shape and k.shape[0] == tokens, (q.shape, k.shape, v.shape)
    assert out.shape == q.shape and heads % kv_heads == 0, (out.shape, q.shape, k.shape)
    if tile is None:
        tile = tile_for(tokens, q.element_size())
        tile = tile._replace(tma=tile.tma and is_flat(k[None]) and is_flat(v[None]))
    group = heads // kv_heads
    if tokens:
        _causal_kernel[(kv_heads, triton.cdiv(tokens * group, tile.rows))](
            *(q, k, v, out),
            *(descriptor(x[None], tile.keys) if tile.tma else None for x in (k, v)),
            *(x.stride(0) for x in (q, k, v, out)),
            tokens,
            log2_scale(dim),
            GROUP=group,
            DIM=dim,
            ROWS=tile.rows,
            KEYS=tile.keys,
            STAGES=tile.stages,
            TMA=tile.tma,
            SPLIT=tile.split,
            num_warps=tile.warps,
        )
    return out
