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
def _picked(source, part, PHASE: tl.constexpr, TIME: tl.constexpr, SHARE: tl.constexpr):
    """What a phase adds: source [BLOCK] itself, or its column of source [BLOCK, SHARE]."""
    if SHARE > 1:
        shares = tl.arange(0, SHARE)[None, :]
        mine = (4 * part + PHASE) * SHARE // (4 * TIME)
        source = tl.sum(tl.where(shares == mine, source, 0.0), axis=1)
    return source


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
    # All loads before the first store, which may alias them for all that the compiler knows.
    above = (frame * (height + 1) + row) * (width + 1) * CHANNELS + at
    below = above + (width + 1) * CHANNELS
    value_00 = tl.load(phase_00_ptr + above, mask=inside, other=0.0)
    value_01 = tl.load(phase_01_ptr + above + CHANNELS, mask=inside, other=0.0)
    value_10 = tl.load(phase_10_ptr + below, mask=inside, other=0.0)
    value_11 = tl.load(phase_11_ptr + below + CHANNELS, mask=inside, other=0.0)
    kind = value_00.dtype
    total_00 = (value_00.to(tl.float32) + _picked(source, part, 0, TIME, SHARE)).to(kind)
    total_01 = (value_01.to(tl.float32) + _picked(source, part, 1, TIME, SHARE)).to(kind)
    total_10 = (value_10.to(tl.float32) + _picked(source, part, 2, TIME, SHARE)).to(kind)
    total_11 = (value_11.to(tl.float32) + _picked(source, part, 3, TIME, SHARE)).to(kind)
    # In a line of out the cells are two pixels apart.
    even = out_ptr + (frame * height + row) * 4 * size + at + at // CHANNELS * CHANNELS
    odd = even + 2 * size
    tl.store(even, total_00, mask=inside)
    tl.store(even + CHANNELS, total_01, mask=inside)
    tl.store(odd, total_10, mask=inside)
    tl.store(odd + CHANNELS, total_11, mask=inside)


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
