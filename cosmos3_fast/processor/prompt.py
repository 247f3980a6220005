"""The two prompt forms that the action model was trained on, byte-exact (docs/model.md, 5)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

VIEW_SENTENCES = {
    "ego_view": "This video is captured from a first-person perspective looking at the scene.",
    "third_person_view": "This video is captured from a third-person perspective looking towards "
    "the agent from the front.",
    "wrist_view": "This video is captured from a wrist-mounted camera.",
    "concat_view": "This video contains concatenated views from multiple camera perspectives.",
}
ASPECTS = ("1,1", "4,3", "3,4", "16,9", "9,16")
FORMATS = ("plain", "json")


def framing(view_point: str | None, view_description: str | None) -> str:
    """View sentence, then the view description; empty without a view point."""
    if view_point is None:
        return ""
    description = (view_description or "").rstrip()
    return VIEW_SENTENCES[view_point] + (f" {description}" if description else "")


def aspect_ratio(height: int, width: int) -> str:
    """The nearest of the five aspects as "W,H"."""

    def distance(name: str) -> float:
        w, h = name.split(",")
        return abs(int(w) / int(h) - width / height)

    return min(ASPECTS, key=distance)


def json_prompt(text: str, view: str, frames: int, fps: float, canvas: tuple[int, int]) -> str:
    """The structured caption: `json.dumps` defaults, keys in the trained order.

    `view` is `framing()`'s text, `frames` = action chunk + 1, `canvas` (H, W). An empty text
    stays empty.
    """
    seconds = frames / fps
    minutes, rest = divmod(round(seconds), 60)
    description = text.strip()
    if description and not description.endswith((".", "!", "?")):
        description += "."
    prompt: dict[str, Any] = {"cinematography": {"framing": view}} if view else {}
    prompt["actions"] = [{"time": f"0:00-{minutes}:{rest:02d}", "description": description}]
    prompt["duration"] = f"{int(seconds)}s"
    prompt["fps"] = float(fps)
    prompt["resolution"] = {"H": canvas[0], "W": canvas[1]}
    prompt["aspect_ratio"] = aspect_ratio(*canvas)
    return json.dumps(prompt)


def plain_prompt(text: str, view: str, frames: int, fps: float, canvas: tuple[int, int]) -> str:
    """Caption, view, duration and resolution as sentences; arguments as in `json_prompt`."""
    caption = text.rstrip()
    sentences = (
        view,
        f"The video is {int(frames / fps):.1f} seconds long and is of {fps:.0f} FPS.",
        f"This video is of {canvas[0]}x{canvas[1]} resolution.",
    )
    for sentence in filter(None, sentences):
        separator = "" if not caption else " " if caption.endswith(".") else ". "
        caption += separator + sentence
    return caption


@dataclass(frozen=True)
class Caption:
    """Builds the caption of a request: call (text, canvas (H, W)) -> str.

    `frames` is action chunk + 1. Without `append_metadata` a plain caption is the text as it is.
    ValueError for an unknown format or view point, and for fps that is not positive and finite.
    """

    format: str
    view_point: str | None
    view_description: str | None
    frames: int
    fps: float
    append_metadata: bool = True

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"prompt_format {self.format!r}; expected one of {list(FORMATS)}")
        if self.view_point is not None and self.view_point not in VIEW_SENTENCES:
            raise ValueError(
                f"view_point {self.view_point!r}; expected one of {list(VIEW_SENTENCES)} or None"
            )
        if not (self.fps > 0 and math.isfinite(self.fps)):
            raise ValueError(f"fps must be positive and finite, got {self.fps}")

    def __call__(self, text: str, canvas: tuple[int, int]) -> str:
        view = framing(self.view_point, self.view_description)
        if self.format == "json":
            return json_prompt(text, view, self.frames, self.fps, canvas)
        if not self.append_metadata:
            return text
        return plain_prompt(text, view, self.frames, self.fps, canvas)
