"""Ranks of one process, and what a sum over ranks, its residual and norm should give.

For tests/test_sum.py (ranks on the CPU or one GPU) and tests/gpu_sum_ranks.py (ranks on GPUs of
their own).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from cosmos3_fast.kernels import reference
from cosmos3_fast.parallel import Symmetric
from cosmos3_fast.parallel_sum import SumMemory

EPS = 1e-6


@dataclass
class Ranks:
    """Ranks of one process on one device: each has memory that the others address."""

    count: int
    rows: int
    columns: int
    dtype: torch.dtype = torch.bfloat16
    deadline: float = 5.0
    device: str = "cpu"
    memory: list[SumMemory] = field(default_factory=list)

    def __post_init__(self) -> None:
        flag_rows = -(-256 * self.count // (self.columns * self.dtype.itemsize))
        shape = (3 * self.rows + flag_rows, self.columns)
        buffers = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self.ranks]
        for rank in self.ranks:
            part = Symmetric(buffers[rank], tuple(b.data_ptr() for b in buffers), "tp")

            def symmetric(size, dtype, axis, part=part):
                assert (size, dtype, axis) == (part.tensor.shape, part.tensor.dtype, part.axis)
                return part

            mesh = SimpleNamespace(
                rank=rank,
                tp_rank=rank,
                tp_size=self.count,
                device=torch.device(self.device),
                settle=(lambda: None) if self.device == "cpu" else torch.cuda.synchronize,
                symmetric=symmetric,
            )
            memory = SumMemory(mesh, self.rows, self.columns, self.dtype, self.deadline)  # type: ignore[arg-type]
            memory.part.fill_(torch.nan), memory.normed.fill_(torch.nan)
            self.memory.append(memory)

    @property
    def ranks(self) -> range:
        return range(self.count)


def share(rows: int, ranks: int, rank: int) -> slice:
    """The rows that a rank owns."""
    return slice(rows * rank // ranks, rows * (rank + 1) // ranks)


def inputs(
    ranks: int, rows: int, columns: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The ranks' parts [M, H], the residual [M, H] and the weight [H], equal wherever it runs."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    return [values(rows, columns) for _ in range(ranks)], values(rows, columns), values(columns)


def truth(
    parts: list[torch.Tensor], residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new residual and its norm in float64."""
    total = torch.stack(parts).double().sum(0)
    wide = residual.double()
    normed = reference.add_rms_norm(total, wide, weight.double(), EPS)
    return wide, normed


def apart(
    parts: list[torch.Tensor], residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as an all-reduce, its sum rounded, and `add_rms_norm` make it."""
    total = torch.stack(parts).float().sum(0).to(residual.dtype)
    held = residual.clone()
    normed = reference.add_rms_norm(total, held, weight, EPS)
    return held, normed


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative L2; NaN never passes a comparison."""
    return float((found.double() - exact).norm() / exact.norm())
