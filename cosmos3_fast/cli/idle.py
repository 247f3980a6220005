"""Flags that were given and change nothing in the request at hand: one warning each."""

from __future__ import annotations

import logging
from collections.abc import Callable

from cosmos3_fast.cli.flags import KARRAS, Settings
from cosmos3_fast.sampler import Schedule, resolve_schedule

log = logging.getLogger(__name__)
Idle = Callable[[Settings, Schedule], bool]


def _forward(asked: Settings) -> bool:
    return bool(asked.args.mode == "forward_dynamics")


def _guided(asked: Settings) -> bool:
    return bool(asked.values["guidance_scale"] != 1)


def _overruled(asked: Settings) -> bool:
    """Whether --use-karras-sigmas asks for another schedule than --schedule names."""
    karras = KARRAS[asked.args.use_karras_sigmas]
    return karras is not None and asked.args.schedule not in (
        None,
        resolve_schedule(None, karras, {}),
    )


def _sides_are_the_tiers(asked: Settings) -> bool:
    """`info` without an observation takes a blank picture of height x width."""
    observed = any(map(asked.given, ("image", "video", "preset")))
    return observed and bool(asked.values["image_size"])


# flags, when none of them changes anything, what to say of it
TABLE: tuple[tuple[tuple[str, ...], Idle, str], ...] = (
    (
        ("action_file", "action_chunk_index"),
        lambda asked, _: not _forward(asked),
        "no effect, --mode {mode} reads no actions",
    ),
    (
        ("negative_prompt", "guidance_interval"),
        lambda asked, _: not _guided(asked),
        "no effect, nothing is guided at --guidance-scale 1",
    ),
    (
        ("no_prompt_metadata",),
        lambda asked, _: bool(asked.args.prompt_format == "json"),
        "no effect, the JSON prompt always holds its metadata (--prompt-format plain need not)",
    ),
    (
        ("view_point", "view_description"),
        lambda asked, _: asked.args.prompt_format == "plain" and asked.args.no_prompt_metadata,
        "no effect, a plain prompt with --no-prompt-metadata is the text alone",
    ),
    (
        ("action_normalization",),
        lambda asked, _: asked.args.action_stats_path is None,
        "no effect without --action-stats-path",
    ),
    (
        ("use_karras_sigmas",),
        lambda asked, _: _overruled(asked),
        "no effect, --schedule {schedule} names the schedule",
    ),
    (
        ("flow_shift",),
        lambda _, schedule: schedule.name == "karras",
        "no effect, the karras schedule has no shift",
    ),
    (
        ("height", "width"),
        lambda asked, _: _sides_are_the_tiers(asked),
        "no effect, the canvas is of tier {image_size} (--image-size 0 takes height x width)",
    ),
)


def warn_of_idle_flags(asked: Settings, schedule: Schedule) -> None:
    """Log a line for each row of the table that applies. The request has been checked, its files
    have been read.
    """
    words = asked.values | {"mode": asked.args.mode}
    for names, idle, why in TABLE:
        flags = [f"--{name.replace('_', '-')}" for name in names if asked.given(name)]
        if flags and idle(asked, schedule):
            log.warning("%s: %s", ", ".join(flags), why.format(**words))
