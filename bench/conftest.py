"""What the suites share: options, one engine a session, baselines in one folder per GPU.

`pytest bench --benchmark-save=NAME` stores under bench/baselines/<gpu>/, without host names;
`--benchmark-compare --benchmark-compare-fail=median:5%` compares with what is stored there, by any
Python, and is refused where nothing is. Times that are taken on a device, or in other processes,
are benchmarks too (`recorded`). Kernels' rows stand in one table at the end (`figures`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos3_fast.__main__ import forget_clone
from cosmos3_fast.engine import Engine
from cosmos3_fast.testing import fill_random, make_nano_folder, make_tiny_checkpoint
from cosmos3_fast.testing.machine import folder_name, machine
from cosmos3_fast.testing.measure import engine_args, gemm_rate, sustained
from cosmos3_fast.testing.requests import WORKLOADS, Workload

sys.path[:] = forget_clone(sys.path)  # which `python -m pytest` put there: see __main__
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
BASELINES = Path(__file__).parent / "baselines"
COPIED_BYTES = 256 << 20 if GPU else 1 << 20  # of one copy, past L2
COLUMNS = ("kernel", "size", "us", "rate", "share", "ratio", "to")
STORED_FACTS = ("python_version", "python_implementation", "system", "machine")


class DeviceClock:
    """A timer for pytest-benchmark that measured seconds alone move."""

    def __init__(self) -> None:
        self.now = 0.0

    def device_seconds(self) -> float:
        return self.now


CLOCK = DeviceClock()


@dataclass
class Figures:
    """What kernels reached, beside the rates of copies and of large products in the same run."""

    copies: float  # GB/s, read and written
    products: float  # TFLOP/s
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def least(self, nbytes: int, flop: int = 0) -> float:
        """Seconds that the roofline gives to so many bytes and FLOP."""
        return max(nbytes / self.copies / 1e9, flop / self.products / 1e12)

    def kernel(
        self, name: str, size: str, seconds: float, nbytes: int, flop: int, ratio: float, to: str
    ) -> dict[str, float]:
        """A row of the table, and the same for extra_info. `ratio`: the time of `to` over
        `seconds`.
        """
        least = self.least(nbytes, flop)
        unit, work = (
            ("GB/s", nbytes / 1e9) if least > self.least(0, flop) else ("TFLOP/s", flop / 1e12)
        )
        found = {unit: work / seconds, "share of roofline": least / seconds}
        return self._add(name, size, seconds, found, f"{least / seconds:.2f}", ratio, to)

    def host(
        self, name: str, size: str, seconds: float, numbers: int, ratio: float, to: str
    ) -> dict[str, float]:
        """The same of something on the host, which has no roofline here."""
        return self._add(name, size, seconds, {"M/s": numbers / seconds / 1e6}, "", ratio, to)

    def _add(
        self, name: str, size: str, seconds: float, found: dict, share: str, ratio: float, to: str
    ) -> dict[str, float]:
        unit, rate = next(iter(found.items()))
        text = f"{rate:.0f} {unit}" if rate >= 100 else f"{rate:.3g} {unit}"
        row = (name, size, f"{seconds * 1e6:.1f}", text, share, f"{ratio:.2f}", to)
        self.rows.append(row)
        info = {"us": seconds * 1e6, **found, f"{to} / ours": ratio}
        return {k: round(v, 3) for k, v in info.items()}

    def lines(self) -> list[str]:
        """The table, under what its shares are of."""
        table = [COLUMNS, *self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        head = f"copies {self.copies:.0f} GB/s, large products {self.products:.4g} TFLOP/s"
        return [head, *("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)]


FIGURES = pytest.StashKey[Figures]()


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


def pytest_itemcollected(item: pytest.Item) -> None:
    """Benchmarks that record measured seconds read the clock that those move."""
    if "recorded" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.benchmark(timer=CLOCK.device_seconds))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The kernels' table, if any ran, after pytest-benchmark's."""
    found = config.stash.get(FIGURES, None)
    if found is not None and found.rows:
        terminalreporter.section("kernels")
        for line in found.lines():
            terminalreporter.write_line(line)


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


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest, rate: float) -> Figures:
    """The table of kernels."""
    found = request.config.stash[FIGURES] = Figures(copy_rate(), rate)
    return found


def copy_rate(rounds: int = 10) -> float:
    """GB/s, read and written, of large copies of random numbers, the median of `rounds`."""
    pairs = [torch.randn(2, COPIED_BYTES // 4, device=DEVICE) for _ in range(3)]

    def copies() -> None:
        for into, source in pairs:
            into.copy_(source)

    return len(pairs) * 2 * COPIED_BYTES / sustained(copies, DEVICE, rounds) / 1e6


@pytest.fixture
def recorded(benchmark: Any) -> Callable[..., float | None]:
    """record(measure, rounds, warmup_rounds): every round of the benchmark is the seconds that a
    call of `measure` returns, whatever the host's clock says. Gives their median, None under
    --benchmark-disable.
    """

    def record(measure: Callable[[], float], rounds: int, warmup_rounds: int = 0) -> float | None:
        def one() -> None:
            CLOCK.now += measure()

        benchmark.pedantic(one, rounds=rounds, warmup_rounds=warmup_rounds)
        return None if benchmark.stats is None else benchmark.stats.stats.median

    return record
