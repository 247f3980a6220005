"""Causal grouped-query flash attention, for the prompt's tower.

    out[i, h] = sum_{j <= i} softmax_j(q[i, h] . k[j, h // G] D^-0.5) v[j, h // G],   G = Hq / Hk

q [n, Hq, D], k, v [n, Hk, D] -> [n, Hq, D], float32 accumulation (online_softmax.py). A program's
rows are (token, head of the group) pairs; only the blocks on the diagonal are masked. The programs
with the most keys start first, over all heads.

H200, bf16, microseconds of this kernel and of torch's fastest attention (cuDNN throughout), by
tokens and heads:

    tokens        160        256        512        1024       2048       3072        4096
    32/8      6.6, 10.0  7.8, 10.5  12.5, 14.8  24.8, 33.2  75.6, 84.1  160, 163   286, 265
    16/4                  6.7, 10.0   9.8, 13.6  18.4, 21.2  39.2, 53.9  83.1, 96.2  134, 153
    8/2                   6.5, 9.5    9.3, 13.5  14.9, 20.4  30.7, 34.0  47.6, 62.0  67.2, 97.1

cuDNN is not taken at 4096: it builds a plan for every new number of tokens, which takes 28 to 30 ms
where it would save 0.02 ms in each of 35 layers. torch's flash attention, without plans, takes 517.
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


# (at most so many tokens, 2-byte tile), the fastest of 24 on an H200 up to 2048 tokens. A launch
# with TMA takes 12 us more of the host, which is what a short prompt waits for. The mask's branch
# in the loop costs up to 6 % of a long one, what follows the loop 1 us of each program. float32
# runs on FMA units: a larger block spills its registers.
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
