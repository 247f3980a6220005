"""The fused sum over ranks, residual and norm: its numbers, its protocol, what it refuses.

Ranks are threads of this process here (streams on a GPU); tests/gpu_sum_ranks.py runs them on GPUs
of their own.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest
import torch
from own_process import run_over_gpus
from ranks import run_cases
from sum_cases import EPS, Ranks, apart, error, inputs, share, truth

from cosmos3_fast import _C, ops, parallel_sum
from cosmos3_fast.config import ParallelConfig
from cosmos3_fast.ops.sum_norm import sum_add_rms_norm
from cosmos3_fast.parallel import TWO_SHOT_BYTES, Mesh, Symmetric
from cosmos3_fast.parallel_sum import RowSums, SumMemory

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHAPES = [(1, 8), (3, 64), (63, 1000), (10, 4096)]
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def together(count: int, work: Callable[[int], object], device: str = "cpu") -> None:
    """work(rank) of all ranks at once: threads, each on a stream of its own on a GPU."""
    failed: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            if device == "cpu":
                work(rank)
                return
            with torch.cuda.stream(torch.cuda.Stream()):
                work(rank)
                torch.cuda.current_stream().synchronize()
        except BaseException as caught:
            failed.append(caught)

    if device != "cpu":
        torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


def summed(
    ranks: Ranks,
    parts: list[torch.Tensor],
    residual: torch.Tensor,
    weight: torch.Tensor,
    whole: bool = False,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Every rank's residual and normed rows after one sum."""
    rows = residual.shape[0]
    held = [m.residual[:rows].copy_(residual) for m in ranks.memory]
    for memory, part in zip(ranks.memory, parts, strict=True):
        memory.part[:rows].copy_(part)

    def work(rank: int) -> None:
        memory = ranks.memory[rank]
        sum_add_rms_norm(memory.part[:rows], held[rank], weight, EPS, memory, whole=whole)

    together(ranks.count, work, ranks.device)
    assert [m.failure() for m in ranks.memory] == [None] * ranks.count
    return held, [m.normed[:rows] for m in ranks.memory]


@on_devices
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_it_is_the_sum_the_residual_and_the_norm(device, name, count, rows, columns):
    """Within twice the error of the reference, which rounds once more; gpu_sum_ranks.py holds large
    sums to its error itself.
    """
    ranks = Ranks(count, rows + 2, columns, DTYPES[name], device=device)
    parts, residual, weight = inputs(count, rows, columns, DTYPES[name], device)
    exact, exact_normed = truth(parts, residual, weight)
    plain, plain_normed = apart(parts, residual, weight)
    held, normed = summed(ranks, parts, residual, weight)
    together = torch.cat([held[r][share(rows, count, r)] for r in ranks.ranks])
    assert error(together, exact) <= 2 * error(plain, exact) + 1e-7
    for rank in ranks.ranks:
        assert torch.equal(normed[rank], normed[0])
        for other in set(ranks.ranks) - {rank}:  # a rank's rows stay with it
            rest = share(rows, count, other)
            assert torch.equal(held[rank][rest], residual[rest])
        assert ranks.memory[rank].normed[rows:].isnan().all()  # nothing is written behind
    assert error(normed[0], exact_normed) <= 2 * error(plain_normed, exact_normed)


@on_devices
@pytest.mark.parametrize("count", [2, 4])
def test_whole_completes_the_residual_on_every_rank(device, count):
    ranks = Ranks(count, 16, 64, device=device)
    parts, residual, weight = inputs(count, 13, 64, torch.bfloat16, device)
    alone, _ = summed(ranks, parts, residual, weight)
    want = torch.cat([alone[r][share(13, count, r)] for r in ranks.ranks]).clone()
    held, _ = summed(ranks, parts, residual, weight, whole=True)
    assert all(torch.equal(x, want) for x in held)


def test_a_norm_of_known_values():
    """Two ranks, a row of ones each on a residual of ones: 3 / sqrt(9) times the weight."""
    ranks = Ranks(2, 1, 8, torch.float32)
    ones, weight = torch.ones(1, 8), torch.arange(8.0)
    held, normed = summed(ranks, [ones, ones], ones, weight)
    assert held[1].unique().item() == 3 and held[0].unique().item() == 1  # rank 1 owns the row
    assert error(normed[0], weight.double()[None]) <= 1e-6


def test_the_sum_rounds_once():
    """1 + 2^-8 + 2^-8 is a bfloat16 number; rounded before the residual is added, 1 + 2^-8 is 1 and
    stays it.
    """
    ranks, ones = Ranks(2, 2, 8), torch.ones(2, 8).bfloat16()
    parts, residual, weight = [ones, ones * 2**-8], ones * 2**-8, torch.ones(8).bfloat16()
    held, _ = summed(ranks, parts, residual, weight)
    assert held[0][0].unique().item() == 1 + 2**-7
    assert apart(parts, residual, weight)[0].unique().item() == 1


@on_devices
def test_ranks_with_random_delays(device):
    """Sums of rotating inputs, each rank late at will; a result that is overtaken would be seen."""
    count, rows, columns, sums = 3, 7, 64, 120
    ranks, wrong = Ranks(count, 8, columns, device=device, deadline=20), []
    cases = [inputs(count, rows, columns, torch.bfloat16, device, seed) for seed in range(5)]
    want = []
    for parts, residual, weight in cases:
        _, normed = summed(ranks, parts, residual, weight)
        want.append(normed[0].clone())

    def run(rank: int) -> None:
        delays, memory = random.Random(rank), ranks.memory[rank]
        for i in range(sums):
            parts, residual, weight = cases[i % len(cases)]
            memory.part[:rows].copy_(parts[rank])
            held = residual.clone()
            time.sleep(delays.choice((0, 0, 1e-3)) * delays.random())
            normed = sum_add_rms_norm(memory.part[:rows], held, weight, EPS, memory)
            if not torch.equal(normed, want[i % len(cases)]):
                wrong.append((rank, i))

    together(count, run, device)
    assert not wrong and all(m.failure() is None for m in ranks.memory)


@on_devices
@pytest.mark.parametrize("phase", ["ready", "stored"])
def test_planted_fault_a_flag_before_its_time(device, phase):
    """A flag that says a peer has come, before it has: its part, or its rows, are missing."""
    ranks = Ranks(2, 4, 64, device=device)
    parts, residual, weight = inputs(2, 4, 64, torch.bfloat16, device)
    memory, late = ranks.memory
    memory.part.copy_(parts[0]), late.part.zero_()
    flags = memory.flags.view(torch.int32).flatten()[:128].view(2, 2, 32)
    flags[0 if phase == "ready" else 1, 1, 0] = 1
    if phase == "ready":
        flags[1, 1, 0] = 1  # nor does it wait for the peer to finish
    else:
        flags[0, 1, 0] = 1
        late.part.copy_(parts[1])
    held = residual.clone()
    normed = sum_add_rms_norm(memory.part, held, weight, EPS, memory)
    assert memory.failure() is None
    _, want = truth(parts, residual, weight)
    mine = error(normed[:2], want[:2])
    assert mine > 0.1 if phase == "ready" else mine < 0.01
    assert normed[2:].isnan().all()  # the peer's rows


@on_devices
def test_a_rank_that_never_comes_ends_the_wait_and_reset_starts_over(device):
    ranks = Ranks(2, 4, 64, device=device, deadline=0.2)
    parts, residual, weight = inputs(2, 4, 64, torch.bfloat16, device)
    memory = ranks.memory[0]

    def alone() -> float:
        start = time.monotonic()
        sum_add_rms_norm(memory.part, residual.clone(), weight, EPS, memory)
        said = memory.failure()
        assert said == "rank 0: the products of rank 1 did not come within 0.2 s (sum 1)"
        return time.monotonic() - start

    assert 0.2 <= alone() < 2
    assert memory.normed.isnan().all()
    assert alone() < 0.2  # nobody waits twice
    assert ranks.memory[1].failure() is None
    # The late rank finds the flag of the first sum, and no end of it: it ends with an error too.
    other = ranks.memory[1]
    sum_add_rms_norm(other.part, residual.clone(), weight, EPS, other)
    assert "rank 1: the products of rank 0" in other.failure()
    for held in ranks.memory:
        held.reset()
    _, normed = summed(ranks, parts, residual, weight)
    assert error(normed[1], truth(parts, residual, weight)[1]) < 0.01


def test_a_late_rank_has_its_number_in_the_launch():
    memory = Ranks(2, 4, 64).memory[0]
    memory.mesh.rank = 2  # of the second guidance branch
    memory.state[2] = 0b10  # csrc/sum.h: State
    assert memory.failure().startswith("rank 2: the products of rank 3 did not come")


REFUSED = {
    "another part": (lambda m, x: {"part": x}, r"part torch.bfloat16 \[4, 64\] is not the ranks'"),
    "another residual": (lambda m, x: {"whole": True, "residual": x}, "residual .* is not the"),
    "short residual": (lambda m, x: {"residual": x[:3]}, r"must be torch.bfloat16 \[4, 64\]"),
    "wide weight": (lambda m, x: {"weight": x[0].float()}, "and torch.float32 "),
    "strided weight": (lambda m, x: {"weight": x.T.reshape(-1)[:128:2]}, "must be contiguous"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses(changed, message):
    memory = Ranks(1, 4, 64).memory[0]
    x = torch.ones(4, 64, dtype=torch.bfloat16)
    given = {"part": memory.part, "residual": memory.residual, "weight": x[0], "eps": EPS}
    with pytest.raises(ValueError, match=message):
        sum_add_rms_norm(**(given | changed(memory, x)), memory=memory)


def test_the_extension_refuses_what_would_write_outside():
    memory = Ranks(1, 4, 64).memory[0]
    given = {
        "residual": memory.residual.data_ptr(),
        "weight": memory.residual.data_ptr(),
        "eps": EPS,
        "dtype": 2,
        "rows": 4,
        "columns": 64,
        "device": -1,
    } | memory.arguments(False)
    _C.sum_norm(**given)
    peers = given["peers"]
    for changed, message in (
        ({"columns": 60}, "must be a multiple of 16"),
        ({"columns": 16392}, "at most 32768"),
        ({"rows": 0}, "0 rows"),
        ({"rank": 1}, "rank 1 of 1 ranks"),
        ({"peers": peers * 9}, "at most 8 ranks, got 9"),
        ({"peers": [0]}, "memory of rank 0 must be aligned"),
        ({"normed": 8}, "multiples of 16"),
        ({"residual_at": 8}, "multiples of 16"),
        ({"weight": 0}, "must not be null"),
        ({"residual": given["residual"] + 2}, "aligned to 16"),
        ({"dtype": 3}, "dtype must be 0, 1 or 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            _C.sum_norm(**(given | changed))


def test_the_layout_is_the_extensions():
    state = Ranks(2, 4, 64).memory[0].state
    assert state.numel() * state.element_size() == _C.SUM_STATE_BYTES
    for count, columns in ((1, 8), (2, 64), (8, 4096)):
        flags = Ranks(count, 4, columns).memory[0].flags
        assert flags.numel() * flags.element_size() >= _C.sum_flag_bytes(count)


def case_apart() -> dict[str, object]:
    got: dict[str, object] = {}
    for cfg, tp in ((1, 4), (2, 2)):
        mesh = Mesh.create(ParallelConfig(4, cfg, tp), "cpu")
        sums = RowSums(mesh)
        parts, residual, weight = inputs(tp, 63, 40, torch.float32)
        part = sums.part(63, 40, torch.float32).copy_(parts[mesh.tp_rank])
        held = sums.residual(63, 40, torch.float32).copy_(residual)
        got[f"normed {tp}"] = ops.sum_add_rms_norm(part, held, weight, EPS, sums, whole=True)
        got[f"residual {tp}"] = held
        assert sums.failure() is None
        mesh.close()
    return got


def test_ranks_that_share_no_memory_reduce_and_add():
    results = run_cases(4, [case_apart])["case_apart"]
    for rank, got in enumerate(results):
        for tp in (2, 4):
            parts, residual, weight = inputs(tp, 63, 40, torch.float32)
            want, normed = truth(parts, residual, weight)
            assert error(got[f"residual {tp}"], want) <= 1e-6, rank
            assert error(got[f"normed {tp}"], normed) <= 1e-6, rank
            assert torch.equal(got[f"normed {tp}"], results[0][f"normed {tp}"])


def test_the_choice_follows_from_sizes_and_the_mesh(monkeypatch):
    """A mesh of a GPU that is never touched: what fits, and up to which size it is wanted."""
    monkeypatch.setattr(parallel_sum, "FUSED_BYTES", {2: 1 << 20})
    made = []
    monkeypatch.setattr(parallel_sum, "SumMemory", lambda *given: made.append(given) or given)

    def fused(rows, columns, dtype=torch.bfloat16, collective="auto", size=2):
        mesh = Mesh(torch.device("cuda", 0), tp_size=size, collective=collective)
        return RowSums(mesh).fused(rows, columns, dtype) is not None

    assert fused(128, 4096) and not fused(129, 4096)
    assert not fused(128, 4096, collective="nccl")
    assert fused(4096, 4096, collective="symmetric")
    assert not fused(8, 4096, size=4) and fused(8, 4096, size=4, collective="symmetric")
    assert not fused(8, 4095) and not fused(8, 64, torch.float64)
    assert fused(1, 16384) and not fused(1, 16392)
    assert not fused(8, 4096, size=1, collective="symmetric")
    assert [given[1] for given in made] == [128, 4096, 8, 1]


def test_a_two_shot_sum_stays_on_its_axis_and_within_its_table():
    limit, x = TWO_SHOT_BYTES[2], torch.zeros(4)
    mesh = Mesh(torch.device("cuda", 0), cfg_size=2, tp_size=2)
    assert mesh.two_shot(limit) and not mesh.two_shot(limit + 1)
    mesh._registered[x.untyped_storage().data_ptr()] = Symmetric(x, (0, 0), "tp")
    assert mesh._two_shot(x, "tp") and not mesh._two_shot(x, "cfg")
    branches = Mesh(torch.device("cuda", 0), cfg_size=2, collective="symmetric")
    assert branches.peers("cfg") and not branches.peers("tp")


def test_a_part_of_each_dtype_has_memory_of_its_own(monkeypatch):
    mesh = Mesh(torch.device("cuda", 0), tp_size=2)
    monkeypatch.setattr(parallel_sum, "FUSED_BYTES", {})
    monkeypatch.setattr(
        mesh,
        "symmetric",
        lambda shape, dtype, axis: Symmetric(torch.zeros(shape, dtype=dtype), (), axis),
    )
    sums, kinds = RowSums(mesh), (torch.float32, torch.bfloat16)
    assert [sums.part(3, 64, dtype).dtype for dtype in kinds] == [*kinds]
    assert sums.part(3, 64, torch.float32).data_ptr() == sums.part(4, 64, torch.float32).data_ptr()


def test_the_log_names_what_sums_over_ranks(monkeypatch):
    monkeypatch.setattr(ops, "peer_kernels", lambda device: device.type == "cuda")
    monkeypatch.setattr(parallel_sum, "FUSED_BYTES", {4: 1 << 20})

    def row(size, device="cuda:0", collective="auto"):
        mesh = Mesh(torch.device(device), tp_size=size, collective=collective)
        return ops.backends(mesh.device, RowSums(mesh)).get("sum_add_rms_norm")

    apart = "all-reduce, then add_rms_norm"
    assert [row(1), row(2), row(4)] == [None, apart, "_C"]
    assert (
        row(4, "cpu") == row(4, collective="nccl") == apart
        and row(2, collective="symmetric") == "_C"
    )
    gpu, cpu = (ops.backends(torch.device(kind))["gate_up_silu"] for kind in ("cuda", "cpu"))
    assert (gpu, cpu) == ("triton, or torch.mm with silu_mul, by its table", "torch reference")


def test_only_a_fused_sum_has_memory_for_all_three(monkeypatch):
    """A limit between two row counts of one capacity; NCCL's sums take no memory that is kept."""
    mesh, made = Mesh(torch.device("cpu"), tp_size=2), []

    def symmetric(shape, dtype, axis):
        made.append(shape[0] // 64 * 64)  # without the rows of flags
        return Symmetric(torch.zeros(shape, dtype=dtype), (0, 0), axis)

    class Read(SumMemory):
        def failure(self):
            return f"read {self.part.shape[0]}"

    monkeypatch.setattr(mesh, "symmetric", symmetric)
    monkeypatch.setattr(RowSums, "_peers", True)
    monkeypatch.setattr(mesh, "two_shot", lambda nbytes, axis="tp": nbytes <= 128 * 8192)
    monkeypatch.setattr(parallel_sum, "FUSED_BYTES", {2: 100 * 8192})
    monkeypatch.setattr(parallel_sum, "SumMemory", Read)
    sums, wide = RowSums(mesh), (4096, torch.bfloat16)
    for rows in (129, 101, 128, 4096):
        assert sums.fused(rows, *wide) is None
        assert sums.part(rows, *wide).shape == sums.residual(rows, *wide).shape == (rows, 4096)
    assert made == [128] and sums.failure() is None
    part, residual, memory = sums.part(100, *wide), sums.residual(70, *wide), sums.fused(65, *wide)
    assert made == [128, 3 * 128] and sums.failure() == "read 128"
    assert part.data_ptr() == memory.part.data_ptr() != sums.part(101, *wide).data_ptr()
    assert residual.data_ptr() == memory.residual.data_ptr()


@pytest.mark.gpu2
def test_two_gpus_sum():
    run_over_gpus(2, "gpu_sum_ranks.py")


@pytest.mark.gpu4
def test_four_gpus_sum():
    run_over_gpus(4, "gpu_sum_ranks.py")
