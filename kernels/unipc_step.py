"""One solver step over the flat state: guidance, corrector, predictor, clean parts re-imposed.

    v    = u + g (c - u), or c alone
    x0   = sample - sigma v
    s    = c_sample sample + c_last last_sample + c_m1 x0_prev + c_m2 x0_prev2 + c_x0 x0
    next = p_sample s + p_x0 x0 + p_m1 x0_prev

    last_sample, x0_prev2, x0_prev, sample = s, x0_prev, x0, next where noisy else clean
    model_in = sample, cast

s is the corrector's result, next the predictor's. All arithmetic is float32; one pass, in place.
The coefficients are row coef[step], read on the device: one graph serves every step. A coefficient
of 0 drops its term whatever the history holds, so nothing of an earlier request, NaN included,
reaches a later one.
Source: UniPC (Zhao et al. 2023), bh2, predict-x0, as a linear combination; cosmos3_fast.sampler.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Columns of a row of coefficients.
COLUMNS = (
    "guidance",
    "sigma",
    "c_sample",
    "c_last",
    "c_m1",
    "c_m2",
    "c_x0",
    "p_sample",
    "p_x0",
    "p_m1",
)
GUIDANCE, SIGMA, C_SAMPLE, C_LAST, C_M1, C_M2, C_X0, P_SAMPLE, P_X0, P_M1 = (
    tl.constexpr(i) for i in range(len(COLUMNS))
)

# (elements a program, warps): a state has about 6e5 elements, so this is latency, not bandwidth.
TILE = (512, 4)


@triton.jit
def _times(coefficient, x):
    return tl.where(coefficient == 0.0, 0.0, coefficient * x)


@triton.jit
def _unipc_step_kernel(
    velocity_ptr,
    sample_ptr,
    last_sample_ptr,
    x0_prev_ptr,
    x0_prev2_ptr,
    clean_ptr,
    noisy_ptr,
    coef_ptr,
    step_ptr,
    model_in_ptr,
    velocity_stride,
    coef_stride,
    size,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    c = coef_ptr + tl.load(step_ptr).to(tl.int64) * coef_stride
    v = tl.load(velocity_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        u = tl.load(velocity_ptr + velocity_stride + at, mask=inside, other=0.0).to(tl.float32)
        v = u + tl.load(c + GUIDANCE) * (v - u)
    sample = tl.load(sample_ptr + at, mask=inside, other=0.0)
    last_sample = tl.load(last_sample_ptr + at, mask=inside, other=0.0)
    x0_prev = tl.load(x0_prev_ptr + at, mask=inside, other=0.0)
    x0_prev2 = tl.load(x0_prev2_ptr + at, mask=inside, other=0.0)
    x0 = sample - tl.load(c + SIGMA) * v
    s = _times(tl.load(c + C_SAMPLE), sample) + _times(tl.load(c + C_LAST), last_sample)
    s += _times(tl.load(c + C_M1), x0_prev) + _times(tl.load(c + C_M2), x0_prev2)
    s += _times(tl.load(c + C_X0), x0)
    following = _times(tl.load(c + P_SAMPLE), s) + _times(tl.load(c + P_X0), x0)
    following += _times(tl.load(c + P_M1), x0_prev)
    clean = tl.load(clean_ptr + at, mask=inside, other=0.0)
    noisy = tl.load(noisy_ptr + at, mask=inside, other=0)
    following = tl.where(noisy != 0, following, clean)
    tl.store(last_sample_ptr + at, s, mask=inside)
    tl.store(x0_prev2_ptr + at, x0_prev, mask=inside)
    tl.store(x0_prev_ptr + at, x0, mask=inside)
    tl.store(sample_ptr + at, following, mask=inside)
    tl.store(model_in_ptr + at, following.to(model_in_ptr.dtype.element_ty), mask=inside)


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
    *,
    tile: tuple[int, int] | None = None,
) -> None:
    """velocity [G, N] (G = 1, or 2: conditional, unconditional); state and clean [N] float32.

    noisy [N] uint8; coef [S, 10] float32 (COLUMNS); step int32 [1] on the device, in [0, S), which
    is not checked; model_in [N] of the network's dtype. Writes sample, last_sample, x0_prev,
    x0_prev2 and model_in.
    """
    guided, size = velocity.shape
    state = (sample, last_sample, x0_prev, x0_prev2, clean)
    assert guided in (1, 2) and velocity.stride(1) == 1, (velocity.shape, velocity.stride())
    assert all(x.dtype == torch.float32 for x in (*state, coef)), [x.dtype for x in state]
    for x in (*state, noisy, model_in):
        assert x.shape == (size,) and x.is_contiguous(), (x.shape, x.stride(), size)
        assert x.device == velocity.device, (x.device, velocity.device)
    assert noisy.dtype == torch.uint8 and step.dtype == torch.int32, (noisy.dtype, step.dtype)
    assert coef.ndim == 2 and coef.shape[1] == len(COLUMNS), (coef.shape, COLUMNS)
    assert coef.stride(1) == 1 and step.numel() == 1, (coef.stride(), step.shape)
    assert coef.device == step.device == velocity.device, (coef.device, step.device)
    block, warps = tile or TILE
    if size:
        _unipc_step_kernel[(triton.cdiv(size, block),)](
            velocity,
            *(sample, last_sample, x0_prev, x0_prev2, clean, noisy, coef, step, model_in),
            velocity.stride(0),
            coef.stride(0),
            size,
            GUIDED=guided == 2,
            BLOCK=block,
            num_warps=warps,
        )
