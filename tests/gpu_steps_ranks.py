"""Captured denoising steps over ranks: `torchrun --nproc_per_node=4 tests/gpu_steps_ranks.py --cfg
2 --tp 2` (or any other mesh of 2, 4 or 8 GPUs).

The engine's own steps at Nano's widths, on a few layers. Thousands of replays with random delays a
rank, before and between the collectives, bit for bit what eager steps without delays gave; planted
faults that must be seen; then whole D requests whose state is compared over the ranks after every
step. Every rank prints what failed; exit status 1 if anything did. `--sums`: how sums over ranks
are made, whatever the tables say. `--tiny` runs on CPU ranks.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from cosmos3_fast import Engine, ParallelConfig, denoise, ops
from cosmos3_fast.agreement import digest
from cosmos3_fast.graph import StepRunner
from cosmos3_fast.parallel import Mesh, Symmetric
from cosmos3_fast.testing import fill_random, make_nano_folder, make_tiny_checkpoint
from cosmos3_fast.testing.gate import reduced
from cosmos3_fast.testing.measure import SUMS, choose_sums, engine_args, wait
from cosmos3_fast.testing.requests import WORKLOADS, Workload

INPUTS = 8  # noises and clean values that replays start from
GRAPHS = 4  # captures of one step, each with other delays
CYCLES = 200_000  # longest delay on the device, some 100 us
DEADLINE_S = 300.0  # of all replays of one check: a hang ends with the watchdog's message
# About 400 tokens a branch. As all-reduces its sums are two-shot, D's over TP ranks are NCCL's.
SHORT = replace(WORKLOADS["E"], latent=(2, 24, 32), steps=4, guidance=3.0, text_tokens=60)


class Delays:
    """This rank's own random delays."""

    def __init__(self, mesh: Mesh) -> None:
        self.random, self.on_gpu = random.Random(1000 + mesh.rank), mesh.device.type == "cuda"

    def device(self) -> None:
        """Half of the time, up to 0.1 ms on the stream; may be captured."""
        if self.random.random() < 0.5:
            cycles = self.random.randrange(CYCLES)
            torch.cuda._sleep(cycles) if self.on_gpu else time.sleep(cycles * 5e-10)

    def host(self) -> None:
        """Once in a hundred times, up to 2 ms."""
        if self.random.random() < 0.01:
            time.sleep(self.random.random() * 2e-3)


def delayed(call: Callable[..., torch.Tensor], delays: Delays) -> Callable[..., torch.Tensor]:
    def run(*args: Any, **keywords: Any) -> torch.Tensor:
        delays.device()
        result = call(*args, **keywords)
        delays.device()
        return result

    return run


class Peers:
    """Collectives that read the peers' memory; without `barriers` ranks overtake each other."""

    def __init__(self, mesh: Mesh, barriers: bool) -> None:
        self.mesh, self.barriers = mesh, barriers
        self.parts: dict[tuple[Any, ...], Symmetric] = {}

    def all_gather(self, x: torch.Tensor, axis: str = "tp") -> torch.Tensor:
        if self.mesh.size(axis) == 1:
            return x[None]
        key = (axis, *x.shape)
        if key not in self.parts:
            self.parts[key] = self.mesh.symmetric(tuple(x.shape), x.dtype, axis)
        part = self.parts[key]
        part.tensor.copy_(x)
        self._wait(part)
        ranks = range(self.mesh.size(axis))
        found = torch.stack([part.handle.get_buffer(r, x.shape, x.dtype) for r in ranks])
        self._wait(part)
        return found

    def all_reduce(self, x: torch.Tensor, axis: str = "tp") -> torch.Tensor:
        return self.all_gather(x, axis).sum(0)

    def sum_add_rms_norm(
        self, part: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *_, **__
    ) -> torch.Tensor:
        return ops.add_rms_norm(self.all_reduce(part), residual, weight, eps)

    def _wait(self, part: Symmetric) -> None:
        if self.barriers:
            part.handle.barrier()


class Steps:
    """The steps of one kind of request, on inputs that every rank makes alike."""

    def __init__(self, engine: Engine, load: Workload) -> None:
        self.engine, self.mesh, self.device = engine, engine.mesh, engine.device
        self.request = load.request(0)
        schedule = denoise.schedule_of(
            engine.args.plugin_args, engine.checkpoint.scheduler, load.steps
        )
        self.plan = denoise.plan(self.request, engine.checkpoint.transformer, schedule)
        values = self.plan.layout.values
        generator = torch.Generator().manual_seed(5)  # the host's: equal on every machine
        self.inputs = torch.randn(INPUTS, 2, values, generator=generator).to(self.device)
        self.delays = Delays(self.mesh)
        self.order = random.Random(0)  # which input comes next: equal on all ranks
        self.wrong = torch.zeros(1, dtype=torch.int64, device=self.device)

    def runner(self, *, capture: bool = True) -> StepRunner:
        """A runner of its own buffers, loaded and prepared."""
        plan, model = self.plan, self.engine.model
        runner = StepRunner(plan.key, plan.layout, model, capture=capture)
        for branch in plan.branches(self.mesh):
            ids = plan.prompts[branch]
            runner.set_prompt(branch, ids, self.engine._kept.und(ids, self.engine.model))
        denoise.load(runner, plan, self.request)
        for guided in sorted(set(plan.guided)):
            runner.prepare(guided)
        return runner

    @contextmanager
    def slowed(self) -> Iterator[None]:
        """While this lasts collectives that are called, or captured, have delays around them."""
        names = ("all_reduce", "all_gather")
        calls = {name: delayed(getattr(self.mesh, name), self.delays) for name in names}
        fused = delayed(ops.sum_add_rms_norm, self.delays)
        with patch.multiple(self.mesh, **calls), patch.object(ops, "sum_add_rms_norm", fused):
            yield

    def delayed_runners(self) -> list[StepRunner]:
        with self.slowed():
            return [self.runner() for _ in range(GRAPHS)]

    def loop(
        self, runner: StepRunner, index: int, delays: Delays | None = None
    ) -> Iterator[torch.Tensor]:
        """[2, N] after each step: the sample and the clean values it points to."""
        noise, clean = self.inputs[index]
        runner.set_state(noise, clean)
        for guided in self.plan.guided:
            if delays is not None:
                delays.host()
                delays.device()
            runner.step(guided)
            yield torch.stack((runner.sample, runner.x0_prev))

    def answers(self, runner: StepRunner) -> torch.Tensor:
        """[INPUTS, steps, 2, N] without delays."""
        found = [torch.stack(list(self.loop(runner, index))) for index in range(INPUTS)]
        return torch.stack(found)

    def replay(
        self,
        runners: Sequence[StepRunner],
        wanted: torch.Tensor,
        count: int,
        before: Callable[[int], int] = lambda index: index,
    ) -> int:
        """Wrong results among `count` steps. Each rank draws which runner is next; all take the
        same input, as `before` sees it.
        """
        self.wrong.zero_()
        with self.slowed():  # CPU ranks call them now
            for _ in range(-(-count // len(self.plan.guided))):
                index = self.order.randrange(INPUTS)
                runner = self.delays.random.choice(runners)
                loop = self.loop(runner, before(index), self.delays)
                for got, want in zip(loop, wanted[index], strict=True):
                    self.wrong += (got != want).any()
        return int(self.wrong.item())


@contextmanager
def watched(engine: Engine) -> Iterator[None]:
    """A hang in here ends every rank."""
    assert engine._watchdog is not None
    engine._requests += 1
    with torch.no_grad(), engine._watchdog.step(engine._requests, DEADLINE_S):
        yield
        wait(engine.device)
    engine.mesh.barrier()


def say(mesh: Mesh, text: str) -> None:
    if mesh.rank == 0:
        print(text, flush=True)


def check_replays(engine: Engine, name: str, load: Workload, count: int) -> list[str]:
    """Captured steps with delays give the bits of eager ones without, equal on all ranks; planted
    faults do not.
    """
    mesh, problems = engine.mesh, []
    with watched(engine):
        steps = Steps(engine, load)
        runners = steps.delayed_runners()
        wanted = steps.answers(steps.runner(capture=False))
    if not bool(wanted.isfinite().all()):
        problems.append(f"{name}: not finite")
    firsts = wanted[:, :, 0].flatten(0, 1)
    if len(torch.unique(firsts, dim=0)) != len(firsts):
        problems.append(f"{name}: two steps give one result")
    digests = mesh.gather_objects(digest(wanted))
    if len(set(digests)) != 1:
        problems.append(f"{name}: the ranks' results differ: {digests}")
    with watched(engine):
        start = time.monotonic()
        wrong = steps.replay(runners, wanted, count)
        seconds = time.monotonic() - start
    counts = mesh.gather_objects(wrong)
    say(mesh, f"{name}: {count} replays in {seconds:.1f} s, wrong on each rank: {counts}")
    if wrong:
        problems.append(f"{name}: {wrong} of {count} replays are wrong")
    problems += check_faults(engine, name, steps, runners, wanted, count // 50 + 20)
    for runner in runners:
        runner.close()
    return problems


def check_faults(
    engine: Engine,
    name: str,
    steps: Steps,
    runners: list[StepRunner],
    wanted: torch.Tensor,
    count: int,
) -> list[str]:
    """What one rank alone does wrong must show as a wrong result; afterwards all is well again."""
    last = engine.mesh.rank == engine.mesh.world_size - 1
    weight = engine.model.gen[0].attention.out.weight
    counted = iter(range(count))

    def another(index: int) -> int:
        return (index + 1) % INPUTS if last and next(counted) == 3 else index

    with watched(engine):
        other_input = steps.replay(runners, wanted, count, before=another)
    before = weight[0, 0].clone()
    weight[0, 0] += 4 if last else 0
    with watched(engine):
        other_weight = steps.replay(runners, wanted, count)
    weight[0, 0] = before
    with watched(engine):
        again = steps.replay(runners, wanted, count)
    found = {"one input of another request": other_input, "one weight": other_weight}
    problems = [f"{name}: {again} wrong after the faults"] if again else []
    for fault, wrong in found.items():
        counts = engine.mesh.gather_objects(wrong)
        say(engine.mesh, f"{name}: planted, {fault} on the last rank: {counts} of {count} wrong")
        problems += [] if any(counts) else [f"{name}: planted fault not seen: {fault}"]
    return problems


def check_races(engine: Engine, load: Workload, count: int) -> list[str]:
    """The delays find a collective that does not wait: peers' memory read without barriers."""
    mesh, found = engine.mesh, {}
    for barriers in (True, False):
        peers = Peers(mesh, barriers)
        calls = {"all_reduce": peers.all_reduce, "all_gather": peers.all_gather}
        with watched(engine):
            steps = Steps(engine, load)
            fused = patch.object(ops, "sum_add_rms_norm", peers.sum_add_rms_norm)
            with patch.multiple(mesh, **calls), fused:
                if barriers:
                    wanted = steps.answers(steps.runner())
                runners = steps.delayed_runners()
        with watched(engine):
            found[barriers] = mesh.gather_objects(steps.replay(runners, wanted, count))
        for runner in runners:
            runner.close()
    say(
        mesh,
        f"peers' memory, {count} replays: wrong {found[True]}, without barriers {found[False]}",
    )
    problems = ["peers' memory: wrong in spite of barriers"] if any(found[True]) else []
    return problems + ([] if any(found[False]) else ["planted fault not seen: no barriers"])


class States:
    """Checksums of the denoised state after every step of an engine's requests, on the device."""

    def __init__(self, engine: Engine, load: Workload) -> None:
        self.engine, self.load = engine, load
        self.key = Steps(engine, load).plan.key
        self.found: list[torch.Tensor] = []
        self.planted = -1  # before the checksum of which step this rank's state is altered

    def run(self, seed: int) -> None:
        self.engine.step(self.load.request(seed, prompt=seed % 5), on_step=self._take)

    def take(self) -> list[int]:
        """All checksums so far, in order."""
        return torch.stack(self.found).tolist()

    def _take(self, _: int) -> None:
        runner = self.engine._kept.runners.peek(self.key)
        assert runner is not None
        if len(self.found) == self.planted:
            bits = runner.sample.view(torch.int32)
            bits[0] ^= 1
        parts = (runner.sample, runner.last_sample, runner.x0_prev, runner.x0_prev2)
        bits = torch.cat(parts).view(torch.int32).long()
        odd = torch.arange(len(bits), device=bits.device) * 0x1E3779B97F4A7C15 | 1
        self.found.append((bits * odd).sum())  # integers: in any order the same


def check_states(engine: Engine, load: Workload, requests: int) -> list[str]:
    """The state after every step of whole requests is equal on all ranks; a planted bit is seen."""
    mesh, states, problems = engine.mesh, States(engine, load), []
    mesh.barrier()
    start = time.monotonic()
    for seed in range(requests):
        states.run(seed)
    mine, seconds = states.take(), time.monotonic() - start
    count, ranks = len(mine), mesh.gather_objects(mine)
    differ = [step for step, values in enumerate(zip(*ranks, strict=True)) if len(set(values)) > 1]
    if differ or count != requests * load.steps:
        problems.append(f"states differ after {len(differ)} of {count} steps: {differ[:5]}")
    if len(set(mine)) != count:
        problems.append(f"{count} steps, but {len(set(mine))} states")
    say(mesh, f"states of {count} steps, {seconds:.1f} s: {len(differ)} differ between the ranks")
    if mesh.rank == mesh.world_size - 1:
        states.planted = count + 1
    states.run(requests)
    ranks = mesh.gather_objects(states.take()[count:])
    differ = [step for step, values in enumerate(zip(*ranks, strict=True)) if len(set(values)) > 1]
    say(mesh, f"planted, one bit of the last rank's state in step 1: steps {differ} differ")
    expected = list(range(1, load.steps))
    return problems + ([] if differ == expected else [f"planted bit seen in {differ}"])


def make_engine(args: argparse.Namespace, folder: Path) -> Engine:
    parallel = ParallelConfig(args.cfg * args.tp, args.cfg, args.tp)
    if args.tiny:
        made = make_tiny_checkpoint(folder / "tiny")
        return Engine(engine_args(made, "cpu", torch.float32, parallel=parallel))
    made = reduced(make_nano_folder(folder / "nano"), folder / "reduced", args.layers)
    given = engine_args(
        made, "cuda", torch.bfloat16, parallel=parallel, collective=choose_sums(args.sums, args.tp)
    )
    return Engine(given, weights=fill_random)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cfg", type=int, default=1)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--replays", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=250, help="whole D requests of 4 steps")
    parser.add_argument("--layers", type=int, default=2, help="36 is all of Nano")
    parser.add_argument("--sums", choices=SUMS, default="table", help="kind of sums over ranks")
    parser.add_argument("--tiny", action="store_true", help="CPU ranks, tiny model, float32")
    args = parser.parse_args(argv)
    if args.sums != "table" and (args.tiny or args.tp == 1):
        parser.error("--sums needs GPU ranks and --tp of 2 or more")
    short, whole = SHORT, WORKLOADS["D"]
    if args.tiny:
        short, whole = short.small(), whole.small()
    with tempfile.TemporaryDirectory(prefix="cosmos3-steps-") as name:
        engine = make_engine(args, Path(name))
    with engine:
        mesh = engine.mesh
        problems = check_replays(engine, "short", short, args.replays)
        problems += check_replays(engine, "D", whole, args.replays // 10)
        if engine.device.type == "cuda":
            problems += check_races(engine, short, args.replays // 50)
        problems += check_states(engine, whole, args.requests)
        sums = engine.model.sums
        made = sum(int(memory.state[0]) for memory in sums._fused.values())
        say(mesh, f"{made} sums over ranks were made in one kernel")
        problems += [text for text in [sums.failure()] if text]
        wrong = {"fused": not made, "all-reduce": made, "nccl": made}.get(args.sums)
        problems += [f"{made} sums in one kernel with --sums {args.sums}"] if wrong else []
        for problem in problems:
            print(f"FAILED rank {mesh.rank}: {problem}", flush=True)
        failed = any(mesh.gather_objects(bool(problems)))
        verdict = "FAILED" if failed else f"all checks passed on {mesh.world_size} ranks"
        say(mesh, f"steps, cfg {args.cfg} x tp {args.tp}: {verdict}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
