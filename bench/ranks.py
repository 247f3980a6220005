"""D, E and S at Nano size over ranks, against one GPU in the same run: agreement first, then times.

    torchrun --nproc_per_node=4 bench/ranks.py --cfg 2 --tp 2 --decode

Every rank first runs the requests alone (world size 1) on its own GPU; rank 0 compares the mesh's
results with that, checks that all ranks hold equal bits, and prints one JSON line a request.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from cosmos3_fast import (
    Cosmos3PolicyWNArgs,
    DeviceConfig,
    Engine,
    EngineArgs,
    EngineConfig,
    ParallelConfig,
    RuntimeConfig,
)
from cosmos3_fast.agreement import digest
from cosmos3_fast.testing import fill_random, make_nano_folder
from cosmos3_fast.testing.requests import WORKLOADS

LOCAL = "cuda" if torch.cuda.is_available() else "cpu"


def engine(folder: Path, cfg: int, tp: int, *, device: str, graph: bool, decode: bool) -> Engine:
    """A Nano with random weights, equal in every mesh; the native schedule."""
    return Engine(
        EngineArgs(
            plugin_args=Cosmos3PolicyWNArgs(
                checkpoint_dir=folder, schedule="native", decode_video=decode
            ),
            config=EngineConfig(
                device=DeviceConfig(device, torch.bfloat16),
                parallel=ParallelConfig(cfg * tp, cfg, tp),
                runtime=RuntimeConfig(use_cuda_graph=graph, step_deadline_s=120.0),
            ),
        ),
        weights=fill_random,
    )


def timed(engine: Engine, kind: str, repeats: int) -> tuple[list[float], dict[str, float]]:
    """Wall ms from a request in host memory to its actions there, and the stages' medians."""
    totals, stages = [], []
    for repeat in range(repeats):
        request = WORKLOADS[kind].request(100 + repeat)
        torch.cuda.synchronize()
        engine.mesh.barrier()
        begin = time.perf_counter()
        engine.step(request)["action"].cpu()
        totals.append((time.perf_counter() - begin) * 1e3)
        stages.append(dict(engine.times))
    names = stages[0]
    return totals, {n: round(statistics.median(s[n] for s in stages), 2) for n in names}


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def main() -> int:
    """Run; exit status 1 when ranks differ or a result is further than the bound from one GPU."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg", type=int, default=1)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--requests", default="D,E,S")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--bound", type=float, default=0.05, help="relative L2 against one GPU")
    args = parser.parse_args()
    kinds = args.requests.split(",")
    folder = make_nano_folder(tempfile.mkdtemp())
    device = f"cuda:{torch.distributed.get_node_local_rank(fallback_rank=0)}"
    torch.cuda.set_device(device)
    alone, alone_ms = {}, {}
    with engine(folder, 1, 1, device=device, graph=not args.eager, decode=args.decode) as one:
        for kind in kinds:
            one.warmup(WORKLOADS[kind].request(7))
            result = one.step(WORKLOADS[kind].request(7))
            alone[kind] = {name: tensor.cpu() for name, tensor in result.items()}
            alone_ms[kind] = timed(one, kind, args.repeats)
    del one
    torch.cuda.empty_cache()
    bad = False
    mesh_engine = engine(
        folder, args.cfg, args.tp, device=device, graph=not args.eager, decode=args.decode
    )
    with mesh_engine as many:
        for kind in kinds:
            many.warmup(WORKLOADS[kind].request(7))
            result = many.step(WORKLOADS[kind].request(7))
            digests = many.mesh.gather_objects({n: digest(t) for n, t in result.items()})
            equal = all(d == digests[0] for d in digests)
            errors = {n: error(t.cpu(), alone[kind][n]) for n, t in result.items()}
            totals, stages = timed(many, kind, args.repeats)
            bad |= not equal or not max(errors.values()) < args.bound
            if many.mesh.rank == 0:
                one_ms = statistics.median(alone_ms[kind][0])
                row = {
                    "request": kind,
                    "mesh": f"cfg {args.cfg} x tp {args.tp}",
                    "ms": round(statistics.median(totals), 1),
                    "one_gpu_ms": round(one_ms, 1),
                    "speedup": round(one_ms / statistics.median(totals), 3),
                    "stages": stages,
                    "one_gpu_stages": alone_ms[kind][1],
                    "ranks_bit_equal": equal,
                    "error_against_one_gpu": {n: f"{e:.2e}" for n, e in errors.items()},
                    "peak_GiB": round(many.peak_bytes / 2**30, 1),
                }
                print(json.dumps(row), flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
