"""The halo convolution's input: `_C` (CPU twin, and CUDA where there is a GPU) held to the torch
reference.

The exchange runs among ranks of this process here; tests/gpu_halo_ranks.py runs it among GPUs.
"""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from halo_cases import (
    BORDER,
    LAST,
    ODD,
    RIGHT_BOTTOM,
    Case,
    Guarded,
    Ranks,
    edge_bytes,
    errors,
    inputs,
    limit,
    result_shape,
    strip,
    strip_result,
)
from own_process import run_over_gpus

from cosmos3_fast import _C
from cosmos3_fast.kernels import reference_conv
from cosmos3_fast.ops import halo
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.parallel_edges import EdgeSlots

HAS_GPU = torch.cuda.is_available()
DEVICES = [
    "cpu",
    pytest.param(
        "cuda:0", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no GPU")]
    ),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = Case("small", (24, 3, 10, 7))
on_devices = pytest.mark.parametrize("device", DEVICES)


def short(value: object) -> str | None:
    return value.name if isinstance(value, Case) else str(value).removeprefix("torch.")


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", ODD, ids=short)
def test_matches_the_reference(case, dtype, device):
    given = inputs(case, dtype, device)
    guarded = Guarded(result_shape(case), dtype, device)
    out = halo.conv_input(**given, out=guarded.out)
    error, eager = errors(out, given)
    assert error <= limit(dtype, eager) and guarded.intact()
    if not case.bias and case.prologue != "norm_silu":
        assert torch.equal(out, reference_conv.conv_input(**given))


@on_devices
@pytest.mark.parametrize("axis", [3, 4])
@pytest.mark.parametrize("prologue", ["none", "norm_silu"])
@pytest.mark.parametrize("pad", [BORDER, RIGHT_BOTTOM, (1, 2, 2, 1)], ids=str)
def test_given_edges_fill_the_padding_bit_for_bit(axis, prologue, pad, device):
    case = Case("", (16, 2, 5, 6), prologue, 1, pad)
    given = inputs(case, torch.bfloat16, device)
    shape = list(result_shape(case))
    shape[2] -= case.history
    shape[3] -= pad[2] + pad[3]
    shape[4] -= pad[0] + pad[1]
    edges = {}
    for name, count in zip(("before", "after"), pad[2:] if axis == 3 else pad[:2], strict=True):
        shape[axis] = count
        edges[name] = torch.randn(shape, device=device).to(torch.bfloat16)  # not channels-last
    want = reference_conv.conv_input(**given, **edges, axis=axis)
    out = halo.conv_input(**given, **edges, axis=axis)
    error, eager = errors(out, given | {"axis": axis}, **edges)
    assert error <= 2 * eager
    outside = torch.ones_like(want, dtype=torch.bool)
    inner = outside[:, :, 1:, pad[2] : want.shape[3] - pad[3], pad[0] : want.shape[4] - pad[1]]
    inner.zero_()
    assert torch.equal(out[outside], want[outside])


@on_devices
def test_a_pixel_that_is_not_a_number_stays_one_and_alone(device):
    given = inputs(SMALL, torch.bfloat16, device)
    given["x"][0, 5, 1, 4, 3] = torch.nan
    bad = halo.conv_input(**given).isnan()
    assert bad[0, :, 3, 5, 4].all() and bad.sum() == SMALL.shape[0]


@on_devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=short)
def test_the_bias_is_added_with_one_rounding(dtype, device):
    """Every finite value of the type, and sums that fall between two of them."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = bits[bits.isfinite()][: 63 * 1000].view(1, -1, 1, 63, 1).contiguous(memory_format=LAST)
    bias = torch.randn(x.shape[1]) * torch.logspace(-7, 3, x.shape[1])
    out = halo.conv_input(x.to(device), prologue="none", bias=bias.to(device)).cpu()
    assert torch.equal(out, (x.float() + bias.view(-1, 1, 1, 1)).to(dtype))
    zero = torch.zeros_like(bias).to(device)
    assert torch.equal(halo.conv_input(x.to(device), prologue="none", bias=zero).cpu(), x)


@on_devices
@pytest.mark.parametrize("prologue", ["none", "norm_silu"])
@pytest.mark.parametrize("axis", [3, 4])
def test_edges_are_the_results_own_rows(prologue, axis, device):
    given = inputs(Case("", (16, 2, 5, 6), prologue, 0, (0, 0, 0, 0)), torch.bfloat16, device)
    whole = halo.conv_input(**given)
    del given["history"], given["pad"]
    first, last = halo.conv_edges(**given, axis=axis, before=1, after=3)
    assert torch.equal(first, whole.narrow(axis, 0, 1))
    assert torch.equal(last, whole.narrow(axis, whole.shape[axis] - 3, 3))
    assert halo.conv_edges(**given, axis=axis) == (None, None)


STRIPS = {2: [3, 2], 3: [1, 3, 1], 4: [2, 2, 1, 2], 8: [2, 1, 1, 1, 1, 1, 1, 1]}
EXCHANGES = (
    Case("residual", (24, 3, 0, 0)),
    Case("plain", (8, 2, 0, 0), "none", 0),
    Case("stride 2", (24, 3, 0, 0), "none", 0, RIGHT_BOTTOM),
    Case("scalar", (5, 2, 0, 0)),
    Case("two rows after", (16, 2, 0, 0), "none", 1, (1, 2, 1, 2)),
    Case("two rows before", (3, 2, 0, 0), "norm_silu", 0, (2, 1, 2, 1)),
    Case("stride 2 again", (16, 1, 0, 0), "none", 0, RIGHT_BOTTOM),
)


def sized(case: Case, axis: int, rows: int) -> Case:
    size = (rows, 6) if axis == 3 else (6, rows)
    return Case(case.name, (*case.shape[:2], *size), case.prologue, case.history, case.pad)


@on_devices
@pytest.mark.parametrize("axis", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("count", STRIPS)
def test_ranks_write_the_slices_of_one_rank(count, dtype, axis, device):
    """An odd number of exchanges, twice: both parities serve every case, one-sided ones too."""
    cases = [sized(case, axis, max(case.pad) * sum(STRIPS[count])) for case in EXCHANGES]
    ranks = Ranks(count, max(edge_bytes(case, axis, dtype) for case in cases), device=device)
    for seed, case in enumerate(cases * 2):
        sizes = [max(case.pad) * size for size in STRIPS[count]]
        given = inputs(case, dtype, device, seed)
        x = given.pop("x")
        whole = halo.conv_input(x, **given)
        order = list(range(count))
        random.Random(seed).shuffle(order)
        sent = {}
        for r in order:
            out = Guarded(strip_result(whole, sizes, r, axis, case).shape, dtype, device).out
            mine = strip(x, sizes, r, axis)
            sent[r] = halo.send_edges(mine, ranks.slots[r], **given, axis=axis, out=out)
        for r in reversed(order):
            halo.fill_edges(*sent[r], ranks.slots[r])
            assert torch.equal(sent[r][0], strip_result(whole, sizes, r, axis, case)), (
                case.name,
                r,
            )
    assert all(slots.failure() is None for slots in ranks.slots)


class Pair:
    """Two ranks that exchange pictures full of one number."""

    def __init__(self, device: str, deadline: float = 0.05) -> None:
        self.slots = Ranks(2, 8 * 2 * 4 * 3, deadline, device).slots
        self.device = device
        self.sent: list = [None, None]

    def send(self, rank: int, number: float) -> None:
        x = torch.full((1, 8, 2, 3, 3), float(number), device=self.device)
        out = torch.full((1, 8, 2, 5, 5), torch.nan, device=self.device)
        out = out.contiguous(memory_format=LAST)
        self.sent[rank] = halo.send_edges(
            x, self.slots[rank], prologue="none", pad=BORDER, axis=3, out=out
        )

    def receive(self, rank: int) -> float:
        """The number that the other rank is seen to have sent."""
        out, plan = self.sent[rank]
        halo.fill_edges(out, plan, self.slots[rank])
        seen = out[0, :, :, 4 if rank == 0 else 0, 1:4]
        return seen.unique().item()


@on_devices
def test_a_neighbour_one_exchange_ahead_harms_nothing(device):
    pair = Pair(device)
    pair.send(0, 1), pair.send(1, -1)
    assert pair.receive(0) == -1
    pair.send(0, 2)  # rank 1 has not yet read the 1
    assert pair.receive(1) == 1
    pair.send(1, -2)
    assert pair.receive(1) == 2 and pair.receive(0) == -2


@on_devices
def test_planted_fault_parity_fixed_by_the_host(device):
    """The same schedule with one parity: rank 1 reads what rank 0 sent an exchange later."""
    pair = Pair(device)
    pair.send(0, 1), pair.send(1, -1)
    assert pair.receive(0) == -1
    pair.slots[0].state[0] += 1
    pair.send(0, 2)
    assert pair.receive(1) == 2


@on_devices
def test_planted_fault_flag_before_its_edge(device):
    pair = Pair(device)
    flags = pair.slots[1].memory.tensor[-256:].view(torch.int32)
    flags[0] = 1
    pair.send(1, -1)
    assert pair.receive(1) == 0
    assert pair.slots[1].failure() is None


@on_devices
def test_planted_fault_counter_one_behind(device):
    pair = Pair(device)
    pair.slots[1].state[0] -= 1
    pair.send(0, 1), pair.send(1, -1)
    assert pair.receive(0) == 0
    said = pair.slots[0].failure()
    assert said == "rank 0: the edges of rank 1 did not come within 0.05 s (exchange 1)"


def test_planted_fault_halo_off():
    given = inputs(SMALL, torch.float32, "cpu")
    x, sizes = given.pop("x"), [6, 4]
    whole = halo.conv_input(x, **given)
    alone = Ranks(1, 4096).slots[0]
    out = halo.conv_input_exchange(strip(x, sizes, 0, 3), alone, **given)
    want = strip_result(whole, sizes, 0, 3, SMALL)
    assert torch.equal(out[:, :, :, :-1], want[:, :, :, :-1])
    assert not torch.equal(out, want)


@on_devices
def test_a_neighbour_that_never_comes_ends_the_wait_and_reset_starts_over(device):
    pair = Pair(device, deadline=0.2)
    pair.send(0, 1)
    start = time.monotonic()
    assert pair.receive(0) == 0  # the padding is zero, not what memory held
    assert 0.2 <= time.monotonic() - start < 2
    assert "rank 1" in pair.slots[0].failure() and pair.slots[1].failure() is None
    pair.send(0, 2)
    start = time.monotonic()
    pair.receive(0)  # nobody waits twice
    assert time.monotonic() - start < 0.2
    for slots in pair.slots:
        slots.reset()
    pair.send(0, 3), pair.send(1, -3)
    assert (pair.receive(0), pair.receive(1)) == (-3, 3)
    assert all(slots.failure() is None for slots in pair.slots)


@on_devices
def test_a_reset_forgets_the_exchanges_before_it(device):
    """An old flag must not pass for the first one after it."""
    pair = Pair(device, deadline=0.2)
    pair.send(0, 1), pair.send(1, -1)
    assert (pair.receive(0), pair.receive(1)) == (-1, 1)
    for slots in pair.slots:
        slots.reset()
    pair.send(0, 2)  # rank 1 sends nothing
    assert pair.receive(0) == 0
    assert "rank 1" in pair.slots[0].failure()


def test_ranks_in_threads_with_random_delays():
    sizes, exchanges = [2, 1, 2], 150
    case = sized(EXCHANGES[0], 3, sum(sizes))
    one_sided = sized(EXCHANGES[2], 3, sum(sizes))
    ranks, wrong = Ranks(3, edge_bytes(case, 3, torch.float32)), []
    pictures = []
    for seed in range(5):
        which = one_sided if seed in (1, 2) else case
        given = inputs(which, torch.float32, "cpu", seed)
        x = given.pop("x")
        pictures.append((which, x, given, halo.conv_input(x, **given)))

    def run(rank: int) -> None:
        delays = random.Random(rank)
        for i in range(exchanges):
            which, x, given, whole = pictures[i % len(pictures)]
            mine = strip(x, sizes, rank, 3)
            out, plan = halo.send_edges(mine, ranks.slots[rank], **given, axis=3)
            time.sleep(delays.choice((0, 0, 1e-3)) * delays.random())
            halo.fill_edges(out, plan, ranks.slots[rank])
            if not torch.equal(out, strip_result(whole, sizes, rank, 3, which)):
                wrong.append((rank, i))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and all(slots.failure() is None for slots in ranks.slots)


REFUSED = {
    "four dimensions": ({"x": torch.zeros(8, 1, 3, 3)}, r"x must be \[1, C, T, H, W\]"),
    "float64": ({"x": torch.zeros(1, 8, 1, 3, 3).double()}, "x must be float32, float16"),
    "unknown prologue": ({"prologue": "gelu"}, "prologue must be one of"),
    "axis 2": ({"axis": 2}, "axis must be 3"),
    "short gamma": ({"prologue": "norm_silu", "gamma": torch.ones(7)}, "gamma must hold 8"),
    "wrong edge": ({"before": torch.zeros(1, 8, 1, 2, 3)}, r"before must be .*\[1, 8, 1, 1, 3\]"),
    "wrong out": ({"out": torch.zeros(1, 8, 1, 5, 4)}, r"out must be .*\[1, 8, 1, 5, 5\]"),
}


@pytest.mark.parametrize("changed, message", REFUSED.values(), ids=REFUSED.keys())
def test_refuses(changed, message):
    given = {"x": torch.zeros(1, 8, 1, 3, 3), "prologue": "none", "pad": BORDER}
    with pytest.raises(ValueError, match=message):
        halo.conv_input(**(given | changed))


def test_the_extension_refuses_what_would_write_outside():
    slots = Ranks(2, 256).slots[0]
    x = torch.zeros(1, 8, 1, 3, 64)
    with pytest.raises(RuntimeError, match="an edge of 2048 bytes does not fit slots of 256"):
        halo.conv_input_exchange(x, slots, prologue="none", pad=BORDER)
    with pytest.raises(RuntimeError, match="a strip of 3 cannot give an edge of 4"):
        halo.conv_input_exchange(x[..., :1], slots, prologue="none", pad=(0, 0, 4, 0))
    with pytest.raises(RuntimeError, match="gamma goes with norm_silu"):
        halo.conv_input(x, prologue="norm_silu")
    with pytest.raises(RuntimeError, match="must not be empty"):
        halo.conv_input(x[..., :0], prologue="none")


def test_slots_need_memory_that_ranks_share():
    mesh = Mesh.single("cpu")
    assert EdgeSlots(mesh, 1000).neighbours == 0
    for among in (0, 2):
        with pytest.raises(ValueError, match=f"among must be 1 to 1, got {among}"):
            EdgeSlots(mesh, 1000, among=among)
    mesh.world_size = 2
    with pytest.raises(ValueError, match="cannot see each other's memory"):
        EdgeSlots(mesh, 1000)


def test_the_layout_is_the_extensions():
    for nbytes in (1, 256, 4096):
        slots = Ranks(1, nbytes).slots[0]
        assert slots.state.numel() * slots.state.element_size() == _C.HALO_STATE_BYTES
        memory = slots.memory.tensor
        assert memory.numel() == _C.halo_buffer_bytes(slots.slot_bytes)
        assert slots.slot_bytes >= nbytes


@pytest.mark.gpu2
def test_two_gpus_exchange():
    run_over_gpus(2, "gpu_halo_ranks.py")


@pytest.mark.gpu4
def test_four_gpus_exchange():
    run_over_gpus(4, "gpu_halo_ranks.py")
