"""Peer memory in which the tensor-parallel ranks' products are summed, added and normalised.

`csrc/sum.h` says what the fused sum, residual and norm compute and how ranks share the rows,
`csrc/sum.cu` the protocol. The exchange counter is on the device.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from cosmos3_fast.parallel import Mesh, Symmetric

__all__ = ["RowSums", "SumMemory"]

# Largest sum, in bytes, for which the fused kernel beats an all-reduce and `add_rms_norm`, by group
# size; those of D, E and S were timed, up to 51 MB. Sizes without a row: the two apart.
FUSED_BYTES: dict[int, int] = {2: 64 << 20, 4: 64 << 20}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_ROW_BYTES = 32768
_FLAG_STRIDE = 128  # csrc/sum.h: kFlagStride
_STATE_WORDS = 8  # csrc/sum.h: State
_ERROR, _ERROR_EPOCH = 2, 3


class SumMemory:
    """One rank's `part`, `normed` and `residual` [capacity, columns], which its peers address too.

    `deadline`: seconds that a kernel waits for a peer. Made by all ranks of the axis "tp" together,
    outside a capture, with equal arguments; used from one stream.
    """

    def __init__(
        self, mesh: Mesh, capacity: int, columns: int, dtype: torch.dtype, deadline: float
    ) -> None:
        self.mesh, self.deadline_ns = mesh, int(deadline * 1e9)
        row_bytes = columns * dtype.itemsize
        flag_rows = -(-2 * mesh.tp_size * _FLAG_STRIDE // row_bytes)
        self.memory = mesh.symmetric((3 * capacity + flag_rows, columns), dtype, "tp")
        rows = self.memory.tensor[: 3 * capacity].view(3, capacity, columns)
        self.part, self.normed, self.residual = rows.unbind()
        self.flags = self.memory.tensor[3 * capacity :]
        self._part_bytes = capacity * row_bytes
        self.state = torch.zeros(_STATE_WORDS, dtype=torch.int32, device=mesh.device)

    def arguments(self, whole: bool) -> dict[str, object]:
        """Arguments of `_C.sum_norm`: where the ranks' memory is; `whole`: residuals travel too."""
        return {
            "peers": list(self.memory.pointers),
            "rank": self.mesh.tp_rank,
            "part": 0,
            "normed": self._part_bytes,
            "residual_at": 2 * self._part_bytes if whole else -1,
            "flags": 3 * self._part_bytes,
            "state": self.state.data_ptr(),
            "deadline_ns": self.deadline_ns,
        }

    def failure(self) -> str | None:
        """Which ranks did not come before the deadline, None if all did. Waits for the device.

        Once it says something, no result since then is to be used; only `reset` clears it.
        """
        words = self.state.tolist()
        first = self.mesh.rank - self.mesh.tp_rank
        late = [first + r for r in range(self.mesh.tp_size) if words[_ERROR] >> r & 1]
        if not late:
            return None
        ranks = " and ".join(f"rank {r}" for r in late)
        return (
            f"rank {self.mesh.rank}: the products of {ranks} did not come within "
            f"{self.deadline_ns / 1e9:g} s (sum {words[_ERROR_EPOCH]})"
        )

    def reset(self) -> None:
        """Start from sum 0 again, after a failure; all ranks together, outside a capture."""
        self.mesh.settle()
        self.flags.zero_()
        self.state.zero_()
        self.mesh.settle()


class RowSums:
    """The memory of a model's sums, shared by the row counts up to a power of two.

    A sum that one kernel makes has a `SumMemory`; one that is a two-shot all-reduce has peer memory
    for the part alone; others have ordinary memory. All of it follows from what is equal on all
    ranks.
    """

    def __init__(self, mesh: Mesh, *, deadline: float = 30.0) -> None:
        self.mesh, self.deadline = mesh, deadline
        self._fused: dict[tuple[int, int, torch.dtype], SumMemory] = {}
        self._parts: dict[tuple[int, int, torch.dtype], Symmetric] = {}

    @property
    def fused_bytes(self) -> int:
        """Largest sum in bytes that one kernel makes; 0 where none does."""
        if not self._peers:
            return 0
        always = self.mesh.collective == "symmetric"
        return sys.maxsize if always else FUSED_BYTES.get(self.mesh.tp_size, 0)

    def part(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, columns] to compute this rank's product into, for the next sum of that shape.

        Given out again by the next call of about that size: the sum must have been made, in stream
        order, before. The first such call is a collective outside a capture.
        """
        memory = self.fused(rows, columns, dtype)
        if memory is not None:
            return memory.part[:rows]
        if not self.mesh.two_shot(rows * columns * dtype.itemsize):
            return self._plain(rows, columns, dtype)
        key = _capacity(rows), columns, dtype
        if key not in self._parts:
            self._parts[key] = self.mesh.symmetric(key[:2], dtype, "tp")
        return self._parts[key].tensor[:rows]

    def residual(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, columns] for a residual that a sum may complete on every rank; as `part`."""
        memory = self.fused(rows, columns, dtype)
        return self._plain(rows, columns, dtype) if memory is None else memory.residual[:rows]

    def fused(self, rows: int, columns: int, dtype: torch.dtype) -> SumMemory | None:
        """The memory for one kernel that sums, adds and normalises, None where the parts are faster
        or it does not fit; as `part`.
        """
        row_bytes = columns * dtype.itemsize
        fits = dtype in _DTYPES and row_bytes % 16 == 0 and row_bytes <= _MOST_ROW_BYTES
        if not fits or rows * row_bytes > self.fused_bytes:
            return None
        key = _capacity(rows), columns, dtype
        if key not in self._fused:
            self._fused[key] = SumMemory(self.mesh, *key, self.deadline)
        return self._fused[key]

    def failure(self) -> str | None:
        """Which ranks a sum did not see before its deadline, None if all; see `SumMemory`."""
        found = [memory.failure() for memory in self._fused.values()]
        return next((text for text in found if text), None)

    @property
    def _peers(self) -> bool:
        return self.mesh.peers("tp")

    def _plain(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=self.mesh.device)


def _capacity(rows: int) -> int:
    """The power of two that holds them: prompts of any length share a few memories."""
    return 1 << (rows - 1).bit_length()
