"""How the ranks of one launch find each other, and their CPU-side channel.

The launch (torchrun, or plain processes with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) is
read by torch.distributed. Rank 0 compares it with the configuration before any group exists, and
every rank that has arrived raises what rank 0 found. The channel runs over the launch's key-value
store, never over a GPU, so a hung device cannot block it.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from cosmos3_fast.config import ParallelConfig

_LINGER_S = 5.0  # how long rank 0 keeps the store alive for the others to read a verdict
_generation = itertools.count()  # equal on all ranks: meshes are made in the same order
# The store that rank 0 hosts outside torchrun lives as long as its process: a rank that makes its
# next mesh before rank 0 has closed the last would else meet the old store, and lose it.
_hosted: list[dist.Store] = []


def _seconds(seconds: float) -> timedelta:
    return timedelta(milliseconds=max(1, int(seconds * 1e3)))


class Channel:
    """Small JSON values between the ranks, over a connection to the store of their own.

    `watch` is a second connection, for the watchdog's thread. Both are made while the ranks meet:
    torch looks up every peer's host name, which takes seconds where reverse DNS does not answer.
    A gather is one `set`, one `multi_get` and one `delete_key`: about 0.2 ms on one host.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        self.store = store
        self.watch = store.clone()  # type: ignore[attr-defined]  # missing in torch's stubs
        self.rank, self.size, self.timeout = rank, size, timeout
        self.rounds = 0

    def gather(self, value: Any, timeout: float | None = None) -> list[Any]:
        """`value` of every rank in rank order (JSON: tuples arrive as lists).

        Raises TimeoutError naming the ranks that did not come within `timeout` seconds (None: the
        channel's) or had given up before, ConnectionError when the store is gone.
        """
        limit = self.timeout if timeout is None else timeout
        keys = [self._key(rank) for rank in range(self.size)]
        with self._connected():
            self.store.set(keys[self.rank], json.dumps([value]))
            self.store.set_timeout(_seconds(limit))
            cards = self._cards(keys)
            missing = [rank for rank, card in enumerate(cards) if not card]
            if missing:
                self.store.set(keys[self.rank], "[]")  # who comes later must not go on alone
                raise TimeoutError(
                    f"rank {self.rank} waited {limit:g} s for {ranks_text(missing)} of {self.size}"
                )
            # Everybody who wrote this round has read the one before.
            self.store.delete_key(self._key(self.rank, -1))
        self.rounds += 1
        return [value for (value,) in cards]

    def tell(self, value: Any) -> None:
        """This rank's part of the next gather, which the others read when they come to it; this one
        goes on to the gather after. ConnectionError when the store is gone.
        """
        with self._connected():
            self.store.set(self._key(self.rank), json.dumps([value]))
        self.rounds += 1

    def _cards(self, keys: list[str]) -> list[list[Any]]:
        """[value] of every rank, [] of one that has not come in time or has given up."""
        try:
            return [json.loads(text) for text in self.store.multi_get(keys)]
        except dist.DistNetworkError:
            raise
        except dist.DistStoreError:  # too late: who is there
            return [json.loads(self.store.get(k)) if self.store.check([k]) else [] for k in keys]

    def _key(self, rank: int, back: int = 0) -> str:
        return f"gather/{self.rounds + back}/{rank}"

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except dist.DistNetworkError as error:
            raise ConnectionError(
                f"rank {self.rank}: the launch's store is gone: {error}"
            ) from error


def launch_size() -> int:
    """Processes of the torchrun launch that this one belongs to; 1 outside torchrun."""
    if not dist.is_torchelastic_launched():
        return 1
    # As in `_meet`: rank 1 makes it a client of torchrun's store.
    _, _, size = next(dist.rendezvous("env://", rank=1, timeout=_seconds(60)))
    return size


def leave_together(timeout: float = 30.0) -> None:
    """Return once every process of the torchrun launch has come here, at the latest after `timeout`
    seconds; at once outside torchrun.

    torchrun ends all processes as soon as one has ended with an error. One whose error the others
    have, too, comes here first, so that they can say theirs.
    """
    if not dist.is_torchelastic_launched():
        return
    try:
        store, _, size = next(dist.rendezvous("env://", rank=1, timeout=_seconds(timeout)))
        if store.add("cosmos3_fast/leaving", 1) == size:
            store.set("cosmos3_fast/left", "")
        store.wait(["cosmos3_fast/left"], _seconds(timeout))
    except dist.DistError:
        return  # somebody does something else, or torchrun itself has gone: nothing to wait for


def ranks_text(ranks: list[int]) -> str:
    """[2, 3] -> "ranks 2, 3"."""
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks))}"


def join(config: ParallelConfig, device: torch.device, timeout: float) -> tuple[Channel, bool]:
    """Meet the other ranks, take `device`, check the launch against `config`, start
    torch.distributed if nobody has.

    Returns the channel and whether this call started the process group. Raises ValueError on every
    rank where launch and configurations disagree or a rank cannot have its GPU, TimeoutError naming
    the ranks that did not come.
    """
    started = not dist.is_initialized()
    if started:
        store, own, rank, size = _meet(config, timeout)
    else:
        store = dist.distributed_c10d._get_default_store()
        own = store.clone()  # type: ignore[attr-defined]
        rank, size = dist.get_rank(), dist.get_world_size()
    prefix = f"cosmos3_fast/{next(_generation)}"
    channel = Channel(dist.PrefixStore(prefix, own), rank, size, timeout)
    _agree_on_launch(channel, config, device, timeout)
    if started:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"{prefix}/group", store),
            rank=rank,
            world_size=size,
            device_id=device if device.type == "cuda" else None,
        )
    return channel, started


def _meet(config: ParallelConfig, timeout: float) -> tuple[dist.Store, dist.Store, int, int]:
    """Two connections to the launch's store, this rank and the launch's size. Waits for rank 0
    alone.

    torch's rendezvous makes rank 0 wait for WORLD_SIZE clients and then says only how many came;
    asked for a world of one it does not wait. A second, client-side rendezvous tells WORLD_SIZE.
    """
    limit = _seconds(timeout)
    try:
        store, rank, _ = next(dist.rendezvous("env://", world_size=1, timeout=limit))
        _hosted[:] = _hosted or [store]
        own, _, size = next(dist.rendezvous("env://", rank=1, timeout=limit))
    except ValueError as error:
        raise ValueError(
            f"world_size {config.world_size} needs a launch of {config.world_size} processes "
            f"(torchrun --nproc_per_node={config.world_size}): RANK, WORLD_SIZE, MASTER_ADDR or "
            "MASTER_PORT is missing or no number"
        ) from error
    except dist.DistError as error:
        raise TimeoutError(
            f"no sign of rank 0 of {config.world_size} within {timeout:g} s: {error}"
        ) from error
    return store, own, rank, size


def _agree_on_launch(
    channel: Channel, config: ParallelConfig, device: torch.device, timeout: float
) -> None:
    """Raise the same error on every rank that has come, unless all are there and agree."""
    card = {
        "mesh": [config.cfg_size, config.tp_size],
        "host": socket.gethostname(),
        "device": str(device),
        "refusal": _take(device),
        "pid": os.getpid(),
    }
    store = channel.store
    try:
        store.set(f"card/{channel.rank}", json.dumps(card))
        if channel.rank == 0:
            store.set("verdict", json.dumps(_verdict(channel, timeout)))
        # Rank 0 may have started one import later than this rank: its patience counts from then.
        store.wait(["verdict"], _seconds(2 * timeout + _LINGER_S))
        kind, text = json.loads(store.get("verdict"))
        store.set(f"read/{channel.rank}", "")
        if kind and channel.rank == 0:
            _linger(channel)
    except dist.DistError as error:
        raise TimeoutError(f"no sign of rank 0 of {config.world_size}: {error}") from error
    if kind:
        raise {"ValueError": ValueError, "TimeoutError": TimeoutError}[kind](text)


def _take(device: torch.device) -> str:
    """Make a GPU this process's current one; why that cannot be, or ""."""
    if device.type != "cuda":
        return ""
    count = torch.cuda.device_count()
    if device.index >= count:
        return f"asks for {device} and sees {count} GPU{'s' if count != 1 else ''}"
    try:
        torch.cuda.set_device(device)
    except RuntimeError as error:  # in use elsewhere, full, broken: the other ranks must hear of it
        return f"cannot have {device}: {str(error).splitlines()[0]}"
    return ""


def _arrived(channel: Channel) -> list[int]:
    return [rank for rank in range(channel.size) if channel.store.check([f"card/{rank}"])]


def _linger(channel: Channel) -> None:
    keys = [f"read/{rank}" for rank in _arrived(channel)]
    try:
        channel.store.wait(keys, _seconds(_LINGER_S))
    except dist.DistStoreError:
        return  # somebody died meanwhile: the verdict stands, and nobody else needs the store


def _verdict(channel: Channel, timeout: float) -> tuple[str, str]:
    """("", "") or the kind and text of what is wrong with the launch, decided by rank 0 alone."""
    store, size = channel.store, channel.size
    try:
        store.wait([f"card/{rank}" for rank in range(size)], _seconds(timeout))
    except dist.DistStoreError:
        there = _arrived(channel)
        missing = [rank for rank in range(size) if rank not in there]
        return "TimeoutError", (
            f"a launch of {size} ranks is expected; after {timeout:g} s there is no sign of "
            f"{ranks_text(missing)} (here: {ranks_text(there)})"
        )
    cards = [json.loads(store.get(f"card/{rank}")) for rank in range(size)]
    meshes = [tuple(card["mesh"]) for card in cards]
    if len(set(meshes)) > 1:
        said = "; ".join(f"rank {r}: cfg {c} x tp {t}" for r, (c, t) in enumerate(meshes))
        return "ValueError", f"the ranks have different ParallelConfigs: {said}"
    cfg, tp = meshes[0]
    if cfg * tp != size:
        return "ValueError", (
            f"ParallelConfig(world_size={cfg * tp}, cfg_size={cfg}, tp_size={tp}) needs "
            f"{cfg * tp} ranks, the launch has {size} (torchrun --nproc_per_node={cfg * tp})"
        )
    refused = [f"rank {r} {card['refusal']}" for r, card in enumerate(cards) if card["refusal"]]
    if refused:
        return "ValueError", f"one GPU a rank: {', '.join(refused)}"
    on_gpus = [card for card in cards if "cuda" in card["device"]]
    hosts = sorted({card["host"] for card in on_gpus})
    if len(hosts) > 1:  # their kernels address each other's memory
        return "ValueError", f"GPU ranks must be on one host, these are on {', '.join(hosts)}"
    for device in sorted({card["device"] for card in on_gpus}):
        ranks = [rank for rank, card in enumerate(cards) if card["device"] == device]
        if len(ranks) > 1:
            return "ValueError", f"{ranks_text(ranks)} all ask for {device}: one GPU a rank"
    return "", ""
