"""The halo exchange among GPUs: `torchrun --nproc_per_node=2 tests/gpu_halo_ranks.py` (or 4, 8).

Bit equality with one rank, thousands of graph replays with random delays a rank and an odd number
of exchanges a graph, planted faults that must be seen, the deadline. Every rank prints what failed;
exit status 1 if anything did. bench/test_collectives.py takes the times.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from gpu_rank_scripts import CYCLES, run
from halo_cases import (
    BORDER,
    LAST,
    RIGHT_BOTTOM,
    Case,
    Guarded,
    edge_bytes,
    inputs,
    strip,
    strip_result,
)

from cosmos3_fast.ops import halo
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.parallel_edges import EdgeSlots

CASES = (
    Case("residual", (256, 5, 33, 40)),
    Case("plain", (512, 3, 33, 40), "none", 0),
    Case("stride 2", (160, 3, 66, 80), "none", 0, RIGHT_BOTTOM),
    Case("scalar", (12, 2, 33, 41)),
    Case("two rows", (64, 2, 33, 41), "none", 1, (1, 2, 2, 1)),
    Case("wide", (1024, 3, 35, 40)),
)
STRESS = (
    Case("residual", (24, 2, 0, 6)),
    Case("stride 2", (24, 2, 0, 6), "none", 0, RIGHT_BOTTOM),
    Case("plain", (8, 2, 0, 6), "none", 0),
)


def spread(size: int, count: int) -> list[int]:
    return [size // count + (rank < size % count) for rank in range(count)]


def check_slices(mesh: Mesh, _: int) -> list[str]:
    """What every rank writes equals, bit for bit, the slice of what one rank writes."""
    wrong = []
    for dtype in (torch.bfloat16, torch.float32):
        for axis in (3, 4):
            nbytes = max(edge_bytes(case, axis, dtype) for case in CASES)
            slots = EdgeSlots(mesh, nbytes, deadline=10)
            for seed, case in enumerate(CASES * 3):
                given = inputs(case, dtype, str(mesh.device), seed)
                x = given.pop("x")
                sizes = spread(case.shape[axis - 1], mesh.world_size)
                want = strip_result(halo.conv_input(x, **given), sizes, mesh.rank, axis, case)
                out = Guarded(want.shape, dtype, str(mesh.device)).out
                mine = strip(x, sizes, mesh.rank, axis)
                halo.conv_input_exchange(mine, slots, **given, axis=axis, out=out)
                if not torch.equal(out, want):
                    wrong.append(f"slices: {case.name}, {dtype}, axis {axis}, exchange {seed}")
            wrong += [text for text in [slots.failure()] if text]
            mesh.barrier()
    return wrong


class Stress:
    """Captured graphs of three exchanges whose pictures follow a counter on the device.

    `before_wait` and `after_wait` are called around every waiting kernel and captured with it. Each
    graph delays this rank differently between and inside its exchanges; which one is replayed is
    drawn per rank, and all ranks' n-th replays exchange the same pictures.
    """

    def __init__(
        self,
        mesh: Mesh,
        slots: EdgeSlots,
        *,
        graphs: int = 4,
        before_wait: Callable[[], object] = lambda: None,
        after_wait: Callable[[], object] = lambda: None,
    ) -> None:
        self.mesh, self.slots = mesh, slots
        self.before_wait, self.after_wait = before_wait, after_wait
        self.delays = random.Random(mesh.rank)
        self.sizes = [2 + (rank % 2) for rank in range(mesh.world_size)]
        self.cases = [replace(c, shape=(*c.shape[:2], sum(self.sizes), 6)) for c in STRESS]
        self.step = torch.zeros(1, device=mesh.device)
        self.wrong = torch.zeros(1, dtype=torch.int64, device=mesh.device)
        self.base = [self._base(case) for case in self.cases]
        self.gamma = torch.linspace(0.5, 1.5, 24, device=mesh.device)
        self._warm()
        self.graphs = [self._capture() for _ in range(graphs)]

    def replay(self, times: int) -> int:
        """Wrong results among `times` replays."""
        for _ in range(times):
            self.delays.choice(self.graphs).replay()
            if self.delays.random() < 0.01:
                time.sleep(self.delays.random() * 2e-3)
        torch.cuda.synchronize()
        return int(self.wrong.item())

    def _base(self, case: Case) -> torch.Tensor:
        channels, frames, height, width = case.shape
        count = torch.arange(channels * frames * height * width, device=self.mesh.device)
        return (count * 37 % 251).float().view(1, frames, height, width, channels).movedim(-1, 1)

    def _exchange(self, case: Case, base: torch.Tensor, k: int) -> None:
        whole = ((base + self.step * 7 + k * 13) % 251 - 125).to(torch.bfloat16)
        whole = whole.contiguous(memory_format=LAST)
        given = {"prologue": case.prologue, "history": case.history, "pad": case.pad}
        given["gamma"] = self.gamma if case.prologue == "norm_silu" else None
        want = strip_result(halo.conv_input(whole, **given), self.sizes, self.mesh.rank, 3, case)
        mine = strip(whole, self.sizes, self.mesh.rank, 3).contiguous(memory_format=LAST)
        out = torch.full(want.shape, torch.nan, dtype=want.dtype, device=want.device)
        out = out.contiguous(memory_format=LAST)
        self._delay()
        out, plan = halo.send_edges(mine, self.slots, **given, out=out)
        self._delay()
        self.before_wait()
        halo.fill_edges(out, plan, self.slots)
        self.after_wait()
        self.wrong += (out != want).any()

    def _delay(self) -> None:
        if self.delays.random() < 0.5:
            torch.cuda._sleep(self.delays.randrange(CYCLES))

    def _all(self) -> None:
        for k, (case, base) in enumerate(zip(self.cases, self.base, strict=True)):
            self._exchange(case, base, k)
        self.step += 1

    def _warm(self) -> None:
        """Each kernel once before a capture, without neighbours: nothing is exchanged."""
        for case, base in zip(self.cases, self.base, strict=True):
            gamma = self.gamma if case.prologue == "norm_silu" else None
            x = base.to(torch.bfloat16)
            halo.conv_input(x, prologue=case.prologue, gamma=gamma, pad=case.pad)
        given = inputs(CASES[0], torch.bfloat16, str(self.mesh.device))
        halo.conv_input_exchange(slots=self.slots, **given)
        torch.cuda.synchronize()
        self.mesh.barrier()

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._all()
        return graph


def make_slots(mesh: Mesh, deadline: float, among: int | None = None) -> EdgeSlots:
    nbytes = edge_bytes(CASES[0], 3, torch.bfloat16)
    return EdgeSlots(mesh, nbytes, deadline=deadline, among=among)


def check_stress(mesh: Mesh, replays: int) -> list[str]:
    slots = make_slots(mesh, 30)
    stress = Stress(mesh, slots)
    mesh.barrier()
    start = time.monotonic()
    wrong = stress.replay(replays)
    seconds = time.monotonic() - start
    epoch = int(slots.state[0])
    mesh.barrier()
    if mesh.rank == 0:
        print(f"{replays} replays, {epoch} exchanges, {wrong} wrong, {seconds:.1f} s", flush=True)
    expected = 3 * replays + 1
    problems = [f"stress: {wrong} wrong results"] if wrong else []
    problems += [f"stress: epoch {epoch}, expected {expected}"] if epoch != expected else []
    return problems + [text for text in [slots.failure()] if text]


def check_faults(mesh: Mesh, replays: int) -> list[str]:
    """Each planted fault must show on some rank, as a wrong result or as a failure."""
    plants = ("halo off", "one parity", "edge late", "counter one behind")
    unseen = []
    for plant in plants:
        slots = make_slots(mesh, 0.5, among=1 if plant == "halo off" else None)
        hooks = {}
        if plant == "one parity":  # every epoch odd
            hooks["after_wait"] = lambda state=slots.state: state[:1].add_(1)
        if plant == "edge late":  # flags that say the edges have come, before they have
            flags = slots.memory.tensor[-256:].view(torch.int32)
            hooks["before_wait"] = lambda flags=flags: flags.fill_(1 << 30)
        stress = Stress(mesh, slots, **hooks)
        if plant == "counter one behind" and mesh.rank == mesh.world_size - 1:
            slots.state[:1] -= 1
        torch.cuda.synchronize()
        mesh.barrier()
        wrong = stress.replay(max(replays // 10, 500))
        seen = bool(wrong) or slots.failure() is not None
        said = mesh.gather_objects([wrong, slots.failure()])
        if not any(mesh.gather_objects(seen)):
            unseen.append(f"planted fault not seen: {plant}")
        if mesh.rank == 0:
            print(f"planted {plant}: {said}", flush=True)
        mesh.barrier()
    return unseen


def check_deadline(mesh: Mesh, _: int) -> list[str]:
    """The last rank stays away: its neighbour ends at the deadline, says so, and can start over."""
    slots, problems = make_slots(mesh, 0.3), []
    x = torch.full((1, 8, 1, 4, 8), mesh.rank + 1.0, device=mesh.device, dtype=torch.bfloat16)
    last, given = mesh.world_size - 1, {"prologue": "none", "pad": BORDER, "axis": 3}
    start = time.monotonic()
    if mesh.rank != last:
        halo.conv_input_exchange(x, slots, **given)
    torch.cuda.synchronize()
    seconds, said = time.monotonic() - start, slots.failure()
    if mesh.rank == last - 1:
        if not 0.3 <= seconds < 3 or said is None or f"rank {last}" not in said:
            problems.append(f"deadline: {seconds:.2f} s, {said!r}")
        print(f"deadline: {said}, ended after {seconds:.2f} s", flush=True)
    elif said is not None:
        problems.append(f"deadline: blamed {said!r}")
    slots.reset()
    out = halo.conv_input_exchange(x, slots, **given)
    for rank, row in ((mesh.rank - 1, 0), (mesh.rank + 1, 5)):
        want = rank + 1 if 0 <= rank <= last else 0
        if not bool((out[0, :, 0, row, 1:-1] == want).all()):
            problems.append(f"after reset: row {row} is not {want}")
    return problems + [text for text in [slots.failure()] if text]


CHECKS = (check_slices, check_stress, check_faults, check_deadline)

if __name__ == "__main__":
    sys.exit(run("halo ranks", __doc__, CHECKS))
