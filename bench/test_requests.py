"""Whole requests D, E and S, from pixels and token ids on the host to checked actions there.

On a GPU at Nano size on random weights; elsewhere tiny, so that the suite stays alive. The checks
of `testing.gate` come first, and a kind that fails them has no figure. Every repeat has a new
picture and seed and a prompt whose keys and values are cached; the figure for a new prompt, the
overhead (loop over the sum of its products and attentions timed alone in the same run), the rate
and the memory stand in extra_info. A denoising step is a benchmark of its own, timed on the device.
`bench/against_diffusers.py` gives the ratio to diffusers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from cosmos3_fast.testing.gate import gate
from cosmos3_fast.testing.measure import configured, growth, measure
from cosmos3_fast.testing.requests import WORKLOADS

GROWN_MIB = 16.0  # of tensors on the device; rotary and mask tables of new shapes are kept


def rounded(row: dict) -> dict:
    """extra_info: numbers rounded, stages as they are."""
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


@pytest.fixture(scope="module")
def checked(engine, workload) -> Callable[[str], dict]:
    """The errors of a kind within their bounds, found once."""
    found: dict[str, dict] = {}

    def check(kind: str) -> dict:
        if kind not in found:
            found[kind] = gate(engine, workload(kind))
        return found[kind]

    return check


@pytest.mark.parametrize("kind", WORKLOADS)
def test_request(benchmark, engine, rate, kind, request, workload, checked):
    load = workload(kind)
    errors = checked(kind)
    repeats = request.config.getoption("--repeats")
    row = measure(engine, load, repeats=repeats, rate=rate)
    benchmark.extra_info.update(rounded(row | errors))
    seeds = itertools.count(5000)
    with configured(engine, decode=False):
        engine.warmup(load.request(0))
        benchmark.pedantic(
            lambda made: engine.step(made)["action"].cpu(),
            setup=lambda: ((load.request(next(seeds)),), {}),
            rounds=max(3, repeats // 2),
        )
    print(f"{kind}: {rounded(row)}")


@pytest.mark.parametrize("kind", WORKLOADS)
def test_denoising_step(benchmark, recorded, engine, kind, workload, checked):
    """The loop of a request over its steps: the captured step with everything around it."""
    checked(kind)
    load, seeds = workload(kind), itertools.count(9000)

    def step_seconds() -> float:
        engine.step(load.request(next(seeds)))
        return engine.times["denoise"] / load.steps / 1e3

    with configured(engine, decode=False):
        engine.warmup(load.request(0))
        recorded(step_seconds, rounds=5, warmup_rounds=1)
    benchmark.extra_info["steps"] = load.steps


@pytest.mark.parametrize("kind", ["D", "E"])
def test_request_with_decode(benchmark, engine, kind, workload, checked):
    checked(kind)
    load, seeds = workload(kind), itertools.count(7000)
    with configured(engine, decode=True):
        engine.warmup(load.request(0))
        benchmark.pedantic(
            lambda made: engine.step(made)["pixels"].cpu(),
            setup=lambda: ((load.request(next(seeds)),), {}),
            rounds=3,
        )
    benchmark.extra_info["stages_ms"] = rounded(engine.times)
    benchmark.extra_info["peak_GiB"] = round(engine.peak_bytes / 2**30, 2)


def test_memory_does_not_grow(benchmark, engine, request, workload):
    kinds, count = [workload(kind) for kind in WORKLOADS], request.config.getoption("--growth")
    with configured(engine, decode=False):
        grown = benchmark.pedantic(growth, args=(engine, kinds, count), rounds=1)
    benchmark.extra_info.update(rounded(grown))
    print(f"memory: {rounded(grown)}")
    assert grown.get("allocated_grown_MiB", 0.0) <= GROWN_MIB, grown
