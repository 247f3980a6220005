"""Ctrl-C ends a command with one line and status 130; a launch ends together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from cosmos3_fast import cli
from cosmos3_fast.cli import ending, main, tiny
from cosmos3_fast.cli.ending import interruptible, leave

# A command that waits to be interrupted, then waits again where it would clean up.
WAITS = """
import sys, time
from cosmos3_fast.cli import main, tiny

def work(args):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaning", flush=True)
        time.sleep(float(args.folder))

tiny.main = work
sys.exit(main(["make-tiny", sys.argv[1]]))
"""


@pytest.mark.parametrize("launched", [False, True], ids=["alone", "in a launch"])
def test_ctrl_c_is_one_line_and_status_130(launched):
    environment = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}
    environment |= {"TORCHELASTIC_RUN_ID": "a launch"} if launched else {}
    with subprocess.Popen(
        [sys.executable, "-c", WAITS, "0"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "cosmos3-fast make-tiny: interrupted\n")
    assert out == ("" if launched else "cleaning\n"), "a rank of a launch waits for nobody"


def test_an_interrupt_during_the_demo_names_the_demo(monkeypatch, capsys, tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.run, "main", interrupt)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "cosmos3-fast demo: interrupted\n"


def test_a_second_ctrl_c_ends_what_the_first_left_waiting():
    with subprocess.Popen(
        [sys.executable, "-c", WAITS, "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in ("ready\n", "cleaning\n"):
            assert process.stdout.readline() == line
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")


def test_an_interrupt_without_our_handler_is_said_too(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "main", interrupt)
    assert main(["make-tiny", "x"]) == 130
    assert capsys.readouterr().err == "cosmos3-fast make-tiny: interrupted\n"


def test_the_handler_is_set_in_the_main_thread_alone_and_taken_back():
    found = []

    def look():
        with interruptible("x"):
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    look()
    assert found[0] is signal.default_int_handler and found[1] is not found[0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_processes_of_a_launch_end_without_a_teardown(monkeypatch, capfd):
    class Ended(Exception):
        pass

    def end(status):
        raise Ended(status)

    order = []
    monkeypatch.setattr(ending, "leave_together", lambda: order.append("together"))
    monkeypatch.setattr(ending.os, "_exit", end)
    assert leave(2) == 2
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a launch")
    for flags in (["make-tiny", ""], ["make-tiny", "x", "--turbo"]):
        with pytest.raises(Ended, match="2"):
            cli.main(flags)
    assert order == ["together"] * 3
    assert "DIR must name a folder" in capfd.readouterr().err
