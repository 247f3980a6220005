"""The whole engine over CPU ranks: every mesh gives what one process gives, bit-equal on all ranks.

One launch for each number of ranks runs all meshes of that size on the tiny checkpoint in fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from engine_fixtures import checkpoint, engine_args, equal, noise, picture, request
from ranks import argument, run_cases

from cosmos3_fast import Engine, EngineArgs, EngineConfig, ParallelConfig, RuntimeConfig
from cosmos3_fast.checkpoint import open_checkpoint
from cosmos3_fast.model import UNUSED
from cosmos3_fast.testing import make_tiny_checkpoint

EXACT = 1e-5
MESHES = {2: [(1, 2), (2, 1)], 4: [(1, 4), (2, 2)], 8: [(1, 8), (2, 4)]}  # (cfg, tp) by ranks
ALL_MESHES = [(size, *mesh) for size, meshes in MESHES.items() for mesh in meshes]
MODES = {
    "policy": {},
    "forward_dynamics": {"cond_action": noise(1, 4, 64, seed=2)},
    "inverse_dynamics": {},
}
GUIDANCE = {
    "guided": {"guidance_scale": 3.0},
    "interval": {
        "guidance_scale": 3.0,
        "guidance_interval": (950, 1000),
        "num_inference_steps": 3,
    },
    "one branch": {"guidance_scale": 1.0},
}
REQUESTS = {
    f"{mode}, {guidance}": {"mode": mode} | MODES[mode] | GUIDANCE[guidance]
    for mode in MODES
    for guidance in GUIDANCE
} | {"policy, guided again": {}}
# 5x6 latents: uneven strips on 2 and 4 ranks, and fewer rows than 8 ranks.
PICTURES = {
    "one picture": {"cond_video_pixels": picture(1, 3, 1, 80, 96, seed=6)},
    "a clip": {
        "cond_video_pixels": picture(1, 3, 5, 80, 96, seed=7),
        "mode": "inverse_dynamics",
    },
}


def parallel_args(folder: str | Path, cfg: int, tp: int, **plugin: Any) -> EngineArgs:
    args = engine_args(Path(folder), **plugin)
    config = EngineConfig(
        args.config.device, ParallelConfig(cfg * tp, cfg, tp), args.config.runtime
    )
    return EngineArgs(plugin_args=args.plugin_args, config=config)


def answers(engine: Engine, requests: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Every request's tensors under "name: key"."""
    found = {}
    for name, changes in requests.items():
        for key, tensor in engine.step(request(**changes)).items():
            found[f"{name}: {key}"] = tensor.clone()
    return found


def pictures(engine: Engine) -> dict[str, torch.Tensor]:
    asked = {name: {"cond_video_latents": None} | more for name, more in PICTURES.items()}
    return answers(engine, asked)


@contextmanager
def warnings() -> Iterator[list[str]]:
    """Messages of the engine's warnings while this lasts."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("cosmos3_fast.engine")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def case_meshes() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for cfg, tp in argument("meshes"):
        args = parallel_args(argument("folder"), cfg, tp)
        with warnings() as said, Engine(args) as engine:
            results = answers(engine, REQUESTS)
            read = {name: report.bytes for name, report in engine.load_reports.items()}
        found |= {f"{cfg}x{tp} {name}": tensor for name, tensor in results.items()}
        found |= {f"{cfg}x{tp} warnings": said, f"{cfg}x{tp} bytes": read}
    return found


def case_pictures() -> dict[str, Any]:
    cfg, tp = argument("meshes")[0]
    with Engine(parallel_args(argument("folder"), cfg, tp, decode_video=True)) as engine:
        return pictures(engine)


def case_grouped_heads() -> dict[str, Any]:
    """Two key/value heads: a mesh that divides them, or the refusal of one that does not."""
    cfg, tp = argument("meshes")[0]
    try:
        with Engine(parallel_args(argument("grouped"), cfg, tp)) as engine:
            return {"policy: action": engine.step(request())["action"]}
    except ValueError as error:
        return {"error": str(error)}


def case_collective() -> dict[str, Any]:
    args = parallel_args(argument("folder"), 1, 2, runtime=RuntimeConfig(collective="nccl"))
    with Engine(args) as engine:
        return {"collective": engine.mesh.collective}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def launches(folder: Path) -> dict[int, dict[str, list[dict[str, Any]]]]:
    found = {}
    for size, meshes in MESHES.items():
        arguments = {"folder": str(folder), "grouped": str(checkpoint()), "meshes": meshes}
        cases = [case_meshes, case_pictures, case_grouped_heads, case_collective]
        count = {2: 4, 4: 3, 8: 2}[size]
        found[size] = run_cases(size, cases[:count], arguments=arguments)
    return found


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, torch.Tensor]:
    with Engine(engine_args(folder)) as engine:
        found = answers(engine, REQUESTS)
    with Engine(engine_args(folder, decode_video=True)) as engine:
        return found | pictures(engine)


@pytest.mark.parametrize(("size", "cfg", "tp"), ALL_MESHES)
def test_a_mesh_gives_what_one_process_gives(launches, single, size, cfg, tp) -> None:
    got = launches[size]["case_meshes"][0]
    for name in REQUESTS:
        for key in ("action", "video"):
            tensor = got[f"{cfg}x{tp} {name}: {key}"]
            assert oracle.error(tensor, single[f"{name}: {key}"]) <= EXACT, (name, key)


@pytest.mark.parametrize("size", MESHES)
def test_the_vae_in_strips_gives_what_one_process_gives(launches, single, size) -> None:
    got = launches[size]["case_pictures"][0]
    assert sorted(got) == sorted(
        f"{n}: {k}" for n in PICTURES for k in ("action", "video", "pixels")
    )
    for name, tensor in got.items():
        assert oracle.error(tensor, single[name]) <= EXACT, name


@pytest.mark.parametrize("size", MESHES)
def test_all_ranks_give_the_same_bits(launches, size) -> None:
    for case in ("case_meshes", "case_pictures"):
        results = launches[size][case]
        tensors = [{k: v for k, v in r.items() if isinstance(v, torch.Tensor)} for r in results]
        assert len(tensors) == size and tensors[0].keys()
        assert all(equal(tensors[0], other) for other in tensors[1:])


def test_the_configured_kind_of_sums_reaches_the_mesh(launches) -> None:
    assert [rank["collective"] for rank in launches[2]["case_collective"]] == ["nccl"] * 2


@pytest.mark.parametrize(("size", "cfg", "tp"), ALL_MESHES)
def test_what_came_between_changes_no_bit(launches, size, cfg, tp) -> None:
    got = launches[size]["case_meshes"][0]
    for key in ("action", "video"):
        first = got[f"{cfg}x{tp} policy, guided: {key}"]
        assert torch.equal(first, got[f"{cfg}x{tp} policy, guided again: {key}"])


@pytest.mark.parametrize(("size", "cfg", "tp"), ALL_MESHES)
def test_a_second_group_without_guidance_is_said_once(launches, size, cfg, tp) -> None:
    said = [got[f"{cfg}x{tp} warnings"] for got in launches[size]["case_meshes"]]
    once = ["no step is guided: with cfg_size 2 the second group adds nothing"]
    assert said[0] == (once if cfg == 2 else [])
    assert not any(said[1:])


@pytest.mark.parametrize(("size", "cfg", "tp"), ALL_MESHES)
def test_a_rank_reads_its_slices_alone(launches, folder, size, cfg, tp) -> None:
    """Per rank: all of what is replicated and 1/tp of every attention and MLP matrix."""
    cut = whole = 0
    with open_checkpoint(folder / "transformer") as tensors:
        for name, tensor in tensors.items():
            if (".self_attn." in name and len(tensor.shape) == 2) or ".mlp" in name:
                cut += tensor.nbytes
            elif not name.startswith(UNUSED):
                whole += tensor.nbytes
    with open_checkpoint(folder / "vae") as tensors:
        encoder = sum(
            t.nbytes for n, t in tensors.items() if not n.startswith(("decoder.", "post_"))
        )
    assert cut > 2**20
    read = [got[f"{cfg}x{tp} bytes"] for got in launches[size]["case_meshes"]]
    assert [one["transformer"] for one in read] == [whole + cut // tp] * size
    assert sum(one["transformer"] - whole for one in read) == cfg * cut
    assert [one["vae"] for one in read] == [encoder] * size


def test_grouped_heads_divide_over_two_ranks(launches) -> None:
    with Engine(engine_args(checkpoint())) as engine:
        want = engine.step(request())["action"]
    for got in launches[2]["case_grouped_heads"]:
        assert oracle.error(got["policy: action"], want) <= EXACT


def test_heads_that_do_not_divide_are_refused_on_every_rank(launches) -> None:
    for got in launches[4]["case_grouped_heads"]:
        assert "tp_size 4 does not divide" in got["error"]
        assert got == launches[4]["case_grouped_heads"][0]
