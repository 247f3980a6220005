"""The four commands of PhyAI's multi-GPU page under torchrun on GPUs, scaled to those there are.

As in test_ranks_cli, whose commands these are, on a tiny checkpoint: once as documented, in
bfloat16, and once in float32, where ranks must give one GPU's result to 1e-5.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import oracle
import pytest
import test_ranks_cli as page
import torch

from cosmos3_fast.cli import main
from cosmos3_fast.processor import read_actions

EXACT = 1e-5
DTYPES = {"bfloat16": (), "float32": ("--dtype", "float32")}
FILES = ["out.mp4", "out_action.json", "out_action.png"]
COUNTS = {2: list(page.COMMANDS), 4: list(page.COMMANDS), 8: ["policy with guidance on 8"]}
WRONG = {name: told for name, told in page.WRONG.items() if told[0] == 2}

folder = page.folder  # the fixture: a checkpoint, an observation, a clip and actions


def by_gpus(some: dict[int, list[str]]) -> list:
    return [
        pytest.param(count, name, marks=getattr(pytest.mark, f"gpu{count}"), id=f"{name}, {count}")
        for count, names in some.items()
        for name in names
    ]


def scaled(name: str, count: int) -> list[str]:
    """The command's flags on `count` ranks: as documented, or with a smaller --tp."""
    ranks, flags = page.COMMANDS[name]
    at = flags.index("--tp") + 1
    cfg = ranks // int(flags[at])
    return [*flags[:at], str(count // cfg), *flags[at + 1 :]]


def alone(name: str) -> list[str]:
    """The flags without the mesh."""
    flags = page.COMMANDS[name][1]
    return list(flags[flags.index("--tp") + 2 :])


def together(
    commands: dict[str, tuple[int, list[str]]], folder: Path, most: int = 4
) -> dict[str, page.Outcome]:
    """Every command's outcome by name, `most` at a time, each in a folder of its name."""
    found: dict[str, page.Outcome] = {}
    asked = list(commands.items())
    for first in range(0, len(asked), most):
        running = {}
        for name, (ranks, flags) in asked[first : first + most]:
            place = folder / name
            place.mkdir()
            for item in ("tiny", "observation.png", "obs.mp4", "action.json"):
                (place / item).symlink_to(folder / item)
            command = [*flags, *page.EVERYWHERE, "--out", ".cache/out"]
            running[name] = page.torchrun(ranks, command, place), time.monotonic()
        found |= {name: page.outcome(*process) for name, process in running.items()}
    return found


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Callable[[int], dict[str, page.Outcome]]:
    """count -> the outcome of "NAME, COUNT, DTYPE"."""

    def run(count: int) -> dict[str, page.Outcome]:
        asked = {
            f"{name}, {count}, {dtype}": (count, [*scaled(name, count), *more])
            for dtype, more in DTYPES.items()
            for name in COUNTS[count]
        }
        return together(asked, folder)

    return cache(run)


@pytest.fixture(scope="module")
def single(folder: Path) -> Callable[[str, str], Path]:
    """(command, dtype) -> the folder of its results in this process, on one GPU."""

    def run(name: str, dtype: str) -> Path:
        place, before = folder / f"alone {name}, {dtype}", Path.cwd()
        os.chdir(folder)
        try:
            words = ["run", *alone(name), *DTYPES[dtype], *page.EVERYWHERE, "--out", f"{place}/out"]
            assert main(words) == 0
        finally:
            os.chdir(before)
        return place

    return cache(run)


def actions(place: Path) -> torch.Tensor:
    return torch.as_tensor(read_actions(place / "out_action.json"))


@pytest.mark.parametrize(("count", "name"), by_gpus(COUNTS))
def test_the_documented_command_gives_what_one_gpu_gives(
    outcomes, single, folder, count, name
) -> None:
    for dtype in DTYPES:
        ended = outcomes(count)[f"{name}, {count}, {dtype}"]
        assert ended.status == 0, ended.output
    place, want = folder / f"{name}, {count}, float32" / ".cache", single(name, "float32")
    assert oracle.error(actions(place), actions(want)) <= EXACT
    shown, wanted = (page.frames(f / "out.mp4") for f in (place, want))
    assert shown.shape == wanted.shape
    assert np.abs(shown.astype(int) - wanted).mean() <= 4  # the codec's: see test_ranks_cli


@pytest.mark.parametrize(("count", "name"), by_gpus(COUNTS))
def test_rank_0_alone_prints_and_writes(outcomes, folder, count, name) -> None:
    for dtype in DTYPES:
        at = f"{name}, {count}, {dtype}"
        output = outcomes(count)[at].output
        assert page.written(folder / at / ".cache") == FILES
        assert page.written(folder / at) == [
            ".cache", "action.json", "obs.mp4", "observation.png", "tiny",
        ]  # fmt: skip
        assert output.count("ms: prepare") == 1 and output.count("wrote ") == 3
        assert "step/s" in output and "Traceback" not in output


@pytest.mark.parametrize(("count", "_"), by_gpus({2: ["all"], 4: ["all"]}))
def test_in_bfloat16_ranks_err_no_more_than_one_gpu(outcomes, single, folder, count, _) -> None:
    """Against float32 on one GPU, the actions of the generating commands together: at most twice
    one GPU's own error.
    """
    names = [name for name in COUNTS[count] if "forward" not in name]
    truth, one = (
        torch.stack([actions(single(n, d)) for n in names]) for d in ("float32", "bfloat16")
    )
    outcomes(count)
    many = torch.stack([actions(folder / f"{n}, {count}, bfloat16" / ".cache") for n in names])
    error, bound = oracle.error(many, truth), 2 * oracle.error(one, truth)
    assert 0 < error <= bound


@pytest.fixture(scope="module")
def refused(folder: Path) -> dict[str, page.Outcome]:
    return together(
        {name: (ranks, list(flags)) for name, (ranks, flags, _) in WRONG.items()}, folder
    )


@pytest.mark.gpu2
@pytest.mark.parametrize("name", WRONG)
def test_a_command_that_cannot_run_says_why_on_every_rank(refused, folder, name) -> None:
    page.require_refused(refused[name], folder, name)


def test_one_gpus_flags_are_the_commands_without_a_mesh() -> None:
    """Of the tests above, what runs without a GPU: how the commands are scaled."""
    for name, (ranks, flags) in page.COMMANDS.items():
        assert scaled(name, ranks) == list(flags)
        assert not {"--tp", "--cfg"} & set(alone(name))
    guided = scaled("policy with guidance on 8", 2)
    assert guided[:4] == ["--cfg", "2", "--tp", "1"]
    assert scaled("policy on 4", 2)[:2] == ["--tp", "2"]
    assert "--device" not in page.EVERYWHERE
