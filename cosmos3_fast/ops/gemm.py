"""Products with a weight, by the cuBLASLt algorithm that `gemm_table` has for their size, else by
torch.

torch takes the first algorithm of cuBLASLt's heuristic; trying them finds a faster one for some
sizes. The choice is data: the GPU's name, the version of the library and the sizes decide it, never
a timing nor a failure, so equal ranks choose alike. Both ways run one library, accumulate in
float32 and round once. Nothing waits for the device; a product may be captured once it has run.
"""

from __future__ import annotations

import importlib
import math
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from cosmos3_fast.ops.gemm_table import GEMM_TABLE

__all__ = ["linear", "linear_add_"]

DTYPES = {torch.float16: 1, torch.bfloat16: 2}
NEAREST = 1.1  # a row serves M up to this factor away; other measured M are further apart
WORKSPACE_BYTES = 32 << 20  # what torch gives cuBLAS on Hopper
ALIGNMENT = 16  # bytes, of addresses and rows: what the kernels' bulk copies need
_WORDS = 8


class Problem(NamedTuple):
    """out [m, n] = x [m, k] weight [n, k]^T, as `_C` takes it: row strides in elements."""

    m: int
    n: int
    k: int
    ldx: int
    ldw: int
    ldo: int
    dtype: int
    device: int


class Choice(NamedTuple):
    problem: Problem
    accumulate: bool
    algorithm: tuple[int, ...]
    workspace_bytes: int


def linear(
    x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [M, K] times weight [N, K] transposed -> [M, N], of one dtype; not for autograd.

    Rows of `out` may be strided. Raises ValueError for an `out` of another shape or dtype, and
    torch's error for other shapes that disagree.
    """
    if out is not None:
        expected = (x.shape[0], weight.shape[0])
        if out.shape != expected or out.dtype != x.dtype:
            raise ValueError(f"out is {out.dtype} {list(out.shape)}, not {x.dtype} {expected}")
    if (choice := _choose(x, weight, out, accumulate=False)) is not None:
        out = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
        return _run(choice, x, weight, out)
    return F.linear(x, weight) if out is None else torch.mm(x, weight.t(), out=out)


def linear_add_(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """residual [M, N] += x [M, K] times weight [N, K] transposed, in place and rounded once."""
    if (choice := _choose(x, weight, residual, accumulate=True)) is not None:
        return _run(choice, x, weight, residual)
    return residual.addmm_(x, weight.t())


@cache
def _extension() -> Any:
    return importlib.import_module("cosmos3_fast._C")


def problem_of(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None) -> Problem | None:
    """The product as `_C` takes it; None where that has no way to run it (torch has). Without
    `out`, for a new one.
    """
    tensors = [x, weight] if out is None else [x, weight, out]
    if not all(_takes(t) and t.dtype == x.dtype and t.device == x.device for t in tensors):
        return None
    (m, k), n = x.shape, weight.shape[0]
    if weight.shape[1] != k or (out is not None and out.shape != (m, n)):
        return None
    ldo = n if out is None else out.stride(0)
    if ldo * x.element_size() % ALIGNMENT:
        return None
    return Problem(m, n, k, x.stride(0), weight.stride(0), ldo, DTYPES[x.dtype], x.get_device())


def nearest(section: tuple[str, int], product: tuple[str, int, int, bool], m: int) -> str | None:
    """The table's row for M = m of a product, or None where it holds none near that."""
    rows = GEMM_TABLE.get(section, {}).get(product, {})
    best = min(rows, key=lambda row: abs(math.log(row / m)), default=None)
    return rows[best] if best is not None and max(best / m, m / best) <= NEAREST else None


def words(row: str) -> tuple[int, ...]:
    """A row of the table as the 8 words that `_C` takes."""
    found = [int(word, 16) for word in row.split(".")]
    return tuple(found + [0] * (_WORDS - len(found)))


def _takes(tensor: torch.Tensor) -> bool:
    if not tensor.is_cuda or tensor.dtype not in DTYPES or tensor.ndim != 2 or not tensor.numel():
        return False
    row = tensor.stride(0) * tensor.element_size()
    return (
        tensor.stride(1) == 1
        and tensor.stride(0) >= tensor.shape[1]
        and row % ALIGNMENT == 0
        and tensor.data_ptr() % ALIGNMENT == 0
    )


def _choose(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None, *, accumulate: bool
) -> Choice | None:
    problem = problem_of(x, weight, out)
    return None if problem is None else _choice(problem, accumulate)


@lru_cache(maxsize=4096)
def _choice(problem: Problem, accumulate: bool) -> Choice | None:
    """The measured algorithm of a problem and the workspace it needs; None: torch's choice."""
    section = (torch.cuda.get_device_name(problem.device), _extension().gemm_library())
    dtype = {code: str(dtype).removeprefix("torch.") for dtype, code in DTYPES.items()}
    product = (dtype[problem.dtype], problem.n, problem.k, accumulate)
    row = nearest(section, product, problem.m)
    if row is None:
        return None
    algorithm = words(row)
    needed = _extension().gemm_workspace(problem, algorithm)
    return (
        Choice(problem, accumulate, algorithm, needed) if 0 <= needed <= WORKSPACE_BYTES else None
    )


@cache
def _workspace(device: int, stream: int) -> torch.Tensor:
    """Scratch for split-K, one a stream as torch does: calls on one stream follow each other."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=f"cuda:{device}")


def _run(choice: Choice, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    if not choice.workspace_bytes:
        return run(choice, x, weight, out, None)
    device = choice.problem.device
    stream = torch.cuda.current_stream(device).cuda_stream
    return run(choice, x, weight, out, _workspace(device, stream))


def run(
    choice: Choice,
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor | None,
) -> torch.Tensor:
    """One product by the choice made for these tensors' problem, on the current stream."""
    _extension().gemm_run(
        problem=choice.problem,
        algorithm=choice.algorithm,
        accumulate=choice.accumulate,
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        out=out.data_ptr(),
        workspace=0 if workspace is None else workspace.data_ptr(),
        workspace_bytes=0 if workspace is None else workspace.numel(),
        stream=torch.cuda.current_stream(choice.problem.device).cuda_stream,
    )
    return out
