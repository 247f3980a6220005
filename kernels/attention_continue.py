"""Continues an online softmax, in place, over UND keys of device-side length.

    lse' = log(e^lse + sum_j e^s_j),   out' = out e^(lse - lse') + sum_j e^(s_j - lse') v[j]

for s_j = q . k[j] D^-0.5 over the first und_len keys; cuDNN gave out and lse over the GEN keys.
There are few UND keys, so this is a matter of bytes (q and out in, out' back) and of latency: small
blocks and constant row strides take few registers, which leaves room for several programs an SM.
Accumulation is float32 (online_softmax.py); a program's rows are (token, head of the group) pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .online_softmax import check_und, log2_scale, over_blocks


class ContinueTile(NamedTuple):
    """Rows (token-head pairs) and keys of a block, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


# By bytes of an element, the fastest of twelve at D and E on an H200 (two branches of D: 75 us,
# where the bytes alone take 36). float32 runs on FMA units: a larger block spills its registers.
TILES = {2: ContinueTile(64, 32, 4, 2), 4: ContinueTile(16, 32, 8, 1)}

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["tokens"])
def _continue_kernel(
    q_ptr, k_ptr, v_ptr, und_len_ptr, before_ptr, lse_ptr, out_ptr,
    q_batch, k_batch, v_batch, before_batch, out_batch, tokens, scale,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, BEFORE_ROW: tl.constexpr,
    OUT_ROW: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, STORE_LSE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    und_len = tl.load(und_len_ptr + batch)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    inside = (token < tokens)[:, None]
    here = (head * DIM)[:, None] + tl.arange(0, DIM)[None, :]
    rows = token[:, None].to(tl.int64)
    q_ptr += batch * q_batch + rows * Q_ROW + here
    q = tl.load(q_ptr, mask=inside, other=0.0, eviction_policy="evict_first")
    lse_ptr += (batch * tl.num_programs(1) * GROUP + head) * tokens + token
    lse = tl.load(lse_ptr, mask=token < tokens, other=0.0) * _LOG2E
    before_ptr += batch * before_batch + rows * BEFORE_ROW + here
    before = tl.load(before_ptr, mask=inside, other=0.0, eviction_policy="evict_first")
    acc, top = before.to(tl.float32), lse
    total = tl.full([ROWS], 1.0, tl.float32)
    k_ptr += batch * k_batch + kv_head * DIM
    v_ptr += batch * v_batch + kv_head * DIM
    acc, top, total = over_blocks(
        acc, top, total, q, k_ptr, v_ptr, K_ROW, V_ROW, None, None, 0, 0,
        0, und_len, token, scale, DIM, KEYS, STAGES, True, False, False,
    )  # fmt: skip
    out_ptr += batch * out_batch + rows * OUT_ROW + here
    tl.store(out_ptr, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    if STORE_LSE:
        tl.store(lse_ptr, (top + tl.math.log2(total)) * _LN2, mask=token < tokens)


def launch_continue(
    q: torch.Tensor,
    before: torch.Tensor,
    lse: torch.Tensor,
    und_k: torch.Tensor,
    und_v: torch.Tensor,
    und_len: torch.Tensor,
    out: torch.Tensor,
    *,
    store_lse: bool,
    tile: ContinueTile | None = None,
) -> None:
    """`attention_continue` from before [B, M, Hq, D] into out, which may be the same tensor."""
    (batch, tokens, heads, dim), kv_heads = q.shape, und_k.shape[2]
    assert lse.shape == (batch, heads, tokens), (lse.shape, q.shape)
    assert lse.is_contiguous() and lse.dtype == torch.float32, (lse.stride(), lse.dtype)
    assert before.shape == q.shape and before.stride()[2:] == (dim, 1), before.stride()
    tile, group = tile or TILES[q.element_size()], heads // kv_heads
    if not tokens * batch:
        return
    tensors = q, und_k, und_v, before, out
    _continue_kernel[(triton.cdiv(tokens * group, tile.rows), kv_heads, batch)](
        *(q, und_k, und_v, und_len, before, lse, out),
        *(x.stride(0) for x in tensors),
        tokens,
        log2_scale(dim),
        *(x.stride(1) for x in tensors),
        GROUP=group,
        DIM=dim,
        STORE_LSE=store_lse,
        ROWS=tile.rows,
        KEYS=tile.keys,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )


def attention_continue(
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    und_k: torch.Tensor,
    und_v: torch.Tensor,
    und_len: torch.Tensor,
    *,
    tile: ContinueTile | None = None,
) -> None:
    """Continue over the UND keys, in place, the softmax that gave out [B, M, Hq, D].

    q [B, M, Hq, D], und_k, und_v [B, C, Hk, D], und_len [B] int32 on the device, 0 to C, unchecked.
    lse [B, Hq, M] float32 contiguous: natural log of the sum of exponentials of the scaled scores
    so far. Both are overwritten; with und_len 0 out keeps its bits.
    """
    check_und(q, und_k, und_v, und_len, out)
    launch_continue(q, out, lse, und_k, und_v, und_len, out, store_lse=True, tile=tile)
