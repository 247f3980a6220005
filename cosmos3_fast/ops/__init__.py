"""The only door to fused kernels: one function per operation, whatever the device.

A CUDA tensor goes to the Triton kernel (or `_C`), a CPU tensor to the one torch reference of the
operation (`kernels/reference.py`), and so does any tensor inside `with ops.reference():`; pictures
and noise go to `_C` on the CPU too. The choice follows from the tensor's device and from what the
build holds; no operation falls back after a failure. Shapes and formulas stand in the references'
docstrings.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from cosmos3_fast.kernels import reference as _reference
from cosmos3_fast.kernels import reference_conv as _reference_conv
from cosmos3_fast.ops import halo
from cosmos3_fast.ops.extension import extension as _extension
from cosmos3_fast.ops.extension import place
from cosmos3_fast.ops.sum_norm import sum_add_rms_norm as _sum_add_rms_norm

if TYPE_CHECKING:
    from cosmos3_fast.parallel_sum import RowSums

_TRITON = {  # operation -> module of cosmos3_fast.kernels that holds its launcher
    "rms_norm": "rms_norm",
    "add_rms_norm": "rms_norm",
    "qk_norm_rope": "qk_norm_rope",
    "attention": "attention",
    "causal_attention": "causal_attention",
    "silu_mul": "silu_mul",
    "gate_up_silu": "gate_up_silu",
    "timestep_add": "timestep_add",
    "unipc_step": "unipc_step",
    "interleave_add": "interleave_add",
}
_forced = False


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """Within this context every operation runs its torch reference, on any device (tests and
    benchmarks).
    """
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


@cache
def _kernel(name: str) -> Callable[..., Any]:
    module = importlib.import_module(f"cosmos3_fast.kernels.{_TRITON[name]}")
    return getattr(module, name)


def _runs_reference(device: torch.device) -> bool:
    return _forced or device.type == "cpu"


def _pick(name: str, tensor: torch.Tensor) -> Callable[..., Any]:
    if _runs_reference(tensor.device):
        return getattr(_reference, name)
    return _kernel(name)


def backends(device: torch.device, sums: RowSums | None = None) -> dict[str, str]:
    """What each operation runs on `device`: "triton", "_C", "torch reference", or which ways its
    shapes choose between; with `sums`, those of several ranks, the sum over them too.
    """
    fused = "torch reference" if _runs_reference(device) else "triton"
    rows = dict.fromkeys(_TRITON, fused)
    if fused == "triton":
        rows["gate_up_silu"] = "triton, or torch.mm with silu_mul, by its table"
    if sums is not None and sums.mesh.tp_size > 1:
        one_kernel = peer_kernels(device) and sums.fused_bytes > 0
        rows["sum_add_rms_norm"] = "_C" if one_kernel else "all-reduce, then add_rms_norm"
    rows["image_to_tensor"] = "_C" if _extension_runs(device) else "torch reference"
    rows["conv_input"] = "_C" if peer_kernels(device) else "torch reference"
    return rows


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """RMSNorm of x [M, H] with weight [H] -> [M, H]."""
    return _pick("rms_norm", x)(x, weight, eps, out=out)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual [M, H] += x [M, H] in place; RMSNorm of the sum -> [M, H]."""
    return _pick("add_rms_norm", x)(x, residual, weight, eps, out=out)


def sum_add_rms_norm(
    part: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    sums: RowSums,
    *,
    whole: bool = False,
) -> torch.Tensor:
    """residual [M, H] += the sum of the ranks' parts [M, H]; RMSNorm of that -> [M, H].

    `part` is memory of `sums`, and so may be the result: it is valid until the next such sum. Where
    one kernel does it all, a rank's residual is complete in its own share of the rows, and in all
    of them if `whole`, for which it must be memory of `sums`.
    """
    rows, columns = part.shape
    memory = sums.fused(rows, columns, part.dtype) if peer_kernels(part.device) else None
    if memory is not None:
        return _sum_add_rms_norm(part, residual, weight, eps, memory, whole=whole)
    return add_rms_norm(sums.mesh.all_reduce(part, "tp"), residual, weight, eps)


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
    """Per-head norm and rotation of qkv [M, (Hq + 2 Hk) D], written into q_out, k_out, v_out [M,
    heads, D].
    """
    run = _pick("qk_norm_rope", qkv)
    run(qkv, q_weight, k_weight, cos, sin, eps, q_out=q_out, k_out=k_out, v_out=v_out)


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
    """q [B, M, Hq, D] over [k, v [B, N, Hk, D] | the first und_len[b] rows of und_k, und_v] -> [B,
    M, Hq, D].
    """
    return _pick("attention", q)(q, k, v, und_k, und_v, und_len, out=out)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Causal attention of q [n, Hq, D] over k, v [n, Hk, D] -> [n, Hq, D]."""
    return _pick("causal_attention", q)(q, k, v, out=out)


def silu_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu(first half) * second half of gate_up [M, 2 I] -> [M, I]."""
    return _pick("silu_mul", gate_up)(gate_up, out=out)


def gate_up_silu(
    x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """silu(x Wg^T) * (x Wu^T) of x [M, H] and weight [2 I, H] = [Wg; Wu] -> [M, I]."""
    return _pick("gate_up_silu", x)(x, weight, out=out)


def gate_up_is_fused(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `gate_up_silu` of these is one kernel, not a product with `silu_mul` after it."""
    if _runs_reference(x.device):
        return False
    module = importlib.import_module("cosmos3_fast.kernels.gate_up_silu")
    return bool(module.is_fused(x, weight))


def timestep_add(
    x: torch.Tensor, table: torch.Tensor, step: torch.Tensor, noisy: torch.Tensor
) -> torch.Tensor:
    """x [M, H] += table [S, H][step] in place on rows where noisy [M] is set; returns x."""
    return _pick("timestep_add", x)(x, table, step, noisy)


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
    """Guidance, UniPC corrector and predictor, clean parts re-imposed: one pass over the flat state
    [N], in place.
    """
    run = _pick("unipc_step", sample)
    run(velocity, sample, last_sample, x0_prev, x0_prev2, clean, noisy, coef, step, model_in)


def interleave_add(
    phases: Sequence[torch.Tensor], source: torch.Tensor, *, time: int, first: bool
) -> torch.Tensor:
    """Four phases [T, O, h + 1, w + 1] interleaved, plus the duplicated source [1, I, S, h, w] ->
    [1, O, T, 2 h, 2 w] in channels_last_3d.
    """
    return _pick("interleave_add", source)(phases, source, time=time, first=first)


def conv_input(
    x: torch.Tensor,
    *,
    prologue: str,
    gamma: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    history: int = 0,
    pad: tuple[int, int, int, int] = (0, 0, 0, 0),
    axis: int = 3,
    before: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    """The padded channels-last input of a convolution of x [1, C, T, H, W], prologue applied."""
    run = halo.conv_input if peer_kernels(x.device) else _reference_conv.conv_input
    return run(
        x,
        prologue=prologue,
        gamma=gamma,
        bias=bias,
        history=history,
        pad=pad,
        axis=axis,
        before=before,
        after=after,
    )


def conv_edges(
    x: torch.Tensor,
    *,
    prologue: str,
    gamma: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    axis: int = 3,
    before: int = 0,
    after: int = 0,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The first `before` and last `after` rows of a strip as its neighbours pad with them."""
    run = halo.conv_edges if peer_kernels(x.device) else _reference_conv.conv_edges
    return run(x, prologue=prologue, gamma=gamma, bias=bias, axis=axis, before=before, after=after)


conv_input_exchange = halo.conv_input_exchange


def peer_kernels(device: torch.device) -> bool:
    """Whether `_C`'s kernels run there: they store strips' edges straight into peers' memory."""
    return device.type == "cuda" and _extension_runs(device)


def _extension_runs(device: torch.device) -> bool:
    return not _forced and (device.type == "cpu" or _extension().has_cuda)


def image_to_tensor(frames: torch.Tensor) -> torch.Tensor:
    """uint8 frames [T, H, W, 3] -> float32 [3, T, H, W] = x / 127.5 - 1, channels-last memory."""
    if not _extension_runs(frames.device):
        return _reference.image_to_tensor(frames)
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(
            f"frames must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}"
        )
    frames = frames.contiguous()
    out = torch.empty(frames.shape, dtype=torch.float32, device=frames.device)
    _extension().image_to_tensor(
        frames=frames.data_ptr(), out=out.data_ptr(), count=frames.numel(), **place(frames)
    )
    return out.permute(3, 0, 1, 2)


def legacy_normal(seed: int, count: int, *, threads: int = 4) -> torch.Tensor:
    """float32 [count] on the CPU: numpy's RandomState(seed).standard_normal, bit for bit, whatever
    the number of threads. ValueError for a seed outside [0, 2**32) or a negative count.
    """
    if not 0 <= seed < 2**32 or count < 0 or threads < 1:
        raise ValueError(
            "seed must be in [0, 2**32), count not negative and threads positive, got "
            f"{seed}, {count} and {threads}"
        )
    if _forced:
        return _reference.legacy_normal(seed, count)
    out = torch.empty(count, dtype=torch.float32, device="cpu")
    _extension().legacy_normal(seed, out.data_ptr(), count, threads)
    return out
