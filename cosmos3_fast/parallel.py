"""The mesh of ranks (cfg outer, tp inner) and its collectives.

rank = cfg_rank * tp_size + tp_rank. Groups and collectives are torch.distributed's (NCCL on cuda,
gloo on cpu), peer memory is torch's symmetric memory; at size 1 every collective is the identity.
Tensor collectives may be captured in a CUDA graph: the communicators exist once `Mesh.create`
returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from cosmos3_fast.config import COLLECTIVES, ParallelConfig
from cosmos3_fast.launch import Channel, join

# torch 2.13 renamed it; 2.11 has the old name alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Largest all-reduce, in bytes, for which symmetric memory beats NCCL, by group size. Two-shot and
# NCCL in a captured graph on H200s over NVLink, us: 24 MB 84 against 109 (2 GPUs), 133 against 137
# (4); 3.2 MB 18 against 33, 25 against 36; 0.25 MB 8 against 11, 10 against 15. Sizes without a
# row: NCCL.
TWO_SHOT_BYTES = {2: 32 << 20, 4: 24 << 20}


@dataclass(frozen=True)
class Symmetric:
    """Memory of equal size on all ranks of an axis, mapped into each of them.

    `tensor`: this rank's part. `pointers`: every rank's part as a device address in this process,
    in axis order, for kernels that store to peers; (own address,) at size 1 and on cpu, where
    ranks cannot see each other's memory.
    """

    tensor: torch.Tensor
    pointers: tuple[int, ...]
    axis: str
    handle: Any = None  # torch's _SymmetricMemory: keeps the mapping, has barriers and signal pads


class Mesh:
    """Ranks, groups and collectives of one engine. Build with `Mesh.create` or `Mesh.single`.

    Axes: "tp" (same cfg rank), "cfg" (same tp rank), "world". Every collective must be called by
    all ranks of its axis, in the same order, with tensors of equal shape and dtype.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        cfg_size: int = 1,
        tp_size: int = 1,
        channel: Channel | None = None,
        owns_group: bool = False,
        collective: str = "auto",
    ) -> None:
        if collective not in COLLECTIVES:
            raise ValueError(f"collective must be one of {COLLECTIVES}, got {collective!r}")
        self.device = device
        self.cfg_size, self.tp_size, self.world_size = cfg_size, tp_size, cfg_size * tp_size
        self.rank = channel.rank if channel else 0
        self.cfg_rank, self.tp_rank = divmod(self.rank, tp_size)
        self.collective = collective
        self.channel = channel
        self._owns_group = owns_group
        self._groups = self._make_groups() if channel else {}
        self._registered: dict[int, Symmetric] = {}  # by the address of the storage

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> Mesh:
        """One rank, no process group."""
        return cls(_with_index(torch.device(device), 0))

    @classmethod
    def create(
        cls,
        config: ParallelConfig,
        device: torch.device | str,
        *,
        timeout: float = 300.0,
        collective: str = "auto",
    ) -> Mesh:
        """Join the launch. `device` "cuda" without an index is this rank's GPU on its host.

        Uses the process group that exists, or starts one (env://) which `close` then ends.
        `timeout`: seconds to wait for the other ranks, also the limit of `gather_objects`. Raises
        ValueError on every rank where the launch does not match `config` or a rank cannot have its
        GPU, TimeoutError naming missing ranks.
        """
        device = torch.device(device)
        if config.world_size == 1:
            return cls.single(device)
        if device.type == "cuda":
            device = _with_index(device, None)
        channel, started = join(config, device, timeout)
        mesh = cls(
            device,
            cfg_size=config.cfg_size,
            tp_size=config.tp_size,
            channel=channel,
            owns_group=started,
            collective=collective,
        )
        mesh._connect()
        return mesh

    def size(self, axis: str) -> int:
        """Number of ranks on an axis."""
        return {"tp": self.tp_size, "cfg": self.cfg_size, "world": self.world_size}[axis]

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """torch's group of an axis; None at size 1."""
        return self._groups.get(axis)

    def two_shot(self, nbytes: int, axis: str = "tp") -> bool:
        """Whether so many bytes of `symmetric(…, axis)` are reduced by its two-shot kernel."""
        limit = TWO_SHOT_BYTES.get(self.size(axis), 0)
        return self.peers(axis) and (self.collective == "symmetric" or nbytes <= limit)

    def peers(self, axis: str = "tp") -> bool:
        """Whether kernels address the memory of other ranks of the axis."""
        return self.size(axis) > 1 and self.device.type == "cuda" and self.collective != "nccl"

    def all_reduce(self, x: torch.Tensor, axis: str = "tp") -> torch.Tensor:
        """Sum over the axis, in x, which is returned.

        Memory from `symmetric(…, axis)` is reduced by torch's two-shot kernel where `two_shot` says
        so.
        """
        group = self._groups.get(axis)
        if group is None:
            return x
        if self._two_shot(x, axis):
            torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", group.group_name)
        else:
            dist.all_reduce(x, group=group)
        return x

    def all_gather(
        self, x: torch.Tensor, axis: str = "tp", *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x of every rank of the axis, stacked in axis order: [size, *x.shape], contiguous.

        At size 1 without `out`: x[None], a view. `out` must be contiguous.
        """
        group = self._groups.get(axis)
        if group is None:
            return x[None] if out is None else out.copy_(x[None])
        if out is None:
            out = x.new_empty((self.size(axis), *x.shape))
        _all_gather(out.flatten(), x.contiguous().flatten(), group=group)
        return out

    def exchange_edges(
        self, first: torch.Tensor | None, last: torch.Tensor | None, *, among: int | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Swap strip edges with the world neighbours, bit for bit.

        Sends `first` to rank - 1 and `last` to rank + 1; returns (the `last` of rank - 1, the
        `first` of rank + 1), None at the ends and where the argument of that name is None, which
        must be so on all ranks alike. Shapes equal on all ranks, any dtype and strides; 5-D
        results are channels-last. `among`: only the first so many ranks hold strips; the others
        get (None, None).
        """
        count = self.world_size if among is None else among
        if self.rank >= count:
            return None, None
        below, above = self.rank > 0, self.rank + 1 < count
        packed_first, packed_last = _pack(first), _pack(last)
        before = torch.empty_like(packed_last) if below and packed_last is not None else None
        after = torch.empty_like(packed_first) if above and packed_first is not None else None
        # The order is the same on both sides of every pair, as NCCL needs.
        work = [
            (dist.isend, packed_first if below else None, self.rank - 1),
            (dist.irecv, before, self.rank - 1),
            (dist.isend, packed_last if above else None, self.rank + 1),
            (dist.irecv, after, self.rank + 1),
        ]
        group = self._groups.get("world")
        moves = [
            dist.P2POp(kind, tensor, group=group, group_peer=peer)
            for kind, tensor, peer in work
            if tensor is not None
        ]
        for request in dist.batch_isend_irecv(moves) if moves else ():
            request.wait()
        return _unpack(before), _unpack(after)

    def symmetric(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8, axis: str = "tp"
    ) -> Symmetric:
        """Allocate memory that the ranks of `axis` share (a collective). Not during a capture.

        Views of `.tensor` are recognised by `all_reduce`. On cpu and at size 1 it is ordinary
        memory.
        """
        group = self._groups.get(axis)
        if group is None or self.device.type != "cuda":
            tensor = torch.zeros(shape, dtype=dtype, device=self.device)
            return Symmetric(tensor, (tensor.data_ptr(),), axis)
        tensor = symmetric_memory.empty(shape, dtype=dtype, device=self.device)
        handle = symmetric_memory.rendezvous(tensor, group)
        tensor.zero_()
        part = Symmetric(tensor, tuple(handle.buffer_ptrs), axis, handle)
        self._registered[tensor.untyped_storage().data_ptr()] = part
        # Nobody stores into a peer's memory before it is zeroed. Not `barrier`: the ranks of the
        # other guidance branch, whose prompt may be cached, do not come here.
        dist.all_reduce(torch.zeros(1, device=self.device), group=group)
        torch.cuda.synchronize(self.device)
        return part

    def gather_objects(self, value: Any, timeout: float | None = None) -> list[Any]:
        """A small JSON value of every rank, in world order, on the host alone (about 0.2 ms).

        Raises TimeoutError naming the ranks that did not come, ConnectionError without the store.
        """
        return [value] if self.channel is None else self.channel.gather(value, timeout)

    def tell(self, value: Any) -> None:
        """This rank's part of the next `gather_objects`, for the others: it does not wait for
        theirs.
        """
        if self.channel is not None:
            self.channel.tell(value)

    @property
    def meetings(self) -> int:
        """Calls of `gather_objects` and `tell` so far."""
        return 0 if self.channel is None else self.channel.rounds

    def barrier(self) -> None:
        """All ranks' host threads have come this far. Says nothing about their GPUs."""
        self.gather_objects(None)

    def settle(self) -> None:
        """Every rank's device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.barrier()

    def close(self) -> None:
        """End symmetric memory, then the groups this mesh made, then the one it started.

        Call it after graphs and their buffers are gone and after the watchdog is closed.
        """
        if self.device.type == "cuda" and self._groups:
            torch.cuda.synchronize(self.device)
        self._registered.clear()
        made = [group for group in self._groups.values() if group is not dist.group.WORLD]
        self._groups = {}
        if not dist.is_initialized():
            return
        for group in made:
            dist.destroy_process_group(group)
        if self._owns_group:
            dist.destroy_process_group()
        self._owns_group, self.channel = False, None

    def _make_groups(self) -> dict[str, dist.ProcessGroup]:
        """Groups of the axes larger than 1. Every rank makes all of them, in the same order."""
        grid = torch.arange(self.world_size, device="cpu").view(self.cfg_size, self.tp_size)
        groups: dict[str, dist.ProcessGroup] = {"world": dist.group.WORLD}  # type: ignore[dict-item]
        for axis, rows in (("tp", grid.tolist()), ("cfg", grid.T.tolist())):
            if self.size(axis) == self.world_size:
                groups[axis] = groups["world"]
                continue
            for ranks in rows if self.size(axis) > 1 else ():
                group = dist.new_group(ranks)
                if self.rank in ranks:
                    groups[axis] = group
        return groups

    def _connect(self) -> None:
        """NCCL connects at the first use, which must not be inside a capture."""
        if self.device.type != "cuda":
            return
        for axis in self._groups:
            self.all_reduce(torch.zeros(1, device=self.device), axis)
        edge = torch.zeros(1, device=self.device)
        self.exchange_edges(edge, edge)
        torch.cuda.synchronize(self.device)

    def _two_shot(self, x: torch.Tensor, axis: str) -> bool:
        """Whether symmetric memory's kernel reduces x, from data equal on all ranks of the axis."""
        part = self._registered.get(x.untyped_storage().data_ptr()) if self._registered else None
        held = part is not None and part.axis == axis
        return held and self.two_shot(x.numel() * x.element_size(), axis)


def _with_index(device: torch.device, index: int | None) -> torch.device:
    """A cuda device always has an index; without one it is this rank's on its host."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", dist.get_node_local_rank() if index is None else index)


def _pack(x: torch.Tensor | None) -> torch.Tensor | None:
    """Contiguous, and for 5-D activations in channels-last order, whatever strides the ranks
    have.
    """
    if x is None:
        return None
    return x.movedim(1, -1).contiguous() if x.dim() == 5 else x.contiguous()


def _unpack(x: torch.Tensor | None) -> torch.Tensor | None:
    return x.movedim(-1, 1) if x is not None and x.dim() == 5 else x
