"""Captions byte for byte: JSON against diffusers, plain against sentences written by hand."""

from __future__ import annotations

import json

import pytest
from diffusers import Cosmos3OmniPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos3_fast.processor.canvas import TIERS
from cosmos3_fast.processor.droid import DROID
from cosmos3_fast.processor.prompt import (
    VIEW_SENTENCES,
    Caption,
    aspect_ratio,
    framing,
    json_prompt,
    plain_prompt,
)

TEXTS = st.one_of(
    st.sampled_from(["", "Pick up the cup", " Stop! ", "Is it there?", "a.b", 'é 🤖 "q" \\ \n']),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
)
CANVASES = sorted({size for sizes in TIERS.values() for size in sizes} | {(256, 448), (16, 16)})


@settings(max_examples=150, deadline=None)
@given(
    text=TEXTS,
    view=st.sampled_from([None, *VIEW_SENTENCES]),
    frames=st.integers(2, 4000),
    fps=st.sampled_from([1.0, 5.0, 10.0, 15.0, 24.0, 29.97, 60.0]),
    canvas=st.sampled_from(CANVASES),
)
def test_json_prompt_equals_diffusers(text, view, frames, fps, canvas):
    expected = Cosmos3OmniPipeline._build_action_json_prompt(
        text, view_point=view, num_frames=frames, fps=fps, height=canvas[0], width=canvas[1]
    )
    assert json_prompt(text, framing(view, None), frames, fps, canvas) == expected


def test_json_prompt_of_the_droid_recipe():
    droid = DROID()
    caption = Caption("json", droid.view_point, droid.view_description, 33, droid.fps)
    assert caption("put the block in the bowl ", (544, 736)) == (
        '{"cinematography": {"framing": "This video contains concatenated views from multiple '
        "camera perspectives. The top row is from the wrist-mounted camera. The bottom row "
        "contains two horizontally concatenated third-person perspective views of the scene from "
        'opposite sides, with the robot visible."}, "actions": [{"time": "0:00-0:02", '
        '"description": "put the block in the bowl."}], "duration": "2s", "fps": 15.0, '
        '"resolution": {"H": 544, "W": 736}, "aspect_ratio": "4,3"}'
    )


def test_an_empty_description_stays_empty():
    prompt = json.loads(json_prompt("  ", "", 17, 24.0, (480, 832)))
    assert prompt["actions"] == [{"time": "0:00-0:01", "description": ""}]
    assert "cinematography" not in prompt


def test_half_seconds_round_to_even_in_the_time_and_down_in_the_duration():
    prompts = [json.loads(json_prompt("x", "", n, 2.0, (16, 16))) for n in (3, 5, 125)]
    assert [p["actions"][0]["time"] for p in prompts] == ["0:00-0:02", "0:00-0:02", "0:00-1:02"]
    assert [p["duration"] for p in prompts] == ["1s", "2s", "62s"]


@pytest.mark.parametrize("tier", TIERS)
def test_aspects_of_the_canvases(tier):
    assert [aspect_ratio(*size) for size in TIERS[tier]] == ["1,1", "4,3", "3,4", "16,9", "9,16"]


EGO = VIEW_SENTENCES["ego_view"]
METADATA = "The video is 0.0 seconds long and is of 24 FPS. This video is of 480x832 resolution."
PLAIN = {
    "no full stop": ("Pick up the cup", f"Pick up the cup. {EGO} {METADATA}"),
    "full stop": ("Pick up the cup. \n", f"Pick up the cup. {EGO} {METADATA}"),
    "exclamation": ("Go!", f"Go!. {EGO} {METADATA}"),
    "leading space": (" Go.", f" Go. {EGO} {METADATA}"),
    "empty": ("", f"{EGO} {METADATA}"),
}


@pytest.mark.parametrize(("text", "expected"), PLAIN.values(), ids=PLAIN)
def test_plain_prompt(text, expected):
    assert plain_prompt(text, EGO, 17, 24.0, (480, 832)) == expected


def test_plain_prompt_of_the_droid_recipe():
    droid = DROID()
    caption = Caption("plain", droid.view_point, droid.view_description + " ", 33, droid.fps)
    assert caption("stack the blocks", (544, 736)) == (
        "stack the blocks. This video contains concatenated views from multiple camera "
        "perspectives. The top row is from the wrist-mounted camera. The bottom row contains two "
        "horizontally concatenated third-person perspective views of the scene from opposite "
        "sides, with the robot visible. The video is 2.0 seconds long and is of 15 FPS. This "
        "video is of 544x736 resolution."
    )


def test_plain_prompt_without_a_view_or_metadata():
    assert plain_prompt("Go.", "", 17, 24.0, (480, 832)) == f"Go. {METADATA}"
    assert Caption("plain", "ego_view", None, 17, 24.0, False)(" Go ", (480, 832)) == " Go "


def test_frames_a_second_are_rounded_in_the_plain_prompt():
    caption = plain_prompt("Go.", "", 90, 29.97, (480, 832))
    assert caption.startswith("Go. The video is 3.0 seconds long and is of 30 FPS. ")


def test_the_json_prompt_keeps_its_metadata():
    """`append_metadata` is the plain prompt's."""
    bare, whole = (Caption("json", "ego_view", None, 17, 24.0, flag) for flag in (False, True))
    assert (
        bare("Go.", (480, 832))
        == whole("Go.", (480, 832))
        == json_prompt("Go.", EGO, 17, 24.0, (480, 832))
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("yaml", "ego_view", None, 17, 24.0), "prompt_format 'yaml'.*'plain', 'json'"),
        (("json", "top_view", None, 17, 24.0), "view_point 'top_view'.*ego_view"),
        (("json", "ego_view", None, 17, 0.0), "fps must be positive and finite, got 0.0"),
        (("json", "ego_view", None, 17, float("nan")), "fps must be positive and finite, got nan"),
        (("json", "ego_view", None, 17, float("inf")), "fps must be positive and finite, got inf"),
    ],
    ids=["format", "view", "zero fps", "nan fps", "infinite fps"],
)
def test_bad_caption_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Caption(*arguments)
