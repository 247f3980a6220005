"""The parts of gpu_gemm.py: a product's tensors, its candidate algorithms, checks and times."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from cosmos3_fast import _C
from cosmos3_fast.ops import gemm

ROTATE_BYTES = 128 << 20  # weights rotate over more than this, past L2
GRAPH_US = 400.0  # a captured graph of calls lasts about this long, or one turn of the weights
COUNT = 256  # algorithms asked of the heuristic
SPLIT_K, REDUCTION = 2, 3  # attributes, CUBLASLT_ALGO_CONFIG_*
EXACT_REDUCTIONS = (0, 2)  # none, or in float32 through the workspace: no atomics, no bf16 sums
NAMES = ("id", "tile", "split_k", "reduction", "swizzle", "custom", "stages", "inner", "cluster")
# Values tried besides those that the heuristic shows: cluster shapes 1x1, 2x1, 4x1, 1x2, 2x2.
ALSO = {2: (1, 2, 3, 4), 4: (0, 1), 5: (0, 1, 2, 3), 8: (0, 2, 3, 4, 5, 6)}

Words = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A product x [m, k] weight [n, k]^T; `accumulate` adds it to a residual in place."""

    name: str
    m: int
    n: int
    k: int
    accumulate: bool

    @property
    def tflop(self) -> float:
        return 2e-12 * self.m * self.n * self.k


@dataclass
class Tensors:
    """A case's inputs; `start` is what a residual holds before the product, NaN where none is."""

    x: torch.Tensor
    weights: list[torch.Tensor]
    start: torch.Tensor
    out: torch.Tensor
    scratch: torch.Tensor
    problem: gemm.Problem

    @classmethod
    def of(cls, case: Case) -> Tensors:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

        copies = min(max(2, -(-ROTATE_BYTES // (2 * case.n * case.k))), 16)
        x = random(case.m, case.k)
        weights = [random(case.n, case.k).mul_(case.k**-0.5) for _ in range(copies)]
        start = (
            random(case.m, case.n) if case.accumulate else x.new_full((case.m, case.n), torch.nan)
        )
        scratch = torch.empty(gemm.WORKSPACE_BYTES, device="cuda", dtype=torch.uint8)
        problem = gemm.problem_of(x, weights[0], start)
        assert problem is not None
        return cls(x, weights, start, start.clone(), scratch, problem)


def attributes(words: Words) -> tuple[int, ...]:
    return tuple(_C.gemm_attributes(words))


def describe(words: Words) -> str:
    return " ".join(f"{n} {v}" for n, v in zip(NAMES, attributes(words), strict=True) if v)


def usable(problem: gemm.Problem, words: Words) -> bool:
    """Runs this problem, in the workspace, and adds up its parts in an order that is fixed."""
    values = attributes(words)
    if values[SPLIT_K] > 1 and values[REDUCTION] not in EXACT_REDUCTIONS:
        return False
    return 0 <= _C.gemm_workspace(problem, words) <= gemm.WORKSPACE_BYTES


def heuristic(problem: gemm.Problem) -> list[Words]:
    """cuBLASLt's own list, its first choice first; with a workspace and without one."""
    asked = (_C.gemm_candidates(problem, size, COUNT) for size in (gemm.WORKSPACE_BYTES, 0))
    found = dict.fromkeys(tuple(words) for words in itertools.chain.from_iterable(asked))
    return [words for words in found if usable(problem, words)]


def variations(problem: gemm.Problem, best: Iterable[Words], seen: Iterable[Words]) -> list[Words]:
    """`best` with one attribute changed to a value that another algorithm of `seen` has, or one of
    ALSO; without those seen.
    """
    seen = dict.fromkeys(seen)
    rows = [attributes(words) for words in seen]
    found: dict[Words, None] = {}
    for words, index in itertools.product(best, range(1, len(NAMES))):
        for value in sorted({row[index] for row in rows} | set(ALSO.get(index, ()))):
            varied = tuple(_C.gemm_vary(words, index, value))
            if index == SPLIT_K and value > 1:
                varied = tuple(_C.gemm_vary(varied, REDUCTION, EXACT_REDUCTIONS[1]))
            if varied not in seen and varied not in found and usable(problem, varied):
                found[varied] = None
    return list(found)


def call(case: Case, t: Tensors, words: Words | None, weight: torch.Tensor) -> None:
    """One product into t.out by an algorithm, or by torch (None)."""
    if words is not None:
        choice = gemm.Choice(t.problem, case.accumulate, words, t.scratch.numel())
        gemm.run(choice, t.x, weight, t.out, t.scratch)
    elif case.accumulate:
        t.out.addmm_(t.x, weight.t())
    else:
        torch.mm(t.x, weight.t(), out=t.out)


def errors(case: Case, t: Tensors, truth: torch.Tensor, words: Words | None) -> tuple[float, float]:
    """(largest, root of the sum of squares) of the error of one product."""
    t.out.copy_(t.start)
    call(case, t, words, t.weights[0])
    difference = torch.sub(t.out, truth)
    return tuple(torch.linalg.vector_norm(difference, p).item() for p in (torch.inf, 2))


def correct(case: Case, t: Tensors, found: list[Words]) -> tuple[list[Words], list[str]]:
    """Those whose errors against the float32 product are at most twice torch's; the others, why."""
    truth = t.x.float() @ t.weights[0].float().t()
    if case.accumulate:
        truth += t.start.float()
    bounds = [2 * error for error in errors(case, t, truth, None)]
    good, bad = [], []
    for words in found:
        try:
            seen = errors(case, t, truth, words)
        except RuntimeError as error:  # refused when run: no candidate, and said so
            bad.append(f"{describe(words)}: {error}")
            continue
        if all(error <= bound for error, bound in zip(seen, bounds, strict=True)):
            good.append(words)
        else:
            bad.append(f"{describe(words)}: errors {seen} exceed {bounds}")
    return good, bad


def repeats(case: Case, t: Tensors, words: Words, times: int = 20) -> bool:
    """Whether `times` runs give the bits of the first, other products between them."""
    first = None
    for _ in range(times):
        for weight in t.weights[1::-1]:
            t.out.copy_(t.start)
            call(case, t, words, weight)
        first = t.out.clone() if first is None else first
        if not torch.equal(t.out, first):
            return False
    return True


@functools.cache
def side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def captured(case: Case, t: Tensors, words: Words | None) -> tuple[Callable[[], None], int]:
    """A graph of calls over all weights, and how many calls. Not torch.cuda.graph, which collects
    garbage each time.
    """
    guess_us = case.tflop / 700 * 1e6
    turns = max(1, round(GRAPH_US / guess_us / len(t.weights)))
    graph, stream = torch.cuda.CUDAGraph(), side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(case, t, words, t.weights[0])
        graph.capture_begin()
        for weight in t.weights * turns:
            call(case, t, words, weight)
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, len(t.weights) * turns


def timed(
    case: Case, t: Tensors, variants: list[Words | None], rounds: int
) -> dict[Words | None, list[float]]:
    """Microseconds a call of every variant in each of `rounds`, all variants in turn in each."""
    graphs = {words: captured(case, t, words) for words in variants}
    events: dict[Words | None, list] = {words: [] for words in variants}
    t.out.copy_(t.start.nan_to_num(0))
    for _ in range(rounds + 1):
        for words, (replay, _) in graphs.items():
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            replay()
            pair[1].record()
            events[words].append(pair)
        torch.cuda.synchronize()
    return {
        words: [begin.elapsed_time(end) * 1e3 / graphs[words][1] for begin, end in pairs[1:]]
        for words, pairs in events.items()
    }


def fastest(times: dict[Words | None, list[float]], count: int) -> list[Words]:
    order = sorted(times, key=lambda words: statistics.median(times[words]))
    return [words for words in order if words is not None][:count]


@dataclass
class Result:
    case: Case
    tried: int
    bad: list[str]
    best: Words | None
    torch_us: float
    best_us: float
    gain: float  # median over rounds of torch's time over the best candidate's


def search(case: Case, *, vary: bool, rounds: int) -> Result:
    """Screen the heuristic's list and variations of its best, settle the fastest against torch."""
    t = Tensors.of(case)
    listed = heuristic(t.problem)
    seen, bad = dict.fromkeys(listed), []
    times: dict[Words | None, list[float]] = {}
    wave = listed
    for _ in range(3 if vary else 1):
        good, refused = correct(case, t, wave)
        bad += refused
        times |= timed(case, t, [*good], 3)
        wave = variations(t.problem, fastest(times, 3), seen)[:64]
        seen |= dict.fromkeys(wave)
    finals = timed(case, t, [None, *fastest(times, 5)], rounds)
    settle = functools.partial(repeats, case, t)
    stable = [words for words in fastest(finals, 5) if settle(words)]
    bad += [f"{describe(w)}: not bit-equal" for w in finals if w is not None and w not in stable]
    if not stable:
        us = statistics.median(finals[None])
        return Result(case, len(times), bad, None, us, us, 1.0)
    last = timed(case, t, [None, stable[0]], rounds)  # once more: the best of many flatters itself
    gain = statistics.median(a / b for a, b in zip(last[None], last[stable[0]], strict=True))
    us = [statistics.median(last[words]) for words in (None, stable[0])]
    return Result(case, len(times), bad, stable[0], *us, gain)
