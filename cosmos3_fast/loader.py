"""Strict loading: every slot filled once, every name and shape agreed before a byte is read.

A module says where its tensors go (`slots() -> {checkpoint name: Slot}`); this file knows no layer.
Names are strict both ways, shapes exact, casts only between floating-point types and reported,
values finite. Tensors are read in the order of the shards, so that disks read forward; on cuda they
pass through two pinned buffers, one filling while the other is copied.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from tqdm import tqdm

from cosmos3_fast.checkpoint import LazyTensor, Slot

log = logging.getLogger(__name__)

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STAGING_BYTES = 64 << 20
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LoadReport:
    """What one `load` did.

    Bytes read by this rank, wall seconds, tensors filled, casts by kind, names not loaded.
    """

    bytes: int
    seconds: float
    tensors: int
    casts: tuple[str, ...]
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        rate = self.bytes / max(self.seconds, 1e-9) / 1e9
        casts = f", cast {'; '.join(self.casts)}" if self.casts else ""
        skipped = f", {len(self.skipped)} not loaded: {first_five(self.skipped)}"
        return (
            f"{self.tensors} tensors, {self.bytes / 1e9:.3g} GB in {self.seconds:.2f} s"
            f" ({rate:.3g} GB/s)"
            f"{casts}{skipped if self.skipped else ''}"
        )


def load(
    slots: Mapping[str, Slot],
    tensors: Mapping[str, LazyTensor],
    *,
    unused: tuple[str, ...] = (),
    strict: bool = True,
    progress: Progress | None = None,
) -> LoadReport:
    """Fill every slot from the checkpoint tensor of its name.

    `unused`: known names that are not loaded, each itself and everything under it ("lm_head" covers
    "lm_head.weight", not "lm_head_2"); one that ends in "_" or "." covers every name that begins
    so.
    `strict=False` turns other leftover names into a warning. `progress(done, total)` is called
    after each tensor, in bytes.

    ValueError, before any byte is read, with the first five names: a slot without a tensor, a
    leftover tensor, a shape that is not exactly the slot's, a dtype that is no declared cast
    (equal, or float to float); after reading: values that are not finite in the target's dtype.
    """
    start = time.perf_counter()
    skipped = _check_names(slots, tensors, unused, strict)
    casts = _check_tensors(slots, tensors)
    order = [(name, slots[name]) for name in tensors if name in slots]
    total = sum(slot.target.numel() * tensors[name].dtype.itemsize for name, slot in order)
    finite: dict[str, torch.Tensor] = {}
    copiers: dict[torch.device, Copy] = {}
    done, previous = 0, None
    for name, slot in order:
        lazy = tensors[name]
        if previous is not None and previous != lazy.shard:
            previous.close()
        previous = lazy.shard
        device = slot.target.device
        if device not in copiers:
            copiers[device] = _copier(device)
        with torch.no_grad():
            copiers[device](lazy.read(slot.index), slot.target)
            finite[name] = torch.isfinite(slot.target).all()
        done += slot.target.numel() * lazy.dtype.itemsize
        if progress is not None:
            progress(done, total)
    if previous is not None:
        previous.close()
    _check_finite(finite)
    return LoadReport(done, time.perf_counter() - start, len(order), casts, skipped)


Copy = Callable[[torch.Tensor, torch.Tensor], object]


def _copier(device: torch.device) -> Copy:
    """The function (source on the host, target on `device`) that copies and casts."""
    return PinnedStaging(device).copy if device.type == "cuda" else _copy


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)


class PinnedStaging:
    """Copies host tensors to one GPU: one pinned buffer is filled while the other is sent."""

    def __init__(self, device: torch.device, nbytes: int = STAGING_BYTES) -> None:
        self.device, self.nbytes = device, nbytes
        self._buffers = [
            torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(2)
        ]
        self._sent = [torch.cuda.Event(), torch.cuda.Event()]
        self._turn = 0

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """`target` = `source` cast to its dtype; returns when `source` has been read."""
        for part, into in row_pieces(source, target, self.nbytes):
            self._send(part, into)

    def _send(self, source: torch.Tensor, target: torch.Tensor) -> None:
        turn, self._turn = self._turn, 1 - self._turn
        self._sent[turn].synchronize()
        stage = self._buffers[turn][: source.numel() * source.element_size()]
        stage = stage.view(source.dtype).view(source.shape)
        stage.copy_(source)
        # cast on the device: a copy_ across devices and dtypes at once casts on the host first
        target.copy_(stage.to(self.device, non_blocking=True))
        self._sent[turn].record(torch.cuda.current_stream(self.device))


def row_pieces(
    source: torch.Tensor, target: torch.Tensor, nbytes: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut both alike into pieces of at most `nbytes` of the source: whole rows while they fit."""
    size = source.numel() * source.element_size()
    if size <= nbytes or source.dim() == 0:
        yield source, target
    elif size // source.shape[0] > nbytes:
        for row in range(source.shape[0]):
            yield from row_pieces(source[row], target[row], nbytes)
    else:
        rows = nbytes // (size // source.shape[0])
        for at in range(0, source.shape[0], rows):
            yield source[at : at + rows], target[at : at + rows]


def unfilled(parameters: Mapping[str, torch.Tensor], slots: Mapping[str, Slot]) -> list[str]:
    """Names of parameters that the slots' targets do not fill exactly once, counted by storage.

    For a module: `unfilled(dict(module.named_parameters()), module.slots())` must be empty.
    """
    counts: Counter[int] = Counter()
    for slot in slots.values():
        counts[slot.target.untyped_storage().data_ptr()] += slot.target.numel()
    return [
        name
        for name, parameter in parameters.items()
        if counts[parameter.untyped_storage().data_ptr()] != parameter.numel()
    ]


def progress_bar(description: str) -> Progress:
    """A tqdm bar in bytes to pass as `progress`; it closes itself when all is done."""
    bars: list[tqdm] = []

    def update(done: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(total=total, desc=description, unit="B", unit_scale=True))
        bars[0].update(done - bars[0].n)
        if done == total:
            bars[0].close()

    return update


def first_five(names: tuple[str, ...] | list[str]) -> str:
    """The first five names, and how many there are if more."""
    shown = ", ".join(names[:5])
    return f"{shown}, … ({len(names)} in all)" if len(names) > 5 else shown


def _covers(prefix: str, name: str) -> bool:
    return (
        name == prefix
        or name.startswith(prefix + ".")
        or (prefix.endswith(("_", ".")) and name.startswith(prefix))
    )


def _check_names(
    slots: Mapping[str, Slot],
    tensors: Mapping[str, LazyTensor],
    unused: tuple[str, ...],
    strict: bool,
) -> tuple[str, ...]:
    """Names not loaded; ValueError for gaps, and when strict for leftovers."""
    missing = [name for name in slots if name not in tensors]
    if missing:
        raise ValueError(f"the checkpoint lacks tensors: {first_five(missing)}")
    skipped = tuple(name for name in tensors if name not in slots)
    leftover = [name for name in skipped if not any(_covers(p, name) for p in unused)]
    if leftover and strict:
        raise ValueError(
            f"the checkpoint holds tensors that have no place here: {first_five(leftover)}"
        )
    if leftover:
        log.warning("tensors without a place here are not loaded: %s", first_five(leftover))
    return skipped


def _check_tensors(slots: Mapping[str, Slot], tensors: Mapping[str, LazyTensor]) -> tuple[str, ...]:
    """Exact shapes and declared casts, all checked; the casts, one line a kind."""
    wrong, casts = [], Counter[str]()
    for name, slot in slots.items():
        lazy, dtype = tensors[name], slot.target.dtype
        if lazy.shape != tuple(slot.shape):
            wrong.append(f"{name} has shape {lazy.shape}, expected {tuple(slot.shape)}")
        elif lazy.dtype != dtype:
            if lazy.dtype not in FLOATS or dtype not in FLOATS:
                wrong.append(f"{name} has dtype {lazy.dtype}, which cannot be loaded as {dtype}")
            casts[f"{lazy.dtype} to {dtype}".replace("torch.", "")] += 1
    if wrong:
        raise ValueError(f"the checkpoint does not fit: {first_five(wrong)}")
    return tuple(f"{kind}: {count}" for kind, count in casts.items())


def _check_finite(finite: Mapping[str, torch.Tensor]) -> None:
    """One wait a device: the flags are on the devices until here."""
    flags: dict[torch.device, list[str]] = {}
    for name, flag in finite.items():
        flags.setdefault(flag.device, []).append(name)
    bad = [
        name
        for names in flags.values()
        for name, good in zip(names, torch.stack([finite[n] for n in names]).tolist(), strict=True)
        if not good
    ]
    if bad:
        raise ValueError(f"weights that are not finite: {first_five(bad)}")
