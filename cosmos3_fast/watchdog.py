"""A rank that dies or hangs ends all ranks, with its name.

NCCL's own watchdog does not see captured collectives, and a main thread inside a CUDA wait runs no
signal handler. So each rank has two threads: one writes this rank's sign (a count, its step) to the
launch's store and reads the others', one judges. Only the first touches the store, which blocks
when its host is stopped. Times are this process's own clock: when did a sign last *change* here.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.distributed as dist

from cosmos3_fast.launch import Channel
from cosmos3_fast.parallel import Mesh

EXIT_STATUS = 75  # EX_TEMPFAIL: this rank is well, the launch is not
IDLE, RUNNING, FAILED, ENDED, CLOSED = "idle", "running", "failed", "ended", "closed"


@dataclass
class Sign:
    """What is known of a rank: its state, and when its count last changed (time.monotonic)."""

    count: int = 0
    state: str = IDLE
    step: int = -1
    text: str = ""
    seen: float = field(default_factory=time.monotonic)  # last change of the count
    since: float = field(default_factory=time.monotonic)  # last change of anything else

    def beat(self, count: int) -> None:
        """A sign came: of a peer when its count changed."""
        if count != self.count:
            self.count, self.seen = count, time.monotonic()

    def say(self, state: str, step: int, text: str) -> None:
        """Another thread may read between these lines: the time first, the state last."""
        if (state, step) != (self.state, self.step):
            self.since = time.monotonic()
        self.text, self.step, self.state = text, step, state

    def describe(self, now: float) -> str:
        """One line for the message."""
        asked = "no request yet" if self.step < 0 else f"request {self.step}"
        text = f" ({self.text})" if self.text else ""
        state = f"{self.state} for {now - self.since:.1f} s{text}"
        return f"{asked}, {state}, last sign {now - self.seen:.1f} s ago"


class Watchdog:
    """Watches over the ranks of a mesh from construction to `close`. Does nothing at size 1.

    A step here is one request of the engine, from the agreement on it to its result; its denoising
    steps are parts of it (`note`). `deadline`: seconds one step may take. `silence`: seconds
    without a sign after which a rank counts as dead. Construction
    is a collective (a barrier on the host). One main thread uses `begin`, `end`, `step`; every end
    of the process happens in the judging thread, by os._exit(EXIT_STATUS) after a message on
    stderr.
    """

    def __init__(self, mesh: Mesh, *, deadline: float = 30.0, silence: float = 10.0) -> None:
        self.rank, self.size = mesh.rank, mesh.world_size
        self.deadline = deadline
        self.silence = silence
        self.period = min(0.5, self.silence / 8)
        self._limit = deadline
        self._signs = [Sign() for _ in range(self.size)]
        self._lost = ""  # why the store is gone
        self._answered = time.monotonic()  # when the store last did
        self._rounds = 0  # completed exchanges with the store
        self._told: object = ""  # the state that the store has of this rank
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        if mesh.channel is not None:
            self._channel: Channel = mesh.channel
            mesh.barrier()
            self._answered = time.monotonic()
            self._start()

    @contextmanager
    def step(self, step: int, deadline: float | None = None) -> Iterator[None]:
        """A step that all ranks run: a deadline over the block (None: the constructor's).

        An error marks this rank as failed and waits for a few signs of the others before it goes
        on: when a collective broke because a rank died, the process ends here with that rank's
        name.
        """
        self.begin(step, deadline)
        try:
            yield
        except BaseException as error:
            self._set(FAILED, step, f"{type(error).__name__}: {error}"[:300])
            self._await_signs()
            raise
        self.end()

    def begin(self, step: int, deadline: float | None = None) -> None:
        """A step starts here; its deadline runs until `end`."""
        self._limit = self.deadline if deadline is None else deadline
        self._set(RUNNING, step, "")

    def note(self, text: str) -> None:
        """Name the part of the step that the host is in now, for the message. Costs no exchange.

        The device may be behind: the host issues captured work without waiting for it.
        """
        self._signs[self.rank].text = text

    def end(self) -> None:
        """The step is over."""
        self._set(IDLE, self._signs[self.rank].step, "")

    def close(self) -> None:
        """Stop watching: before `mesh.close()`. Waits (at most `silence`) for the others to do so
        too.
        """
        if not self._threads:
            return
        self._set(CLOSED, self._signs[self.rank].step, self._signs[self.rank].text)
        # Rank 0 may host the store: it must not leave before the others have seen that it closed.
        self._wait_until(lambda: self._all_closed() or bool(self._lost), self.silence)
        # The last to close sees at once that all have, and the others wait to be told.
        self._wait_until(lambda: self._told == CLOSED or bool(self._lost), self.silence)
        self._stop.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(timeout=2 * self.period)
        self._threads = []

    def _start(self) -> None:
        # Both are daemons: the store may never answer again, and the process must still be able to
        # end.
        for name, body in (("signs", self._exchange), ("judge", self._judge)):
            thread = threading.Thread(target=body, name=f"cosmos3-fast {name}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _set(self, state: str, step: int, text: str) -> None:
        own = self._signs[self.rank]
        if own.state != ENDED:
            own.say(state, step, text)
        if state in (FAILED, ENDED, CLOSED):  # the rest can wait for the next period
            self._wake.set()

    def _exchange(self) -> None:
        """Thread: my sign out, the others' in, every period and at once when I fail or close."""
        store = self._channel.watch
        keys = [f"sign/{rank}" for rank in range(self.size)]
        own = self._signs[self.rank]
        try:
            while not self._stop.is_set():
                self._wake.clear()
                own.beat(own.count + 1)
                sign = [own.count, own.state, own.step, own.text]
                store.set(keys[self.rank], json.dumps(sign))
                self._told = sign[1]
                values = store.multi_get(keys)
                self._answered = time.monotonic()
                for rank, value in enumerate(values):
                    if rank != self.rank:
                        count, state, step, text = json.loads(value)
                        self._signs[rank].say(state, step, text)
                        self._signs[rank].beat(count)
                self._rounds += 1
                self._wake.wait(self.period)
        except (dist.DistError, RuntimeError) as error:
            self._lost = str(error).splitlines()[0]

    def _judge(self) -> None:
        """Thread: end the process as soon as there is a cause."""
        last = time.monotonic()
        while not self._stop.wait(self.period / 2):
            now = time.monotonic()
            if now - last > self.silence / 2:
                self._forgive(now)  # this process itself was stopped: nobody else is to blame yet
            last = now
            cause = self._cause(now)
            if cause and not self._stop.is_set():
                self._end_process(cause)

    def _forgive(self, now: float) -> None:
        self._answered = now
        for sign in self._signs:
            sign.seen = sign.since = now

    def _cause(self, now: float) -> str:
        """Why the process must end now; "" for no reason."""
        others = [(rank, sign) for rank, sign in enumerate(self._signs) if rank != self.rank]
        own = self._signs[self.rank]
        for _, sign in others:
            if sign.state == ENDED:
                return sign.text
        if own.state == CLOSED:
            return ""
        for rank, sign in others:
            if sign.state == CLOSED:
                continue
            if now - sign.seen > self.silence and now - self._answered < self.silence / 2:
                failed = f"; it failed in request {sign.step}: {sign.text}"
                why = failed if sign.state == FAILED else ""
                return f"no sign of rank {rank} for {now - sign.seen:.1f} s{why}"
        if self._lost and self._signs[0].state != CLOSED:
            return f"no sign of rank 0: its store (or torchrun's) is gone: {self._lost}"
        if now - self._answered > self.silence and self._signs[0].state != CLOSED:
            silent = now - self._answered
            return (
                f"no sign of rank 0 for {silent:.1f} s: its store (or torchrun's) does not answer"
            )
        if own.state != RUNNING:
            return ""
        running = now - own.since
        # A rank may have failed because another one died: then that one will be silent soon.
        doubt = any(now - s.seen > 2 * self.period for _, s in others if s.state != CLOSED)
        for rank, sign in others if not doubt else ():
            if sign.state in (FAILED, CLOSED) and min(now - sign.since, running) > self.silence / 2:
                why = f": {sign.text}" if sign.text else ""
                return f"rank {rank} {sign.state} in request {sign.step}{why}"
        if running > self._limit:
            return self._late(now, running)
        return ""

    def _late(self, now: float, running: float) -> str:
        """The step passed its deadline: name who keeps it."""
        own = self._signs[self.rank]
        part = f", {own.text}," if own.text else ""
        text = (
            f"request {own.step}{part} has run {running:.1f} s, "
            f"past its deadline of {self._limit:g} s: "
        )
        others = [(rank, sign) for rank, sign in enumerate(self._signs) if rank != self.rank]
        rank, oldest = min(others, key=lambda item: item[1].seen)
        if now - oldest.seen > 4 * self.period:
            return f"{text}no sign of rank {rank} for {now - oldest.seen:.1f} s"
        for rank, sign in others:
            if sign.state != RUNNING or sign.step != own.step:
                why = f": {sign.text}" if sign.text else ""
                return f"{text}rank {rank} is not in it (request {sign.step}, {sign.state}{why})"
        return f"{text}all ranks are in it"

    def _end_process(self, cause: str) -> None:
        now = time.monotonic()
        lines = [f"cosmos3-fast: rank {self.rank} of {self.size} ends itself: {cause}"]
        lines += [f"  rank {rank}: {sign.describe(now)}" for rank, sign in enumerate(self._signs)]
        os.write(
            2, ("\n".join(lines) + "\n").encode()
        )  # the main thread may hold sys.stderr's lock
        self._set(ENDED, self._signs[self.rank].step, cause)
        rounds = self._rounds
        # The others say the same cause, also when the store ends with this process.
        self._wait_until(lambda: self._rounds >= rounds + 2 or bool(self._lost), 2 * self.period)
        if self.rank == 0 and not self._lost:
            time.sleep(2 * self.period)
        os._exit(EXIT_STATUS)

    def _await_signs(self) -> None:
        """Return when every other rank has given two new signs; else the judge ends the process."""
        if not self._threads:
            return
        counts = [sign.count for sign in self._signs]
        self._wait_until(
            lambda: all(
                sign.count >= count + 2 or sign.state == CLOSED
                for sign, count in zip(self._signs, counts, strict=True)
            ),
            self.silence + 4 * self.period,
        )

    def _all_closed(self) -> bool:
        return all(sign.state in (CLOSED, ENDED) for sign in self._signs)

    def _wait_until(self, condition: Callable[[], bool], limit: float) -> None:
        stop = time.monotonic() + limit
        while not condition() and time.monotonic() < stop:
            time.sleep(self.period / 8)
