"""Full disks, a standard output that takes nothing, log lines beside a progress bar."""

from __future__ import annotations

import errno
import io
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
from engine_fixtures import checkpoint
from PIL import Image

from cosmos3_fast.cli import bench, main, output
from cosmos3_fast.engine import Engine

LIMIT = 100_000  # bytes a file may have: the JSON files fit, the weights do not
COMMAND = [sys.executable, "-m", "cosmos3_fast"]
SMALL = (
    "--image-size", "256", "--action-chunk-size", "4", "--steps", "2", "--no-video",
    "--domain-name", "umi", "--device", "cpu",
)  # fmt: skip
INFO = ["info", "--domain-name", "umi", "--device", "cpu"]
FULL = os.strerror(errno.ENOSPC)


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))


def environment(**more: str) -> dict[str, str]:
    """Without coverage, whose own file would be cut, and with a buffer before standard output."""
    away = ("COVERAGE", "PYTHONUNBUFFERED")
    return {k: v for k, v in os.environ.items() if not any(name in k for name in away)} | more


def said_to(stdout: int | IO[str], *flags: str) -> tuple[int, str]:
    """Status and standard error of a command whose lines go there."""
    done = subprocess.run(
        [*COMMAND, *flags],
        env=environment(),
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stderr


def closed_pipe() -> int:
    reads, writes = os.pipe()
    os.close(reads)
    return writes


@pytest.mark.parametrize("command", ["make-tiny", "bench"])
def test_weights_that_do_not_fit_on_the_disk_are_one_line(tmp_path, command):
    flags = {"make-tiny": [f"{tmp_path}/tiny"], "bench": ["--tiny", "--device", "cpu"]}[command]
    done = subprocess.run(
        [*COMMAND, command, *flags],
        env=environment(TMPDIR=str(tmp_path)),
        preexec_fn=limited,
        capture_output=True,
        text=True,
        timeout=120,
    )
    (said,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert said.startswith(f"cosmos3-fast {command}: cannot write {tmp_path}/")
    assert "File too large" in said
    assert command == "make-tiny" or list(tmp_path.iterdir()) == [], "the folder is left behind"


def test_a_bench_without_a_temporary_folder_is_one_line(monkeypatch, capsys):
    def refuse(**_):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(output.tempfile, "TemporaryDirectory", refuse)
    assert main(["bench", "--tiny", "--device", "cpu"]) == 2
    said = "cannot write a temporary folder: No usable temporary directory found in ['/tmp']"
    assert capsys.readouterr().err == f"cosmos3-fast bench: {said}\n"


def flags_of(name: str) -> list[str]:
    return [name] if name == "--help" else [*INFO, "--checkpoint", str(checkpoint())]


@pytest.mark.parametrize("name", ["info", "--help"])
def test_a_full_standard_output_is_one_line_and_status_2(name):
    with open("/dev/full", "w") as full:
        found = said_to(full, *flags_of(name))
    assert found == (2, f"cosmos3-fast {name}: cannot write standard output: {FULL}\n")


@pytest.mark.parametrize("name", ["info", "--help"])
def test_a_pipe_that_nobody_reads_ends_quietly_with_status_141(name):
    assert said_to(closed_pipe(), *flags_of(name)) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(("target", "status"), [("full", 2), ("pipe", 141)])
def test_run_has_written_its_files_when_its_lines_cannot_be(tmp_path, target, status):
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "a.png")
    place = os.open("/dev/full", os.O_WRONLY) if target == "full" else closed_pipe()
    flags = ["run", "--checkpoint", str(checkpoint()), "--out", f"{tmp_path}/out", *SMALL]
    ended, said = said_to(place, *flags, "--image", str(tmp_path / "a.png"))
    lines = [line for line in said.splitlines() if line.startswith("cosmos3-fast ")]
    want = f"cosmos3-fast run: cannot write standard output: {FULL}"
    assert ended == status and lines == ([want] if target == "full" else [])
    assert "Traceback" not in said and "Exception" not in said
    assert (tmp_path / "out_action.json").is_file()


def test_a_warning_during_the_steps_stands_on_a_line_of_its_own(tmp_path, monkeypatch):
    step = Engine.step

    def warned(self, request, on_step):
        def noted(index):
            on_step(index)
            logging.getLogger("cosmos3_fast.test").warning("late")

        return step(self, request, on_step=noted)

    monkeypatch.setattr(Engine, "step", warned)
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    handler = output.AboveBars(shown)
    logging.getLogger().addHandler(handler)
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    flags = ["--image", str(tmp_path / "a.png"), *SMALL]
    try:
        base = ["run", "--checkpoint", str(checkpoint()), "--out", f"{tmp_path}/out"]
        assert main([*base, *flags]) == 0
    finally:
        logging.getLogger().removeHandler(handler)
    pieces = shown.getvalue().replace("\r", "\n").split("\n")
    assert pieces.count("late") == 2 and sum("late" in piece for piece in pieces) == 2
    assert any("2/2" in piece for piece in pieces)


def test_benchs_lines_go_out_at_once(capsys):
    output.tell("a", 1)
    assert capsys.readouterr().out == "a 1\n"
    assert Path(bench.__file__).read_text().count("print(") == 0
