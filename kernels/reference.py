"""Plain torch reference of every fused operation: one function per op, signatures as the kernels'.

It serves CPU tensors, tests and benchmarks. Nothing here waits for the device, so each function can
be captured. Intermediate precision is float32 (float64 for float64 inputs); where the model rounds
in between, so does the reference. `conv_input` and `conv_edges` are in `reference_conv.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

__all__ = [
    "add_rms_norm",
    "attention",
    "causal_attention",
    "gate_up_silu",
    "image_to_tensor",
    "interleave_add",
    "legacy_normal",
    "qk_norm_rope",
    "rms_norm",
    "silu_mul",
    "timestep_add",
    "unipc_step",
]


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _give(value: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    return value if out is None else out.copy_(value)


def _normalise(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [M, H], weight [H] -> [M, H]: normalised in float32, rounded to x.dtype, times weight."""
    return _give(_normalise(x, weight, eps), out)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual [M, H] += x [M, H] in place (one rounding); returns rms_norm(residual) [M, H]."""
    residual.add_(x)
    return rms_norm(residual, weight, eps, out=out)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = _wide(x).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


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
) -> None:
    """Split qkv [M, (Hq + 2 Hk) D], normalise and rotate q and k per head, store q, k and v.

    q_weight, k_weight [D]; cos, sin [M, D/2] float32; element i pairs with i + D/2, both use column
    i. Writes q_out [M, Hq, D], k_out [M, Hk, D], v_out [M, Hk, D], whose rows may be strided.
    """
    rows, dim = qkv.shape[0], q_weight.shape[0]
    heads = [q_out.shape[1], k_out.shape[1], v_out.shape[1]]
    q, k, v = qkv.view(rows, -1, dim).split(heads, dim=1)
    cos, sin = cos[:, None], sin[:, None]
    q_out.copy_(_rotate(_normalise(q, q_weight, eps), cos, sin))
    k_out.copy_(_rotate(_normalise(k, k_weight, eps), cos, sin))
    v_out.copy_(v)


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
    """Unmasked grouped-query attention of q [B, M, Hq, D] over [k | first und_len[b] of und_k].

    k, v [B, N, Hk, D]; und_k, und_v [B, C, Hk, D]; und_len [B] int32 on the device; scale D**-0.5;
    query head h reads key/value head h // (Hq / Hk). Rows at and past und_len[b] may hold anything,
    NaN included.
    """
    valid = torch.arange(und_k.shape[1], device=q.device) < und_len[:, None]
    rows = valid[:, :, None, None]
    keys = torch.cat((k, und_k.where(rows, und_k.new_zeros(()))), dim=1)
    values = torch.cat((v, und_v.where(rows, und_v.new_zeros(()))), dim=1)
    mask = torch.cat((valid.new_ones(k.shape[:2]), valid), dim=1)[:, None, None]
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    result = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
    return _give(result.transpose(1, 2), out)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Causal grouped-query attention: q [n, Hq, D], k, v [n, Hk, D] -> [n, Hq, D]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    result = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return _give(result[0].transpose(0, 1), out)


def silu_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """gate_up [M, 2 I] -> silu(gate) * up [M, I]; gate is the first half, silu is rounded first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return _give(F.silu(gate) * up, out)


def gate_up_silu(
    x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [M, H], weight [2 I, H] = [Wg; Wu] -> silu(x Wg^T) * (x Wu^T) [M, I].

    Both products are rounded to the dtype first, then silu, as in `silu_mul`.
    """
    return silu_mul(F.linear(x, weight), out=out)


def timestep_add(
    x: torch.Tensor, table: torch.Tensor, step: torch.Tensor, noisy: torch.Tensor
) -> torch.Tensor:
    """x [M, H] += table [S, H][step] in place where noisy [M] uint8 is not 0; returns x.

    step is int32 [1] on the device of x.
    """
    row = table.index_select(0, step.long())
    return x.copy_(torch.where(noisy.bool()[:, None], x + row, x))


def _times(coefficient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """coefficient * x, and 0 times anything is 0: histories hold anything at the first steps."""
    return torch.where(coefficient == 0, torch.zeros_like(x), coefficient * x)


def unipc_step(
    velocity: torch.Tensor,
    sample: torch.Tensor,
    last_sample: torch.Tensor,
    x0_prev: torch.Tensor,
    x0_prev2: torch.Tensor,
    clean: torch.Tensor,
    noisy: torch.Tensor,
    coef: torch.Tensor,
    step: torch.Tensor,
    model_in: torch.Tensor,
) -> None:
    """Guidance, UniPC corrector and predictor, and clean parts re-imposed, all in place.

    velocity [G, N]: G = 1, or 2 with row 0 conditional c, row 1 unconditional u: v = u + g (c - u).
    sample, last_sample, x0_prev, x0_prev2, clean [N] of one dtype, in which all arithmetic is done;
    noisy [N] uint8; step int32 [1] on the device; model_in [N]: the new sample in its own dtype.
    coef [S, K], row coef[step] is
    (g, sigma, c_sample, c_last, c_m1, c_m2, c_x0, p_sample, p_x0, p_m1):

        x0   = sample - sigma v
        s    = c_sample sample + c_last last_sample + c_m1 x0_prev + c_m2 x0_prev2 + c_x0 x0
        next = p_sample s + p_x0 x0 + p_m1 x0_prev

    Then last_sample = s, x0_prev2 = x0_prev, x0_prev = x0, sample = next where noisy else clean.
    """
    row = coef.index_select(0, step.long())[0].to(sample.dtype)
    g, sigma, c_sample, c_last, c_m1, c_m2, c_x0, p_sample, p_x0, p_m1 = row.unbind()
    v = velocity.to(sample.dtype)
    v = v[0] if v.shape[0] == 1 else v[1] + g * (v[0] - v[1])
    x0 = sample - sigma * v
    s = _times(c_sample, sample) + _times(c_last, last_sample)
    s = s + _times(c_m1, x0_prev) + _times(c_m2, x0_prev2) + _times(c_x0, x0)
    following = _times(p_sample, s) + _times(p_x0, x0) + _times(p_m1, x0_prev)
    last_sample.copy_(s)
    x0_prev2.copy_(x0_prev)
    x0_prev.copy_(x0)
    sample.copy_(torch.where(noisy.bool(), following, clean))
    model_in.copy_(sample)


def interleave_add(
    phases: Sequence[torch.Tensor],
    source: torch.Tensor,
    *,
    time: int,
    first: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Four phases [T, O, h + 1, w + 1] and source [1, I, S, h, w] -> [1, O, T, 2 h, 2 w].

    With p, q = divmod(phase's number, 2), pixel (2 i + p, 2 j + q) of the channels-last result is
    phase (p, q) at (i + p, j + q) plus source at (i, j), rounded once. Frames (s, a), a < time, of
    source frame s follow one another; where the group is the `first`, source frame 0 has the last
    alone: T = S time - (time - 1 if first else 0). Channel o reads source channel
    ((o time + a) 4 + 2 p + q) // (4 time O / I); I / O divides 4 time.
    """
    frames, channels = phases[0].shape[:2]
    into, height, width = source.shape[1], *source.shape[3:]
    share, lead = into // channels, time - 1 if first else 0
    if out is None:
        shape = (1, channels, frames, 2 * height, 2 * width)
        kind = {"dtype": source.dtype, "device": source.device}
        out = torch.empty(shape, **kind, memory_format=torch.channels_last_3d)
    for number in range(4 * time):
        a, p, q = number // 4, number // 2 % 2, number % 2
        begin = (a - lead) % time
        phase = phases[2 * p + q][begin::time, :, p : p + height, q : q + width]
        channel, frame = number * share // (4 * time), (begin + lead) // time
        cells = source[0, channel::share, frame : frame + len(phase)].transpose(0, 1)
        torch.add(phase, cells, out=out[0, :, begin::time, p::2, q::2].transpose(0, 1))
    return out


def image_to_tensor(frames: torch.Tensor) -> torch.Tensor:
    """frames uint8 [T, H, W, 3] -> float32 [3, T, H, W]: x / 127.5 - 1, memory channels-last."""
    return frames.permute(3, 0, 1, 2).float() / 127.5 - 1


def legacy_normal(seed: int, count: int) -> torch.Tensor:
    """float32 [count] on the CPU: numpy's RandomState(seed), drawn in float64, then cast."""
    drawn = np.random.RandomState(seed).standard_normal(count)
    return torch.from_numpy(drawn.astype(np.float32))
