"""Mesh: groups, collectives and edges over CPU ranks, against sums and stacks made in one
process.
"""

from __future__ import annotations

import os
import socket
import time

import pytest
import torch
from ranks import Launch, argument, run_cases

from cosmos3_fast.config import ParallelConfig
from cosmos3_fast.parallel import Mesh

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _mesh(cfg: int, tp: int, timeout: float = 30.0) -> Mesh:
    return Mesh.create(ParallelConfig(cfg * tp, cfg, tp), "cpu", timeout=timeout)


def _values(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def _collectives(cfg: int, tp: int) -> dict[str, object]:
    mesh = _mesh(cfg, tp)
    got: dict[str, object] = {"place": [mesh.rank, mesh.cfg_rank, mesh.tp_rank]}
    for name, dtype in DTYPES.items():
        for axis in ("tp", "cfg", "world"):
            x = _values(mesh.rank, (63, 5), dtype)
            got[f"reduce {axis} {name}"] = mesh.all_reduce(x.clone(), axis)
            got[f"gather {axis} {name}"] = mesh.all_gather(x.T, axis)
            out = x.new_full((mesh.size(axis), 63, 5), float("nan"))
            assert mesh.all_gather(x, axis, out=out).data_ptr() == out.data_ptr()
            got[f"gather out {axis} {name}"] = out
    objects = [mesh.gather_objects({"rank": mesh.rank, "round": n}) for n in range(3)]
    got["objects"] = objects
    assert mesh.channel is not None
    keys = [mesh.channel._key(mesh.rank, back) for back in (-3, -2, -1)]
    got["kept"] = [mesh.channel.store.check([key]) for key in keys]
    if mesh.rank == 3:
        time.sleep(0.2)
        mesh.channel.store.set("late", "")
    mesh.barrier()
    got["waited"] = mesh.channel.store.check(["late"])
    mesh.close()
    return got


def case_2x2() -> dict[str, object]:
    return _collectives(2, 2)


def case_1x4() -> dict[str, object]:
    return _collectives(1, 4)


def case_edges() -> dict[str, object]:
    mesh = _mesh(1, 4)
    got: dict[str, object] = {}
    for name, dtype in DTYPES.items():
        activation = _strip(mesh.rank, dtype)
        before, after = mesh.exchange_edges(activation[..., :2, :], activation[..., -1:, :])
        got |= {f"{name} before": before, f"{name} after": after}
        before, after = mesh.exchange_edges(None, activation[..., -1:, :])
        got |= {f"{name} one way": before, f"{name} one way after": after}
        before, after = mesh.exchange_edges(activation[..., :1], activation[..., -1:], among=3)
        got |= {f"{name} among before": before, f"{name} among after": after}
    mesh.close()
    return got


def case_group_of_the_caller() -> dict[str, object]:
    """A process group that exists is used and survives `close`."""
    torch.distributed.init_process_group("gloo")
    meshes = [_mesh(2, 2), _mesh(1, 4)]
    sums = [mesh.all_reduce(torch.ones(1)).item() for mesh in meshes]
    for mesh in meshes:
        mesh.close()
    alive = torch.distributed.is_initialized()
    torch.distributed.destroy_process_group()
    return {"sums": sums, "alive": alive}


def _strip(rank: int, dtype: torch.dtype) -> torch.Tensor:
    """A channels-last strip on odd ranks, contiguous on even ones."""
    x = _values(rank, (1, 3, 2, 5, 7), dtype)
    return x.contiguous(memory_format=torch.channels_last_3d) if rank % 2 else x


CASES = [case_2x2, case_1x4, case_edges, case_group_of_the_caller]


@pytest.fixture(scope="module")
def four() -> dict[str, list[dict[str, object]]]:
    return run_cases(4, CASES)


def _axis_ranks(rank: int, axis: str, tp: int) -> list[int]:
    grid = torch.arange(4).view(-1, tp)
    cfg_rank, tp_rank = divmod(rank, tp)
    return {
        "tp": grid[cfg_rank].tolist(),
        "cfg": grid[:, tp_rank].tolist(),
        "world": list(range(4)),
    }[axis]


@pytest.mark.parametrize("axis", ["tp", "cfg", "world"])
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(("case", "tp"), [("case_2x2", 2), ("case_1x4", 4)])
def test_collectives(four, case, tp, name, axis) -> None:
    for rank, got in enumerate(four[case]):
        assert got["place"] == [rank, *divmod(rank, tp)]
        ranks = _axis_ranks(rank, axis, tp)
        each = [_values(r, (63, 5), DTYPES[name]) for r in ranks]
        torch.testing.assert_close(
            got[f"reduce {axis} {name}"].double(),
            torch.stack(each).double().sum(0),
            rtol=1e-6 if name == "fp32" else 2e-2,
            atol=1e-6 if name == "fp32" else 2e-2,
        )
        first = four[case][ranks[0]]
        assert torch.equal(got[f"reduce {axis} {name}"], first[f"reduce {axis} {name}"])
        assert torch.equal(got[f"gather out {axis} {name}"], torch.stack(each))
        assert torch.equal(got[f"gather {axis} {name}"], torch.stack([x.T for x in each]))


@pytest.mark.parametrize("case", ["case_2x2", "case_1x4"])
def test_objects_come_in_world_order(four, case) -> None:
    for got in four[case]:
        assert got["objects"] == [[{"rank": r, "round": n} for r in range(4)] for n in range(3)]


@pytest.mark.parametrize("case", ["case_2x2", "case_1x4"])
def test_the_store_keeps_the_last_round_alone(four, case) -> None:
    assert [got["kept"] for got in four[case]] == [[False, False, True]] * 4


@pytest.mark.parametrize("case", ["case_2x2", "case_1x4"])
def test_a_barrier_waits_for_the_last_rank(four, case) -> None:
    assert [got["waited"] for got in four[case]] == [True] * 4


@pytest.mark.parametrize("name", DTYPES)
def test_edges_are_the_neighbours_bits(four, name) -> None:
    strips = [_strip(rank, DTYPES[name]) for rank in range(4)]
    for rank, got in enumerate(four["case_edges"]):
        _same(got.get(f"{name} before"), strips[rank - 1][..., -1:, :] if rank > 0 else None)
        _same(got.get(f"{name} after"), strips[rank + 1][..., :2, :] if rank < 3 else None)
        _same(got.get(f"{name} one way"), strips[rank - 1][..., -1:, :] if rank > 0 else None)
        assert got.get(f"{name} one way after") is None
        inside = 0 < rank < 3
        _same(got.get(f"{name} among before"), strips[rank - 1][..., -1:] if inside else None)
        _same(got.get(f"{name} among after"), strips[rank + 1][..., :1] if rank < 2 else None)


def _same(got: object, want: torch.Tensor | None) -> None:
    if want is None:
        assert got is None
    else:
        assert isinstance(got, torch.Tensor) and got.dtype == want.dtype and torch.equal(got, want)


def test_a_group_of_the_caller_is_used_and_kept(four) -> None:
    for got in four["case_group_of_the_caller"]:
        assert got == {"sums": [2.0, 4.0], "alive": True}


def test_one_rank_is_the_identity() -> None:
    mesh = Mesh.create(ParallelConfig(1, 1, 1), "cpu")
    x = _values(0, (63, 5), torch.float32)
    for axis in ("tp", "cfg", "world"):
        assert mesh.all_reduce(x, axis) is x
        assert torch.equal(mesh.all_gather(x, axis), x[None])
        out = torch.empty(1, 63, 5)
        assert torch.equal(mesh.all_gather(x, axis, out=out), x[None])
    assert mesh.exchange_edges(x, x) == (None, None)
    assert mesh.gather_objects({"a": 1}) == [{"a": 1}]
    memory = mesh.symmetric((4, 3), torch.bfloat16)
    assert memory.pointers == (memory.tensor.data_ptr(),)
    mesh.barrier()
    mesh.close()


def test_an_unknown_collective_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'auto', 'symmetric', 'nccl'.*'ring'"):
        Mesh(torch.device("cpu"), collective="ring")


def case_join() -> dict[str, object]:
    cfg, tp = argument("mesh")
    try:
        _mesh(cfg, tp, timeout=argument("timeout"))
    except (ValueError, TimeoutError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


def case_join_differing() -> dict[str, object]:
    cfg, tp = (2, 1) if os.environ["RANK"] == "0" else (1, 2)
    try:
        _mesh(cfg, tp)
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}


def test_a_launch_of_another_size_is_named_on_every_rank() -> None:
    arguments = {"mesh": [2, 2], "timeout": 20.0}
    for got in run_cases(3, [case_join], arguments=arguments)["case_join"]:
        assert got["error"] == (
            "ValueError: ParallelConfig(world_size=4, cfg_size=2, tp_size=2) needs 4 ranks, "
            "the launch has 3 (torchrun --nproc_per_node=4)"
        )


def test_ranks_with_different_meshes_are_named_on_every_rank() -> None:
    for got in run_cases(2, [case_join_differing])["case_join_differing"]:
        assert got["error"] == (
            "the ranks have different ParallelConfigs: rank 0: cfg 2 x tp 1; rank 1: cfg 1 x tp 2"
        )


def case_join_gpus() -> dict[str, object]:
    """A host of two GPUs, the second of which is broken where the argument says so."""
    taken = []

    def set_device(device: torch.device) -> None:
        if device.index >= 2 or device.index == argument("broken"):
            raise RuntimeError("CUDA error: no such luck\nKernel errors might be reported later")
        taken.append(str(device))

    torch.cuda.device_count, torch.cuda.set_device = lambda: 2, set_device
    size, hosts = int(os.environ["WORLD_SIZE"]), argument("hosts")
    if hosts:
        socket.gethostname = lambda: hosts[int(os.environ["RANK"])]
    try:
        Mesh.create(ParallelConfig(size, 1, size), argument("device"), timeout=20.0)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "taken": taken}
    return {"error": None}


MORE_RANKS = "rank 2 asks for cuda:2 and sees 2 GPUs, rank 3 asks for cuda:3 and sees 2 GPUs"
BROKEN = "rank 1 cannot have cuda:1: CUDA error: no such luck"


@pytest.mark.parametrize(
    ("size", "broken", "error"),
    [(4, None, MORE_RANKS), (2, 1, BROKEN)],
    ids=["more-ranks-than-gpus", "a-broken-gpu"],
)
def test_a_rank_without_its_gpu_is_named_on_every_rank(size, broken, error) -> None:
    arguments = {"broken": broken, "device": "cuda", "hosts": None}
    results = run_cases(size, [case_join_gpus], arguments=arguments)["case_join_gpus"]
    for rank, got in enumerate(results):
        assert got["error"] == f"ValueError: one GPU a rank: {error}"
        assert got["taken"] == ([f"cuda:{rank}"] if rank < 2 and rank != broken else [])


def test_ranks_that_ask_for_one_gpu_are_named_on_every_rank() -> None:
    arguments = {"broken": None, "device": "cuda:1", "hosts": None}
    for got in run_cases(2, [case_join_gpus], arguments=arguments)["case_join_gpus"]:
        assert got["error"] == ("ValueError: ranks 0, 1 all ask for cuda:1: one GPU a rank")


def test_gpu_ranks_on_several_hosts_are_refused_on_every_rank() -> None:
    arguments = {"broken": None, "device": "cuda", "hosts": ["one", "two"]}
    for got in run_cases(2, [case_join_gpus], arguments=arguments)["case_join_gpus"]:
        assert got["error"] == "ValueError: GPU ranks must be on one host, these are on one, two"


def test_a_missing_rank_is_named_on_every_rank() -> None:
    arguments = {"mesh": [2, 2], "timeout": 1.0}
    with Launch(4, [case_join], ranks=[0, 1, 3], arguments=arguments) as launch:
        assert launch.statuses(30) == {0: 0, 1: 0, 3: 0}
        for rank in launch.ranks:
            assert launch.result("case_join", rank)["error"] == (
                "TimeoutError: a launch of 4 ranks is expected; after 1 s there is no sign of "
                "rank 2 (here: ranks 0, 1, 3)"
            )


def test_a_missing_rank_0_is_named() -> None:
    arguments = {"mesh": [1, 2], "timeout": 1.0}
    with Launch(2, [case_join], ranks=[1], arguments=arguments) as launch:
        assert launch.statuses(30) == {1: 0}
        error = launch.result("case_join", 1)["error"]
    assert error.startswith("TimeoutError: no sign of rank 0 of 2 within 1 s")


def test_without_a_launch_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"launch of 4 processes \(torchrun --nproc_per_node=4\)"):
        _mesh(2, 2)
