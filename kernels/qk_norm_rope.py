"""One launch: split a QKV product, normalise and rotate queries and keys per head, store all.

    n = round(x * rsqrt(mean(x^2) + eps)) * weight                        per head of D elements
    y[i] = n[i] cos[i] - n[i + D/2] sin[i],  y[i + D/2] = n[i + D/2] cos[i] + n[i] sin[i],  i < D/2

qkv [M, (Hq + 2 Hk) D] -> q [M, Hq, D], k [M, Hk, D], v [M, Hk, D] (copied). The mean, the products
and the rotation are float32, n is rounded to the dtype as in rms_norm, y is rounded once. Keys and
values go straight into the attention's buffers. Interleaving is a matter of the cos, sin tables.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# (heads a program, warps)
TILE = (8, 2)


@triton.jit
def _normalise(x, scale, weight):
    n = (x.to(tl.float32) * scale).to(x.dtype).to(tl.float32)
    return (n * weight.to(tl.float32)).to(x.dtype).to(tl.float32)


@triton.jit
def _qk_norm_rope_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    qkv_stride,
    table_stride,
    q_stride,
    k_stride,
    v_stride,
    eps,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, HALF)[None, :]
    is_q = head < QUERIES
    is_k = (head >= QUERIES) & (head < QUERIES + KEYS)
    is_v = (head >= QUERIES + KEYS) & (head < QUERIES + 2 * KEYS)
    qkv_ptr += row * qkv_stride + head * (2 * HALF) + at
    first = tl.load(qkv_ptr, mask=is_q | is_k | is_v, other=0.0)
    second = tl.load(qkv_ptr + HALF, mask=is_q | is_k | is_v, other=0.0)

    wide1, wide2 = first.to(tl.float32), second.to(tl.float32)
    squares = tl.sum(wide1 * wide1 + wide2 * wide2, axis=1)
    scale = (1.0 / tl.sqrt(squares / (2 * HALF) + eps))[:, None]
    weight1 = tl.where(is_q, tl.load(q_weight_ptr + at), tl.load(k_weight_ptr + at))
    weight2 = tl.where(is_q, tl.load(q_weight_ptr + HALF + at), tl.load(k_weight_ptr + HALF + at))
    n1 = _normalise(first, scale, weight1)
    n2 = _normalise(second, scale, weight2)
    cos = tl.load(cos_ptr + row * table_stride + at)
    sin = tl.load(sin_ptr + row * table_stride + at)
    y1 = (n1 * cos - n2 * sin).to(first.dtype)
    y2 = (n2 * cos + n1 * sin).to(first.dtype)

    q_ptr += row * q_stride + head * (2 * HALF) + at
    k_ptr += row * k_stride + (head - QUERIES) * (2 * HALF) + at
    v_ptr += row * v_stride + (head - QUERIES - KEYS) * (2 * HALF) + at
    tl.store(q_ptr, y1, mask=is_q & (at < HALF))
    tl.store(q_ptr + HALF, y2, mask=is_q & (at < HALF))
    tl.store(k_ptr, y1, mask=is_k & (at < HALF))
    tl.store(k_ptr + HALF, y2, mask=is_k & (at < HALF))
    tl.store(v_ptr, first, mask=is_v & (at < HALF))
    tl.store(v_ptr + HALF, second, mask=is_v & (at < HALF))


def _check(qkv, q_weight, k_weight, cos, sin, outputs) -> None:
    rows, dim = qkv.shape[0], q_weight.shape[0]
    assert dim >= 2 and dim & (dim - 1) == 0, f"head_dim {dim} is no power of two"
    heads = sum(x.shape[1] for x in outputs)
    assert qkv.shape == (rows, heads * dim) and qkv.stride(1) == 1, (qkv.shape, heads, dim)
    assert outputs[1].shape[1] == outputs[2].shape[1], [x.shape for x in outputs]
    for x in outputs:
        assert x.shape == (rows, x.shape[1], dim), (x.shape, qkv.shape)
        assert x.stride(2) == 1 and (x.stride(1) == dim or x.shape[1] == 1), x.stride()
        assert x.dtype == qkv.dtype and x.device == qkv.device, (x.dtype, x.device)
    for x in (q_weight, k_weight):
        assert x.shape == (dim,) and x.is_contiguous() and x.dtype == qkv.dtype, (x.shape, x.dtype)
    for x in (cos, sin):
        assert x.shape == (rows, dim // 2) and x.dtype == torch.float32, (x.shape, x.dtype)
        assert x.stride() == cos.stride() and x.stride(1) == 1, (cos.stride(), sin.stride())


def qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    tile: tuple[int, int] | None = None,
) -> None:
    """qkv [M, (Hq + 2 Hk) D]; q_weight, k_weight [D] of its dtype; cos, sin [M, D/2] float32.

    Writes q_out [M, Hq, D], k_out [M, Hk, D], v_out [M, Hk, D], whose rows may be strided; D = 2^j.
    """
    _check(qkv, q_weight, k_weight, cos, sin, (q_out, k_out, v_out))
    queries, keys, dim = q_out.shape[1], k_out.shape[1], q_out.shape[2]
    heads, warps = tile or TILE
    heads = min(heads, triton.next_power_of_2(queries + 2 * keys))
    if qkv.shape[0]:
        _qk_norm_rope_kernel[(qkv.shape[0], triton.cdiv(queries + 2 * keys, heads))](
            *(qkv, q_weight, k_weight, cos, sin, q_out, k_out, v_out),
            qkv.stride(0),
            cos.stride(0),
            q_out.stride(0),
            k_out.stride(0),
            v_out.stride(0),
            eps,
            QUERIES=queries,
            KEYS=keys,
            HALF=dim // 2,
            HEADS=heads,
            num_warps=warps,
        )
