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

import pytest
import torch
from ranks import Launch, argument, reached, run_cases

from cosmos3_fast.config import ParallelConfig
from cosmos3_fast.parallel import Mesh
from cosmos3_fast.watchdog import EXIT_STATUS, Watchdog

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


def test_one_rank_has_no_watchdog_threads() -> None:
    watchdog = Watchdog(Mesh.single("cpu"), deadline=0.01, silence=0.01)
    with watchdog.step(0):
        time.sleep(0.05)
    watchdog.note("nothing")
    watchdog.close()
