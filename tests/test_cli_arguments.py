"""argv: numbers below zero, and what `--help` says of every flag."""

from __future__ import annotations

import argparse
import re

import pytest
from engine_fixtures import checkpoint
from PIL import Image

from cosmos3_fast.cli import COMMANDS, main, parser
from cosmos3_fast.cli.flags import DEFAULTS, join_numbers
from cosmos3_fast.config import SCHEDULES
from cosmos3_fast.processor import read_actions
from cosmos3_fast.processor.canvas import TIERS
from cosmos3_fast.processor.prompt import VIEW_SENTENCES

STATE = "-0.1,-0.2,0.3,-1.5,0.2,1.4,0.7,0.9"
JOINED = {
    "state": (["--state", STATE], [f"--state={STATE}"]),
    "exponent": (["--state", "-1e-3,0"], ["--state=-1e-3,0"]),
    "half": (["--guidance-interval", "-.5,900"], ["--guidance-interval=-.5,900"]),
    "abbreviated": (["--stat", "-1,2"], ["--stat=-1,2"]),
    "one number": (["--flow-shift", "-1e3"], ["--flow-shift=-1e3"]),
    "joined before": (["--state=-1,2", "-3,4"], ["--state=-1,2", "-3,4"]),
    "above zero": (["--state", "1,-2"], ["--state", "1,-2"]),
    "flags": (["--no-video", "--state", "-v"], ["--no-video", "--state", "-v"]),
    "behind the flags": (["--", "-1"], ["--", "-1"]),
    "first": (["-1,2"], ["-1,2"]),
}


@pytest.mark.parametrize(("argv", "want"), JOINED.values(), ids=JOINED)
def test_numbers_below_zero_belong_to_their_flag(argv, want):
    assert join_numbers(argv) == want


def test_a_state_whose_first_joint_is_below_zero(tmp_path):
    """As two words, as one, and turned about by nothing: the same rows."""
    Image.new("RGB", (320, 270), (200, 30, 30)).save(tmp_path / "a.png")
    base = ["run", "--checkpoint", str(checkpoint()), "--preset", "droid", "--no-video"]
    base += ["--steps", "1", "--image-size", "256", "--action-chunk-size", "4"]
    base += ["--image", str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    rows = []
    for state in (["--state", STATE], [f"--state={STATE}"], ["--state", STATE[1:]]):
        assert main([*base, *state]) == 0
        rows.append(read_actions(tmp_path / "out_action.json"))
    assert rows[0].equal(rows[1]) and not rows[0].equal(rows[2])


def test_an_interval_below_zero_is_refused_for_its_numbers(capsys):
    base = ["info", "--checkpoint", str(checkpoint()), "--domain-name", "umi"]
    flags = ["--guidance-scale", "3", "--guidance-interval", "-5,900"]
    assert main([*base, *flags]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(r"guidance_interval must be .*, got \(-5.0, 900.0\)", said)


def actions(command: str) -> list[argparse.Action]:
    choices = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr, index]
    return [a for a in choices[command]._actions if not isinstance(a, argparse._HelpAction)]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_of_every_flag_what_it_is_and_its_default(command):
    for action in actions(command):
        text, name = action.help or "", action.dest
        assert text, name
        if isinstance(action, argparse._StoreTrueAction) or action.required:
            continue
        default = DEFAULTS.get(name) if action.default is None else action.default
        if default not in (None, ""):
            assert re.search(rf"default: {re.escape(str(default))}[,)]|default: {default}$", text)
        elif name not in ("preset", "image", "video", "state", "action_file", "json"):
            assert "default: " in text, name


ALLOWED = {"image_size": (0, *TIERS), "view_point": VIEW_SENTENCES}


@pytest.mark.parametrize("name", ALLOWED)
def test_help_tells_the_values_that_a_flag_takes(name):
    (action,) = (action for action in actions("run") if action.dest == name)
    assert all(re.search(rf"\b{value}\b", action.help or "") for value in ALLOWED[name])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_can_be_printed(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and command in shown
    if command in ("run", "info"):
        assert f"{{{','.join(SCHEDULES)}}}" in shown
    if command == "bench":
        assert "rounded up to a multiple of 60" in " ".join(shown.split())
