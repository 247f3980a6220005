"""What the scripts over GPU ranks share: their command line, their verdict, how they take times."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence

import torch

from cosmos3_fast.config import ParallelConfig
from cosmos3_fast.parallel import Mesh

CYCLES = 200_000  # longest delay on the device, some 100 us: ranks overtake each other
Check = Callable[[Mesh, int], list[str]]  # of the mesh and a number of replays: what is wrong


def run(name: str, about: str, checks: Sequence[Check], take_times: Callable[[Mesh], None]) -> int:
    """Every check on all GPUs of the launch; times if all is right. Each rank prints what failed;
    the exit status, 1 if anything did on any.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--replays", type=int, default=10_000)
    parser.add_argument("--check", action="store_true", help="take no times")
    arguments = parser.parse_args()
    world = int(os.environ["WORLD_SIZE"])
    mesh = Mesh.create(ParallelConfig(world_size=world, tp_size=world), "cuda")
    problems = [text for check in checks for text in check(mesh, arguments.replays)]
    for problem in problems:
        print(f"FAILED rank {mesh.rank}: {problem}", flush=True)
    failed = any(mesh.gather_objects(bool(problems)))
    if mesh.rank == 0:
        print(f"{name}: " + ("FAILED" if failed else f"all checks passed on {world} GPUs"))
    if not failed and not arguments.check:
        take_times(mesh)
    mesh.settle()
    mesh.close()
    return int(failed)


def time_us(mesh: Mesh, call: Callable[[int], object], count: int, sets: int = 1) -> float:
    """Median microseconds of a call in a captured graph, all ranks at once; the slowest rank's.

    `call(i)` works on the i-th of `sets` sets of memory, which take turns.
    """
    for i in range(sets):
        call(i)
    mesh.settle()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for i in range(count):
            call(i % sets)
    for _ in range(12):
        mesh.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    return max(mesh.gather_objects(statistics.median(times[2:])))
