"""Engines of four CPU ranks (cfg 2 x tp 2) that meet, or do not: what they keep when the guidance
branches differ, and what the others hear of a rank that fails or comes late.
"""

from __future__ import annotations

import re
import threading
import time
from typing import Any
from unittest.mock import patch

import pytest
from engine_fixtures import checkpoint, ids, request
from ranks import run_cases
from test_engine_calls import deadlines
from test_ranks_errors import build, said

from cosmos3_fast import denoise
from cosmos3_fast.startup import PREPARE_S


def case_histories() -> dict[str, Any]:
    """Requests of which the guidance branches cache different prompts; then one rank answers from
    another thread.
    """
    interval = {"guidance_interval": (950, 1000), "num_inference_steps": 4}
    other = {"text": ids(11, seed=4), "num_inference_steps": 4}
    asked = [interval, other, other | interval, {}, {"guidance_scale": 1.0}, {}]
    with (
        build(decode_video=True) as engine,
        deadlines(engine) as found,
        patch.object(engine._kept, "clear", wraps=engine._kept.clear) as clear,
    ):
        for changes in asked:
            engine.step(request(**changes))
        if engine.mesh.rank == 1:
            thread = threading.Thread(target=engine.step, args=(request(),))
            thread.start()
            thread.join()
        else:
            engine.step(request())
        return {"dropped": clear.call_count, "deadlines": found}


def case_one_fails_last() -> dict[str, Any]:
    """Rank 1 alone fails, when the others wait for it no more."""
    with build() as engine:
        planted = engine.mesh.rank == 1
        check = denoise.require_finite
        if planted:
            denoise.require_finite = _fail
        first = said(engine.step, request())
        denoise.require_finite = check
        return {"first": first, "then": [said(engine.step, request()) for _ in range(2)]}


def case_one_fails_at_its_last_step() -> dict[str, Any]:
    """Rank 1 alone fails, while the others wait for it at the request's end."""
    with build() as engine:
        odd = engine.mesh.rank == 1
        first = said(engine.step, request(), on_step=_fail_last if odd else None)
        return {"first": first, "then": [said(engine.step, request()) for _ in range(2)]}


def case_one_comes_late() -> dict[str, Any]:
    """Rank 1 comes when all others have given it up, rank 2 when some have: nobody goes on alone,
    or falls out of step.
    """
    with build() as engine:
        engine.step(request())
        engine.mesh.channel.timeout = 3.0
        time.sleep((0.0, 6.5, 1.5, 0.0)[engine.mesh.rank])
        first = said(engine.step, request())
        meetings = engine.mesh.meetings
        time.sleep((6.5, 0.0, 5.0, 6.5)[engine.mesh.rank])
        return {"first": first, "then": said(engine.step, request()), "meetings": meetings}


def _fail_last(index: int) -> None:
    if index == 1:
        raise KeyError("out of luck")


def _fail(_: object) -> None:
    raise KeyError("out of luck")


CASES = [
    case_histories,
    case_one_fails_last,
    case_one_fails_at_its_last_step,
    case_one_comes_late,
]


@pytest.fixture(scope="module")
def four() -> dict[str, list[dict[str, Any]]]:
    return run_cases(4, CASES, arguments={"folder": str(checkpoint())})


def test_a_rank_that_failed_alone_stops_the_others(four) -> None:
    word = "RuntimeError: this engine must be rebuilt: KeyError: 'out of luck'"
    for rank, got in enumerate(four["case_one_fails_last"]):
        assert got["first"] == ("KeyError: 'out of luck'" if rank == 1 else "nothing")
        assert got["then"] == [word if rank == 1 else f"ValueError: rank 1: {word}"] * 2


def test_a_rank_that_fails_at_its_last_step_is_heard_by_those_that_wait(four) -> None:
    error = "KeyError: 'out of luck'"
    heard = f"RuntimeError: rank 1: {error}"
    for rank, got in enumerate(four["case_one_fails_at_its_last_step"]):
        assert got["first"] == (error if rank == 1 else heard)
        own = f"RuntimeError: this engine must be rebuilt: {got['first']}"
        assert got["then"] == [own] * 2


def test_a_rank_that_comes_late_does_not_go_on_alone(four) -> None:
    for rank, got in enumerate(four["case_one_comes_late"]):
        assert re.match(rf"TimeoutError: rank {rank} waited 3 s for ranks? \d", got["first"])
        assert got["then"].startswith("RuntimeError: this engine must be rebuilt: TimeoutError")
        assert got["meetings"] == four["case_one_comes_late"][0]["meetings"]


def test_equal_histories_drop_nothing(four) -> None:
    """And whoever answers from another thread only waits longer for its decoder."""
    for got in four["case_histories"]:
        assert got["dropped"] == 0
        assert got["deadlines"] == [PREPARE_S, None, None, None, PREPARE_S, None, PREPARE_S]
