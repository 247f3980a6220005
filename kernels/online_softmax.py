"""The inner loop of flash attention: an online softmax over blocks of keys of one key/value head.

For rows of queries q, over keys j in [start, stop), with s = scale q . k[j] (log2 e is in scale):

    top' = max(top, s),  total' = total 2^(top - top') + sum_j 2^(s - top'),
    acc' = acc 2^(top - top') + sum_j 2^(s - top') v[j]

Scores and sums are float32; the weights are rounded to v's dtype for the second product. Whole
blocks are loaded without masks, by TMA if asked; the rest by smaller blocks that are masked, so
that nothing at or past stop is read, NaN or not.
Source: FlashAttention-2 (Dao 2023), online softmax (Milakov and Gimelshein 2018).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


class Tile(NamedTuple):
    """Rows (token-head pairs) and keys of a block, warps, pipeline stages, keys loaded by TMA, keys
    of a masked block.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool = False
    tail: int = 32


@triton.jit
def over_blocks(
    acc, top, total, q, k_ptr, v_ptr, k_row, v_row, k_desc, v_desc, desc_row, desc_column,
    start, stop, token, scale,
    DIM: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    TAIL: tl.constexpr, CAUSAL: tl.constexpr, TMA: tl.constexpr, diagonal=0,
):  # fmt: skip
    """(acc [R, D], top [R], total [R]) after keys [start, stop); TMA reads through descriptors.

    k_ptr and v_ptr point at key 0 of the head; key 0 is (desc_row, desc_column) of a descriptor.
    CAUSAL hides the keys after each row's token in the blocks from key `diagonal` on, and then TMA
    may read past stop, zeros past the descriptor's end.
    """
    column = tl.arange(0, KEYS)
    at = tl.arange(0, DIM)
    k_offsets = column[None, :] * k_row + at[:, None]
    v_offsets = column[:, None] * v_row + at[None, :]
    for first in tl.range(start, stop, KEYS, num_stages=STAGES):
        key = first + column
        k_block = k_ptr + tl.cast(first, tl.int64) * k_row + k_offsets
        v_block = v_ptr + tl.cast(first, tl.int64) * v_row + v_offsets
        if TMA:
            k = k_desc.load([desc_row + first, desc_column]).T
        elif TAIL:
            k = tl.load(k_block, mask=(key < stop)[None, :], other=0.0)
            v = tl.load(v_block, mask=(key < stop)[:, None], other=0.0)  # with k: one latency
        else:
            k = tl.load(k_block)
            if STAGES == 1:
                v = tl.load(v_block)
        scores = tl.dot(q, k, input_precision="ieee")
        if CAUSAL:  # which hides the keys from stop on, too
            if first >= diagonal:
                scores = tl.where(key[None, :] <= token[:, None], scores, -float("inf"))
        elif TAIL:
            scores = tl.where((key < stop)[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.math.exp2(scores * scale - new_top[:, None])
        kept = tl.math.exp2(top - new_top)
        if TMA:
            v = v_desc.load([desc_row + first, desc_column])
        elif not TAIL and STAGES > 1:
            v = tl.load(v_block)
        total = total * kept + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def over_keys(
    acc, top, total, q, k_ptr, v_ptr, k_row, v_row, k_desc, v_desc, desc_row, desc_column,
    length, token, scale,
    DIM: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """over_blocks on the first length keys: whole blocks of KEYS, then masked ones of TAIL."""
    whole = length // KEYS * KEYS
    acc, top, total = over_blocks(
        acc, top, total, q, k_ptr, v_ptr, k_row, v_row, k_desc, v_desc, desc_row, desc_column,
        0, whole, token, scale, DIM, KEYS, STAGES, False, False, TMA,
    )  # fmt: skip
    return over_blocks(
        acc, top, total, q, k_ptr, v_ptr, k_row, v_row, None, None, 0, 0,
        whole, length, token, scale, DIM, TAIL, 1, True, False, False,
    )  # fmt: skip


def log2_scale(dim: int) -> float:
    """D**-0.5 log2(e): scores in base 2."""
    return dim**-0.5 * math.log2(math.e)


def is_flat(x: torch.Tensor) -> bool:
    """Whether TMA can read x [B, N, Hk, D]: one stride over (B, N), everything at 16 bytes."""
    aligned = (x.data_ptr() | x.stride(1) * x.element_size()) % 16 == 0
    return aligned and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))


def descriptor(x: torch.Tensor, keys: int) -> TensorDescriptor:
    """TMA descriptor of x [B, N, Hk, D], flat over (B, N), in blocks of `keys` rows of one head."""
    batch, rows, heads, dim = x.shape
    assert is_flat(x), (x.shape, x.stride(), x.data_ptr())
    return TensorDescriptor(x, [batch * rows, heads * dim], [x.stride(1), 1], [keys, dim])


def check_heads(q: torch.Tensor, *others: torch.Tensor) -> None:
    """q [..., Hq, D]: one dtype and device, heads packed, D a power of two of at least 16."""
    dim = q.shape[-1]
    assert dim >= 16 and dim & (dim - 1) == 0, f"head_dim {dim} is no power of two of at least 16"
    for x in (q, *others):
        assert x.ndim == q.ndim and x.shape[-1] == dim, (x.shape, q.shape)
        assert x.stride(-1) == 1 and (x.stride(-2) == dim or x.shape[-2] == 1), x.stride()
        assert x.dtype == q.dtype and x.device == q.device, (x.dtype, q.dtype, x.device, q.device)
