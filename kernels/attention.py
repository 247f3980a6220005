"""Grouped-query flash attention over [GEN keys | the first und_len UND keys].

    out[m, h] = sum_j softmax_j(q[m, h] . k[j, h // G] * D^-0.5) v[j, h // G],   G = Hq / Hk

The number of GEN keys is known to the host, that of UND keys is read on the device: one graph
serves every prompt length up to the buffer's capacity, and what lies past the length is not loaded.
Accumulation is float32 (online_softmax.py). A program's rows are (token, head of the group) pairs:
all heads of a group share the keys it loads.

cuDNN wants its lengths on the host: it takes the GEN keys and returns its log-sum-exp, from which
`attention_continue` goes on over the UND keys.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .causal_attention import causal_attention
from .online_softmax import Tile, check_heads, descriptor, log2_scale, over_blocks

__all__ = [
    "attention",
    "attention_choice",
    "attention_continue",
    "attention_cudnn",
    "attention_triton",
    "causal_attention",
]


# By bytes of an element. 64 x 64 with 4 warps and 3 stages won at D, E and S on the H200. float32
# runs on FMA units: a larger block spills its registers.
TILES = {2: Tile(64, 64, 4, 3), 4: Tile(16, 32, 8, 1)}
CONTINUE_TILES = {2: Tile(64, 64, 4, 3), 4: Tile(16, 32, 8, 1)}

# Which one runs, by (query tokens, GEN keys) of one batch element; elsewhere the nearest row in log
# scale. `python tests/gpu_kernels.py` prints rows; these are of a plain Triton kernel against cuDNN
# over all keys, without the continuation (H200, 32 query and 8 key/value heads of 128): 20 against
# 19 us at 406, 180 against 130 at 1966, 400 against 321 at 3093.
ATTENTION_CHOICE = {
    (406, 406): "triton",
    (774, 3093): "cudnn",
    (1547, 3093): "cudnn",
    (1966, 1966): "cudnn",
    (3093, 3093): "cudnn",
}

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _over_keys(
    acc, top, total, q, k_ptr, v_ptr, k_row, v_row, k_desc, v_desc, desc_row, desc_column,
    length, token, scale,
    DIM: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The online softmax over the first length keys: whole blocks without masks, then the tail."""
    whole = length // KEYS * KEYS
    acc, top, total = over_blocks(
        acc, top, total, q, k_ptr, v_ptr, k_row, v_row, k_desc, v_desc, desc_row, desc_column,
        0, whole, token, scale, DIM, KEYS, STAGES, False, False, TMA,
    )  # fmt: skip
    return over_blocks(
        acc, top, total, q, k_ptr, v_ptr, k_row, v_row, None, None, 0, 0,
        whole, length, token, scale, DIM, KEYS, 1, True, False, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "gen_keys", "capacity"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, und_k_ptr, und_v_ptr, und_len_ptr, before_ptr, lse_ptr, out_ptr,
    k_desc, v_desc, und_k_desc, und_v_desc,
    q_batch, q_row, k_batch, k_row, v_batch, v_row, und_k_batch, und_k_row, und_v_batch, und_v_row,
    before_batch, before_row, out_batch, out_row, tokens, gen_keys, capacity, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, CONTINUE: tl.constexpr, STORE_LSE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    kv_head, element = tl.program_id(1), tl.program_id(2)
    batch = element.to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, DIM)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    inside = (token < tokens)[:, None]
    here = (head * DIM)[:, None] + at[None, :]
    rows = token[:, None].to(tl.int64)
    q = tl.load(q_ptr + batch * q_batch + rows * q_row + here, mask=inside, other=0.0)
    lse_ptr += (batch * tl.num_programs(1) * GROUP + head) * tokens + token
    if CONTINUE:
        before_ptr += batch * before_batch + rows * before_row + here
        acc = tl.load(before_ptr, mask=inside, other=0.0).to(tl.float32)
        top = tl.load(lse_ptr, mask=token < tokens, other=0.0) * _LOG2E
        total = tl.full([ROWS], 1.0, tl.float32)
    else:
        acc = tl.zeros([ROWS, DIM], tl.float32)
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        k_ptr += batch * k_batch + kv_head * DIM
        v_ptr += batch * v_batch + kv_head * DIM
        acc, top, total = _over_keys(
            acc, top, total, q, k_ptr, v_ptr, k_row, v_row, k_desc, v_desc,
            element * gen_keys, kv_head * DIM, gen_keys, token, scale, DIM, KEYS, STAGES, TMA,
        )  # fmt: skip
    und_k_ptr += batch * und_k_batch + kv_head * DIM
    und_v_ptr += batch * und_v_batch + kv_head * DIM
    und_len = tl.load(und_len_ptr + batch)
    acc, top, total = _over_keys(
        acc, top, total, q, und_k_ptr, und_v_ptr, und_k_row, und_v_row, und_k_desc, und_v_desc,
        element * capacity, kv_head * DIM, und_len, token, scale, DIM, KEYS, STAGES, TMA,
    )  # fmt: skip
    out_ptr += batch * out_batch + rows * out_row + here
    tl.store(out_ptr, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    if STORE_LSE:
        tl.store(lse_ptr, (top + tl.math.log2(total)) * _LN2, mask=token < tokens)


def _check_und(q, k, v, und_k, und_v, und_len, out) -> None:
    check_heads(q, k, v, und_k, und_v, out)
    batch, _, heads, _ = q.shape
    assert k.shape == v.shape and und_k.shape == und_v.shape, (k.shape, v.shape, und_v.shape)
    assert k.shape[0] == und_k.shape[0] == batch, (q.shape, k.shape, und_k.shape)
    assert k.shape[2] == und_k.shape[2] and heads % k.shape[2] == 0, (q.shape, k.shape)
    assert out.shape == q.shape and k.shape[1] >= 1, (out.shape, q.shape, k.shape)
    assert und_len.shape == (batch,) and und_len.is_contiguous(), und_len.shape
    assert und_len.dtype == torch.int32 and und_len.device == q.device, und_len.dtype


def _launch(q, k, v, und_k, und_v, und_len, before, lse, out, tile) -> torch.Tensor:
    """lse None: softmax from the start over k, v; else continued from (before, lse)."""
    (batch, tokens, heads, dim), kv_heads = q.shape, und_k.shape[2]
    group = heads // kv_heads
    if tokens * batch:
        _attention_kernel[(triton.cdiv(tokens * group, tile.rows), kv_heads, batch)](
            *(q, k, v, und_k, und_v, und_len, before, q if lse is None else lse, out),
            *(descriptor(x, tile.keys) if tile.tma else None for x in (k, v, und_k, und_v)),
            *(s for x in (q, k, v, und_k, und_v, before, out) for s in x.stride()[:2]),
            tokens,
            k.shape[1],
            und_k.shape[1],
            log2_scale(dim),
            GROUP=group,
            DIM=dim,
            CONTINUE=lse is not None,
            STORE_LSE=lse is not None,
            ROWS=tile.rows,
            KEYS=tile.keys,
            STAGES=tile.stages,
            TMA=tile.tma,
            num_warps=tile.warps,
        )
    return out


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
    """`attention` in one Triton launch; shapes as there."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    _check_und(q, k, v, und_k, und_v, und_len, out)
    tile = tile or TILES[q.element_size()]
    return _launch(q, k, v, und_k, und_v, und_len, q, None, out, tile)


def attention_continue(
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    und_k: torch.Tensor,
    und_v: torch.Tensor,
    und_len: torch.Tensor,
    *,
    tile: Tile | None = None,
) -> None:
    """Continue over the UND keys, in place, the softmax that gave out [B, M, Hq, D].

    lse [B, Hq, M] float32 contiguous: natural log of the sum of exponentials of the scaled scores
    so far. Both are overwritten; with und_len 0 out keeps its bits. The rest as in `attention`.
    """
    _check_und(q, und_k, und_v, und_k, und_v, und_len, out)
    _check_lse(q, lse)
    tile = tile or CONTINUE_TILES[q.element_size()]
    _launch(q, und_k, und_v, und_k, und_v, und_len, out, lse, out, tile)


def _check_lse(q: torch.Tensor, lse: torch.Tensor) -> None:
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]), (lse.shape, q.shape)
    assert lse.is_contiguous() and lse.dtype == torch.float32, (lse.stride(), lse.dtype)


def attention_cudnn(
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
    """`attention` by cuDNN over the GEN keys, continued by Triton over the UND keys.

    2-byte dtypes. cuDNN takes grouped heads as they are, lays its output out like q and keeps its
    plans per thread: run it once in the capturing thread before a capture.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    _check_und(q, k, v, und_k, und_v, und_len, out)
    assert q.element_size() == 2, f"cuDNN attention needs a 2-byte dtype, not {q.dtype}"
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(
        queries, keys, values, None, True, scale=q.shape[3] ** -0.5
    )
    before, lse = result[0].transpose(1, 2), result[1].view(q.shape[0], q.shape[2], q.shape[1])
    assert before.stride()[2:] == (q.shape[3], 1), before.stride()
    tile = tile or CONTINUE_TILES[2]
    return _launch(q, und_k, und_v, und_k, und_v, und_len, before, lse, out, tile)


def attention_choice(tokens: int, keys: int) -> str:
    """ "triton" or "cudnn": the row of ATTENTION_CHOICE nearest to (tokens, keys) in log scale."""
    here = math.log(tokens), math.log(keys)
    nearest = min(ATTENTION_CHOICE, key=lambda row: math.dist(here, [math.log(n) for n in row]))
    return ATTENTION_CHOICE[nearest]


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
    heads are packed; N >= 1. What runs is a matter of the shapes and the dtype alone.
    """
    if q.element_size() == 2 and attention_choice(q.shape[1], k.shape[1]) == "cudnn":
        return attention_cudnn(q, k, v, und_k, und_v, und_len, out=out)
    return attention_triton(q, k, v, und_k, und_v, und_len, out=out)
