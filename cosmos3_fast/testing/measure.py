"""Measures an engine: whole requests, the step beside its products and attentions alone, memory.

Times are wall milliseconds from a request in host memory (uint8 pixels, token ids) to its checked
actions there, a new picture and seed in every repeat. Stages and parts are timed on the device.
Nothing here checks an answer: `testing.gate` does, and runs first.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from cosmos3_fast import parallel_sum
from cosmos3_fast.config import (
    Cosmos3PolicyWNArgs,
    DeviceConfig,
    EngineArgs,
    EngineConfig,
    ParallelConfig,
    RuntimeConfig,
)
from cosmos3_fast.engine import Engine
from cosmos3_fast.graph import Captured
from cosmos3_fast.request import Cosmos3ActionRequest
from cosmos3_fast.testing.parts import StepParts
from cosmos3_fast.testing.requests import Workload

SQUARE = {"cuda": 8192, "cpu": 256}  # sides of the product that gives a device's rate
SUMS = ("table", "fused", "all-reduce", "nccl")
FRESH = 5  # requests with a prompt never seen
FIRST_SEED = 1000


def engine_args(
    folder: Any,
    device: str,
    dtype: torch.dtype,
    *,
    parallel: ParallelConfig | None = None,
    decode: bool = False,
    graph: bool = True,
    deadline_s: float = 120.0,
    collective: str = "auto",
) -> EngineArgs:
    """The arguments that benchmarks share: the native schedule of a folder's configuration."""
    return EngineArgs(
        plugin_args=Cosmos3PolicyWNArgs(
            checkpoint_dir=folder, schedule="native", decode_video=decode
        ),
        config=EngineConfig(
            device=DeviceConfig(device, dtype),
            parallel=parallel or ParallelConfig(),
            runtime=RuntimeConfig(
                use_cuda_graph=graph, step_deadline_s=deadline_s, collective=collective
            ),
        ),
    )


def choose_sums(how: str, tp_size: int) -> str:
    """How this process makes every sum over ranks from now on, one of SUMS -> what to pass as
    `collective`. "table": as the engine does; "fused": in one kernel with residual and norm;
    "all-reduce": apart from them, by torch's two-shot or NCCL; "nccl": by NCCL. ValueError where
    "fused" has no ranks to sum over.
    """
    if how == "fused" and tp_size == 1:
        raise ValueError("sums in one kernel need a tp size of 2 or more")
    if how == "all-reduce":
        parallel_sum.FUSED_BYTES = {}
    return {"fused": "symmetric", "nccl": "nccl"}.get(how, "auto")


@contextmanager
def configured(
    engine: Engine, *, graph: bool | None = None, decode: bool | None = None
) -> Iterator[None]:
    """While this lasts the engine captures, or decodes, as told (None: as it was made).

    Graphs and caches are dropped at both ends where `graph` is given. `decode=True` needs an engine
    that was made with its decoder.
    """
    before, runtime = engine.args, engine.args.config.runtime
    if graph is not None:
        runtime = replace(runtime, use_cuda_graph=graph)
    plugin = before.plugin_args
    if decode is not None:
        plugin = replace(plugin, decode_video=decode)
    config = replace(before.config, runtime=runtime)
    engine.args = replace(before, plugin_args=plugin, config=config)
    if graph is not None:
        engine._kept.clear()
    try:
        yield
    finally:
        engine.args = before
        if graph is not None:
            engine._kept.clear()


def wait(device: torch.device) -> None:
    """Until everything issued to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Milliseconds of one of `calls` calls issued one after the other."""
    wait(device)
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) * 1e3 / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def repeated(
    calls: Sequence[Callable[[], object]], count: int, device: torch.device
) -> Captured[None]:
    """`count` calls, which take turns, captured on a GPU. The last result of each is kept, so that
    results take turns in memory as the calls' inputs do.
    """
    results: list[object] = [None] * len(calls)

    def run() -> None:
        for i in range(count):
            results[i % len(calls)] = calls[i % len(calls)]()

    return Captured(run, device, True)


def gemm_rate(device: torch.device, dtype: torch.dtype, rounds: int = 10) -> float:
    """TFLOP/s of large square products of random numbers, the median of `rounds`."""
    side = SQUARE[device.type]
    a, *b = (torch.randn(side, side, device=device).to(dtype) for _ in range(4))
    out = torch.empty_like(a)

    def products() -> None:
        for weight in b:
            torch.mm(a, weight, out=out)

    return len(b) * 2 * side**3 / sustained(products, device, rounds) / 1e9


def sustained(run: Callable[[], None], device: torch.device, rounds: int) -> float:
    """Milliseconds of run(), captured on a GPU: the median of `rounds` of three replays."""
    graph = Captured(run, device, True)
    times = [timed(graph, device, 3) for _ in range(rounds + 2)][2:]
    graph.reset()
    return statistics.median(times)


@dataclass(frozen=True)
class Times:
    """Milliseconds of each request, in order, and the median of each stage."""

    ms: tuple[float, ...]
    stages: dict[str, float]

    @property
    def p50(self) -> float:
        return statistics.median(self.ms)

    @property
    def p99(self) -> float:
        """The smallest time that 99 % of the requests do not exceed."""
        return sorted(self.ms)[max(0, -(-99 * len(self.ms) // 100) - 1)]


def time_requests(engine: Engine, requests: Iterable[Cosmos3ActionRequest]) -> Times:
    """Run them one after the other; a request is made before its clock starts."""
    gc.collect()
    ms, stages = [], []
    for request in requests:
        wait(engine.device)
        engine.mesh.barrier()
        start = time.perf_counter()
        engine.step(request)["action"].cpu()
        ms.append((time.perf_counter() - start) * 1e3)
        stages.append(engine.times)
    names = stages[0]
    return Times(tuple(ms), {n: statistics.median(s[n] for s in stages) for n in names})


def measure(
    engine: Engine,
    workload: Workload,
    *,
    repeats: int,
    rounds: int = 5,
    rate: float | None = None,
    decode: bool = False,
) -> dict[str, Any]:
    """Every figure of one workload on a single-rank engine, by name.

    `repeats` timed requests after `warmup`; `rounds` of (a request, its parts alone) in turn for
    the overhead; `rate`: TFLOP/s that the share is taken of; `decode`: time the decoder as well.
    """
    with configured(engine, decode=False):
        row = _requests(engine, workload, repeats) | _overhead(engine, workload, rounds, rate)
    if decode:
        row |= _decode(engine, workload)
    return row


def _requests(engine: Engine, workload: Workload, repeats: int) -> dict[str, Any]:
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    engine.warmup(workload.request(0))
    seeds = range(FIRST_SEED, FIRST_SEED + repeats)
    times = time_requests(engine, (workload.request(seed) for seed in seeds))
    fresh = time_requests(engine, (workload.request(i, prompt=i + 1) for i in range(FRESH)))
    return {
        "ms": times.p50,
        "ms_p99": times.p99,
        "p99_over_p50": times.p99 / times.p50,
        "requests": repeats,
        "first_over_tenth": times.ms[0] / times.ms[min(9, repeats - 1)],
        "uncached_ms": fresh.p50,
        "stages_ms": times.stages,
        "peak_GiB": engine.peak_bytes / 2**30,
    }


def _overhead(
    engine: Engine, workload: Workload, rounds: int, rate: float | None
) -> dict[str, Any]:
    """The loop over the sum of its products and attentions timed alone, in turn with it."""
    parts = StepParts(engine.model, engine.checkpoint, workload.request(0), engine.args.plugin_args)
    steps, device = workload.steps, engine.device
    loops, products, attentions = [], [], []
    for index in range(rounds + 1):
        engine.step(workload.request(FIRST_SEED + index))
        loops.append(engine.times["denoise"])
        products.append(steps * timed(parts.products, device, steps))
        attentions.append(steps * timed(parts.attentions, device, steps))
    loop, product, attention = (statistics.median(t[1:]) for t in (loops, products, attentions))
    flop = steps * parts.flop / 1e9  # over milliseconds: TFLOP/s
    parts.close()
    row = {
        "tokens": parts.shape.tokens,
        "branches": parts.shape.branches,
        "loop_ms": loop,
        "products_ms": product,
        "attentions_ms": attention,
        "overhead": loop / (product + attention),
        "tflops": flop / loop,
        "products_tflops": steps * parts.shape.product_flop(engine.model.config) / 1e9 / product,
    }
    return row | ({"share_of_rate": flop / loop / rate} if rate else {})


def _decode(engine: Engine, workload: Workload, rounds: int = 3) -> dict[str, float]:
    """Milliseconds of the decode stage and of the whole request, and the peak memory with it."""
    with configured(engine, decode=True):
        engine.step(workload.request(0))
        requests = (workload.request(FIRST_SEED + i) for i in range(rounds))
        times = time_requests(engine, requests)
    return {
        "decode_ms": times.stages["decode"],
        "with_decode_ms": times.p50,
        "decode_peak_GiB": engine.peak_bytes / 2**30,
    }


def growth(engine: Engine, workloads: Iterable[Workload], count: int) -> dict[str, float]:
    """Device and host memory gained over `count` one-step requests of alternating shapes, in MiB.

    Every tenth request has one of a row of other chunk sizes, so that captured shapes are evicted
    and made again. The second half is compared with the first, at the same place in the order.
    """
    kinds = [replace(workload, steps=1) for workload in workloads]
    others = [replace(kinds[-1], chunk=kinds[-1].chunk + 4 * n) for n in range(1, 4)]
    turn = 10 * len(others)
    half = max(1, -(-count // (2 * turn))) * turn

    def run(first: int) -> dict[str, float]:
        for i in range(first, first + half):
            kind = others[i // 10 % len(others)] if i % 10 == 9 else kinds[i % len(kinds)]
            engine.step(kind.request(i, prompt=i % 12))
        return memory_mib(engine.device)

    before = run(0)
    after = run(half)
    return {f"{name}_grown_MiB": after[name] - before[name] for name in before} | {
        "requests": 2 * half
    }


def memory_mib(device: torch.device) -> dict[str, float]:
    """MiB that tensors and torch hold on the device, and that the process holds of the host."""
    gc.collect()
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    held = {"host": pages * 4096 / 2**20}
    if device.type == "cuda":
        wait(device)
        held["allocated"] = torch.cuda.memory_allocated(device) / 2**20
        held["reserved"] = torch.cuda.memory_reserved(device) / 2**20
    return held
