"""How long each way of attention (ops.variants) takes on this GPU, at the shapes of a step."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch

from cosmos3_fast import ops
from cosmos3_fast.config import TransformerConfig
from cosmos3_fast.graph import Captured
from cosmos3_fast.ops import variants
from cosmos3_fast.testing.measure import timed
from cosmos3_fast.testing.parts import ROTATED_BYTES, StepShape

CALLS, REPLAYS = 20, 15


def microseconds(make: Callable[[], Callable[[], object]], nbytes: int) -> float:
    """Median of a call in a captured graph; make() gives a call on inputs of its own, `nbytes`
    large, and inputs rotate past L2.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    calls = [make() for _ in range(min(max(2, -(-ROTATED_BYTES // nbytes)), 40))]
    turns = -(-CALLS // len(calls))

    def all_calls() -> None:
        for call in calls * turns:
            call()

    graph = Captured(all_calls, device, True)
    times = [timed(graph, device) for _ in range(REPLAYS + 3)][3:]
    graph.reset()
    return statistics.median(times) * 1e3 / (len(calls) * turns)


def attention_row(
    queries: int, shape: StepShape, config: TransformerConfig, dtype: torch.dtype
) -> str:
    """Microseconds of what ops takes and of every way: `queries` tokens a branch, a step's keys."""
    heads, kv_heads, dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    groups = shape.branches
    nbytes = dtype.itemsize * groups * dim * 2 * (queries * heads + shape.tokens * kv_heads)

    def inputs() -> list[torch.Tensor]:
        keys = [(groups, n, kv_heads, dim) for n in (shape.tokens, shape.capacity)]
        sizes = [(groups, queries, heads, dim), *(size for size in keys for _ in range(2))]
        return [torch.randn(*size, device="cuda").to(dtype) for size in sizes]

    def make(run: Callable[..., torch.Tensor]) -> Callable[[], object]:
        und_len = torch.tensor(shape.und, device="cuda", dtype=torch.int32)
        return functools.partial(run, *inputs(), und_len)

    us = {
        name: microseconds(functools.partial(make, run), nbytes)
        for name, run in ({"taken": ops.attention} | variants.attention(*inputs())).items()
    }
    times = ", ".join(f"{name} {value:.1f}" for name, value in us.items())
    return f"{queries} tokens, {shape.tokens} keys, {groups * heads} heads: {times}"
