"""Time whole requests at the real model's size on this machine, on random weights."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cosmos3_fast import denoise
from cosmos3_fast.cli.flags import default_device
from cosmos3_fast.cli.output import require_place, tell, temporary_folder, writing
from cosmos3_fast.config import CheckpointConfig, DeviceConfig, EngineArgs
from cosmos3_fast.engine import Engine
from cosmos3_fast.testing import fill_random, make_nano_folder, make_tiny_checkpoint
from cosmos3_fast.testing.gate import gate
from cosmos3_fast.testing.machine import machine
from cosmos3_fast.testing.measure import configured, engine_args, gemm_rate, growth, measure
from cosmos3_fast.testing.parts import StepShape
from cosmos3_fast.testing.requests import WORKLOADS, Workload
from cosmos3_fast.testing.tune import (
    attention_rows,
    attention_shapes,
    gate_up_rows,
    gate_up_shapes,
)

GROWTH = "watch memory over N more requests, rounded up to a multiple of 60 (default: 0, none)"
COLUMNS = {  # heading -> the row's figure, how it is written
    "tokens": ("tokens", "{:.0f}"),
    "ms p50": ("ms", "{:.1f}"),
    "ms p99": ("ms_p99", "{:.1f}"),
    "new prompt": ("uncached_ms", "{:.1f}"),
    "loop": ("loop_ms", "{:.1f}"),
    "overhead": ("overhead", "{:.3f}"),
    "TFLOP/s": ("tflops", "{:.2f}"),
    "of GEMM rate": ("share_of_rate", "{:.0%}"),
    "decode": ("decode_ms", "{:.1f}"),
    "peak GiB": ("peak_GiB", "{:.1f}"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure. A row's overhead is the loop over its products and attentions alone."""
    add = parser.add_argument
    kinds = "D (DROID), E (example), S (one frame)"
    add("--requests", default="D,E,S", help=f"comma-separated, of {kinds}; default: D,E,S")
    add("--repeats", type=int, default=20, help="timed requests of each kind (default: 20)")
    add("--decode", action="store_true", help="time the decoder as well")
    add("--eager", action="store_true", help="without captured graphs")
    add("--growth", type=int, default=0, metavar="N", help=GROWTH)
    add("--tune", action="store_true", help="print rows for the tables of choices instead")
    add("--tiny", action="store_true", help="a tiny model and small requests (any machine)")
    add("--device", help="cuda:N or cpu (default: cuda:0 where there is one, else cpu)")
    add("--json", metavar="FILE", help="write the figures there, as in bench/baselines")


def main(args: argparse.Namespace) -> None:
    """Check, measure, print; ValueError when a check fails, and then no figure of that kind."""
    kinds = _kinds(args)
    if args.json is not None:
        require_place(args.json)
    target = default_device("cuda:0") if args.device is None else args.device
    device = torch.device(DeviceConfig(target).target)
    if device.type == "cpu" and not args.tiny:
        raise ValueError("the real size needs a GPU of about 40 GiB: add --tiny here")
    if args.tune and device.type == "cpu":
        raise ValueError("--tune times GPU kernels, and needs a GPU")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with temporary_folder("cosmos3-bench-") as name:
        with writing(name):
            folder = make_tiny_checkpoint(name, kv_heads=2) if args.tiny else make_nano_folder(name)
        made = engine_args(folder, str(device), dtype, decode=args.decode, graph=not args.eager)
        if args.tune:
            torch.cuda.set_device(device.index or 0)
            _tune(folder, made, kinds)
            return
        with Engine(made, weights=fill_random) as engine:
            if engine.device.type == "cuda":
                torch.cuda.set_device(engine.device)  # parts are timed outside a request, too
            report = _measure(engine, kinds, args)
    tell(table(report["requests"]))
    if args.json is not None:
        with writing(args.json):
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
        tell(f"wrote {args.json}")


def _kinds(args: argparse.Namespace) -> dict[str, Workload]:
    unknown = [kind for kind in args.requests.split(",") if kind not in WORKLOADS]
    if unknown:
        raise ValueError(f"--requests takes {', '.join(WORKLOADS)}, got {', '.join(unknown)}")
    if args.repeats < 1 or args.growth < 0:
        raise ValueError("--repeats must be at least 1, --growth at least 0")
    chosen = {kind: WORKLOADS[kind] for kind in args.requests.split(",")}
    return {kind: w.small() if args.tiny else w for kind, w in chosen.items()}


def _measure(
    engine: Engine, kinds: Mapping[str, Workload], args: argparse.Namespace
) -> dict[str, Any]:
    """Everything that --json writes."""
    where = machine()
    tell(f"{where['gpu']}, torch {where['torch']}, {_dtype(engine)}, random weights")
    rate = gemm_rate(engine.device, engine.model.dtype)
    tell(f"products of {rate:.4g} TFLOP/s on this device")
    rows = {}
    for kind, workload in kinds.items():
        errors = gate(engine, workload)
        tell(
            f"{kind}: checks passed (error {errors['error']:.1e}, "
            f"eager torch's {errors['eager_error']:.1e})",
        )
        row = measure(engine, workload, repeats=args.repeats, rate=rate, decode=args.decode)
        rows[kind] = _rounded(row | errors)
    report: dict[str, Any] = {
        "machine": where,
        "command": shlex.join(["cosmos3-fast", *sys.argv[1:]]),
        "dtype": _dtype(engine),
        "gemm_tflops": round(rate, 3),
        "requests": rows,
    }
    if args.growth:
        with configured(engine, decode=False):
            report["growth"] = _rounded(growth(engine, kinds.values(), args.growth))
        tell("growth:", *(f"{name} {value}" for name, value in report["growth"].items()))
    return report


def _dtype(engine: Engine) -> str:
    return str(engine.model.dtype).removeprefix("torch.")


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Five significant digits, in nested rows too."""
    return {
        name: _rounded(value)
        if isinstance(value, Mapping)
        else float(f"{value:.5g}")
        if isinstance(value, float)
        else value
        for name, value in row.items()
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows of `measure` as a table; columns that no row has are left out."""
    shown = {h: c for h, c in COLUMNS.items() if any(c[0] in row for row in rows.values())}
    lines = [["", *shown]]
    for kind, row in rows.items():
        cells = (f.format(row[name]) if name in row else "-" for name, f in shown.values())
        lines.append([kind, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _tune(folder: Path, made: EngineArgs, kinds: Mapping[str, Workload]) -> None:
    """Rows of ATTENTION_CHOICE and GATE_UP_CHOICE (kernels/) at the shapes of requests, over 1 to 8
    ranks; no model is made.
    """
    dtype, plugin = made.config.device.params_dtype, made.plugin_args
    checkpoint = CheckpointConfig.read(folder)
    config = checkpoint.transformer
    steps = []
    for workload in kinds.values():
        schedule = denoise.schedule_of(plugin, checkpoint.scheduler, workload.steps)
        steps.append(StepShape.of(denoise.plan(workload.request(0), config, schedule)))
    where = machine()
    tell(f"{where['gpu']}, torch {where['torch']}: microseconds of each way, captured, in turn")
    attentions, products = attention_shapes(steps, config), gate_up_shapes(steps, config)
    for lines in (
        attention_rows(attentions, config.head_dim, dtype),
        gate_up_rows(products, config.hidden_size, dtype),
    ):
        for line in lines:
            tell(line)
