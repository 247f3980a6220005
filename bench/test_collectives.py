"""All-reduce and all-gather over the GPUs of a host, in a captured graph; the host's agreement.

Each all-reduce kernel (NCCL, two-shot) is compared with the sum in float64 first, then timed as a
graph of calls: microseconds a call on the slowest rank, and the ratio to NCCL in the same launch.
What `parallel.TWO_SHOT_BYTES` should say is read off this table (`-s` shows it; the ranks are
processes of their own, so pytest-benchmark times nothing here). Without GPUs only the agreement
over CPU ranks is timed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from ranks import argument, run_cases

from cosmos3_fast.agreement import agree
from cosmos3_fast.config import ParallelConfig
from cosmos3_fast.parallel import Mesh

SIZES = {"24 MB": 24 << 20, "3.2 MB": 3276800, "0.25 MB": 256 << 10, "64 KB": 64 << 10}
CALLS, ROUNDS = 50, 20


def _mesh(device: str) -> Mesh:
    size = argument("size")
    return Mesh.create(ParallelConfig(size, 1, size), device, collective="symmetric")


def _graph_microseconds(mesh: Mesh, call: Any) -> float:
    """Median time of a call in a replayed graph of CALLS calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(ROUNDS):
        mesh.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return sorted(times)[ROUNDS // 2]


def case_collectives() -> dict[str, Any]:
    mesh = _mesh("cuda")
    got: dict[str, Any] = {}
    for label, nbytes in SIZES.items():
        memory = mesh.symmetric((nbytes // 2,), torch.bfloat16).tensor
        values = torch.randn(
            nbytes // 2,
            generator=torch.Generator(mesh.device).manual_seed(mesh.rank),
            device="cuda",
        ).bfloat16()
        truth = mesh.all_gather(values).double().sum(0)
        plain = values.clone()
        kernels = {
            "nccl": (plain, lambda x=plain: torch.distributed.all_reduce(x)),
            "two_shot": (memory, lambda x=memory: mesh.all_reduce(x)),
        }
        for kernel, (x, call) in kernels.items():
            x.copy_(values)
            torch.cuda.synchronize()
            mesh.barrier()
            call()
            error = (x.double() - truth).abs().max().item() / truth.abs().max().item()
            assert error < 2**-7, f"{kernel} {label}: relative error {error}"
            x.zero_()
            got[f"{kernel} {label}"] = _graph_microseconds(mesh, call)
        into = values.new_empty(mesh.tp_size, nbytes // 2)
        got[f"gather {label}"] = _graph_microseconds(
            mesh, lambda x=values, y=into: mesh.all_gather(x, out=y)
        )
    torch.cuda.synchronize()
    mesh.close()
    return got


def case_agreement() -> dict[str, Any]:
    mesh = _mesh("cpu")
    held = {f"field {i}": "x" * 40 for i in range(20)}
    times = []
    for _ in range(300):
        start = time.perf_counter()
        agree(mesh, held, state={"prompt": True})
        times.append(time.perf_counter() - start)
    mesh.close()
    return {"milliseconds": sorted(times)[len(times) // 2] * 1e3}


def _gpus(size: int) -> Any:
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    missing = pytest.mark.skipif(there < size, reason=f"needs {size} CUDA GPUs, {there} here")
    return pytest.param(size, marks=[missing, getattr(pytest.mark, f"gpu{size}")])


@pytest.mark.parametrize("size", [_gpus(2), _gpus(4)])
def test_collectives(size) -> None:
    ranks = run_cases(size, [case_collectives], timeout=300, arguments={"size": size})
    slowest = {
        k: max(got[k] for got in ranks["case_collectives"]) for k in ranks["case_collectives"][0]
    }
    for label in SIZES:
        for kernel in ("nccl", "two_shot", "gather"):
            micros = slowest[f"{kernel} {label}"]
            ratio = slowest[f"nccl {label}"] / micros
            print(
                f"{size} GPUs, {label}: {kernel} {micros:.1f} us, {ratio:.2f} x NCCL's all-reduce"
            )


@pytest.mark.parametrize("size", [2, 4])
def test_agreement(size) -> None:
    ranks = run_cases(size, [case_agreement], arguments={"size": size})["case_agreement"]
    slowest = max(got["milliseconds"] for got in ranks)
    print(f"{size} ranks: {slowest:.2f} ms")
