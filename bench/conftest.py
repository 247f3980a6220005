"""What the suites share: options, one engine a session, baselines in one folder per GPU.

`pytest bench --benchmark-save=NAME` stores under bench/baselines/<gpu>/, without host names;
`--benchmark-compare --benchmark-compare-fail=median:5%` compares with what is stored there, by any
Python, and is refused where nothing is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos3_fast.__main__ import forget_clone
from cosmos3_fast.engine import Engine
from cosmos3_fast.testing import fill_random, make_nano_folder, make_tiny_checkpoint
from cosmos3_fast.testing.machine import folder_name, machine
from cosmos3_fast.testing.measure import engine_args, gemm_rate
from cosmos3_fast.testing.requests import WORKLOADS, Workload

sys.path[:] = forget_clone(sys.path)  # which `python -m pytest` put there: see __main__
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
BASELINES = Path(__file__).parent / "baselines"
STORED_FACTS = ("python_version", "python_implementation", "system", "machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cosmos3-fast")
    group.addoption("--repeats", type=int, default=20 if GPU else 3, help="requests a figure")
    group.addoption(
        "--growth", type=int, default=60 if GPU else 2, help="requests of the memory check"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Baselines of this GPU, unless --benchmark-storage says otherwise.

    pytest-benchmark looks for stored runs of this system and Python alone, and only warns where it
    finds none: so a comparison is given its file here.
    """
    option = config.option
    if getattr(option, "benchmark_storage", None) == "file://./.benchmarks":
        option.benchmark_storage = f"file://{BASELINES / folder_name()}"
    compare = getattr(option, "benchmark_compare", None)
    if compare and option.benchmark_storage.startswith("file://"):
        option.benchmark_compare = str(stored(option.benchmark_storage, compare))


def stored(storage: str, compare: str | bool) -> Path:
    """The last stored run, or the last one whose name begins with `compare`, or that file."""
    if Path(str(compare)).is_file():
        return Path(str(compare))
    folder, start = Path(storage.removeprefix("file://")), "" if compare is True else compare
    runs = [run for run in folder.glob("*/[0-9]*_*.json") if run.name.startswith(str(start))]
    if not runs:
        raise pytest.UsageError(f"nothing stored in {folder} to compare with that begins {start!r}")
    return max(runs, key=lambda run: (run.name, run.parent.name))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """The GPU and the versions instead of the host: nothing that names it is stored."""
    kept = {name: machine_info[name] for name in STORED_FACTS if name in machine_info}
    # pytest-benchmark looks below "cpu" when it compares
    processor = {"cpu": {"brand": (machine_info.get("cpu") or {}).get("brand_raw", "unknown")}}
    machine_info.clear()
    machine_info.update(kept | processor | machine())


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    """Without the name of the folder that the clone happens to lie in."""
    commit_info.pop("project", None)


@pytest.fixture(scope="session")
def workload() -> Callable[[str], Workload]:
    """D, E or S by its letter; small on a machine without a GPU."""
    return lambda kind: WORKLOADS[kind] if GPU else WORKLOADS[kind].small()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint's configuration: Nano's on a GPU, else a tiny one with its weights."""
    path = tmp_path_factory.mktemp("checkpoint")
    return make_nano_folder(path) if GPU else make_tiny_checkpoint(path, kv_heads=2)


@pytest.fixture(scope="session")
def engine(folder: Path) -> Any:
    """With its decoder, which `testing.measure.configured` switches."""
    made = engine_args(folder, str(DEVICE), DTYPE, decode=True)
    with Engine(made, weights=fill_random) as engine:
        yield engine


@pytest.fixture(scope="session")
def rate() -> float:
    """TFLOP/s of large products on this device."""
    return gemm_rate(DEVICE, DTYPE)
