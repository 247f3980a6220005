"""Engines over GPU ranks: steps under delays, lost ranks, different requests, prompts cached on
one guidance branch alone.

The cases and the harness are those of CPU ranks; what can only be seen on GPUs is that captured
collectives end with their process, and that no device memory stays behind.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import gpu_steps_ranks
import pytest
import test_ranks_errors as errors
import torch
from engine_fixtures import checkpoint, counted, engine_args, equal, ids, picture, request
from ranks import _ENVIRONMENT, Launch, argument, run_cases

from cosmos3_fast import DeviceConfig, Engine
from cosmos3_fast.testing import make_tiny_checkpoint
from cosmos3_fast.watchdog import EXIT_STATUS

CPU, GPU = ("cpu", "float32"), ("cuda", "bfloat16")
MESHES = {2: [(1, 2), (2, 1)], 4: [(2, 2), (1, 4)], 8: [(2, 4), (1, 8)]}  # (cfg, tp) by GPUs
PICTURE = picture(1, 3, 1, 80, 96)
CONTEXT_MIB = 200  # less than any process takes on a GPU it uses


def by_gpus(cases: dict[int, Sequence[Any]]) -> list[Any]:
    """(GPUs, case) as parameters marked with the GPUs they need."""
    return [
        pytest.param(count, case, marks=getattr(pytest.mark, f"gpu{count}"), id=f"{count}-{case}")
        for count, some in cases.items()
        for case in some
    ]


def on_device(folder: Path | None = None, **plugin: Any) -> Any:
    """`engine_args` on the launch's kind of device."""
    target, dtype = argument("device")
    return engine_args(folder, device=DeviceConfig(target, getattr(torch, dtype)), **plugin)


def build(**runtime: Any) -> Engine:
    errors.engine_args = on_device
    return errors.build(*argument("mesh"), **runtime)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose heads divide over 8 ranks."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


# Captured steps with random delays, and 1000 steps whose state is equal on all ranks.


def case_steps() -> dict[str, Any]:
    cfg, tp = argument("mesh")
    words = f"--tiny --cfg {cfg} --tp {tp} --replays 20 --requests 2".split()
    return {"status": gpu_steps_ranks.main(words)}


def test_the_script_for_gpus_runs_on_cpu_ranks() -> None:
    ended = run_cases(2, [case_steps], arguments={"mesh": [2, 1]})["case_steps"]
    assert [rank["status"] for rank in ended] == [0, 0]


def replay_with_delays(count: int, mesh: tuple[int, int], *more: str) -> None:
    script = str(Path(gpu_steps_ranks.__file__).resolve())
    flags = ["--cfg", str(mesh[0]), "--tp", str(mesh[1]), *more]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}"]
    done = subprocess.run(
        [*launcher, script, *flags],
        env=os.environ | _ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize(("count", "mesh"), by_gpus(MESHES))
def test_replays_with_delays_keep_every_bit(count: int, mesh: tuple[int, int]) -> None:
    replay_with_delays(count, mesh)


TP_MESHES = {count: [mesh for mesh in MESHES[count] if mesh[1] > 1] for count in (2, 4)}


@pytest.mark.parametrize("sums", ["all-reduce", "nccl"])
@pytest.mark.parametrize(("count", "mesh"), by_gpus(TP_MESHES))
def test_replays_with_other_sums_keep_every_bit(
    count: int, mesh: tuple[int, int], sums: str
) -> None:
    replay_with_delays(count, mesh, "--sums", sums, "--replays", "2000", "--requests", "20")


# The VAE's edges without peer memory.


def case_edges() -> dict[str, Any]:
    asked, found = request(cond_video_latents=None, cond_video_pixels=PICTURE), {}
    for collective in ("auto", "nccl"):
        with build(decode_video=True, collective=collective) as engine:
            answers = [engine.step(asked) for _ in range(2)]
            assert equal(*({k: a[k] for k in ("action", "video")} for a in answers))
            found |= {f"{collective}: {k}": v for k, v in answers[1].items()}
            found[f"{collective}: in peer memory"] = bool(engine.vae._edges._made)
    return found


@pytest.mark.gpu2
def test_nccl_carries_the_edges_of_strips_when_told_to(folder) -> None:
    told = {"mesh": (2, 1), "device": GPU, "folder": str(folder)}
    results = run_cases(2, [case_edges], arguments=told)["case_edges"]
    for got in results:
        assert got["auto: in peer memory"] and not got["nccl: in peer memory"]
        for name in ("action", "video"):
            assert torch.equal(got[f"nccl: {name}"], got[f"auto: {name}"]), name
            assert torch.equal(got[f"nccl: {name}"], results[0][f"nccl: {name}"]), name
        pixels, want = got["nccl: pixels"], got["auto: pixels"]  # cuDNN may choose otherwise
        assert (pixels - want).norm() <= 0.02 * want.norm()


# Lost ranks. (what happens in the middle of a request, on which rank, cfg x tp, the cause)

SCENARIOS = {
    2: {
        "kill -9 of rank 1": ("kill", 1, (1, 2), "no sign of rank 1 for "),
        "kill -9 of rank 0": ("kill", 0, (2, 1), "no sign of rank 0: its store"),
        "SIGSTOP of rank 1": ("stop", 1, (2, 1), "no sign of rank 1 for "),
        "SIGSTOP of rank 0": ("stop", 0, (1, 2), "no sign of rank 0 for "),
        "rank 1 hangs": ("hang", 1, (1, 2), "past its deadline of 3 s: all ranks are in it"),
    },
    4: {
        "kill -9 of rank 3": ("kill", 3, (2, 2), "no sign of rank 3 for "),
        "SIGSTOP of rank 2": ("stop", 2, (2, 2), "no sign of rank 2 for "),
        "SIGSTOP of rank 1": ("stop", 1, (1, 4), "no sign of rank 1 for "),
    },
}
SIGN_S = 1.0  # longer than a sign takes to be written and read; the request takes 2.3 s
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def case_trouble() -> None:
    errors.engine_args = on_device
    errors.case_trouble()


def used_mib() -> list[int]:
    """Memory in use on every GPU, of all processes."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def given_back(before: list[int], patience: float = 20) -> list[int]:
    """MiB more in use than `before` on each GPU, once that is none or after `patience` seconds."""
    stop = time.monotonic() + patience
    while True:
        more = [now - then for now, then in zip(used_mib(), before, strict=True)]
        if max(more) <= 0 or time.monotonic() > stop:
            return more
        time.sleep(0.2)


def strike(launch: Launch, scenario: tuple[str, int, tuple[int, int], str]) -> None:
    """End or stop the victim in the middle of its request, of which the others then know."""
    what, victim = scenario[:2]
    launch.mark(victim, "stepping", timeout=120)
    time.sleep(SIGN_S)
    if what in SIGNALS:
        os.kill(launch.pid(victim), SIGNALS[what])


def lose_ranks(count: int, folder: Path, device: Sequence[str]) -> dict[str, Any]:
    """{scenario: {survivor: (exit status, stderr)}}, and under "memory" the MiB a GPU held during
    and after.
    """
    found: dict[str, Any] = {}
    before = used_mib() if device == GPU else []
    with ExitStack() as stack:
        launches = {}
        for name, (what, victim, mesh, _) in SCENARIOS[count].items():
            told = {"what": what, "victim": victim, "mesh": mesh, "folder": str(folder)}
            launch = Launch(count, [case_trouble], arguments=told | {"device": device})
            launches[name] = stack.enter_context(launch)
        with ThreadPoolExecutor(len(launches)) as pool:
            for _ in pool.map(strike, launches.values(), SCENARIOS[count].values()):
                pass
        during = used_mib() if device == GPU else []
        for name, launch in launches.items():
            found[name] = errors._ended(launch, *SCENARIOS[count][name][:2])
    assert all(launch.alive() == [] for launch in launches.values())
    if device == GPU:
        held = [now - then for now, then in zip(during, before, strict=True)]
        found["memory"] = {"during": held[:count], "after": given_back(before)[:count]}
    return found


@pytest.fixture(scope="module")
def lost(folder: Path) -> Callable[[int], dict[str, Any]]:
    return cache(lambda count: lose_ranks(count, folder, GPU))


def check_survivors(count: int, name: str, survivors: dict[int, tuple[int, str]]) -> None:
    what, victim, _, cause = SCENARIOS[count][name]
    last = rf"^  rank {victim}: request 2, .*step \d+ of 50.*, last sign [\d.]+ s ago$"
    assert len(survivors) == count - (what in SIGNALS)
    for rank, (status, text) in survivors.items():
        first = text.partition(f"rank {rank} of {count} ends itself: ")[2].partition("\n")[0]
        assert status == EXIT_STATUS, (rank, text)
        assert cause in first, (rank, text)
        assert re.search(last, text, re.MULTILINE), (rank, text)


@pytest.mark.parametrize(("count", "name"), by_gpus(SCENARIOS))
def test_every_survivor_says_which_rank_its_step_and_its_age(lost, count, name) -> None:
    check_survivors(count, name, lost(count)[name])


@pytest.mark.parametrize(("count", "_"), by_gpus({count: ["all"] for count in SCENARIOS}))
def test_no_device_memory_stays_behind(lost, count, _) -> None:
    memory = lost(count)["memory"]
    print(memory)
    assert min(memory["during"]) >= CONTEXT_MIB, memory  # so that the next line can fail
    assert max(memory["after"]) <= 0, memory


# Ranks that ask for different things, are missing, or have other prompts cached.


def case_disagreements() -> dict[str, Any]:
    """Another seed, prompt or step count on the last rank, then a good request."""
    found: dict[str, Any] = {}
    with build() as engine:
        mesh, first = engine.mesh, engine.step(request())
        odd = mesh.rank == mesh.world_size - 1
        with counted(engine) as calls:
            for name in ("seed", "prompt", "steps"):
                theirs = errors.DISAGREEMENTS[name][1]
                found[name] = errors.said(engine.step, request(**(theirs if odd else {})))
        found["calls"], found["usable"] = calls, equal(first, engine.step(request()))
    return found


PROMPTS = {
    "both new": (ids(19), ids(7, seed=1)),
    # Longer: its all-reduces need memory that the ranks of its branch alone make.
    "the prompt new, the negative one cached": (ids(150, seed=5), ids(7, seed=1)),
    "the prompt cached, the negative one new": (ids(150, seed=5), ids(70, seed=6)),
    "both cached": (ids(19), ids(70, seed=6)),
}


def case_prompts() -> dict[str, Any]:
    """Results and `encode_prompt` calls of prompts in turn, then of each from nothing."""
    found: dict[str, Any] = {}
    with build() as engine:
        mesh, asked = engine.mesh, {n: request(text=t, negative=m) for n, (t, m) in PROMPTS.items()}
        for name, one in asked.items():
            with counted(engine) as calls:
                result = engine.step(one)
            found[f"{name}: calls"] = calls.count("encode_prompt")
            found |= {f"{name}: {key}": tensor.cpu() for key, tensor in result.items()}
        steps = [runner._steps for runner in engine._kept.runners._values.values()]
        found["captured"] = [one._graph is not None for step in steps for one in step.values()]
        for name, one in asked.items():
            engine._kept.clear()
            result = engine.step(one)
            for key, tensor in result.items():
                found[f"{name}: {key} bits"] = torch.equal(tensor.cpu(), found[f"{name}: {key}"])
        found["cfg"] = [mesh.cfg_size, mesh.cfg_rank]
    return found


def case_missing() -> dict[str, Any]:
    from cosmos3_fast import ParallelConfig
    from cosmos3_fast.parallel import Mesh

    (cfg, tp), device = argument("mesh"), argument("device")[0]
    config = ParallelConfig(cfg * tp, cfg, tp)
    try:
        Mesh.create(config, device, timeout=1.0)
    except TimeoutError as error:
        return {"error": str(error)}
    return {"error": "none"}


CASES = [case_disagreements, case_prompts]


def together(mesh: Sequence[int], device: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    told = {"mesh": mesh, "device": device, "folder": str(checkpoint())}
    return run_cases(mesh[0] * mesh[1], CASES, arguments=told)


SMALL_MESHES = {2: MESHES[2], 4: MESHES[4][:1]}  # two key/value heads


@pytest.fixture(scope="module")
def launches() -> Callable[[tuple[int, int]], dict[str, list[dict[str, Any]]]]:
    return cache(lambda mesh: together(mesh, GPU))


def check_disagreements(heard: list[dict[str, Any]]) -> None:
    last = len(heard) - 1
    others = "rank 0" if last == 1 else "ranks " + ", ".join(map(str, range(last)))
    short, long = errors.IDS
    wanted = {
        "seed": f"seed is 42 on {others} and 43 on rank {last}",
        "prompt": f"text_ids is {short} on {others} and {long} on rank {last}",
        "steps": f"num_inference_steps is 2 on {others} and 3 on rank {last}",
    }
    for got in heard:
        for name, words in wanted.items():
            assert got[name] == f"ValueError: the ranks disagree: {words}"
        assert got["calls"] == [] and got["usable"]


def check_prompts(found: list[dict[str, Any]], captured: bool) -> None:
    for got in found:
        assert all(same for name, same in got.items() if name.endswith(" bits")), got
        assert got["captured"] and all(one == captured for one in got["captured"])
        cfg, branch = got["cfg"]
        new = {"both new": (1, 1), "both cached": (0, 0)}
        new["the prompt new, the negative one cached"] = (1, 0)
        new["the prompt cached, the negative one new"] = (0, 1)
        for name, calls in new.items():
            assert got[f"{name}: calls"] == (calls[branch] if cfg == 2 else sum(calls)), name
        for name, tensor in got.items():
            if isinstance(tensor, torch.Tensor):
                assert torch.equal(tensor, found[0][name]), name


@pytest.mark.parametrize(("count", "mesh"), by_gpus(SMALL_MESHES))
def test_ranks_with_different_requests_all_hear_and_go_on(launches, count, mesh) -> None:
    check_disagreements(launches(mesh)["case_disagreements"])


@pytest.mark.parametrize(("count", "mesh"), by_gpus(SMALL_MESHES))
def test_a_prompt_cached_on_one_branch_alone_changes_no_bit(launches, count, mesh) -> None:
    check_prompts(launches(mesh)["case_prompts"], captured=True)


@pytest.mark.parametrize("mesh", [(2, 2)], ids=["2x2"])
def test_a_prompt_cached_on_one_branch_alone_changes_no_bit_on_cpu_ranks(mesh) -> None:
    check_prompts(together(mesh, CPU)["case_prompts"], captured=False)


@pytest.mark.parametrize(("count", "mesh"), by_gpus(SMALL_MESHES))
def test_a_missing_gpu_rank_is_named(count, mesh) -> None:
    there = list(range(count - 1))
    told = {"mesh": mesh, "device": GPU}
    with Launch(count, [case_missing], ranks=there, arguments=told) as launch:
        assert set(launch.statuses(60).values()) == {0}
        for rank in there:
            error = launch.result("case_missing", rank)["error"]
            assert f"after 1 s there is no sign of rank {count - 1} (here: rank" in error
