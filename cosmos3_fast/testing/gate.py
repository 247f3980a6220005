"""What must hold before a benchmark gives a number. Each check raises ValueError with what differs.

The bound on rounding follows from measurement: an error against float32 on the same weights of at
most twice that of plain eager torch at the same dtype.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cosmos3_fast import ops
from cosmos3_fast.checkpoint import Slot
from cosmos3_fast.config import read_json
from cosmos3_fast.engine import Engine
from cosmos3_fast.request import Cosmos3ActionRequest
from cosmos3_fast.testing.fill import fill_random
from cosmos3_fast.testing.measure import configured, engine_args
from cosmos3_fast.testing.requests import Workload

Results = dict[str, torch.Tensor]
LAYERS = 4  # of the model that is compared with float32
CONFIGS = ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")


def gate(engine: Engine, workload: Workload, *, layers: int = LAYERS) -> dict[str, float]:
    """All checks of a workload on a single-rank engine; the two errors of `rounding`.

    The engine's graphs and caches are dropped at the end.
    """
    with configured(engine, decode=False):
        graph_equals_eager(engine, workload.request(1))
        prompts_in_turn(engine, workload)
    ours, eager = rounding(engine, workload, layers)
    return {"error": ours, "eager_error": eager}


def graph_equals_eager(engine: Engine, request: Cosmos3ActionRequest) -> None:
    """Captured, captured again and eager runs give the same finite bits."""
    with configured(engine, graph=False):
        eager = _run(engine, request)
    with configured(engine, graph=True):
        for _ in range(2):
            _equal(_run(engine, request), eager, "the captured step differs from the eager one")


def prompts_in_turn(engine: Engine, workload: Workload) -> None:
    """Prompts A, B, A of different lengths: A gets A's answer twice, and B another one."""
    first = workload.request(2)
    other = replace(workload, text_tokens=workload.text_tokens // 2 + 1).request(2, prompt=1)
    a, b, again = (_run(engine, request) for request in (first, other, first))
    _equal(again, a, "a prompt's answer depends on the prompt before it")
    if torch.equal(a["action"], b["action"]):
        raise ValueError("two prompts give one answer")


def rounding(engine: Engine, workload: Workload, layers: int = LAYERS) -> tuple[float, float]:
    """Relative L2 of a request on `layers` layers against float32: ours, and the references' eager.

    Same widths, shapes, schedule and weights in all three; ValueError if ours is over twice theirs.
    """
    with tempfile.TemporaryDirectory(prefix="cosmos3-gate-") as name:
        folder = reduced(engine.checkpoint.folder, name, layers)
        config, request = engine.args.config.device, workload.request(3)
        made = engine_args(folder, config.target, config.params_dtype)
        with Engine(made, weights=fill_random) as small:
            ours, slots = _run(small, request), _slots(small)
            with ops.reference(), configured(small, graph=False):
                eager = _run(small, request)
            wide = engine_args(folder, config.target, torch.float32, graph=False)
            with (
                ops.reference(),
                Engine(wide, weights=lambda theirs: _copy(theirs, slots)) as exact,
            ):
                truth = _run(exact, request)
    errors = tuple(relative(result, truth) for result in (ours, eager))
    floor = torch.finfo(config.params_dtype).eps
    if not errors[0] <= max(2 * errors[1], floor):
        raise ValueError(
            f"error {errors[0]:.2e} against float32 is over twice eager torch's {errors[1]:.2e}"
        )
    return errors[0], errors[1]


def reduced(source: Path, folder: str | Path, layers: int) -> Path:
    """A folder of the same configuration with at most `layers` layers, without weights."""
    folder = Path(folder)
    for name in (*CONFIGS, "model_index.json"):
        config: dict[str, Any] = read_json(source / name)
        if name == CONFIGS[0]:
            config["num_hidden_layers"] = min(layers, config["num_hidden_layers"])
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config))
    return folder


def relative(got: Results, want: Results) -> float:
    """Relative L2 of all results together, in float64."""

    def flat(results: Results) -> torch.Tensor:
        return torch.cat([results[name].flatten().double().cpu() for name in sorted(want)])

    return float((flat(got) - flat(want)).norm() / flat(want).norm())


def _run(engine: Engine, request: Cosmos3ActionRequest) -> Results:
    """Results on the host; the engine itself refuses what is not finite."""
    return {name: tensor.cpu() for name, tensor in engine.step(request).items()}


def _equal(got: Results, want: Results, message: str) -> None:
    for name, tensor in want.items():
        if not torch.equal(got[name], tensor):
            count = int((got[name] != tensor).sum())
            raise ValueError(f"{message}: {name}, {count} of {tensor.numel()} values")


def _slots(engine: Engine) -> dict[str, Slot]:
    return engine.model.slots() | (engine.vae.slots() if engine.vae is not None else {})


@torch.no_grad()
def _copy(into: Mapping[str, Slot], source: Mapping[str, Slot]) -> None:
    for key, slot in into.items():
        slot.target.copy_(source[key].target)
