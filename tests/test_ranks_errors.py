"""Engines of several CPU ranks in trouble: every rank hears the same, or ends with the cause.

One launch of 4 ranks (cfg 2 x tp 2) is told different things; others lose a rank inside a request.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import checkpoint, counted, engine_args, equal, ids, noise, request
from ranks import Launch, argument, reached, run_cases

from cosmos3_fast import Engine, EngineArgs, EngineConfig, ParallelConfig, RuntimeConfig
from cosmos3_fast.agreement import digest
from cosmos3_fast.testing import make_tiny_checkpoint
from cosmos3_fast.watchdog import EXIT_STATUS

DEADLINE = 3.0
PICTURE = noise(1, 3, 1, 80, 96, seed=6).clamp(-1, 1)
IDS = [digest(ids(19)), digest(ids(19, seed=5))]
PICTURES = [digest(PICTURE), digest(PICTURE.clamp(-0.5, 0.5))]
RAW = {"cond_video_latents": None, "cond_video_pixels": PICTURE}
# What the odd rank asks for, what the others do, and what all ranks hear.
DISAGREEMENTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], str]] = {
    "seed": (1, {"seed": 43}, {}, "seed is 42 on ranks 0, 2, 3 and 43 on rank 1"),
    "prompt": (
        3,
        {"text": ids(19, seed=5)},
        {},
        f"text_ids is {IDS[0]} on ranks 0, 1, 2 and {IDS[1]} on rank 3",
    ),
    "steps": (
        0,
        {"num_inference_steps": 3},
        {},
        "num_inference_steps is 3 on rank 0 and 2 on ranks 1, 2, 3",
    ),
    "pixels": (
        2,
        RAW | {"cond_video_pixels": PICTURE.clamp(-0.5, 0.5)},
        RAW,
        f"cond_video_pixels is {PICTURES[0]} on ranks 0, 1, 3 and {PICTURES[1]} on rank 2",
    ),
}


def build(
    cfg: int = 2,
    tp: int = 2,
    folder: Path | None = None,
    decode_video: bool = False,
    **runtime: Any,
) -> Engine:
    args = engine_args(folder or Path(argument("folder")), decode_video=decode_video)
    parallel = ParallelConfig(cfg * tp, cfg, tp)
    config = EngineConfig(args.config.device, parallel, RuntimeConfig(**runtime))
    return Engine(EngineArgs(plugin_args=args.plugin_args, config=config))


def said(call: Callable[..., Any], *args: Any, **keywords: Any) -> str:
    try:
        result = call(*args, **keywords)
    except (ValueError, RuntimeError, FloatingPointError, KeyError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
    if isinstance(result, Engine):
        result.close()
    return "nothing"


def case_disagreements() -> dict[str, Any]:
    """Another request on one rank, a refusal and a bad request, each followed by a good one."""
    found: dict[str, Any] = {}
    with build() as engine:
        rank, first = engine.mesh.rank, engine.step(request())
        with counted(engine) as calls:
            for name, (odd, theirs, ours, _) in DISAGREEMENTS.items():
                found[name] = said(engine.step, request(**(theirs if rank == odd else ours)))
            refused = ValueError("cannot read a.png")
            found["refusal"] = (
                said(engine.refuse, refused) if rank == 2 else said(engine.step, request())
            )
            found["bad"] = said(engine.step, request(seed=-1 if rank == 1 else 42))
        found["calls"] = calls
        found["usable"] = equal(first, engine.step(request()))
    return found


def case_caches() -> dict[str, Any]:
    """One rank has lost one kind of cached thing; the others must not wait for it."""
    with build(max_prompts=3) as engine:
        rank = engine.mesh.rank
        asked = [request(), request(**RAW), request(text=ids(9, seed=8), negative=ids(3, seed=9))]
        first = [engine.step(one) for one in asked]
        losses: dict[str, tuple[int, Callable[[], None]]] = {
            "prompts": (1, engine._kept.prompts.clear),
            "one of two prompts": (0, lambda: engine._kept.prompts.forget(_conditional(asked[0]))),
            "prompts of the other branch": (3, engine._kept.prompts.clear),
            "runners": (2, engine._kept.runners.clear),
            "steps": (1, lambda: [r._steps.clear() for r in engine._kept.runners._values.values()]),
            "encoders": (0, engine._kept.encoders.clear),
        }  # fmt: skip
        found = {}
        for name, (odd, lose) in losses.items():
            if rank == odd:
                lose()
            found[name] = all(equal(a, engine.step(b)) for a, b in zip(first, asked, strict=True))
        with counted(engine) as calls:
            engine.step(asked[2])
        return found | {"calls": [call for call in calls if call != "velocity"]}


def _conditional(asked: Any) -> tuple[int, ...]:
    return tuple(asked.text_ids[0].tolist())


def case_checkpoints() -> dict[str, Any]:
    """Another folder on one rank; then two engines, the first of which rank 0 is slow to close."""
    rank = int(os.environ["RANK"])
    good = Path(argument("folder"))
    found = {}
    for name, (odd, other) in argument("others").items():
        found[name] = said(build, folder=Path(other) if rank == odd else good)
    found["runtime"] = said(build, max_graphs=3 if rank == 1 else 4)
    for _ in range(2):
        engine = build()
        engine.step(request())
        time.sleep(1.0 if rank == 0 else 0.0)
        engine.close()
    return found | {"closed": said(engine.step, request())}


def case_not_finite() -> dict[str, Any]:
    """An error that all ranks find after the exchange."""
    with build() as engine:
        engine.model.proj_out.bias[0] = float("nan")
        return {"first": said(engine.step, request()), "then": said(engine.step, request())}


CASES = [
    case_disagreements,
    case_caches,
    case_checkpoints,
    case_not_finite,
]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("tiny")
    others = {
        "shape": (1, str(make_tiny_checkpoint(folder / "shape", hidden=32, kv_heads=2))),
        "scheduler": (2, str(folder / "scheduler")),
        "weights": (2, str(make_tiny_checkpoint(folder / "weights", kv_heads=2, seed=1))),
        "missing": (3, str(folder / "nowhere")),
        "truncated": (0, str(folder / "truncated")),
    }
    for name in ("scheduler", "truncated"):
        shutil.copytree(checkpoint(), folder / name)
    file = folder / "scheduler" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"flow_shift": 7.0}))
    shard = next((folder / "truncated" / "transformer").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    return run_cases(4, CASES, arguments={"folder": str(checkpoint()), "others": others})


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_with_different_requests_all_hear_where(four, name) -> None:
    want = f"ValueError: the ranks disagree: {DISAGREEMENTS[name][3]}"
    assert [got[name] for got in four["case_disagreements"]] == [want] * 4


@pytest.mark.parametrize(
    ("name", "words"),
    {"refusal": "rank 2: cannot read a.png", "bad": "rank 1: seed must be an integer in"}.items(),
    ids=["refusal", "bad"],
)
def test_the_error_of_one_rank_is_raised_on_all(four, name, words) -> None:
    for rank, got in enumerate(four["case_disagreements"]):
        assert got[name].startswith(f"ValueError: {words}"), rank


def test_nothing_is_computed_for_a_refused_request_and_the_next_one_runs(four) -> None:
    for got in four["case_disagreements"]:
        assert got["calls"] == [] and got["usable"]


def test_ranks_with_different_caches_stay_together_and_keep_the_bits(four) -> None:
    for got in four["case_caches"]:
        assert all(value for name, value in got.items() if name != "calls"), got
        assert got["calls"] == []  # and the caches are whole again


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "shape": "the ranks disagree: checkpoint.transformer is ",
        "scheduler": "the ranks disagree: checkpoint.scheduler is ",
        "weights": "the ranks disagree: transformer numbers is ",
        "missing": "rank 3: ",
        "truncated": "rank 0: checkpoint file ",
        "runtime": "the ranks disagree: max_graphs is 4 on ranks 0, 2, 3 and 3 on rank 1",
    }.items(),
    ids=["shape", "scheduler", "weights", "missing", "truncated", "runtime"],
)
def test_ranks_with_different_checkpoints_are_refused(four, name, words) -> None:
    heard = [got[name] for got in four["case_checkpoints"]]
    assert heard[0].startswith(f"ValueError: {words}"), heard[0]
    assert heard == [heard[0]] * 4


def test_an_engine_follows_another_and_a_closed_one_says_so(four) -> None:
    for got in four["case_checkpoints"]:
        assert got["closed"] == "RuntimeError: this engine must be rebuilt: closed"


def test_after_an_error_in_a_request_no_rank_goes_on(four) -> None:
    for got in four["case_not_finite"]:
        assert got["first"].startswith("FloatingPointError: not finite")
        assert got["then"].startswith("RuntimeError: this engine must be rebuilt: FloatingPoint")


# (what happens in the middle of a request, on which rank, cfg x tp, the cause survivors give)
SCENARIOS = {
    "kill -9 of rank 1": ("kill", 1, (2, 2), r"no sign of rank 1 for \d"),
    "kill -9 of rank 0": ("kill", 0, (1, 2), "no sign of rank 0: its store"),
    "SIGSTOP of rank 3": ("stop", 3, (2, 2), r"no sign of rank 3 for \d"),
    "rank 1 hangs": ("hang", 1, (2, 1), "request 2, .* deadline of 3 s: all ranks are in it"),
    "rank 1 fails": ("fail", 1, (1, 2), "rank 1 .* in request 2: KeyError: 'out of luck'"),
}
PATIENCE = 60.0  # deadline of a request that ends otherwise: the heartbeat keeps DEADLINE


def case_trouble() -> None:
    """At its fifth step the victim fails, or stays until it is killed, stopped or too late: the
    others wait for it.
    """
    what, victim = argument("what"), argument("victim")
    with build(*argument("mesh"), step_deadline_s=DEADLINE, silence_s=DEADLINE) as engine:
        watchdog = engine._watchdog
        assert watchdog is not None and watchdog.silence == watchdog.deadline == DEADLINE
        if what != "hang":
            watchdog.deadline = PATIENCE

        def on_step(index: int) -> None:
            if index == 4 and engine.mesh.rank == victim:
                reached("stepping")
                if what == "fail":
                    raise KeyError("out of luck")
                time.sleep(PATIENCE)

        engine.step(request())
        engine.step(request(num_inference_steps=50), on_step=on_step)


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, dict[int, tuple[int, str]]]]:
    with ExitStack() as stack:
        launches = {}
        for name, (what, victim, mesh, _) in SCENARIOS.items():
            arguments = {"what": what, "victim": victim, "mesh": mesh, "folder": str(checkpoint())}
            launch = Launch(mesh[0] * mesh[1], [case_trouble], arguments=arguments)
            launches[name] = stack.enter_context(launch)
        for name, launch in launches.items():
            what, victim = SCENARIOS[name][:2]
            launch.mark(victim, "stepping")
            if what in ("kill", "stop"):
                os.kill(launch.pid(victim), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[what])
        ended = {name: _ended(launch, *SCENARIOS[name][:2]) for name, launch in launches.items()}
    assert all(launch.alive() == [] for launch in launches.values())
    yield ended


def _ended(launch: Launch, what: str, victim: int) -> dict[int, tuple[int, str]]:
    """Exit status and stderr of the survivors; nobody else may be left."""
    survivors = [rank for rank in launch.ranks if rank != victim or what not in ("kill", "stop")]
    found = {rank: (launch.status(rank, timeout=40), launch.stderr(rank)) for rank in survivors}
    stopped = {launch.pid(victim)} if what == "stop" else set()
    assert set(launch.alive()) <= {launch.leader} | stopped
    return found


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_survivor_ends_with_the_cause(outcomes, name) -> None:
    what, victim = SCENARIOS[name][:2]
    for rank, (status, text) in outcomes[name].items():
        first = text.partition("ends itself: ")[2].partition("\n")[0]
        if what == "fail" and rank == victim and status == 1:  # it left by its own error
            assert text.endswith("KeyError: 'out of luck'\n")
            continue
        assert status == EXIT_STATUS, (rank, text)
        assert re.match(SCENARIOS[name][3], first), (rank, text)
