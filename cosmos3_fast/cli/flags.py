"""Flags shared by `run` and `info`, and the objects they stand for. Names and defaults are the
example script's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
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
from cosmos3_fast.processor.stats import NORMALIZATIONS
from cosmos3_fast.request import MODES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KARRAS = {"auto": None, "true": True, "false": False}
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
    add("--preset", choices=("droid",), help="the released DROID checkpoint's own recipe")
    add("--prompt", default="robot manipulates objects")
    add("--negative-prompt", help="default: empty")
    add("--mode", choices=MODES, default="policy")
    add("--condition-frames", help="clean latent frames, e.g. 0,1 (default: the mode's own)")
    add("--prompt-format", choices=("plain", "json"), default="json")
    add("--view-point")
    add("--view-description", help="more about the view, behind the view point's sentence")
    add("--domain-name", help="embodiment, e.g. droid_lerobot (default: agibotworld)")
    add("--action-chunk-size", type=int)
    add("--raw-action-dim", type=int)
    add("--action-stats-path")
    add("--action-normalization", choices=NORMALIZATIONS, help="default: minmax")
    add("--num-frames", type=int, help="1: PhyAI's one-frame shape (default: chunk + 1)")
    add("--height", type=int, help="default: 480")
    add("--width", type=int, help="default: 832")
    add("--image-size", type=int, help="tier of the canvas; 0 takes --height x --width")
    add("--no-prompt-metadata", action="store_true")
    add("--fps", type=float)
    add("--steps", type=int)
    add("--guidance-scale", type=float)
    add("--guidance-interval", help="LO,HI in timesteps: guidance only where LO < t < HI")
    add("--schedule", choices=SCHEDULES)
    add("--flow-shift", type=float)
    add("--use-karras-sigmas", choices=tuple(KARRAS), default="auto")
    add("--seed", type=int, default=42)


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Where it runs."""
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint folder, diffusers layout")
    add("--tp", type=int, default=1, help="tensor-parallel ranks of each branch")
    add("--cfg", type=int, default=1, help="2: the guidance branches on two groups of ranks")
    add("--device", help="cuda, cuda:N or cpu (default: this rank's GPU, else cpu)")
    add("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")


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
        return self.args.device or ("cuda" if torch.cuda.is_available() else "cpu")

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
