"""Launchers of `_C`'s halo kernels: a convolution's padded input and the exchange of edges with
neighbours.

The formulas are those of `kernels/reference_conv.py`. Each function runs `_C` on the device of its
tensors, the CPU twin for CPU tensors (tests); `ops` decides when it is called. Nothing here waits
for the device, so each may be captured, and the exchange may be captured any number of times: its
epoch lives on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cosmos3_fast.ops.extension import extension, place

if TYPE_CHECKING:
    from cosmos3_fast.parallel_edges import EdgeSlots

__all__ = ["conv_edges", "conv_input", "conv_input_exchange", "fill_edges", "send_edges"]

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PROLOGUES = {"none": 0, "norm_silu": 1}
_SIDES = {
    3: (2, 3),
    4: (0, 1),
}  # where in pad = (left, right, top, bottom) a strip's neighbours are
_CHANNELS_LAST = torch.channels_last_3d


def conv_input(
    x: torch.Tensor,
    *,
    prologue: str,
    gamma: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    history: int = 0,
    pad: tuple[int, int, int, int] = (0, 0, 0, 0),
    axis: int = 3,
    before: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [1, C, T, H, W] -> [1, C, history + T, top + H + bottom, left + W + right] in
    channels_last_3d, one kernel.

    As `kernels.reference_conv.conv_input`; x float32, float16 or bfloat16, gamma and bias [C] used
    as float32. `out`: a result's shape, dtype and memory format. Raises ValueError for shapes,
    dtypes and devices that disagree.
    """
    x = _channels_last(x)
    plan = _plan(x, history, pad, axis)
    out = _result(x, plan, out)
    lead, tail = (pad[i] for i in _SIDES[axis])
    operands = {
        "gamma": _vector("gamma", gamma, x),
        "bias": _vector("bias", bias, x),
        "before": _operand("before", before, x, _edge_shape(out, history, pad, axis, lead)),
        "after": _operand("after", after, x, _edge_shape(out, history, pad, axis, tail)),
    }
    _write(x, out, prologue, operands, plan)
    return out


def conv_edges(
    x: torch.Tensor,
    *,
    prologue: str,
    gamma: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    axis: int = 3,
    before: int = 0,
    after: int = 0,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """First `before`, last `after` rows along `axis` (3 = H, 4 = W) of prologue(x + bias); None for
    0.

    For edges that travel by other means than slots; as `kernels.reference_conv.conv_edges`.
    """

    def edge(count: int, at_end: bool) -> torch.Tensor | None:
        if count == 0:
            return None
        part = x.narrow(axis, x.shape[axis] - count if at_end else 0, count)
        return conv_input(part, prologue=prologue, gamma=gamma, bias=bias)

    return edge(before, False), edge(after, True)


def conv_input_exchange(x: torch.Tensor, slots: EdgeSlots, **arguments: Any) -> torch.Tensor:
    """`conv_input` of this rank's strip, its padding along `axis` filled with the neighbours' true
    edges.

    Takes what `conv_input` takes but `before` and `after`. One kernel writes and sends, a second
    one waits and fills, both on the current stream. Every rank that has a neighbour in `slots` must
    make the same sequence of calls, with equal C, T, pad and extent across the strips. A neighbour
    that does not come in time leaves zeros and a failure that `slots.failure()` tells.
    """
    out, plan = send_edges(x, slots, **arguments)
    fill_edges(out, plan, slots)
    return out


def send_edges(
    x: torch.Tensor,
    slots: EdgeSlots,
    *,
    prologue: str,
    gamma: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    history: int = 0,
    pad: tuple[int, int, int, int] = (0, 0, 0, 0),
    axis: int = 3,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, int]]:
    """The writing half of `conv_input_exchange`: the result, its neighbours' padding still zero,
    and its plan.
    """
    x = _channels_last(x)
    plan = _plan(x, history, pad, axis)
    out = _result(x, plan, out)
    operands = {
        "gamma": _vector("gamma", gamma, x),
        "bias": _vector("bias", bias, x),
    }
    _write(x, out, prologue, operands, plan | slots.targets())
    return out, plan


def fill_edges(out: torch.Tensor, plan: dict[str, int], slots: EdgeSlots) -> None:
    """The waiting half of `conv_input_exchange`; exactly one for every `send_edges`, in the same
    order.
    """
    if slots.neighbours:
        extension().halo_wait(out=out.data_ptr(), **plan, **slots.sources(), **place(out))


def _plan(
    x: torch.Tensor, history: int, pad: tuple[int, int, int, int], axis: int
) -> dict[str, int]:
    """The arguments that the writing and the waiting kernel share."""
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    if axis not in _SIDES:
        raise ValueError(f"axis must be 3 (rows) or 4 (columns), got {axis}")
    names = ("channels", "frames", "height", "width")
    sizes = dict(zip(names, x.shape[1:], strict=True))
    sides = dict(zip(("left", "right", "top", "bottom"), pad, strict=True))
    return sizes | sides | {"dtype": DTYPES[x.dtype], "history": history, "axis": axis}


def _result(x: torch.Tensor, plan: dict[str, int], out: torch.Tensor | None) -> torch.Tensor:
    rows = plan["top"] + plan["height"] + plan["bottom"]
    columns = plan["left"] + plan["width"] + plan["right"]
    shape = (1, plan["channels"], plan["history"] + plan["frames"], rows, columns)
    if out is None:
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_CHANNELS_LAST)
    same = out.shape == shape and out.dtype == x.dtype and out.device == x.device
    if not same or not out.is_contiguous(memory_format=_CHANNELS_LAST):
        raise ValueError(
            f"out must be {x.dtype} {list(shape)} on {x.device} in channels_last_3d, got "
            f"{out.dtype} {list(out.shape)} on {out.device} with strides {out.stride()}"
        )
    return out


def _edge_shape(
    out: torch.Tensor, history: int, pad: tuple[int, int, int, int], axis: int, count: int
) -> tuple[int, int, int]:
    left, right, top, bottom = pad
    frames = out.shape[2] - history
    if axis == 3:
        return frames, count, out.shape[4] - left - right
    return frames, out.shape[3] - top - bottom, count


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    if x.ndim != 5 or x.shape[0] != 1:
        raise ValueError(f"x must be [1, C, T, H, W], got {list(x.shape)}")
    return x.contiguous(memory_format=_CHANNELS_LAST)


def _vector(name: str, vector: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    if vector is None:
        return None
    if vector.device != x.device or vector.numel() != x.shape[1]:
        raise ValueError(
            f"{name} must hold {x.shape[1]} values on {x.device}, got "
            f"{list(vector.shape)} on {vector.device}"
        )
    return vector.flatten().float().contiguous()


def _operand(
    name: str, operand: torch.Tensor | None, x: torch.Tensor, sizes: tuple[int, ...]
) -> torch.Tensor | None:
    if operand is None or 0 in sizes:
        return None
    shape = (1, x.shape[1], *sizes)
    agrees = operand.dtype == x.dtype and operand.device == x.device
    if not agrees or operand.shape != shape:
        raise ValueError(
            f"{name} must be {x.dtype} {list(shape)} on {x.device}, got "
            f"{operand.dtype} {list(operand.shape)} on {operand.device}"
        )
    return operand.contiguous(memory_format=_CHANNELS_LAST)


def _write(
    x: torch.Tensor,
    out: torch.Tensor,
    prologue: str,
    operands: dict[str, torch.Tensor | None],
    numbers: dict[str, int],
) -> None:
    """Launch the writing kernel. The operands, some of them copies, live until it is launched."""
    if prologue not in PROLOGUES:
        raise ValueError(f"prologue must be one of {tuple(PROLOGUES)}, got {prologue!r}")
    addresses = {name: 0 if t is None else t.data_ptr() for name, t in operands.items()}
    addresses |= {"x": x.data_ptr(), "out": out.data_ptr()}
    extension().halo_write(prologue=PROLOGUES[prologue], **addresses, **numbers, **place(x))
