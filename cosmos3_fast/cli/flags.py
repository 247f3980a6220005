"""Flags shared by `run` and `info`, and the objects they stand for. Names and defaults are the
example script's.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cosmos3_fast.config import (
    SCHEDULES,
    Cosmos3PolicyWNArgs,
    DeviceConfig,
    EngineArgs,
    EngineConfig,
    ParallelConfig,
    RuntimeConfig,
)
from cosmos3_fast.processor import DROID, Cosmos3PolicyProcessor
from cosmos3_fast.processor.canvas import TIERS
from cosmos3_fast.processor.prompt import VIEW_SENTENCES
from cosmos3_fast.processor.stats import NORMALIZATIONS
from cosmos3_fast.request import MODES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KARRAS = {"auto": None, "true": True, "false": False}
PROMPT, SEED = "robot manipulates objects", 42
DEVICE = "cuda, cuda:N or cpu (default: this rank's GPU, else cpu)"
NAMES = ("checkpoint", "device", "image", "video", "action_file", "action_stats_path", "json")
_NEGATIVE = re.compile(r"-[\d.][\d.,eE+-]*")  # numbers, the first below zero
# argparse's default of these is None: a preset may replace ours, and what was given is known.
DEFAULTS: dict[str, Any] = {
    "negative_prompt": "",
    "action_normalization": "minmax",
    "height": 480,
    "width": 832,
    "domain_name": "agibotworld",
    "action_chunk_size": 16,
    "raw_action_dim": None,
    "fps": 24.0,
    "image_size": 480,
    "view_point": "ego_view",
    "view_description": None,
    "steps": 30,
    "guidance_scale": 1.0,
    "schedule": None,
    "flow_shift": 10.0,
}


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    """What is asked: observation, instruction, mode, embodiment, sampling."""
    add = parser.add_argument
    add("--preset", choices=("droid",), help="the released DROID checkpoint's recipe; flags win")
    add("--prompt", default=PROMPT, help=f"the instruction (default: {PROMPT})")
    add("--negative-prompt", help="default: empty")
    add("--mode", choices=MODES, default="policy", help="default: policy")
    add("--condition-frames", help="clean latent frames, e.g. 0,1 (default: the mode's own)")
    add("--prompt-format", choices=("plain", "json"), default="json", help="default: json")
    add("--view-point", help=_of("view_point", VIEW_SENTENCES))
    add("--view-description", help="more about the view, behind its sentence (default: nothing)")
    add("--domain-name", help="embodiment, e.g. droid_lerobot, or an id" + _by("domain_name"))
    add("--action-chunk-size", type=int, help="1 or a multiple of 4" + _by("action_chunk_size"))
    add("--raw-action-dim", type=int, help="width of an action (default: the embodiment's)")
    add("--action-stats-path", help="JSON statistics of the robot's actions (default: none)")
    add("--action-normalization", choices=NORMALIZATIONS, help="default: minmax")
    add("--num-frames", type=int, help="1: PhyAI's one-frame shape (default: chunk + 1)")
    add("--height", type=int, help="with --image-size 0, a multiple of 16" + _by("height"))
    add("--width", type=int, help="with --image-size 0, a multiple of 16" + _by("width"))
    tiers = "tier of the canvas, or 0 for --height x --width: "
    add("--image-size", type=int, help=tiers + _of("image_size", (*TIERS, 0)))
    add("--no-prompt-metadata", action="store_true", help="plain prompts: the text alone")
    add("--fps", type=float, help="frames a second" + _by("fps"))
    add("--steps", type=int, help="denoising steps, 1 to 1000" + _by("steps"))
    add("--guidance-scale", type=float, help="1: no guidance" + _by("guidance_scale"))
    interval = "LO,HI in timesteps 0 to 1000: guidance only where LO < t < HI (default: everywhere)"
    add("--guidance-interval", help=interval)
    add("--schedule", choices=SCHEDULES, help="default: what the checkpoint's files say")
    add("--flow-shift", type=float, help="of flow and native schedules" + _by("flow_shift"))
    karras = "without --schedule: true karras, false native, auto the files' (default: auto)"
    add("--use-karras-sigmas", choices=tuple(KARRAS), default="auto", help=karras)
    add("--seed", type=int, default=SEED, help=f"of the noise (default: {SEED})")


def _by(name: str) -> str:
    """A flag's default in its help."""
    return f" (default: {DEFAULTS[name]})"


def _of(name: str, values: Iterable[object]) -> str:
    """A flag's values and its default in its help."""
    return f"{', '.join(map(str, values))} (default: {DEFAULTS[name]})"


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Where it runs."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="checkpoint folder, diffusers layout")
    add("--tp", type=int, default=1, help="tensor-parallel ranks of each branch (default: 1)")
    cfg = "1, or 2: the guidance branches on two groups of ranks (default: 1)"
    add("--cfg", type=int, default=1, help=cfg)
    add("--device", help=DEVICE)
    add("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")


def default_device(gpu: str = "cuda") -> str:
    """`gpu` where there is one, else cpu."""
    return gpu if torch.cuda.is_available() else "cpu"


def join_numbers(argv: Sequence[str]) -> list[str]:
    """argv with `--flag -0.1,0.2` as `--flag=-0.1,0.2`: argparse takes the number for a flag."""
    joined: list[str] = []
    for word in argv:
        before = joined[-1] if joined else ""
        if _NEGATIVE.fullmatch(word) and re.fullmatch("--[a-z-]+", before):
            joined[-1] = f"{before}={word}"
        else:
            joined.append(word)
    return joined


def require_names(args: argparse.Namespace) -> None:
    """ValueError for a file, folder or device whose name is empty."""
    for name in NAMES:
        value = getattr(args, name, None)
        if "" in (value if isinstance(value, list) else [value]):
            raise ValueError(f"--{name.replace('_', '-')} must not be empty, got ''")


@dataclass(frozen=True)
class Settings:
    """The flags with defaults and preset resolved."""

    args: argparse.Namespace
    values: dict[str, Any]

    @classmethod
    def of(cls, args: argparse.Namespace) -> Settings:
        """Flag, else preset, else default; ValueError for a side that is no length."""
        preset: dict[str, Any] = {}
        if args.preset == "droid":
            recipe = DROID()
            preset = recipe.processor_arguments() | recipe.engine_arguments()
            preset |= {"steps": recipe.num_inference_steps, "guidance_scale": recipe.guidance_scale}
            if args.use_karras_sigmas != "auto":
                del preset["schedule"]
        values = {
            name: default if getattr(args, name) is None else getattr(args, name)
            for name, default in (DEFAULTS | preset).items()
        }
        for side in ("height", "width"):
            if values[side] < 1:
                raise ValueError(f"--{side} must be at least 1 pixel, got {values[side]}")
        return cls(args, values)

    def given(self, name: str) -> bool:
        """Whether a flag (of this command or not) was given, its default being None or False."""
        value = getattr(self.args, name, None)
        return value is not None and value is not False

    @property
    def device(self) -> str:
        return default_device() if self.args.device is None else self.args.device

    @property
    def dtype(self) -> torch.dtype:
        if self.args.dtype:
            return DTYPES[self.args.dtype]
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def plugin_args(self, decode_video: bool) -> Cosmos3PolicyWNArgs:
        return Cosmos3PolicyWNArgs(
            checkpoint_dir=self.args.checkpoint,
            flow_shift=self.values["flow_shift"],
            use_karras_sigmas=KARRAS[self.args.use_karras_sigmas],
            schedule=self.values["schedule"],
            decode_video=decode_video,
        )

    def engine_args(self, decode_video: bool = True) -> EngineArgs:
        args = self.args
        return EngineArgs(
            plugin_args=self.plugin_args(decode_video),
            config=EngineConfig(
                device=DeviceConfig(self.device, self.dtype),
                parallel=ParallelConfig(args.cfg * args.tp, args.cfg, args.tp),
                runtime=RuntimeConfig(),
            ),
        )

    def processor(self, device: torch.device | str) -> Cosmos3PolicyProcessor:
        args, values = self.args, self.values
        names = (
            "height", "width", "domain_name", "action_chunk_size", "raw_action_dim", "fps",
            "view_point", "view_description", "action_normalization", "negative_prompt",
        )  # fmt: skip
        return Cosmos3PolicyProcessor(
            tokenizer_name_or_path=f"{args.checkpoint}/text_tokenizer",
            num_frames=args.num_frames,
            mode=args.mode,
            image_size=values["image_size"] or None,
            append_metadata=not args.no_prompt_metadata,
            prompt_format=args.prompt_format,
            cond_frame_indexes=integers(args.condition_frames, "--condition-frames"),
            action_stats_path=args.action_stats_path,
            device=device,
            params_dtype=self.dtype,
            **{name: values[name] for name in names},
        )

    @property
    def guidance_interval(self) -> tuple[float, float] | None:
        found = numbers(self.args.guidance_interval, "--guidance-interval", 2)
        return None if found is None else (found[0], found[1])

    def sampling(self) -> dict[str, Any]:
        """The request's sampling fields."""
        return {
            "fps": self.values["fps"],
            "num_inference_steps": self.values["steps"],
            "guidance_scale": self.values["guidance_scale"],
            "seed": self.args.seed,
            "guidance_interval": self.guidance_interval,
        }


@contextmanager
def named(flag: str) -> Iterator[None]:
    """A ValueError in here gets the flag in front of its words."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error


def numbers(text: str | None, flag: str, count: int | None = None) -> list[float] | None:
    """Comma-separated numbers of a flag; ValueError names the flag."""
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{flag} takes comma-separated numbers, got {text!r}") from error
    if count is not None and len(values) != count:
        raise ValueError(f"{flag} takes {count} numbers, got {len(values)}")
    return values


def integers(text: str | None, flag: str) -> tuple[int, ...] | None:
    """Comma-separated integers of a flag."""
    values = numbers(text, flag)
    if values is None:
        return None
    if not all(v.is_integer() for v in values):
        raise ValueError(f"{flag} takes integers, got {text!r}")
    return tuple(int(v) for v in values)
