"""What the scripts over GPU ranks share: their command line and their verdict."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

from cosmos3_fast.config import ParallelConfig
from cosmos3_fast.parallel import Mesh

CYCLES = 200_000  # longest delay on the device, some 100 us: ranks overtake each other
Check = Callable[[Mesh, int], list[str]]  # of the mesh and a number of replays: what is wrong


def run(name: str, about: str, checks: Sequence[Check]) -> int:
    """Every check on all GPUs of the launch. Each rank prints what failed; the exit status, 1 if
    anything did on any.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--replays", type=int, default=10_000)
    replays = parser.parse_args().replays
    world = int(os.environ["WORLD_SIZE"])
    mesh = Mesh.create(ParallelConfig(world_size=world, tp_size=world), "cuda")
    problems = [text for check in checks for text in check(mesh, replays)]
    for problem in problems:
        print(f"FAILED rank {mesh.rank}: {problem}", flush=True)
    failed = any(mesh.gather_objects(bool(problems)))
    if mesh.rank == 0:
        print(f"{name}: " + ("FAILED" if failed else f"all checks passed on {world} GPUs"))
    mesh.settle()
    mesh.close()
    return int(failed)
