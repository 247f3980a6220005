"""Flags that change nothing say so in one warning each; flags that do are quiet."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from engine_fixtures import checkpoint
from PIL import Image

from cosmos3_fast.cli import main, parser
from cosmos3_fast.cli.flags import Settings
from cosmos3_fast.cli.idle import TABLE, warn_of_idle_flags
from cosmos3_fast.processor.actions import read_actions
from cosmos3_fast.sampler import sigmas

FORWARD = ("--mode", "forward_dynamics", "--action-file")
GUIDED = ("--guidance-scale", "3")
INTERVAL = "--guidance-interval"
DROID = ("--preset", "droid")
IMAGE = ("--image", "a.png")
# flags -> the one warning
IDLE = {
    "actions in policy": (
        ("--action-file", "rows.json"),
        "--action-file: no effect, --mode policy reads no actions",
    ),
    "actions in inverse dynamics": (
        ("--action-file", "rows.json", "--action-chunk-index", "0", "--mode", "inverse_dynamics"),
        "--action-file, --action-chunk-index: no effect, --mode inverse_dynamics reads no actions",
    ),
    "negative prompt": (
        ("--negative-prompt", "blurry"),
        "--negative-prompt: no effect, nothing is guided at --guidance-scale 1",
    ),
    "negative prompt and interval": (
        ("--negative-prompt", "", INTERVAL, "0,1000"),
        "--negative-prompt, --guidance-interval: no effect, nothing is guided at "
        "--guidance-scale 1",
    ),
    "metadata of the JSON prompt": (
        ("--no-prompt-metadata",),
        "--no-prompt-metadata: no effect, the JSON prompt always holds its metadata "
        "(--prompt-format plain need not)",
    ),
    "view of a bare prompt": (
        ("--no-prompt-metadata", "--prompt-format", "plain", "--view-point", "ego_view"),
        "--view-point: no effect, a plain prompt with --no-prompt-metadata is the text alone",
    ),
    "normalisation without statistics": (
        ("--action-normalization", "minmax"),
        "--action-normalization: no effect without --action-stats-path",
    ),
    "two schedules": (
        ("--schedule", "flow", "--use-karras-sigmas", "true"),
        "--use-karras-sigmas: no effect, --schedule flow names the schedule",
    ),
    "height beside a tier": (
        (*IMAGE, "--height", "480"),
        "--height: no effect, the canvas is of tier 480 (--image-size 0 takes height x width)",
    ),
    "sides of a mosaic": (
        (*DROID, "--height", "540", "--width", "640", "--image-size", "256"),
        "--height, --width: no effect, the canvas is of tier 256 "
        "(--image-size 0 takes height x width)",
    ),
}
BUSY = {
    "nothing": (),
    "an observation": IMAGE,
    "the preset": (*DROID, *IMAGE),
    "actions": (*FORWARD, "rows.json"),
    "a chunk": (*FORWARD, "chunks.json", "--action-chunk-index", "0"),
    "guidance": (*GUIDED, "--negative-prompt", "blurry", INTERVAL, "0,1000"),
    "the preset's guidance": (*DROID, "--negative-prompt", "blurry"),
    "interval of one step": (*GUIDED, INTERVAL, "623.5,624.5"),
    "a plain prompt": ("--no-prompt-metadata", "--prompt-format", "plain"),
    "views": ("--prompt-format", "plain", "--view-point", "ego_view"),
    "statistics": ("--action-normalization", "minmax", "--action-stats-path", "s"),
    "one schedule": ("--use-karras-sigmas", "true"),
    "one schedule twice": ("--schedule", "karras", "--use-karras-sigmas", "true"),
    "a schedule, the files' choice": ("--schedule", "flow", "--use-karras-sigmas", "auto"),
    "the preset's schedule replaced": (*DROID, "--use-karras-sigmas", "true"),
    "a shift": ("--flow-shift", "5"),
    "a canvas": (*IMAGE, "--height", "480", "--width", "640", "--image-size", "0"),
    "a blank picture": ("--height", "480", "--width", "640"),
}


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [[0.1] * 10] * 16
    Path("rows.json").write_text(json.dumps(rows))
    Path("chunks.json").write_text(json.dumps({"action_chunks": [rows]}))
    Image.new("RGB", (64, 48)).save("a.png")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def said(caplog: pytest.LogCaptureFixture, *flags: str, schedule: str = "native") -> list[str]:
    of_run = {"--action-file", "--action-chunk-index"} & set(flags)
    asked = Settings.of(
        parser().parse_args(["run" if of_run else "info", "--checkpoint", "c", *flags])
    )
    warn_of_idle_flags(asked, sigmas(schedule, 4, shift=5.0, sigma_min=0.147, sigma_max=200))
    return warnings(caplog)


@pytest.mark.parametrize(("flags", "words"), IDLE.values(), ids=IDLE)
def test_a_flag_without_effect_says_so(caplog, flags, words):
    assert said(caplog, *flags) == [words]


@pytest.mark.parametrize("flags", BUSY.values(), ids=BUSY)
def test_a_flag_with_an_effect_is_quiet(caplog, flags):
    assert said(caplog, *flags) == []


def test_karras_has_no_shift(caplog):
    words = "--flow-shift: no effect, the karras schedule has no shift"
    assert said(caplog, "--flow-shift", "5", schedule="karras") == [words]


def test_every_row_of_the_table_is_tested():
    tested = [words.split(": ", 1)[1].split(" ")[:4] for _, words in IDLE.values()]
    rows = [why.split(" ")[:4] for _, _, why in TABLE if "karras schedule" not in why]

    def matches(row: list[str], one: list[str]) -> bool:
        return all(a == b or "{" in a for a, b in zip(row, one, strict=True))

    assert [row for row in rows if not any(matches(row, one) for one in tested)] == []


def test_an_index_without_chunks_says_so(caplog):
    assert read_actions("rows.json", 0).shape == (16, 10)
    (line,) = warnings(caplog)
    assert line == "'rows.json' holds no action_chunks: chunk 0 of what it holds is all"
    assert read_actions("chunks.json", 0).shape == read_actions("rows.json").shape
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("command", ["run", "info"])
def test_an_interval_without_a_timestep_is_said_once(caplog, command):
    """By the engine where there is one."""
    small = ["--image-size", "256", "--action-chunk-size", "4", "--domain-name", "droid_lerobot"]
    flags = [*IMAGE, *GUIDED, INTERVAL, "0.2,0.8", "--steps", "2"]
    flags += ["--out", "out", "--no-video"] if command == "run" else []
    assert main([command, "--checkpoint", str(checkpoint()), *small, *flags]) == 0
    (line,) = warnings(caplog)
    assert "no step is guided" in line and re.search(r"the timesteps \d+ to \d+", line)


def test_run_and_info_warn_once_and_only_after_the_request_was_checked(caplog, capsys):
    small = ["--image-size", "256", "--action-chunk-size", "4", "--domain-name", "droid_lerobot"]
    base = ["--checkpoint", str(checkpoint()), *small, "--image", "a.png"]
    flags = ["--height", "64", "--steps", "1"]
    assert main(["run", *base, *flags, "--out", "out", "--no-video"]) == 0
    assert len(warnings(caplog)) == 1
    assert main(["info", *base, *flags]) == 0
    assert len(warnings(caplog)) == 2
    assert main(["run", *base, *flags, "--steps", "0", "--out", "out", "--no-video"]) == 2
    assert len(warnings(caplog)) == 2
    assert "num_inference_steps" in capsys.readouterr().err
