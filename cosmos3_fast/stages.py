"""Where the time of a request goes: named stages, timed on the device without waiting for it."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stages:
    """Marks between the stages of one request. On CUDA they are events, read once the request is
    over.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []
        self.mark("start")

    def mark(self, name: str) -> None:
        """The stage `name` ends here."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def milliseconds(self) -> dict[str, float]:
        """Stage -> ms; waits for the last mark."""
        if self._cuda:
            self._marks[-1][1].synchronize()  # type: ignore[union-attr]
        times: dict[str, float] = {}
        for (_, begin), (name, end) in zip(self._marks, self._marks[1:], strict=False):
            times[name] = times.get(name, 0.0) + _span(begin, end)
        return times


def _span(begin: Any, end: Any) -> float:
    return (end - begin) * 1e3 if isinstance(begin, float) else begin.elapsed_time(end)
