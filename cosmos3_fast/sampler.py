"""UniPC (bh2, predict-x0, order 2) for rectified flow, as numbers computed ahead.

A schedule is a few timesteps and sigmas; from the sigmas alone every step is a fixed linear
combination of (sample, last sample, x0 history, new velocity), whose float64 coefficients
`coefficients` lays out, one row a step. `kernels.reference.unipc_step` says what a row does.
Facts: Zhao et al. 2023 (UniPC, arXiv 2302.04867) with B(h) = e^h - 1; sigmas and orders as in
diffusers' `UniPCMultistepScheduler` with `use_flow_sigmas`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cosmos3_fast import ops
from cosmos3_fast.config import SCHEDULES

TRAIN_TIMESTEPS = 1000
SIGMA_GAP = 1e-6

COEF = (
    "guidance", "sigma",
    "c_sample", "c_last", "c_m1", "c_m2", "c_x0",
    "p_sample", "p_x0", "p_m1",
)  # fmt: skip
COLUMN = {name: i for i, name in enumerate(COEF)}


@dataclass(frozen=True)
class Schedule:
    """`timesteps`: n integers in 0..999; `sigmas`: float32 `[n + 1]`, falling to 0; `name`."""

    timesteps: tuple[int, ...]
    sigmas: np.ndarray
    name: str

    @property
    def steps(self) -> int:
        return len(self.timesteps)


def resolve_schedule(
    schedule: str | None,
    use_karras_sigmas: bool | None,
    scheduler_config: Mapping[str, Any],
    model_index: Mapping[str, Any] | None = None,
) -> str:
    """The schedule's name: "karras", "flow" or "native".

    `schedule` names one outright; else `use_karras_sigmas` True is karras, False native; else the
    checkpoint decides: `use_karras_sigmas` of scheduler_config.json, then
    `use_native_flow_schedule` of model_index.json, else flow.
    """
    if schedule is not None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
        return schedule
    if use_karras_sigmas is not None:
        return "karras" if use_karras_sigmas else "native"
    if scheduler_config.get("use_karras_sigmas"):
        return "karras"
    return "native" if (model_index or {}).get("use_native_flow_schedule") else "flow"


def sigmas(
    schedule: str,
    steps: int,
    *,
    shift: float = 1.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
) -> Schedule:
    """Timesteps and sigmas of `steps` steps.

    karras takes sigma_min, sigma_max and rho; flow and native take `shift`. ValueError for fewer
    than one step, and for so many that the first two integer timesteps, or any two sigmas, are
    the same.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    if steps < 1:
        raise ValueError(f"the number of steps must be at least 1, got {steps}")
    if schedule == "karras":
        values = _karras(steps, sigma_min, sigma_max, rho)
    else:
        values = _shifted(schedule, steps, shift)
    timesteps = tuple(int(t) for t in values * TRAIN_TIMESTEPS)
    rounded = np.append(values, 0.0).astype(np.float32)
    if timesteps[0] in timesteps[1:2] or not (np.diff(rounded) < 0).all():
        raise ValueError(
            f"{steps} steps are too many for the {schedule} schedule (shift {shift}): the first "
            f"timesteps are {timesteps[:2]}, the first sigmas {rounded[:2].tolist()}; neighbours "
            "must differ"
        )
    return Schedule(timesteps, rounded, schedule)


def _karras(steps: int, low: float | None, high: float | None, rho: float) -> np.ndarray:
    """Karras et al. 2022, equation 5, mapped from sigma / alpha to the flow's s / (s + 1)."""
    if low is None or high is None or not 0 < low < high < math.inf:
        raise ValueError(
            "the karras schedule needs 0 < sigma_min < sigma_max in scheduler_config.json, "
            f"got {low} and {high}"
        )
    first, last = high ** (1 / rho), low ** (1 / rho)
    ratio = (first + np.linspace(0, 1, steps) * (last - first)) ** rho
    return ratio / (ratio + 1)


def _shifted(schedule: str, steps: int, shift: float) -> np.ndarray:
    if not 0 < shift < math.inf:
        raise ValueError(f"the shift of a schedule must be positive and finite, got {shift}")
    start, end = (1.0, 1 / TRAIN_TIMESTEPS) if schedule == "flow" else (1 - 1 / TRAIN_TIMESTEPS, 0)
    line = np.linspace(start, end, steps + 1)[:-1]
    below = 1 + (shift - 1) * line
    if not below.all():
        raise ValueError(f"a shift of {shift} is too small for the {schedule} schedule")
    values = shift * line / below
    if abs(values[0] - 1) < SIGMA_GAP:
        values[0] -= SIGMA_GAP  # alpha = 0 has no logarithm
    return values


def guided_steps(
    timesteps: Sequence[int], interval: tuple[float, float] | None = None
) -> tuple[bool, ...]:
    """Which steps run the unconditional branch too: lo < t < hi; all without an interval."""
    if interval is None:
        return (True,) * len(timesteps)
    low, high = interval
    return tuple(low < t < high for t in timesteps)


def coefficients(
    sigmas: np.ndarray, guidance: float = 1.0, *, guided: Sequence[bool] | None = None
) -> np.ndarray:
    """float64 `[n, len(COEF)]` for sigmas `[n + 1]`: row i is step i, columns as in `COEF`.

    The order of step i is min(2, n - i, i + 1); the corrector runs from step 1 on, with the order
    of step i - 1. Columns of absent terms are 0.
    `guided[i]` False puts 1 into the guidance column; None guides every step.
    """
    values = np.asarray(sigmas, dtype=np.float64)
    steps = len(values) - 1
    with np.errstate(divide="ignore"):  # the last sigma is 0, its lambda infinite
        lambdas = np.log1p(-values) - np.log(values)
    table = np.zeros((steps, len(COEF)))
    for i in range(steps):
        row = {"guidance": guidance if guided is None or guided[i] else 1.0, "sigma": values[i]}
        row |= _corrector(values, lambdas, i) if i else {"c_sample": 1.0}
        row |= _predictor(values, lambdas, i)
        for name, value in row.items():
            table[i, COLUMN[name]] = value
    return table


def _order(step: int, steps: int) -> int:
    return min(2, steps - step, step + 1)


def _predictor(values: np.ndarray, lambdas: np.ndarray, i: int) -> dict[str, float]:
    """From sigma i to sigma i + 1, given x0 (here) and m1 (one step back)."""
    weight = _weight(values, lambdas, i)
    row = {"p_sample": values[i + 1] / values[i], "p_x0": weight}
    if _order(i, len(values) - 1) == 2:
        ratio = (lambdas[i - 1] - lambdas[i]) / (lambdas[i + 1] - lambdas[i])
        row["p_m1"] = 0.5 * weight / ratio
        row["p_x0"] -= row["p_m1"]
    return row


def _corrector(values: np.ndarray, lambdas: np.ndarray, i: int) -> dict[str, float]:
    """The step from sigma i - 1 to sigma i again, now that x0 at sigma i is known as well."""
    weight = _weight(values, lambdas, i - 1)
    row = {"c_last": values[i] / values[i - 1]}
    new, older = 0.5, 0.0
    if _order(i - 1, len(values) - 1) == 2:
        step = lambdas[i] - lambdas[i - 1]
        ratio = (lambdas[i - 2] - lambdas[i - 1]) / step
        b1, b2 = _moments(step)
        difference = (b2 - b1) / (ratio - 1)
        new, older = b1 - difference, difference / ratio
    row["c_x0"], row["c_m2"] = weight * new, weight * older
    row["c_m1"] = weight * (1 - new - older)
    return row


def _weight(values: np.ndarray, lambdas: np.ndarray, i: int) -> float:
    """alpha (1 - e^-h) of the step from sigma i to i + 1: the weight of all x0 terms together."""
    return -(1 - values[i + 1]) * math.expm1(-(lambdas[i + 1] - lambdas[i]))


def _moments(step: float) -> tuple[float, float]:
    """Right-hand side of the order-2 corrector: k! h phi_{k+1}(h) / B(h) for k = 1, 2, at -h."""
    scale = math.expm1(-step)
    first = scale / -step - 1
    second = first / -step - 0.5
    return first / scale, 2 * second / scale


def noise(seed: int, shape: Sequence[int]) -> np.ndarray:
    """float32 standard normal noise of `shape`: numpy's RandomState(seed), drawn in float64, then
    cast. ValueError for a seed outside [0, 2**32).

    Equal on every rank and every machine. Video and action noise of one request come from two
    fresh generators with the same seed.
    """
    return ops.legacy_normal(seed, math.prod(shape)).numpy().reshape(tuple(shape))
