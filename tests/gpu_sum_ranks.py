"""Sums over ranks among GPUs: `torchrun --nproc_per_node=2 tests/gpu_sum_ranks.py` (or 4, 8).

Error against float64 beside that of an all-reduce and `add_rms_norm`, equal bits on all ranks,
thousands of graph replays with random delays a rank, planted faults that must be seen, the
deadline. Every rank prints what failed; exit status 1 if anything did. bench/test_collectives.py
takes the times.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from gpu_rank_scripts import CYCLES, run
from sum_cases import EPS, Ranks, error, inputs, share, truth

from cosmos3_fast import ops
from cosmos3_fast.agreement import digest
from cosmos3_fast.ops.sum_norm import sum_add_rms_norm
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.parallel_sum import SumMemory

BF16 = torch.bfloat16
SHAPES = ((1, 64), (5, 1000), (406, 4096), (983, 4096), (3093, 4096), (129, 16384))
STRESS = ((61, False), (61, True), (7, False))  # rows of a sum, and whether its residual travels
WIDTH = 512
OCCUPIED_NS = 200_000


@triton.jit
def _occupy(ns):
    """Hold a block's threads for that long."""
    start = tl.extra.cuda.globaltimer()
    now = start
    while now - start < ns:
        now = tl.extra.cuda.globaltimer()


class Crowd:
    """Another stream's blocks, which fill the GPU but for 1024 threads: a sum's own blocks run a
    few at a time, so that this rank's rows come after the others'.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.blocks = 2 * torch.cuda.get_device_properties(device).multi_processor_count - 1

    def __call__(self) -> None:
        with torch.cuda.stream(self.stream):
            _occupy[(self.blocks,)](OCCUPIED_NS, num_warps=32)


def check_numbers(mesh: Mesh, _: int) -> list[str]:
    """No further from float64 than the two operations apart, and the same bits on every rank."""
    wrong = []
    for dtype in (BF16, torch.float16, torch.float32):
        for rows, columns in SHAPES:
            if columns * dtype.itemsize > 32768:
                continue
            name = f"numbers: {rows} x {columns}, {dtype}"
            memory = SumMemory(mesh, rows, columns, dtype, 10)
            parts, residual, weight = inputs(mesh.tp_size, rows, columns, dtype, str(mesh.device))
            exact, exact_normed = truth(parts, residual, weight)
            plain = residual.clone()
            total = mesh.all_reduce(parts[mesh.tp_rank].clone())
            plain_normed = ops.add_rms_norm(total, plain, weight, EPS)
            memory.part.copy_(parts[mesh.tp_rank])
            memory.residual.copy_(residual)
            memory.normed.fill_(torch.nan)
            normed = sum_add_rms_norm(memory.part, memory.residual, weight, EPS, memory, whole=True)
            bits = [digest(normed), digest(memory.residual)]
            if any(other != bits for other in mesh.gather_objects(bits)):
                wrong.append(f"{name}: ranks differ")
            slack = 1.02 if rows > 100 else 2  # few values: chance
            for what, mine, theirs, true in (
                ("residual", memory.residual, plain, exact),
                ("normed", normed, plain_normed, exact_normed),
            ):
                found, bound = error(mine, true), slack * error(theirs, true)
                if not found <= bound:
                    wrong.append(f"{name}: {what} {found:.2e}, apart {bound:.2e}")
                if mesh.rank == 0 and rows == 3093:
                    print(f"{name}, {what}: {found:.3e}; apart {error(theirs, true):.3e}")
            wrong += [text for text in [memory.failure()] if text]
            mesh.barrier()
    return wrong


class Stress:
    """Captured graphs of three sums whose numbers follow a counter on the device.

    They are whole and small, so that one rank's kernel over the exact total gives the bits that all
    must. Each graph delays this rank differently before and between its sums; which one is replayed
    is drawn per rank. The last rank's sums share its GPU with a `Crowd`. `before` is called ahead
    of every sum and captured with it.
    """

    def __init__(
        self, mesh: Mesh, memory: SumMemory, before: Callable[[], object] = lambda: None
    ) -> None:
        self.mesh, self.memory, self.before = mesh, memory, before
        self.delays = random.Random(mesh.rank)
        self.crowd = Crowd(mesh.device) if mesh.rank == mesh.world_size - 1 else lambda: None
        self.step = torch.zeros(1, device=mesh.device)
        self.wrong = torch.zeros(1, dtype=torch.int64, device=mesh.device)
        self.alone = Ranks(1, memory.part.shape[0], WIDTH, device=str(mesh.device)).memory[0]
        self.weight = torch.linspace(0.5, 1.5, WIDTH, device=mesh.device).to(BF16)
        count = torch.arange(memory.part.numel(), device=mesh.device)
        self.base = (count * 37 % 29).float().view(-1, WIDTH)
        self._warm()
        self.graphs = [self._capture() for _ in range(4)]

    def replay(self, times: int) -> int:
        """Wrong results among `times` replays."""
        for _ in range(times):
            self.crowd()
            self.delays.choice(self.graphs).replay()
            if self.delays.random() < 0.01:
                time.sleep(self.delays.random() * 2e-3)
        torch.cuda.synchronize()
        return int(self.wrong.item())

    def _numbers(self, rows: int, k: int, seed: int) -> torch.Tensor:
        values = (self.base[:rows] + self.step * 7 + k * 13 + seed * 5) % 29 - 14
        return values.to(BF16)

    def _sum(self, k: int, rows: int, whole: bool) -> None:
        memory, alone, ranks = self.memory, self.alone, self.mesh.tp_size
        parts = [self._numbers(rows, k, seed) for seed in range(ranks)]
        residual = self._numbers(rows, k, ranks)
        want_residual = residual.clone()
        alone.part[:rows].copy_(torch.stack(parts).float().sum(0))
        want = self._call(alone, want_residual)
        self._delay()
        memory.part[:rows].copy_(parts[self.mesh.tp_rank])
        held = memory.residual[:rows].copy_(residual)
        memory.normed[:rows].fill_(torch.nan)
        self._delay()
        self.before()
        normed = self._call(memory, held, whole)
        mine = slice(None) if whole else share(rows, ranks, self.mesh.tp_rank)
        self.wrong += (normed != want).any() | (held[mine] != want_residual[mine]).any()

    def _call(self, memory: SumMemory, residual: torch.Tensor, whole: bool = False) -> torch.Tensor:
        part = memory.part[: residual.shape[0]]
        return sum_add_rms_norm(part, residual, self.weight, EPS, memory, whole=whole)

    def _delay(self) -> None:
        if self.delays.random() < 0.5:
            torch.cuda._sleep(self.delays.randrange(CYCLES))

    def _all(self) -> None:
        for k, (rows, whole) in enumerate(STRESS):
            self._sum(k, rows, whole)
        self.step += 1

    def _warm(self) -> None:
        """Each kernel once before a capture; one sum is made."""
        self._numbers(1, 0, 0)
        self.alone.part.zero_(), self.memory.part.zero_()
        self._call(self.alone, self.alone.residual)
        self._call(self.memory, self.memory.residual)
        self.crowd()
        torch.cuda.synchronize()
        self.mesh.barrier()

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._all()
        return graph


def make_memory(mesh: Mesh, deadline: float) -> SumMemory:
    return SumMemory(mesh, 64, WIDTH, BF16, deadline)


def check_stress(mesh: Mesh, replays: int) -> list[str]:
    memory = make_memory(mesh, 30)
    stress = Stress(mesh, memory)
    mesh.barrier()
    start = time.monotonic()
    wrong = stress.replay(replays)
    seconds = time.monotonic() - start
    epoch, expected = int(memory.state[0]), len(STRESS) * replays + 1
    mesh.barrier()
    if mesh.rank == 0:
        print(f"{replays} replays, {epoch} sums, {wrong} wrong, {seconds:.1f} s", flush=True)
    problems = [f"stress: {wrong} wrong results"] if wrong else []
    problems += [f"stress: epoch {epoch}, expected {expected}"] if epoch != expected else []
    return problems + [text for text in [memory.failure()] if text]


def check_faults(mesh: Mesh, replays: int) -> list[str]:
    """Each planted fault must show on some rank, as a wrong result or as a failure."""
    unseen = []
    for plant in ("nobody waits for parts", "nobody waits for rows", "counter one behind"):
        memory = make_memory(mesh, 0.5)
        flags = memory.flags.view(torch.int32).flatten()[: 64 * mesh.tp_size]
        ready, stored = flags.view(2, mesh.tp_size, 32)
        ahead = {"nobody waits for parts": ready, "nobody waits for rows": stored}.get(plant)
        if ahead is None:
            stress = Stress(mesh, memory)
            if mesh.rank == mesh.world_size - 1:
                memory.state[:1] -= 1
        else:  # flags that say a rank has come, before it has
            stress = Stress(mesh, memory, before=lambda flags=ahead: flags.fill_(1 << 30))
        torch.cuda.synchronize()
        mesh.barrier()
        wrong = stress.replay(max(replays // 10, 500))
        said = mesh.gather_objects([wrong, memory.failure()])
        if not any(count or text for count, text in said):
            unseen.append(f"planted fault not seen: {plant}")
        if mesh.rank == 0:
            print(f"planted {plant}: {said}", flush=True)
        mesh.barrier()
    return unseen


def check_deadline(mesh: Mesh, _: int) -> list[str]:
    """The last rank stays away: the others end at the deadline, say so, and can start over."""
    memory, problems, last = make_memory(mesh, 0.3), [], mesh.world_size - 1
    weight = torch.ones(WIDTH, device=mesh.device, dtype=BF16)
    memory.part.fill_(1.0)
    memory.residual.zero_()
    torch.cuda.synchronize()
    mesh.barrier()
    start = time.monotonic()
    if mesh.rank != last:
        sum_add_rms_norm(memory.part, memory.residual, weight, EPS, memory)
    torch.cuda.synchronize()
    seconds, said = time.monotonic() - start, memory.failure()
    if mesh.rank != last:
        if not 0.3 <= seconds < 3 or said is None or f"rank {last}" not in said:
            problems.append(f"deadline: {seconds:.2f} s, {said!r}")
        if mesh.rank == 0:
            print(f"deadline: {said}, ended after {seconds:.2f} s", flush=True)
    elif said is not None:
        problems.append(f"deadline: blamed {said!r}")
    memory.reset()
    memory.residual.zero_()
    torch.cuda.synchronize()
    mesh.barrier()
    normed = sum_add_rms_norm(memory.part, memory.residual, weight, EPS, memory, whole=True)
    if not bool((normed == 1).all() & (memory.residual == mesh.world_size).all()):
        problems.append("after reset: a wrong sum")
    return problems + [text for text in [memory.failure()] if text]


CHECKS = (check_numbers, check_stress, check_faults, check_deadline)

if __name__ == "__main__":
    sys.exit(run("sum ranks", __doc__, CHECKS))
