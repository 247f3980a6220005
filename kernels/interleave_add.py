"""The four phases of an upsampling interleaved, and its duplicating shortcut added on the way.

    out[t, 2 i + p, 2 j + q, o] = round(phase[p, q][t, i + p, j + q, o] + source[s, i, j, c])
    c = ((o time + a) 4 + 2 p + q) // (4 time O / I)        s, a = divmod(t + lead, time)

phase[p, q] [T, h + 1, w + 1, O] and source [S, h, w, I] -> out [T, 2 h, 2 w, O], all channels-last;
T = S time - lead, where lead is time - 1 if the group holds frame 0, else 0. The sum is float32. An
output channel has I / O source channels next to one another: a program loads those of its cells
once and picks each phase's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

# (values of a phase a program, warps) by bytes of an element: 16 bytes of each phase a thread.
TILES = {2: (1024, 4), 4: (1024, 8)}


@triton.jit
def _add_phase(
    phase_ptr,
    out_ptr,
    source,
    frame,
    row,
    part,
    at,
    inside,
    height,
    width,
    PHASE: tl.constexpr,
    TIME: tl.constexpr,
    CHANNELS: tl.constexpr,
    SHARE: tl.constexpr,
):
    """One phase of a block; source [BLOCK], or [BLOCK, SHARE] to pick from."""
    p: tl.constexpr = PHASE // 2
    q: tl.constexpr = PHASE % 2
    if SHARE > 1:
        pick = (4 * part + PHASE) * SHARE // (4 * TIME)
        shares = tl.arange(0, SHARE)[None, :]
        source = tl.sum(tl.where(shares == pick, source, 0.0), axis=1)
    place = (frame * (height + 1) + row + p) * (width + 1) + q
    value = tl.load(phase_ptr + place * CHANNELS + at, mask=inside, other=0.0)
    total = (value.to(tl.float32) + source).to(value.dtype)
    place = (2 * (frame * height + row) + p) * (2 * width) + q
    cell = at + at // CHANNELS * CHANNELS  # in a line of out, where cells are two pixels apart
    tl.store(out_ptr + place * CHANNELS + cell, total, mask=inside)


@triton.jit
def _interleave_add_kernel(
    phase_00_ptr,
    phase_01_ptr,
    phase_10_ptr,
    phase_11_ptr,
    source_ptr,
    out_ptr,
    height,
    width,
    blocks,
    lead,
    TIME: tl.constexpr,
    CHANNELS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line, start = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK
    frame, row = (line // height).to(tl.int64), line % height
    source_frame, part = (frame + lead) // TIME, (frame + lead) % TIME
    size = width * CHANNELS  # values of a line of one phase, number j * CHANNELS + o
    at = start + tl.arange(0, BLOCK)
    inside = at < size
    source_ptr += (source_frame * height + row) * size * SHARE
    wide = start * SHARE + tl.arange(0, BLOCK * SHARE)
    source = tl.load(source_ptr + wide, mask=wide < size * SHARE, other=0.0).to(tl.float32)
    if SHARE > 1:
        source = tl.reshape(source, (BLOCK, SHARE))
    _add_phase(
        phase_00_ptr, out_ptr, source, frame, row, part, at, inside, height, width,
        0, TIME, CHANNELS, SHARE,
    )  # fmt: skip
    _add_phase(
        phase_01_ptr, out_ptr, source, frame, row, part, at, inside, height, width,
        1, TIME, CHANNELS, SHARE,
    )  # fmt: skip
    _add_phase(
        phase_10_ptr, out_ptr, source, frame, row, part, at, inside, height, width,
        2, TIME, CHANNELS, SHARE,
    )  # fmt: skip
    _add_phase(
        phase_11_ptr, out_ptr, source, frame, row, part, at, inside, height, width,
        3, TIME, CHANNELS, SHARE,
    )  # fmt: skip


def interleave_add(
    phases: Sequence[torch.Tensor],
    source: torch.Tensor,
    *,
    time: int,
    first: bool,
    out: torch.Tensor | None = None,
    tile: tuple[int, int] | None = None,
) -> torch.Tensor:
    """phases (0, 0), (0, 1), (1, 0), (1, 1), each [T, O, h + 1, w + 1], and source [1, I, S, h, w]
    -> [1, O, T, 2 h, 2 w] in channels_last_3d, of the same dtype.

    `first`: the group holds frame 0. What is not in channels-last order is copied into it.
    """
    phases = [phase.contiguous(memory_format=torch.channels_last) for phase in phases]
    source = source.contiguous(memory_format=torch.channels_last_3d)
    frames, channels = phases[0].shape[:2]
    _, into, sources, height, width = source.shape
    lead = time - 1 if first else 0
    shape = (1, channels, frames, 2 * height, 2 * width)
    if out is None:
        kind = {"dtype": source.dtype, "device": source.device}
        out = torch.empty(shape, **kind, memory_format=torch.channels_last_3d)
    assert len(phases) == 4 and len(source) == 1, (len(phases), source.shape)
    assert all(x.shape == (frames, channels, height + 1, width + 1) for x in phases), shape
    assert frames == sources * time - lead and into % channels == 0, (shape, source.shape)
    assert 4 * time % (into // channels) == 0, (channels, into, time)
    assert out.shape == shape, (out.shape, shape)
    assert out.is_contiguous(memory_format=torch.channels_last_3d), out.stride()
    assert all(x.dtype == source.dtype and x.device == source.device for x in (*phases, out))
    assert 2 * width * into < 2**31, (width, into)
    block, warps = tile or TILES[source.element_size()]
    block = min(block, triton.next_power_of_2(width * channels))
    blocks = triton.cdiv(width * channels, block)
    if frames:
        _interleave_add_kernel[(blocks * frames * height,)](
            *phases,
            source,
            out,
            height,
            width,
            blocks,
            lead,
            TIME=time,
            CHANNELS=channels,
            SHARE=into // channels,
            BLOCK=block,
            num_warps=warps,
        )
    return out
