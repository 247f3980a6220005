"""The residual stream of a tower: products are added to it, norms read it."""

from __future__ import annotations

import torch

from cosmos3_fast import ops
from cosmos3_fast.parallel_sum import RowSums


class Residual:
    """x [M, H], and this rank's part of the product that the next norm adds to it.

    Over several ranks a product is summed by the norm that follows it, in one operation. After such
    a norm a rank may hold only its own share of x's rows; `norm(…, whole=True)` completes them.
    """

    def __init__(self, x: torch.Tensor, sums: RowSums) -> None:
        self.x, self.sums = x, sums
        self.part: torch.Tensor | None = None

    def add_product(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Add x [M, in / tp] times weight [H, in / tp] transposed, summed over the ranks.

        On one rank it accumulates inside the GEMM. Over several the sum is left to the next norm:
        adding a part first would round the residual once more.
        """
        if self.sums.mesh.tp_size == 1:
            self.x.addmm_(x, weight.t())
            return
        assert self.part is None, "a product is still to be added"
        part = self.sums.part(x.shape[0], weight.shape[0], x.dtype)
        self.part = torch.mm(x, weight.t(), out=part)

    def norm(self, weight: torch.Tensor, eps: float, *, whole: bool = False) -> torch.Tensor:
        """RMSNorm of x with what was still to be added -> [M, H], valid until the next norm of
        these sums.
        """
        part, self.part = self.part, None
        if part is None:
            return ops.rms_norm(self.x, weight, eps)
        return ops.sum_add_rms_norm(part, self.x, weight, eps, self.sums, whole=whole)

    def select(self, groups: int, rows: torch.Tensor) -> Residual:
        """The residual of these rows alone, of each of `groups` equal parts; x must be whole."""
        assert self.part is None, "a product is still to be added"
        x = self.x.unflatten(0, (groups, -1)).index_select(1, rows).flatten(0, 1)
        return Residual(x, self.sums)
