"""A rank that dies, stops, hangs or fails ends all ranks with the right cause; none is left behind.

All scenarios run at once, each in its own launch of three ranks with a deadline of 3 s.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext, suppress
from types import SimpleNamespace

import pytest
import torch
from ranks import Launch, argument, reached, run_cases

from cosmos3_fast.config import ParallelConfig
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.watchdog import (
    CLOSED,
    ENDED,
    EXIT_STATUS,
    FAILED,
    IDLE,
    RUNNING,
    Sign,
    Watchdog,
)

DEADLINE = 3.0
# name: (what happens, to which rank, the cause that the survivors give)
SCENARIOS = {
    "kill -9 of rank 1": ("kill", 1, "no sign of rank 1 for "),
    "kill -9 of rank 0, which holds the store": ("kill", 0, "no sign of rank 0: its store"),
    "kill -9 of rank 2 between steps": ("kill idle", 2, "no sign of rank 2 for "),
    "SIGSTOP of rank 1": ("stop", 1, "no sign of rank 1 for "),
    "SIGSTOP of rank 0, which holds the store": ("stop", 0, "no sign of rank 0 for "),
    "rank 1 does not come to the step": ("absent", 1, "rank 1 is not in it (request 20, idle)"),
    "rank 1 hangs in the step": ("hang", 1, "all ranks are in it"),
    "rank 1 fails alone": ("fail", 1, "rank 1 failed in request 21: KeyError: 'out of luck'"),
    "rank 1 fails and leaves": ("leave", 1, "it failed in request 21: KeyError: 'out of luck'"),
}


def case_steps() -> None:
    what, victim = argument("what"), argument("victim")
    mesh = Mesh.create(ParallelConfig(3, 1, 3), "cpu", timeout=60)
    watchdog = Watchdog(mesh, deadline=DEADLINE, silence=DEADLINE)
    x = torch.ones(8)
    for step in range(100_000):
        if step == 21:
            reached("running")
            if what == "kill idle" or (what == "absent" and mesh.rank == victim):
                time.sleep(60)
        with suppress(KeyError) if what == "fail" else nullcontext(), watchdog.step(step):
            if step == 21 and what == "hang":
                watchdog.note("step 2 of 4")
                time.sleep(60 if mesh.rank == victim else 0)
            if step == 21 and mesh.rank == victim and what in ("fail", "leave"):
                raise KeyError("out of luck")
            mesh.all_reduce(x.fill_(1))
        if step == 21 and mesh.rank == victim and what == "fail":
            time.sleep(60)
        time.sleep(0.05)


def case_well() -> dict[str, object]:
    """Alike errors, a slow rank within a longer deadline, ranks that close at different times."""
    mesh = Mesh.create(ParallelConfig(2, 1, 2), "cpu", timeout=60)
    watchdog = Watchdog(mesh, deadline=1.0, silence=1.0)
    errors = []
    for error in (ValueError("refused"), FloatingPointError("not finite")):
        try:
            with watchdog.step(0):
                raise error
        except (ValueError, FloatingPointError) as caught:
            errors.append(str(caught))
    with watchdog.step(1, deadline=30):
        time.sleep(1.5 * mesh.rank)
        mesh.all_reduce(torch.ones(1))
    time.sleep(1.5)  # idle has no deadline
    time.sleep(0.5 * mesh.rank)
    watchdog.close()
    watchdog.close()
    mesh.close()
    return {"errors": errors}


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, dict[str, object]]]:
    with ExitStack() as stack:
        launches = {
            name: stack.enter_context(
                Launch(3, [case_steps], arguments={"what": what, "victim": victim})
            )
            for name, (what, victim, _) in SCENARIOS.items()
        }
        for name, launch in launches.items():
            for rank in range(3):
                launch.mark(rank, "running")
            what, victim, _ = SCENARIOS[name]
            if what.startswith("kill"):
                os.kill(launch.pid(victim), signal.SIGKILL)
            if what == "stop":
                os.kill(launch.pid(victim), signal.SIGSTOP)
        ended = {name: _outcome(launch, *SCENARIOS[name][:2]) for name, launch in launches.items()}
    for launch in launches.values():
        assert launch.alive() == []
    yield ended


def _outcome(launch: Launch, what: str, victim: int) -> dict[str, object]:
    expected = [rank for rank in range(3) if rank != victim or what not in ("kill", "stop")]
    statuses = {rank: launch.status(rank, timeout=30) for rank in expected}
    left = {launch.leader, launch.pid(victim)} if what == "stop" else {launch.leader}
    assert set(launch.alive()) <= left
    return {"statuses": statuses, "stderr": {rank: launch.stderr(rank) for rank in expected}}


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_survivor_ends_with_the_cause(outcomes, name) -> None:
    what, victim, cause = SCENARIOS[name]
    for rank, status in outcomes[name]["statuses"].items():
        if rank == victim and what in ("kill idle", "leave"):
            assert status == (1 if what == "leave" else -signal.SIGKILL)
            continue
        said = outcomes[name]["stderr"][rank]
        assert status == EXIT_STATUS, said
        assert f"rank {rank} of 3 ends itself: " in said
        assert cause in said.partition("ends itself: ")[2].splitlines()[0], said
        assert all(f"  rank {other}: request " in said for other in range(3))


def test_the_message_names_the_request_and_the_step_that_hang(outcomes) -> None:
    said = outcomes["rank 1 hangs in the step"]["stderr"].values()
    words = (
        r"request 21, step 2 of 4, has run 3\.\d s, past its deadline of 3 s: all ranks are in it"
    )
    assert all(re.search(words, text) for text in said)
    # The first to end says what rank 1 does; the others may see that it has ended.
    line = r"  rank 1: request 21, running for [\d.]+ s \(step 2 of 4\), last sign 0\."
    assert any(re.search(line, text) for text in said)


def test_nothing_happens_while_all_is_well() -> None:
    for got in run_cases(2, [case_well])["case_well"]:
        assert got["errors"] == ["refused", "not finite"]


NOW = 1000.0
IN_IT = (RUNNING, 5, 2.0, 0.1)  # state, request, seconds in that state, seconds since the last sign
AT_REST = (IDLE, 4, 9.0, 0.1)
GONE = (CLOSED, 4, 9.0, 9.0)
LATE = "request 5 has run 3.5 s, past its deadline of 3 s: "
# name: (who judges, what it knows of every rank, seconds since the store's answer, its loss, cause)
JUDGED = {
    "all well": (1, [IN_IT, IN_IT, IN_IT], 0.1, "", ""),
    "a silent rank": (
        *(1, [IN_IT, IN_IT, (RUNNING, 5, 2.0, 1.5)], 0.1, ""),
        "no sign of rank 2 for 1.5 s",
    ),
    "a silent store makes all ranks look silent": (
        *(0, [IN_IT, (RUNNING, 5, 2.0, 1.5), (RUNNING, 5, 2.0, 1.5)], 1.5, ""),
        "no sign of rank 0 for 1.5 s: its store (or torchrun's) does not answer",
    ),
    "a rank that has closed": (1, [AT_REST, AT_REST, GONE], 0.1, "", ""),
    "a lost store": (
        *(1, [AT_REST, AT_REST, AT_REST], 0.1, "reset by peer"),
        "no sign of rank 0: its store (or torchrun's) is gone: reset by peer",
    ),
    "a store lost after rank 0 has closed": (1, [GONE, AT_REST, AT_REST], 0.1, "reset", ""),
    "a failed rank": (
        *(1, [IN_IT, IN_IT, (FAILED, 5, 0.6, 0.1)], 0.1, ""),
        "rank 2 failed in request 5",
    ),
    "a rank that failed long before this request": (
        *(1, [IN_IT, (RUNNING, 5, 0.1, 0.1), (FAILED, 4, 9.0, 0.1)], 0.1, ""),
        "",
    ),
    "a failed rank, and one that may have died before": (
        *(1, [(RUNNING, 5, 2.0, 0.3), IN_IT, (FAILED, 5, 0.6, 0.1)], 0.1, ""),
        "",
    ),
    "a rank in another request": (
        *(1, [(RUNNING, 5, 3.5, 0.1), (RUNNING, 5, 3.5, 0.1), (RUNNING, 4, 3.5, 0.1)], 0.1, ""),
        LATE + "rank 2 is not in it (request 4, running)",
    ),
}


def _watchdog(rank: int, size: int = 3) -> Watchdog:
    """Of a launch that is not there: without threads, to be asked for its judgement."""
    mesh = SimpleNamespace(rank=rank, world_size=size, channel=None)
    return Watchdog(mesh, deadline=3.0, silence=1.0)  # type: ignore[arg-type]


def _know(watchdog: Watchdog, signs: list[tuple[str, int, float, float]], answered: float) -> None:
    watchdog._answered = NOW - answered
    watchdog._signs = [
        Sign(state=state, step=step, since=NOW - since, seen=NOW - seen)
        for state, step, since, seen in signs
    ]


@pytest.mark.parametrize("name", JUDGED)
def test_the_cause_follows_from_the_signs(name) -> None:
    rank, signs, answered, lost, cause = JUDGED[name]
    watchdog = _watchdog(rank)
    _know(watchdog, signs, answered)
    watchdog._lost = lost
    assert watchdog._cause(NOW) == cause


def test_a_longer_deadline_is_that_of_one_request() -> None:
    watchdog = _watchdog(0)
    watchdog.begin(1, deadline=600.0)
    watchdog.begin(2)
    _know(watchdog, [(RUNNING, 2, 3.5, 0.1)] * 3, answered=0.1)
    assert "past its deadline of 3 s" in watchdog._cause(NOW)


def test_a_note_does_not_start_the_deadline_again() -> None:
    watchdog = _watchdog(1)
    _know(watchdog, [(RUNNING, 5, 3.5, 0.1)] * 3, answered=0.1)
    watchdog.note("step 2 of 4")
    late = "request 5, step 2 of 4, has run 3.5 s, past its deadline of 3 s: all ranks are in it"
    assert watchdog._cause(NOW) == late


def test_a_rank_that_ends_itself_says_nothing_else() -> None:
    """Its main thread may come to the end of the request meanwhile."""
    watchdog = _watchdog(1)
    watchdog._set(ENDED, 5, "no sign of rank 2")
    watchdog.end()
    assert (watchdog._signs[1].state, watchdog._signs[1].text) == (ENDED, "no sign of rank 2")


def test_a_process_that_was_stopped_blames_nobody(monkeypatch) -> None:
    """Between two looks 9 s pass, in which no sign could come."""
    watchdog, clock, causes = _watchdog(1), [NOW], []
    _know(watchdog, [IN_IT] * 3, answered=0.1)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watchdog, "_end_process", causes.append)

    def wait(_: float) -> bool:
        clock[0] += 9.0 if clock[0] == NOW else 0.05
        return clock[0] > NOW + 9.1

    monkeypatch.setattr(watchdog._stop, "wait", wait)
    watchdog._judge()
    assert causes == []


def test_one_rank_has_no_watchdog_threads() -> None:
    watchdog = Watchdog(Mesh.single("cpu"), deadline=0.01, silence=0.01)
    with watchdog.step(0):
        time.sleep(0.05)
    watchdog.note("nothing")
    watchdog.close()
