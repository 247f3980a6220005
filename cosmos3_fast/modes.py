"""The modes of torch in which the engine computes, whatever its caller's are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch


class _Setting(NamedTuple):
    """One of torch's settings of the process, and what the engine needs it to be."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    ours: Any


def _of(owner: Any, name: str, ours: Any) -> _Setting:
    return _Setting(partial(getattr, owner, name), partial(setattr, owner, name), ours)


def _reduction(dtype: str) -> _Setting:
    """Whether products of that type may be reduced in it: one flag, and one for split K."""
    products, name = torch.backends.cuda.matmul, f"allow_{dtype}_reduced_precision_reduction"

    def read() -> tuple[bool, bool]:
        return getattr(products, name), getattr(products, f"{name}_split_k", True)

    return _Setting(read, partial(setattr, products, name), (True, True))


def _settings() -> tuple[_Setting, ...]:
    """Those that choose how products and attentions are computed: torch's defaults, but float32 in
    float32.
    """
    b: Any = torch.backends
    cuda, kinds = b.cuda, ("flash", "mem_efficient", "math", "cudnn")
    return (
        *(
            _of(one, "fp32_precision", "ieee")
            for one in (cuda.matmul, b.cudnn.conv, b.mkldnn.matmul, b.mkldnn.conv)
        ),
        *(_reduction(dtype) for dtype in ("fp16", "bf16")),
        _of(cuda.matmul, "allow_fp16_accumulation", False),
        *(
            _Setting(
                getattr(cuda, f"{kind}_sdp_enabled"), getattr(cuda, f"enable_{kind}_sdp"), True
            )
            for kind in kinds
        ),
        _Setting(
            torch._C._get_blas_preferred_backend,
            torch._C._set_blas_preferred_backend,
            torch._C._BlasBackend.Cublas,
        ),
        # The engine repeats its bits by itself; asked to, torch would refuse products, or fill
        # every new tensor first.
        _Setting(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0),
    )


class _OwnSettings:
    """`with own_settings`: the settings of the process that `_settings` lists. They are put back
    when the last of all calls that overlap has left.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._settings = _settings()
        self._changed: list[tuple[_Setting, Any]] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                found = [(setting, setting.read()) for setting in self._settings]
                self._changed = [(one, value) for one, value in found if value != one.ours]
                for setting, _ in self._changed:
                    setting.write(setting.ours)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for setting, value in self._changed:
                    setting.write(value)


own_settings = _OwnSettings()


@contextmanager
def own_modes(device: torch.device) -> Iterator[None]:
    """No gradients, no inference tensors, no autocast, `own_settings`; tensors on the host unless a
    device is named, `device` the current GPU.

    What a request leaves behind (buffers, graphs, prompts, tables) serves later callers, who may be
    in other modes.
    """
    index = device.index if device.type == "cuda" else -1  # -1: no change
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.cuda.device(index),
        # This mode sees every call: where nobody has set a default, there is none.
        nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"),
        own_settings,
    ):
        yield
