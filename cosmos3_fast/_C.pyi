"""Fused operations in CUDA C++, each with a CPU twin; `ops` checks the arguments first.

Addresses, sizes and CUDA streams are integers; device -1 is the CPU, where the stream is ignored.
Every call launches on that stream alone, allocates nothing and does not wait. A check that fails
raises RuntimeError with the source's file and line.
"""

from collections.abc import Sequence

has_cuda: bool
HALO_STATE_BYTES: int
SUM_STATE_BYTES: int

def image_to_tensor(frames: int, out: int, count: int, device: int, stream: int) -> None: ...

# On the host alone, with threads and memory of its own; it returns when out is written.
def legacy_normal(seed: int, out: int, count: int, threads: int) -> None: ...
def halo_buffer_bytes(slot_bytes: int) -> int: ...
def halo_write(
    *,
    x: int,
    out: int,
    gamma: int = 0,
    bias: int = 0,
    before: int = 0,
    after: int = 0,
    dtype: int,
    prologue: int,
    channels: int,
    frames: int,
    height: int,
    width: int,
    history: int,
    left: int,
    right: int,
    top: int,
    bottom: int,
    axis: int,
    peer_before: int = 0,
    peer_after: int = 0,
    slot_bytes: int = 0,
    state: int = 0,
    device: int,
    stream: int = 0,
) -> None: ...
def halo_wait(
    *,
    out: int,
    dtype: int,
    channels: int,
    frames: int,
    height: int,
    width: int,
    history: int,
    left: int,
    right: int,
    top: int,
    bottom: int,
    axis: int,
    slots: int,
    slot_bytes: int,
    from_before: bool,
    from_after: bool,
    state: int,
    deadline_ns: int,
    device: int,
    stream: int = 0,
) -> None: ...
def sum_flag_bytes(ranks: int) -> int: ...
def sum_norm(
    *,
    peers: Sequence[int],
    rank: int,
    part: int,
    normed: int,
    flags: int,
    residual_at: int = -1,
    residual: int,
    weight: int,
    eps: float,
    dtype: int,
    rows: int,
    columns: int,
    state: int,
    deadline_ns: int,
    device: int,
    stream: int = 0,
) -> None: ...
