"""Edge slots: the peer memory through which neighbouring strips pass their edges on GPUs.

One symmetric allocation a rank holds, for either neighbour, two slots (parities) and a flag;
`csrc/halo.h` has the layout, `csrc/halo.cu` the protocol and why two slots suffice. The exchange
counter is on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from cosmos3_fast.parallel import Mesh

__all__ = ["EdgePool", "EdgeSlots"]

_FLAG_BYTES = 256  # both flags; csrc/halo.h: buffer_bytes
_STATE_WORDS = 8  # csrc/halo.h: State
_ERROR, _ERROR_EPOCH = 3, 4
_ALIGNMENT = 256


class EdgeSlots:
    """This rank's slots, and the addresses of its neighbours'.

    `slot_bytes`: the largest edge, C * T * extent across the strips * rows * bytes of an element;
    rounded up to 256. `among`: only the first so many ranks of the mesh hold strips (None: all);
    the others have no neighbours and make no exchange. `deadline`: seconds that a waiting kernel
    waits. Made by all ranks of the mesh together, outside a capture, with equal arguments; used
    from one stream. Raises ValueError where ranks cannot see each other's memory (cpu): there edges
    travel by `mesh.exchange_edges`.
    """

    def __init__(
        self, mesh: Mesh, slot_bytes: int, *, among: int | None = None, deadline: float = 20.0
    ) -> None:
        count = mesh.world_size if among is None else among
        if not 1 <= count <= mesh.world_size:
            raise ValueError(f"among must be 1 to {mesh.world_size}, got {count}")
        self.mesh = mesh
        self.deadline_ns = int(deadline * 1e9)
        self.slot_bytes = -(-slot_bytes // _ALIGNMENT) * _ALIGNMENT
        self.state = torch.zeros(_STATE_WORDS, dtype=torch.int32, device=mesh.device)
        self.memory = mesh.symmetric((4 * self.slot_bytes + _FLAG_BYTES,), axis="world")
        if len(self.memory.pointers) != mesh.world_size:
            raise ValueError(f"ranks on {mesh.device} cannot see each other's memory")
        self.before = mesh.rank - 1 if 0 < mesh.rank < count else None
        self.after = mesh.rank + 1 if mesh.rank + 1 < count else None

    @property
    def neighbours(self) -> int:
        """How many there are: 0, 1 or 2."""
        return (self.before is not None) + (self.after is not None)

    def targets(self) -> dict[str, int]:
        """Arguments of `_C.halo_write`: the neighbours' buffers as this rank addresses them. Empty
        without any.
        """
        if not self.neighbours:
            return {}
        pointers = self.memory.pointers
        return self._shared() | {
            "peer_before": 0 if self.before is None else pointers[self.before],
            "peer_after": 0 if self.after is None else pointers[self.after],
        }

    def sources(self) -> dict[str, int]:
        """Arguments of `_C.halo_wait`: this rank's buffer, and which neighbours write to it."""
        return self._shared() | {
            "slots": self.memory.tensor.data_ptr(),
            "from_before": self.before is not None,
            "from_after": self.after is not None,
            "deadline_ns": self.deadline_ns,
        }

    def _shared(self) -> dict[str, int]:
        return {"slot_bytes": self.slot_bytes, "state": self.state.data_ptr()}

    def failure(self) -> str | None:
        """Which neighbours did not come before the deadline, None if all did. Waits for the device.

        Once it says something, no result since then is to be used; only `reset` clears it.
        """
        words = self.state.tolist()
        late = [r for bit, r in ((1, self.before), (2, self.after)) if words[_ERROR] & bit]
        if not late:
            return None
        ranks = " and ".join(f"rank {r}" for r in late)
        return (
            f"rank {self.mesh.rank}: the edges of {ranks} did not come within "
            f"{self.deadline_ns / 1e9:g} s (exchange {words[_ERROR_EPOCH]})"
        )

    def reset(self) -> None:
        """Start from exchange 0 again, after a failure; all ranks together, outside a capture."""
        self.mesh.settle()
        self.memory.tensor[4 * self.slot_bytes :].zero_()
        self.state.zero_()
        self.mesh.settle()


class EdgePool:
    """The slots that a network's passes use: few, whatever the number of picture sizes.

    A pass takes the smallest slots made so far that hold its largest edge; new ones are made for
    the next power of two. So for one number of strip holders there are at most as many as that size
    has bits, and together they are smaller than four times the largest edge's. None is given back
    while the pool lives, because captured graphs hold their addresses. All ranks of the mesh call
    alike, so they make and take the same.
    """

    def __init__(self, mesh: Mesh, deadline: float) -> None:
        """`deadline`: as `EdgeSlots` has it, whose other arguments come with a pass."""
        self.mesh, self.deadline = mesh, deadline
        self._made: dict[int, list[EdgeSlots]] = {}  # by holders, in order of size

    def slots(self, nbytes: int, among: int) -> EdgeSlots:
        """Slots of at least `nbytes`; outside a capture, where new ones may have to be made."""
        made = self._made.setdefault(among, [])
        for slots in made:
            if slots.slot_bytes >= nbytes:
                return slots
        size = 1 << (nbytes - 1).bit_length()
        made.append(EdgeSlots(self.mesh, size, among=among, deadline=self.deadline))
        return made[-1]

    def failure(self) -> str | None:
        """The first failure of any slots, None if there is none. Waits for the device."""
        found = (slots.failure() for made in self._made.values() for slots in made)
        return next((text for text in found if text), None)
