"""Every kernel through `ops`: microseconds a call, GB/s or TFLOP/s, ratio to the torch reference.

On a GPU at the sizes of D, E and S (DESIGN.md): a captured graph of calls whose inputs rotate past
L2. Without one, tiny shapes through the reference, so that the suite itself stays alive. Every
benchmark compares its result with the reference in float64 first and gives no number if that fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from cosmos3_fast import ops
from cosmos3_fast.kernels import reference

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
ROWS = {"S": 406, "E": 1966, "D": 3093} if GPU else {"tiny": 63}
HIDDEN, INNER, DIM, QUERIES, KEYS = (4096, 12288, 128, 32, 8) if GPU else (64, 128, 16, 8, 2)
UND, CAPACITY, STEPS = (160, 256, 4) if GPU else (5, 8, 4)
ROTATED_BYTES, CALLS = (128 << 20, 100) if GPU else (0, 2)


@dataclass(frozen=True)
class Op:
    """Inputs of a call; which of them, or the result (-1), is compared; bytes, FLOP of a call."""

    make: Callable[[int], tuple]
    compared: int
    nbytes: Callable[[int], int]
    flop: Callable[[int], int] | None = None


def random(*shape: int, dtype=DTYPE) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float32).to(dtype)


def mark(size: int) -> torch.Tensor:
    return (torch.arange(size, device=DEVICE) % 9 != 0).to(torch.uint8)


def step() -> torch.Tensor:
    return torch.ones(1, device=DEVICE, dtype=torch.int32)


def make_qkv(rows: int) -> tuple:
    angle = random(rows, DIM // 2, dtype=torch.float32)
    weights = random(DIM), random(DIM)
    outputs = {"q_out": QUERIES, "k_out": KEYS, "v_out": KEYS}
    outputs = {x: random(rows, n, DIM) for x, n in outputs.items()}
    qkv = random(rows, (QUERIES + 2 * KEYS) * DIM)
    return qkv, *weights, angle.cos(), angle.sin(), 1e-6, outputs


def make_state(rows: int) -> tuple:
    size = 192 * rows
    state = [random(size, dtype=torch.float32) for _ in range(5)]
    coef = random(STEPS, 10, dtype=torch.float32) / 4
    return random(2, size), *state, mark(size), coef, step(), random(size)


def make_attention(rows: int) -> tuple:
    k, v, und_k, und_v = (random(1, n, KEYS, DIM) for n in (rows, rows, CAPACITY, CAPACITY))
    und_len = torch.full((1,), UND, device=DEVICE, dtype=torch.int32)
    return random(1, rows, QUERIES, DIM), k, v, und_k, und_v, und_len


def make_causal(rows: int) -> tuple:
    return random(rows, QUERIES, DIM), random(rows, KEYS, DIM), random(rows, KEYS, DIM)


SIZE = DTYPE.itemsize
OPS = {
    "rms_norm": Op(
        lambda m: (random(m, HIDDEN), random(HIDDEN), 1e-6), -1, lambda m: 2 * m * HIDDEN * SIZE
    ),
    "add_rms_norm": Op(
        lambda m: (random(m, HIDDEN), random(m, HIDDEN), random(HIDDEN), 1e-6),
        -1,
        lambda m: 4 * m * HIDDEN * SIZE,
    ),
    "qk_norm_rope": Op(make_qkv, 6, lambda m: 2 * m * (QUERIES + 2 * KEYS) * DIM * SIZE),
    "silu_mul": Op(lambda m: (random(m, 2 * INNER),), -1, lambda m: 3 * m * INNER * SIZE),
    "gate_up_silu": Op(
        lambda m: (random(m, HIDDEN), random(2 * INNER, HIDDEN) / HIDDEN**0.5),
        -1,
        lambda m: (m * HIDDEN + 2 * INNER * HIDDEN + m * INNER) * SIZE,
        lambda m: 4 * m * HIDDEN * INNER,
    ),
    "timestep_add": Op(
        lambda m: (random(m, HIDDEN), random(STEPS, HIDDEN), step(), mark(m)),
        -1,
        lambda m: 2 * m * HIDDEN * SIZE,
    ),
    "unipc_step": Op(make_state, 1, lambda m: 192 * m * (3 * SIZE + 37)),
    "attention": Op(
        make_attention,
        -1,
        lambda m: 2 * m * DIM * (QUERIES + KEYS) * SIZE,
        lambda m: 4 * m * (m + UND) * DIM * QUERIES,
    ),
    "causal_attention": Op(
        make_causal,
        -1,
        lambda m: 2 * m * DIM * (QUERIES + KEYS) * SIZE,
        lambda m: 2 * m * m * DIM * QUERIES,
    ),
}


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


def gate(name: str, rows: int) -> None:
    """The result lies within twice the reference's own error, or two ulp, of float64."""
    op, plain = OPS[name], getattr(reference, name)
    inputs = op.make(rows)
    eager = compared(op, plain, copied(inputs, torch.clone))
    truth = compared(op, plain, copied(inputs, torch.Tensor.double))
    for got, small, exact in zip(
        compared(op, getattr(ops, name), inputs), eager, truth, strict=True
    ):
        floor = 2 * torch.finfo(got.dtype).eps * exact.abs().max()
        bound = max(2 * (small - exact).abs().max(), floor)
        assert (got - exact).abs().max() <= bound


def repeated(run: Callable, op: Op, rows: int) -> tuple[Callable[[], None], int]:
    """A function that makes a number of calls and waits for them, and that number."""
    sets = [op.make(rows) for _ in range(max(2, min(40, ROTATED_BYTES // op.nbytes(rows) + 1)))]
    sets *= -(-CALLS // len(sets))

    def calls() -> None:
        for inputs in sets:
            call(run, inputs)

    calls()
    if not GPU:
        return calls, len(sets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay, len(sets)


@pytest.mark.parametrize("size", ROWS)
@pytest.mark.parametrize("name", OPS)
def test_kernel(benchmark, name, size):
    op, rows = OPS[name], ROWS[size]
    torch.manual_seed(0)
    gate(name, rows)
    plain, count = repeated(getattr(reference, name), op, rows)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        plain()
        times.append((time.perf_counter() - begin) / count)
    ours, count = repeated(getattr(ops, name), op, rows)
    benchmark.pedantic(ours, rounds=20, warmup_rounds=2)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median / count
    rate = {"GB/s": op.nbytes(rows) / seconds / 1e9}
    if op.flop:
        rate = {"TFLOP/s": op.flop(rows) / seconds / 1e12}
    info = {"us": seconds * 1e6, **rate, "torch / ours": sorted(times)[2] / seconds}
    benchmark.extra_info.update({k: round(v, 2) for k, v in info.items()})
