"""One strip of every activation per rank, and what a pass over part of a clip carries on.

The image is cut along one side, in whole latent rows (or columns), so strip borders stay aligned
through every resampling: with `scale` pixels a latent row, a rank of n rows holds n * scale. Every
convolution gets its neighbours' true edge rows, so the result is that of one rank, up to rounding.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cosmos3_fast import ops
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.parallel_edges import EdgeSlots

Padding = tuple[int, int, int, int]  # left, right, top, bottom


@dataclass(frozen=True)
class Strips:
    """How `height` x `width` latent pixels lie on the ranks of a mesh.

    `axis`: the side that is cut, 3 = H, 4 = W. `sizes`: latent rows of each rank, zeros last. A
    rank without rows computes row 0 once more with zeros for neighbours and joins the gathers,
    where its part is dropped: nothing hangs and no layer needs a case for an empty tensor.
    `slots`: peer memory through which `_C`'s kernels pass the edges; None sends them by the mesh.
    """

    mesh: Mesh
    axis: int
    sizes: tuple[int, ...]
    slots: EdgeSlots | None = None

    @classmethod
    def plan(cls, mesh: Mesh, height: int, width: int) -> Strips:
        """Cut the side whose widest strip is the smaller part of it, at a tie the longer."""
        ranks = mesh.world_size
        parts = {3: height, 4: width}
        axis = min(parts, key=lambda a: (-(-parts[a] // ranks) / parts[a], -parts[a]))
        base, rest = divmod(parts[axis], ranks)
        return cls(mesh, axis, tuple(base + (rank < rest) for rank in range(ranks)))

    @property
    def holders(self) -> int:
        """Number of ranks that hold rows."""
        return sum(size > 0 for size in self.sizes)

    def local(self, height: int, width: int) -> tuple[int, int]:
        """The widest strip's height and width in latent pixels: equal on all ranks."""
        return (max(self.sizes), width) if self.axis == 3 else (height, max(self.sizes))

    def cut(
        self, x: torch.Tensor, scale: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """This rank's rows of a tensor that every rank holds, and the rows before and after.

        x [1, C, T, H * scale, W * scale]; a neighbouring row is None where the image ends.
        """
        idle = self.mesh.rank >= self.holders
        start = 0 if idle else sum(self.sizes[: self.mesh.rank]) * scale
        size = (1 if idle else self.sizes[self.mesh.rank]) * scale
        end = start + size
        before = x.narrow(self.axis, start - 1, 1) if start > 0 else None
        after = x.narrow(self.axis, end, 1) if end < x.shape[self.axis] else None
        return x.narrow(self.axis, start, size), before, after

    def padded(
        self,
        x: torch.Tensor,
        *,
        prologue: str,
        pad: Padding,
        gamma: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        history: int = 0,
    ) -> torch.Tensor:
        """`ops.conv_input` of this rank's strip [1, C, T, H, W] with the neighbours' edges."""
        if self.slots is not None and self.slots.neighbours:
            return ops.conv_input_exchange(
                x,
                self.slots,
                prologue=prologue,
                gamma=gamma,
                bias=bias,
                history=history,
                pad=pad,
                axis=self.axis,
            )
        before = after = None
        if self.holders > 1:
            low, high = pad[2:] if self.axis == 3 else pad[:2]
            edges = ops.conv_edges(
                x,
                prologue=prologue,
                gamma=gamma,
                bias=bias,
                axis=self.axis,
                before=high,
                after=low,
            )
            before, after = self.mesh.exchange_edges(*edges, among=self.holders)
        return ops.conv_input(
            x,
            prologue=prologue,
            gamma=gamma,
            bias=bias,
            history=history,
            pad=pad,
            axis=self.axis,
            before=before,
            after=after,
        )

    def gather(self, x: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """Every rank's strip [1, C, T, rows * scale, W] (or columns) -> the whole, on all ranks."""
        if self.mesh.world_size == 1:
            return x
        rows, dim = x.movedim(1, -1), self.axis - 1
        short = max(self.sizes) * scale - rows.shape[dim]
        fill = [0, 0] * (rows.ndim - 1 - dim) + [0, short]
        parts = self.mesh.all_gather(F.pad(rows, fill), "world")
        kept = [part.narrow(dim, 0, n * scale) for part, n in zip(parts, self.sizes, strict=True)]
        return torch.cat(kept, dim).movedim(-1, 1)


@dataclass
class Flow:
    """One pass through encoder or decoder: where the strip lies, what earlier groups left behind.

    `first`: the pass holds frame 0. `history`: for each causal convolution the last frames of its
    padded input, None when all frames run at once.
    """

    strips: Strips
    first: bool = True
    history: dict[Hashable, torch.Tensor] | None = None

    @property
    def at_once(self) -> bool:
        return self.history is None

    def carry(self, owner: Hashable, padded: torch.Tensor, frames: int) -> torch.Tensor:
        """Put the frames that `owner` saw last in front of `padded`, and keep its own last ones.

        padded [1, C, frames + T, H, W] begins with `frames` zero frames, which is right for the
        first group.
        """
        if self.history is None:
            return padded
        earlier = self.history.get(owner)
        if earlier is not None:
            padded[:, :, :frames].copy_(earlier)
        self.history[owner] = padded[:, :, -frames:].clone()
        return padded
