"""Collectives over the GPUs of a host, in captured graphs; the host's agreement.

All-reduces (NCCL, two-shot) and all-gathers by size, and what follows every product of a layer: the
sum over ranks, its residual's addition and the norm, in one kernel ("fused") and as an all-reduce
with `add_rms_norm` after it. And a decoder's strip with its neighbours' edges: by the kernel's own
exchange, through NCCL, and with none. Sums are compared with float64 first, strips with the whole
picture; then a graph of calls is timed. What `parallel.TWO_SHOT_BYTES` and
`parallel_sum.FUSED_BYTES` should say is read off these figures.

Every figure is a benchmark. The ranks are processes of their own and take the times, by events on
their GPUs between barriers; a stored round is one of theirs, the slowest rank's seconds of a call.
Without GPUs only the agreement over CPU ranks is timed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from halo_cases import DECODER, LAST, edge_bytes, strip, strip_result
from halo_cases import inputs as halo_inputs
from ranks import argument, run_cases
from sum_cases import EPS, apart, error, inputs, share, truth

from cosmos3_fast import ops
from cosmos3_fast.agreement import agree
from cosmos3_fast.config import ParallelConfig
from cosmos3_fast.ops import halo
from cosmos3_fast.ops.sum_norm import sum_add_rms_norm
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.parallel_edges import EdgeSlots
from cosmos3_fast.parallel_sum import SumMemory

SIZES = {"24 MB": 24 << 20, "3.2 MB": 3276800, "0.25 MB": 256 << 10, "64 KB": 64 << 10}
KINDS = ("nccl", "two_shot", "gather")
ROWS, COLUMNS = (60, 406, 983, 1966, 3093, 6186), 4096  # of a layer's sums, bfloat16
SUMS = ("fused", "two_shot", "nccl")
STRIPS = {f"{case.shape[0]}": case for case in (DECODER[0], DECODER[4], DECODER[6])}
EDGES = ("exchange", "nccl", "none")
SETS = 4  # of memory that the sums take in turn, past L2 for the larger ones
CALLS, ROUNDS, WARMUP = 48, 20, 2
BF16 = torch.bfloat16


def _mesh(device: str) -> Mesh:
    size = argument("size")
    return Mesh.create(ParallelConfig(size, 1, size), device, collective="symmetric")


def _graph_seconds(
    mesh: Mesh, call: Callable[[int], object], fill: Callable[[], object]
) -> list[float]:
    """Seconds of a call, of each round, in a replayed graph of `call(0)` to `call(CALLS - 1)`.

    `fill` makes the numbers anew before a round: sums in place grow with every call.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(SETS):
            call(i)
    mesh.settle()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for i in range(CALLS):
            call(i)
    seconds = []
    for _ in range(WARMUP + ROUNDS):
        mesh.settle()
        fill()
        mesh.settle()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / CALLS)
    mesh.settle()
    return seconds[WARMUP:]


def case_collectives() -> dict[str, Any]:
    mesh = _mesh("cuda")
    got: dict[str, Any] = {}
    for label, nbytes in SIZES.items():
        memory = mesh.symmetric((nbytes // 2,), BF16).tensor
        values = torch.randn(
            nbytes // 2,
            generator=torch.Generator(mesh.device).manual_seed(mesh.rank),
            device=mesh.device,
        ).bfloat16()
        total = mesh.all_gather(values).double().sum(0)
        plain = values.clone()
        kernels = {
            "nccl": (plain, lambda _, x=plain: torch.distributed.all_reduce(x)),
            "two_shot": (memory, lambda _, x=memory: mesh.all_reduce(x)),
        }
        for kernel, (x, call) in kernels.items():
            x.copy_(values)
            mesh.settle()
            call(0)
            found = (x.double() - total).abs().max().item() / total.abs().max().item()
            assert found < 2**-7, f"{kernel} {label}: relative error {found}"
            fill = lambda x=x, y=values: x.copy_(y)  # noqa: E731
            got[f"{kernel} {label}"] = _graph_seconds(mesh, call, fill)
        into = values.new_empty(mesh.tp_size, nbytes // 2)
        gather = lambda _, x=values, y=into: mesh.all_gather(x, out=y)  # noqa: E731
        got[f"gather {label}"] = _graph_seconds(mesh, gather, lambda: None)
    torch.cuda.synchronize()
    mesh.close()
    return got


def _sum(mesh: Mesh, kind: str, memory: SumMemory, rows: int, weight: torch.Tensor) -> torch.Tensor:
    """The norm [rows, columns] of residual and sum over ranks; the residual in `memory`."""
    part, residual = memory.part[:rows], memory.residual[:rows]
    if kind == "fused":
        return sum_add_rms_norm(part, residual, weight, EPS, memory)
    mesh.collective = "nccl" if kind == "nccl" else "symmetric"
    return ops.add_rms_norm(mesh.all_reduce(part), residual, weight, EPS)


def _check_sum(mesh: Mesh, kind: str, memory: SumMemory, given: tuple) -> None:
    """Residual and norm lie within twice the error of eager torch's operations from float64.

    `given`: the ranks' parts [rows, columns], the residual and the weight.
    """
    parts, residual, weight = given
    rows = len(residual)
    memory.part[:rows], memory.residual[:rows] = parts[mesh.tp_rank], residual
    memory.normed.fill_(torch.nan)
    mesh.settle()
    normed = _sum(mesh, kind, memory, rows, weight)
    mesh.settle()
    # In the one kernel a rank's residual is complete in its own rows.
    own = share(rows, mesh.tp_size, mesh.tp_rank) if kind == "fused" else slice(rows)
    exact, eager = truth(parts, residual, weight), apart(parts, residual, weight)
    for what, found, plain, true in zip(
        ("residual", "norm"),
        (memory.residual[:rows][own], normed),
        (eager[0][own], eager[1]),
        (exact[0][own], exact[1]),
        strict=True,
    ):
        mine, bound = error(found, true), 2 * error(plain, true)
        assert mine <= bound, f"{kind}, {rows} rows, {what}: error {mine:.2e}, bound {bound:.2e}"


def case_sums() -> dict[str, Any]:
    mesh = _mesh("cuda")
    sets = [SumMemory(mesh, max(ROWS), COLUMNS, BF16, 10) for _ in range(SETS)]
    weight = torch.ones(COLUMNS, device=mesh.device, dtype=BF16)
    got: dict[str, Any] = {}

    def fill() -> None:
        for memory in sets:
            memory.part.normal_(), memory.residual.normal_()

    for rows in ROWS:
        given = inputs(mesh.tp_size, rows, COLUMNS, BF16, str(mesh.device))
        for kind in SUMS:
            _check_sum(mesh, kind, sets[0], given)
            fill()
            mesh.settle()
            got[f"{kind} {rows}"] = _graph_seconds(
                mesh,
                lambda i, kind=kind, rows=rows: _sum(mesh, kind, sets[i % SETS], rows, weight),
                fill,
            )
    failures = [text for memory in sets if (text := memory.failure())]
    assert not failures, failures
    mesh.settle()
    mesh.close()
    return got


def case_strips() -> dict[str, Any]:
    mesh = _mesh("cuda")
    got: dict[str, Any] = {}
    for label, case in STRIPS.items():
        given = halo_inputs(case, BF16, str(mesh.device))
        whole = given.pop("x")
        rows = case.shape[2]
        sizes = [share(rows, mesh.world_size, rank) for rank in range(mesh.world_size)]
        sizes = [part.stop - part.start for part in sizes]
        x = strip(whole, sizes, mesh.rank, 3).contiguous(memory_format=LAST)
        want = strip_result(halo.conv_input(whole, **given), sizes, mesh.rank, 3, case)
        slots = EdgeSlots(mesh, edge_bytes(case, 3, BF16), deadline=10)
        edge = {k: given[k] for k in ("prologue", "gamma", "bias")}

        def through_nccl(_: int, x=x, given=given, edge=edge) -> torch.Tensor:
            edges = halo.conv_edges(x, **edge, axis=3, before=1, after=1)
            before, after = mesh.exchange_edges(*edges)
            return halo.conv_input(x, **given, before=before, after=after)

        def exchange(_: int, x=x, given=given, slots=slots) -> torch.Tensor:
            return halo.conv_input_exchange(x, slots, **given)

        kinds = {
            "exchange": exchange,
            "nccl": through_nccl,
            "none": lambda _, x=x, given=given: halo.conv_input(x, **given),
        }
        for kind, call in kinds.items():
            if kind != "none":
                assert torch.equal(call(0), want), f"{kind}, {label}: not the picture's strip"
            got[f"{kind} strip {label}"] = _graph_seconds(mesh, call, lambda: None)
        assert not slots.failure(), slots.failure()
    mesh.settle()
    mesh.close()
    return got


def case_agreement() -> dict[str, Any]:
    mesh = _mesh("cpu")
    held = {f"field {i}": "x" * 40 for i in range(20)}
    seconds = []
    for _ in range(300):
        start = time.perf_counter()
        agree(mesh, held, state={"prompt": True})
        seconds.append(time.perf_counter() - start)
    mesh.close()
    return {"agreement": seconds}


def _slowest(ranks: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Of every round of every figure, the slowest rank's seconds."""
    return {
        name: [max(times) for times in zip(*(got[name] for got in ranks), strict=True)]
        for name in ranks[0]
    }


def _gpus(size: int) -> Any:
    there = torch.cuda.device_count()  # unlike is_available, it lets the ranks be forked
    missing = pytest.mark.skipif(there < size, reason=f"needs {size} CUDA GPUs, {there} here")
    marks = [missing, getattr(pytest.mark, f"gpu{size}")]
    return pytest.param(size, marks=marks, id=f"{size}gpus")


@pytest.fixture(scope="module")
def launched(request: pytest.FixtureRequest) -> dict[str, list[float]]:
    """Rounds of every figure over so many GPUs, from one launch."""
    size = request.param
    cases = [case_collectives, case_sums, case_strips]
    ranks = run_cases(size, cases, timeout=300, arguments={"size": size})
    return {k: v for case in cases for k, v in _slowest(ranks[case.__name__]).items()}


def _record(recorded: Callable, benchmark: Any, rounds: list[float], **others: list[float]) -> None:
    """These rounds as the benchmark's; by whose name, medians of other figures over its own."""
    each: Iterator[float] = iter(rounds)
    seconds = recorded(lambda: next(each), rounds=len(rounds))
    if seconds is None:
        return
    ratios = {f"{x} / this": statistics.median(y) / seconds for x, y in others.items()}
    info = {"us": seconds * 1e6, **ratios}
    benchmark.extra_info.update({k: round(v, 3) for k, v in info.items()})
    text = ", ".join(f"{k} {v:.2f}" for k, v in info.items())
    print(f"{benchmark.name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", SIZES)
@pytest.mark.parametrize("launched", [_gpus(2), _gpus(4)], indirect=True)
def test_collective(benchmark, recorded, launched, label, kind) -> None:
    nccl = launched[f"nccl {label}"]
    _record(recorded, benchmark, launched[f"{kind} {label}"], nccl=nccl)


@pytest.mark.parametrize("kind", SUMS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("launched", [_gpus(2), _gpus(4)], indirect=True)
def test_sum_and_norm(benchmark, recorded, launched, rows, kind) -> None:
    others = {x: launched[f"{x} {rows}"] for x in ("two_shot", "nccl")}
    _record(recorded, benchmark, launched[f"{kind} {rows}"], **others)


@pytest.mark.parametrize("kind", EDGES)
@pytest.mark.parametrize("label", STRIPS)
@pytest.mark.parametrize("launched", [_gpus(2), _gpus(4)], indirect=True)
def test_strip(benchmark, recorded, launched, label, kind) -> None:
    none = launched[f"none strip {label}"]
    _record(recorded, benchmark, launched[f"{kind} strip {label}"], none=none)


@pytest.mark.parametrize("size", [2, 4])
def test_agreement(benchmark, recorded, size) -> None:
    """Over CPU ranks, on the host's clock."""
    ranks = run_cases(size, [case_agreement], arguments={"size": size})["case_agreement"]
    _record(recorded, benchmark, _slowest(ranks)["agreement"])
