"""D, E and S at Nano size over ranks, against one GPU in the same run: agreement, then times.

    torchrun --nproc_per_node=4 bench/ranks.py --cfg 2 --tp 2 --decode --json OUT
    torchrun --nproc_per_node=8 bench/ranks.py --cfg 2 --tp 4 --decode --pooled 8
    torchrun --nproc_per_node=8 bench/ranks.py --tp 8

Every rank first runs alone (world size 1) on its own GPU, then all of them as the mesh. Rank 0
prints one JSON line a request; milliseconds are those of the slowest rank. Every rank's exit status
is 1 when ranks hold different bits, or a result lies further from one GPU's than the bound, and
then that request has no times. `--pooled N` compares errors against float32 over N seeds, dealt out
to the ranks, instead of by the fixed bound. Sums over ranks are those of the engine's tables, or
all of one kind by `--sums`; each row names the largest that one kernel makes. `--tiny` runs on CPU
ranks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cosmos3_fast import Engine, ParallelConfig, ops
from cosmos3_fast.agreement import digest
from cosmos3_fast.cli.ending import leave
from cosmos3_fast.graph import Captured
from cosmos3_fast.testing import fill_random, make_nano_folder, make_tiny_checkpoint
from cosmos3_fast.testing.gate import relative
from cosmos3_fast.testing.machine import machine, script_command
from cosmos3_fast.testing.measure import (
    SUMS,
    choose_sums,
    configured,
    engine_args,
    time_requests,
    timed,
)
from cosmos3_fast.testing.requests import WORKLOADS, Workload

Results = dict[str, torch.Tensor]
FLOOR = 1e-6  # an error that float32 has by itself
POOLED_BOUND = {True: 1.20, False: 1.10}  # over one GPU's error; True: 8 ranks' sums round often


@contextmanager
def engine_of(
    folder: Path, args: argparse.Namespace, mesh: tuple[int, int], dtype: torch.dtype
) -> Iterator[Engine]:
    """A model with random weights that are equal in every mesh: those that args.dtype holds."""

    @torch.no_grad()
    def weights(slots: Any) -> None:
        fill_random(slots)
        for slot in slots.values():
            slot.target.copy_(slot.target.to(args.dtype))

    cfg, tp = mesh
    parallel = ParallelConfig(cfg * tp, cfg, tp)
    graph = not args.eager and dtype == args.dtype
    made = engine_args(
        folder,
        args.device,
        dtype,
        parallel=parallel,
        decode=args.decode,
        graph=graph,
        collective=args.collective,
    )
    with Engine(made, weights=weights) as engine:
        yield engine
    if engine.device.type == "cuda":
        torch.cuda.synchronize()


def host(results: Results) -> Results:
    return {name: tensor.cpu() for name, tensor in results.items()}


def answers(engine: Engine, kinds: dict[str, Workload], seeds: range) -> dict[str, list[Results]]:
    """Results on the host of each kind's seeds, actions and latents alone."""
    with configured(engine, decode=False):
        return {
            kind: [host(engine.step(load.request(seed))) for seed in seeds]
            for kind, load in kinds.items()
        }


def times(engine: Engine, load: Workload, args: argparse.Namespace) -> dict[str, Any]:
    """Wall ms to actions, stages and, when asked, collectives and the VAE, on this rank."""
    with configured(engine, decode=False):
        engine.warmup(load.request(7))
        requests = map(load.request, range(100, 100 + args.repeats))
        measured = time_requests(engine, requests)
    row = {"ms": measured.p50, **{f"{n}_ms": ms for n, ms in measured.stages.items()}}
    if engine.mesh.tp_size > 1:
        row |= sums_ms(engine, load)
    return row | (vae_ms(engine, load) if args.decode else {})


def sums_ms(engine: Engine, load: Workload) -> dict[str, float]:
    """A request's sums over ranks alone, two a layer and step, each of all tokens.

    As all-reduces "collectives_ms"; "fused_sums_ms" where one kernel makes each, with the residual
    and the norm, which all-reduces leave to other kernels.
    """
    frames, height, width = load.latent
    rows = frames * -(-height // 2) * -(-width // 2) + load.state_rows + load.chunk
    rows *= 2 if load.guidance != 1 and engine.mesh.cfg_size == 1 else 1
    model, mesh = engine.model, engine.mesh
    shape = rows, model.config.hidden_size, model.dtype
    part, residual = model.sums.part(*shape).zero_(), model.sums.residual(*shape).zero_()
    weight, eps = model.norm_gen.weight, model.norm_gen.eps
    fused = model.sums.fused(*shape) is not None

    def sums() -> None:
        for _ in range(2 * model.config.num_hidden_layers):
            if fused:
                ops.sum_add_rms_norm(part, residual, weight, eps, model.sums)
            else:
                mesh.all_reduce(part, "tp")

    graph = Captured(sums, engine.device, True)
    found = []
    for _ in range(7):
        mesh.barrier()
        found.append(timed(graph, engine.device))
    graph.reset()
    name = "fused_sums_ms" if fused else "collectives_ms"
    return {name: load.steps * statistics.median(found[2:])}


def vae_ms(engine: Engine, load: Workload, rounds: int = 3) -> dict[str, float]:
    """Decode of the request's latents, encode of its whole clip (as inverse dynamics needs it)."""
    calls = {"decode_ms": lambda: engine.vae.decode(latents(engine, load))}
    clip = torch.zeros(1, 3, 4 * load.latent[0] - 3, *load.canvas, device=engine.device)
    clip.uniform_(-1, 1, generator=torch.Generator(engine.device).manual_seed(0))
    calls["encode_clip_ms"] = lambda: engine.vae.encode(clip)
    row = {}
    for name, call in calls.items():
        found = []
        for _ in range(rounds + 1):
            engine.mesh.barrier()
            found.append(timed(call, engine.device))
        row[name] = statistics.median(found[1:])
    return row


def latents(engine: Engine, load: Workload) -> torch.Tensor:
    """Random latents of the request's shape, equal on every rank."""
    shape = (1, engine.checkpoint.transformer.latent_channel, *load.latent)
    generator = torch.Generator(engine.device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=engine.device)


def pixels(engine: Engine, kinds: dict[str, Workload]) -> dict[str, torch.Tensor]:
    return {kind: engine.vae.decode(latents(engine, load)).cpu() for kind, load in kinds.items()}


def pooled(found: list[Results], exact: list[Results]) -> float:
    """Relative L2 of all seeds together."""

    def merge(rows: list[Results]) -> Results:
        return {f"{i} {k}": v for i, row in enumerate(rows) for k, v in row.items()}

    return relative(merge(found), merge(exact))


def everyones(engine: Engine, own: dict[str, list[Results]]) -> dict[str, list[Results]]:
    """Each kind's results of every rank's seeds, in the order of the seeds dealt out by rank."""

    def gather(rows: list[Results]) -> list[Results]:
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        every = {
            name: engine.mesh.all_gather(part.to(engine.device), axis="world").cpu()
            for name, part in stacked.items()
        }
        order = [
            (rank, turn) for turn in range(len(rows)) for rank in range(engine.mesh.world_size)
        ]
        return [{name: part[at] for name, part in every.items()} for at in order]

    return {kind: gather(rows) for kind, rows in own.items()}


def agreement(
    kind: str, args: argparse.Namespace, many: Engine, mine: dict, one: dict, exact: dict
) -> dict[str, Any]:
    """What holds of this kind on all ranks: bits equal, error in order; "good" is the verdict."""
    digests = many.mesh.gather_objects([digest(r) for row in mine[kind] for r in row.values()])
    row: dict[str, Any] = {"ranks_bit_equal": all(d == digests[0] for d in digests)}
    row["against_one_gpu"] = pooled(mine[kind], one[kind])
    good = row["ranks_bit_equal"] and row["against_one_gpu"] <= args.bound
    if exact:
        row["error"], row["one_gpu_error"] = (pooled(r[kind], exact[kind]) for r in (mine, one))
        ratio = row["error"] / max(row["one_gpu_error"], FLOOR)
        row["error_over_one_gpu"] = ratio
        rounds_often = args.tp == 8 and not many.model.sums.fused_bytes
        good = row["ranks_bit_equal"] and ratio <= POOLED_BOUND[rounds_often]
    row["good"] = all(many.mesh.gather_objects(bool(good)))
    return row


def slowest(engine: Engine, row: dict[str, float]) -> dict[str, float]:
    """The largest of each figure over the ranks."""
    rows = engine.mesh.gather_objects(row)
    return {name: round(max(r[name] for r in rows), 2) for name in row}


def report(args: argparse.Namespace, folder: Path, kinds: dict[str, Workload]) -> list[dict]:
    """Everything, one row a request; rank 0 prints it."""
    seeds, own = range(7, 7 + max(1, args.pooled)), {}
    if args.pooled:
        with ops.reference(), engine_of(folder, args, (1, 1), torch.float32) as wide:
            own = answers(wide, kinds, seeds[args.local :: args.cfg * args.tp])
        del wide
        release(args)
    with engine_of(folder, args, (1, 1), args.dtype) as alone:
        one = answers(alone, kinds, seeds)
        one_ms = {kind: times(alone, load, args) for kind, load in kinds.items()}
        shown = pixels(alone, kinds) if args.decode else {}
    del alone
    release(args)
    rows = []
    with engine_of(folder, args, (args.cfg, args.tp), args.dtype) as many:
        mine, exact = answers(many, kinds, seeds), everyones(many, own)
        for kind, load in kinds.items():
            row = {"request": kind, "mesh": f"cfg {args.cfg} x tp {args.tp}"}
            row |= {"sums": args.sums, "fused_bytes": many.model.sums.fused_bytes}
            row |= agreement(kind, args, many, mine, one, exact)
            if args.decode:
                got = many.vae.decode(latents(many, load)).cpu()
                row["pixels_against_one_gpu"] = relative({"": got}, {"": shown[kind]})
                good = row["good"] and row["pixels_against_one_gpu"] <= args.bound
                row["good"] = all(many.mesh.gather_objects(bool(good)))
            if row["good"]:
                row |= slowest(many, times(many, load, args))
                row["one_gpu"] = slowest(many, one_ms[kind])
                row["speedup"] = round(row["one_gpu"]["ms"] / row["ms"], 3)
                row["peak_GiB"] = round(many.peak_bytes / 2**30, 1)
            rows.append(row)
            if many.mesh.rank == 0:
                print(json.dumps(row), flush=True)
        main_rank = many.mesh.rank == 0
    if args.json and main_rank:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        launcher = ["torchrun", f"--nproc_per_node={args.cfg * args.tp}"]
        command = script_command(launcher, sys.argv)
        stored = {"machine": machine(), "command": command, "requests": rows}
        Path(args.json).write_text(json.dumps(stored, indent=2) + "\n")
    return rows


def release(args: argparse.Namespace) -> None:
    if args.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cfg", type=int, default=1)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--requests", default="D,E,S")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--decode", action="store_true", help="the VAE too: decode, clip encode")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--bound", type=float, default=0.05, help="relative L2 against one GPU")
    parser.add_argument("--pooled", type=int, default=0, metavar="N", help="seeds against float32")
    parser.add_argument("--sums", choices=SUMS, default="table", help="kind of sums over ranks")
    parser.add_argument("--tiny", action="store_true", help="CPU ranks, tiny model, float32")
    parser.add_argument("--json", metavar="OUT")
    args = parser.parse_args()
    if args.pooled % (args.cfg * args.tp):
        parser.error(f"--pooled deals seeds out to {args.cfg * args.tp} ranks, got {args.pooled}")
    if args.sums != "table" and (args.tiny or args.tp == 1):
        parser.error("--sums needs GPU ranks and --tp of 2 or more")
    args.collective = choose_sums(args.sums, args.tp)
    args.local = torch.distributed.get_node_local_rank(fallback_rank=0)
    args.device = "cpu" if args.tiny else f"cuda:{args.local}"
    args.dtype = torch.float32 if args.tiny else torch.bfloat16
    return args


def require_gpus(args: argparse.Namespace) -> None:
    """End all ranks with status 2, rank 0 with one line, unless each has a GPU or needs none."""
    found, ranks = torch.cuda.device_count(), args.cfg * args.tp
    if args.tiny or found >= ranks:
        return
    if args.local == 0:
        words = f"needs {ranks} GPUs, this machine has {found}: add --tiny for CPU ranks"
        sys.stderr.write(f"bench/ranks.py: {words}\n")
    sys.exit(leave(2))


def main() -> int:
    """Exit status 1 when ranks differ or a result is out of its bound."""
    args = parse()
    require_gpus(args)
    kinds = {kind: WORKLOADS[kind] for kind in args.requests.split(",")}
    if args.tiny:
        kinds = {kind: load.small() for kind, load in kinds.items()}
    else:
        torch.cuda.set_device(args.device)
    with tempfile.TemporaryDirectory(prefix="cosmos3-ranks-") as name:
        folder = make_tiny_checkpoint(name) if args.tiny else make_nano_folder(name)
        rows = report(args, folder, kinds)
    return int(not all(row["good"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
