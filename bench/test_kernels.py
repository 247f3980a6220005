"""Every kernel through `ops`: microseconds a call, share of its roofline, ratio to torch.

On a GPU at the sizes of D, E and S (`testing.requests`), "guided" being both branches of D: a
captured graph of calls whose inputs and results rotate past L2, in turn with torch's, by device
events. Without one, tiny shapes through the reference, so that the suite itself stays alive. Every
benchmark compares its result with the reference in float64 first and gives no number if that fails.

The roofline is the longer of a call's bytes at the rate of large copies and its FLOP at that of
large products, both measured in the same run (conftest.py, which prints the table). The ratio is to
the torch reference, that of attention to torch's own over keys concatenated beforehand, without a
mask.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cosmos3_fast import ops
from cosmos3_fast.graph import Captured
from cosmos3_fast.kernels import reference
from cosmos3_fast.testing.measure import repeated, timed

GPU = torch.cuda.is_available()
DEVICE, DTYPE = (
    (torch.device("cuda:0"), torch.bfloat16) if GPU else (torch.device("cpu"), torch.float32)
)
HIDDEN, INNER, DIM, QUERIES, KEYS = (4096, 12288, 128, 32, 8) if GPU else (64, 128, 16, 8, 2)
UND, CAPACITY, STEPS = (160, 256, 4) if GPU else (5, 8, 4)
ROTATED_BYTES, ROUNDS, REPLAYS = (128 << 20, 12, 2) if GPU else (0, 5, 1)
LEAST_CALLS, MOST_CALLS = (10, 100) if GPU else (2, 2)
GRAPH_SECONDS = 3e-3  # of a graph at its roofline, between the least and the most calls


@dataclass(frozen=True)
class Size:
    """Tokens of a branch, branches in one call, canvas of the picture (height, width)."""

    tokens: int
    canvas: tuple[int, int]
    branches: int = 1

    @property
    def rows(self) -> int:
        return self.tokens * self.branches

    @property
    def values(self) -> int:
        """Of the flat state, as many for two branches."""
        return 192 * self.tokens


SIZES = {
    "S": Size(406, (480, 832)),
    "E": Size(1966, (480, 832)),
    "D": Size(3093, (544, 736)),
    "guided": Size(3093, (544, 736), 2),
}
TINY = {"tiny": Size(63, (6, 10)), "guided": Size(63, (6, 10), 2)}


@dataclass(frozen=True)
class Peer:
    """What torch does instead, on inputs that are made of the kernel's ahead of time."""

    name: str
    run: Callable
    prepare: Callable[[tuple], tuple]


@dataclass(frozen=True)
class Op:
    """Inputs of a call; which of them, or the result (-1), is compared; bytes, FLOP of a call.

    `branched`: two branches make another call of it. `exact`: the result in float64, for inputs
    that are no floating numbers.
    """

    make: Callable[[Size], tuple]
    compared: int
    nbytes: Callable[[Size], int]
    flop: Callable[[Size], int] = lambda _: 0
    branched: bool = True
    peer: Peer | None = None
    exact: Callable | None = None


def random(*shape: int, dtype=DTYPE) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float32).to(dtype)


def mark(size: int) -> torch.Tensor:
    return (torch.arange(size, device=DEVICE) % 9 != 0).to(torch.uint8)


def step() -> torch.Tensor:
    return torch.ones(1, device=DEVICE, dtype=torch.int32)


def make_qkv(size: Size) -> tuple:
    rows = size.rows
    angle = random(rows, DIM // 2, dtype=torch.float32)
    weights = random(DIM), random(DIM)
    outputs = {"q_out": QUERIES, "k_out": KEYS, "v_out": KEYS}
    outputs = {x: random(rows, n, DIM) for x, n in outputs.items()}
    qkv = random(rows, (QUERIES + 2 * KEYS) * DIM)
    return qkv, *weights, angle.cos(), angle.sin(), 1e-6, outputs


def make_state(size: Size) -> tuple:
    state = [random(size.values, dtype=torch.float32) for _ in range(5)]
    coef = random(STEPS, 10, dtype=torch.float32) / 4
    velocity = random(size.branches, size.values)
    return velocity, *state, mark(size.values), coef, step(), random(size.values)


def make_attention(size: Size) -> tuple:
    count, rows = size.branches, size.tokens
    k, v, und_k, und_v = (random(count, n, KEYS, DIM) for n in (rows, rows, CAPACITY, CAPACITY))
    und_len = torch.full((count,), UND, device=DEVICE, dtype=torch.int32)
    return random(count, rows, QUERIES, DIM), k, v, und_k, und_v, und_len


def make_causal(size: Size) -> tuple:
    rows = size.tokens
    return random(rows, QUERIES, DIM), random(rows, KEYS, DIM), random(rows, KEYS, DIM)


def make_frame(size: Size) -> tuple:
    return (torch.randint(0, 256, (1, *size.canvas, 3), device=DEVICE, dtype=torch.uint8),)


def whole_keys(inputs: tuple) -> tuple:
    """(q, k, v) [B, heads, tokens, D] of attention's inputs."""
    q, k, v, und_k, und_v, _ = inputs
    keys, values = torch.cat((k, und_k[:, :UND]), 1), torch.cat((v, und_v[:, :UND]), 1)
    return tuple(x.transpose(1, 2) for x in (q, keys, values))


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


SIZE = DTYPE.itemsize
HEADS = QUERIES + KEYS
OPS = {
    "rms_norm": Op(
        lambda s: (random(s.rows, HIDDEN), random(HIDDEN), 1e-6),
        -1,
        lambda s: 2 * s.rows * HIDDEN * SIZE,
    ),
    "add_rms_norm": Op(
        lambda s: (random(s.rows, HIDDEN), random(s.rows, HIDDEN), random(HIDDEN), 1e-6),
        -1,
        lambda s: 4 * s.rows * HIDDEN * SIZE,
    ),
    "qk_norm_rope": Op(make_qkv, 6, lambda s: s.rows * DIM * (2 * (QUERIES + 2 * KEYS) * SIZE + 4)),
    "silu_mul": Op(lambda s: (random(s.rows, 2 * INNER),), -1, lambda s: 3 * s.rows * INNER * SIZE),
    "gate_up_silu": Op(
        lambda s: (random(s.rows, HIDDEN), random(2 * INNER, HIDDEN) / HIDDEN**0.5),
        -1,
        lambda s: (s.rows * HIDDEN + 2 * INNER * HIDDEN + s.rows * INNER) * SIZE,
        lambda s: 4 * s.rows * HIDDEN * INNER,
    ),
    "timestep_add": Op(
        lambda s: (random(s.rows, HIDDEN), random(STEPS, HIDDEN), step(), mark(s.rows)),
        -1,
        lambda s: 2 * (s.rows - -(-s.rows // 9)) * HIDDEN * SIZE,
    ),
    "unipc_step": Op(make_state, 1, lambda s: s.values * ((s.branches + 1) * SIZE + 37)),
    "attention": Op(
        make_attention,
        -1,
        lambda s: 2 * (s.rows * HEADS + s.branches * UND * KEYS) * DIM * SIZE,
        lambda s: 4 * s.rows * (s.tokens + UND) * DIM * QUERIES,
        peer=Peer("torch SDPA", torch_attention, whole_keys),
    ),
    "causal_attention": Op(
        make_causal,
        -1,
        lambda s: 2 * s.rows * DIM * HEADS * SIZE,
        lambda s: 2 * s.rows * s.rows * DIM * QUERIES,
        branched=False,
    ),
    "image_to_tensor": Op(
        make_frame,
        -1,
        lambda s: 3 * s.canvas[0] * s.canvas[1] * 5,
        branched=False,
        exact=lambda x: x.permute(3, 0, 1, 2).double() / 127.5 - 1,
    ),
}
CASES = [
    pytest.param(name, size, id=f"{name}-{size}")
    for name, op in OPS.items()
    for size, held in (SIZES if GPU else TINY).items()
    if op.branched or held.branches == 1
]


def call(run: Callable, inputs: tuple) -> object:
    """Positional inputs; a dict of outputs goes by keyword."""
    named = inputs[-1] if isinstance(inputs[-1], dict) else {}
    return run(*(x for x in inputs if not isinstance(x, dict)), **named)


def copied(inputs: tuple, change: Callable) -> tuple:
    """Inputs with every floating tensor replaced by change(tensor)."""

    def one(x):
        if isinstance(x, dict):
            return {k: one(v) for k, v in x.items()}
        return change(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return tuple(one(x) for x in inputs)


def compared(op: Op, run: Callable, inputs: tuple) -> list[torch.Tensor]:
    result = call(run, inputs)
    result = result if op.compared < 0 else inputs[op.compared]
    return list(result.values()) if isinstance(result, dict) else [result]


def gate(name: str, size: Size) -> None:
    """The result lies within twice the reference's own error, or two ulp, of float64."""
    op, plain = OPS[name], getattr(reference, name)
    inputs = op.make(size)
    eager = compared(op, plain, copied(inputs, torch.clone))
    truth = compared(op, op.exact or plain, copied(inputs, torch.Tensor.double))
    for got, small, exact in zip(
        compared(op, getattr(ops, name), inputs), eager, truth, strict=True
    ):
        floor = 2 * torch.finfo(got.dtype).eps * exact.abs().max()
        bound = max(2 * (small - exact).abs().max(), floor)
        assert (got - exact).abs().max() <= bound


def take_turns(name: str, sets: list[tuple], count: int) -> tuple[Callable, list[float], Callable]:
    """Seconds of a call of ours, torch's appended to a list first; what gives the graphs back."""
    peer = OPS[name].peer

    def captured(run: Callable, inputs: list[tuple]) -> Captured[None]:
        return repeated([partial(call, run, x) for x in inputs], count, DEVICE)

    ours = captured(getattr(ops, name), sets)
    if peer is None:
        plain = captured(getattr(reference, name), sets)
    else:
        plain = captured(peer.run, [peer.prepare(x) for x in sets])
    others: list[float] = []

    def seconds(graph: Captured[None]) -> float:
        return timed(graph, DEVICE, REPLAYS) / count / 1e3

    def measure() -> float:
        others.append(seconds(plain))
        return seconds(ours)

    def close() -> None:
        ours.reset()
        plain.reset()

    return measure, others, close


@pytest.mark.parametrize(("name", "size"), CASES)
def test_kernel(benchmark, recorded, figures, name, size):
    op, shape = OPS[name], (SIZES if GPU else TINY)[size]
    nbytes, flop = op.nbytes(shape), op.flop(shape)
    torch.manual_seed(0)
    gate(name, shape)
    count = int(GRAPH_SECONDS / figures.least(nbytes, flop))
    count = max(LEAST_CALLS, min(MOST_CALLS, count))
    sets = [op.make(shape) for _ in range(max(2, min(count, ROTATED_BYTES // nbytes + 1)))]
    measure, others, close = take_turns(name, sets, count)
    seconds = recorded(measure, ROUNDS, warmup_rounds=2)
    close()
    if seconds is None:
        return
    ratio = statistics.median(others[2:]) / seconds
    to = op.peer.name if op.peer else "torch"
    benchmark.extra_info.update(figures.kernel(name, size, seconds, nbytes, flop, ratio, to))


@pytest.mark.parametrize("size", [x for x, s in (SIZES if GPU else TINY).items() if s.branches < 2])
def test_noise(benchmark, figures, size):
    """A request's starting noise, on the host: numpy's numbers bit for bit, then the time."""
    count = (SIZES if GPU else TINY)[size].values
    others = []
    for _ in range(5):
        begin = time.perf_counter()
        truth = reference.legacy_normal(7, count)
        others.append(time.perf_counter() - begin)
    assert torch.equal(ops.legacy_normal(7, count), truth)
    benchmark.pedantic(ops.legacy_normal, (7, count), rounds=10, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median
    ratio = statistics.median(others) / seconds
    info = figures.host("legacy_normal", size, seconds, count, ratio, "numpy")
    benchmark.extra_info.update(info)
