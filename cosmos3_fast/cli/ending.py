"""How the command ends before its time: interrupted, or together with the others of a launch."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from cosmos3_fast.launch import leave_together

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


@contextmanager
def interruptible(words: str) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt in here, a second one ends the process at once.

    In a launch the first one does, after `words` on stderr: the others may be anywhere in a
    collective with this rank, so an orderly end would wait for them.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: _interrupt(words))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(words: str) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    if dist.is_torchelastic_launched():
        os.write(2, f"{words}\n".encode())  # sys.stderr may be in use beneath this handler
        os._exit(INTERRUPTED)
    raise KeyboardInterrupt


def leave(status: int) -> int:
    """`status`, once every process of a torchrun launch has come here; then they end at once.

    torchrun sends SIGTERM to whoever still runs when it sees the first one gone, and looks ten
    times a second: the interpreter's teardown takes longer and is skipped.
    """
    leave_together()
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
