"""How long each way of an operation (ops.variants) takes on this GPU, at the shapes of requests:
rows of the tables that choose between them, ready to be pasted.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cosmos3_fast.config import TransformerConfig
from cosmos3_fast.ops import variants
from cosmos3_fast.testing.measure import repeated, timed
from cosmos3_fast.testing.parts import ROTATED_BYTES, StepShape

CALLS, ROUNDS, WARM_ROUNDS = 20, 15, 3
SETS = 40  # of inputs, at most
TP_SIZES = (1, 2, 4, 8)


def in_turn(
    ways: Mapping[str, Callable[..., object]], make: Callable[[], Sequence[Any]], nbytes: int
) -> dict[str, float]:
    """Microseconds of a call of each way: captured graphs of calls, replayed in turn; medians.

    make() gives the arguments of a call, `nbytes` large; a graph's calls go over enough sets of
    them to pass L2 (SETS at most), the same ones in each way's.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    sets = [make() for _ in range(min(max(2, -(-ROTATED_BYTES // nbytes)), SETS))]
    count = len(sets) * -(-CALLS // len(sets))
    graphs = {
        name: repeated([functools.partial(run, *inputs) for inputs in sets], count, device)
        for name, run in ways.items()
    }
    rounds = [
        {name: timed(graph, device) for name, graph in graphs.items()}
        for _ in range(WARM_ROUNDS + ROUNDS)
    ]
    for graph in graphs.values():
        graph.reset()
    return {
        name: statistics.median(times[name] for times in rounds[WARM_ROUNDS:]) * 1e3 / count
        for name in ways
    }


def microseconds(make: Callable[[], Callable[[], object]], nbytes: int) -> float:
    """`in_turn` of one way; make() gives a call on inputs of its own."""
    return in_turn({"": lambda call: call()}, lambda: (make(),), nbytes)[""]


@dataclass(frozen=True)
class AttentionShape:
    """What a rank's attention reads: `queries` of each branch, `tokens` keys beside `und`."""

    queries: int
    tokens: int
    und: tuple[int, ...]
    capacity: int
    heads: int
    kv_heads: int

    @property
    def key(self) -> tuple[int, int, int]:
        """Its place in ATTENTION_CHOICE."""
        return self.queries, len(self.und) * self.heads, self.heads // self.kv_heads


def attention_shapes(steps: Iterable[StepShape], config: TransformerConfig) -> list[AttentionShape]:
    """Of every layer and, where its queries differ, the last one, over each number of ranks, with
    both branches or one; of those with equal keys the one with more branches.
    """
    found: dict[tuple[int, ...], AttentionShape] = {}
    for step in steps:
        for und in (step.und, step.und[:1]):
            for tp in _tp_sizes(config):
                heads, kv_heads = config.num_attention_heads // tp, config.num_key_value_heads // tp
                for queries in (step.tokens, step.noisy):
                    shape = AttentionShape(
                        queries, step.tokens, und, step.capacity, heads, kv_heads
                    )
                    found.setdefault(shape.key, shape)
    return [found[key] for key in sorted(found)]


def gate_up_shapes(steps: Iterable[StepShape], config: TransformerConfig) -> list[tuple[int, int]]:
    """(rows, I) of every layer and of the last one, as `attention_shapes`."""
    rows = {
        branches * tokens
        for step in steps
        for branches in (1, step.branches)
        for tokens in (step.tokens, step.noisy)
    }
    inner = {config.intermediate_size // tp for tp in _tp_sizes(config)}
    return sorted((n, i) for n in rows for i in inner)


def _tp_sizes(config: TransformerConfig) -> list[int]:
    return [tp for tp in TP_SIZES if config.num_key_value_heads % tp == 0]


def attention_rows(shapes: Iterable[AttentionShape], dim: int, dtype: torch.dtype) -> Iterator[str]:
    """The names of the ways, then a row of ATTENTION_CHOICE for each shape."""

    def inputs(shape: AttentionShape) -> list[torch.Tensor]:
        groups = len(shape.und)
        keys = [(groups, n, shape.kv_heads, dim) for n in (shape.tokens, shape.capacity)]
        sizes = [(groups, shape.queries, shape.heads, dim), *(x for x in keys for _ in range(2))]
        und_len = torch.tensor(shape.und, device="cuda", dtype=torch.int32)
        return [*(torch.randn(*size, device="cuda").to(dtype) for size in sizes), und_len]

    cases = ((shape.key, functools.partial(inputs, shape)) for shape in shapes)
    return table_rows("ATTENTION_CHOICE", cases, lambda *x: variants.attention(*x[:5]))


def gate_up_rows(
    shapes: Iterable[tuple[int, int]], hidden: int, dtype: torch.dtype
) -> Iterator[str]:
    """The names of the ways, then a row of GATE_UP_CHOICE for each (rows, I)."""

    def inputs(rows: int, inner: int) -> list[torch.Tensor]:
        x = torch.randn(rows, hidden, device="cuda")
        weight = torch.randn(2 * inner, hidden, device="cuda") / hidden**0.5
        return [x.to(dtype), weight.to(dtype)]

    cases = ((shape, functools.partial(inputs, *shape)) for shape in shapes)
    return table_rows("GATE_UP_CHOICE", cases, variants.gate_up_silu)


def table_rows(
    table: str,
    cases: Iterable[tuple[tuple[int, ...], Callable[[], list[torch.Tensor]]]],
    ways_of: Callable[..., dict[str, Callable[..., torch.Tensor]]],
) -> Iterator[str]:
    """The names of the ways, then a row of each (key, make): the fastest way and every time."""
    for index, (key, make) in enumerate(cases):
        inputs = make()
        ways = ways_of(*inputs)
        if not index:
            yield f"{table}: {', '.join(ways)}"
        us = in_turn(ways, make, sum(x.numel() * x.element_size() for x in inputs))
        times = ", ".join(f"{value:.1f}" for value in us.values())
        yield f'    {key}: "{min(us, key=us.__getitem__)}",  # {times}'
