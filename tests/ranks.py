"""Ranks on CPU for tests: one launch of plain processes that runs many cases.

A case is a function of a test module without arguments; it returns {name: tensor or JSON value}.
The parent gets every rank's results and compares them:

    results = run_cases(4, [case_sum, case_gather])
    results["case_sum"][rank]["x"]

The launch's process imports torch and the test module once and forks the ranks, which carry
torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). A hard limit ends
the whole process group. `Launch` is for tests that end ranks themselves.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

Case = Callable[[], "dict[str, Any] | None"]
# A test must never use NVLink multicast, on whatever machine it runs.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "TORCH_CPP_LOG_LEVEL": "FATAL",
}


class Launch:
    """`size` ranks running `cases` in order. Use as a context manager: leaving ends every
    process.
    """

    def __init__(
        self,
        size: int,
        cases: Sequence[Case],
        *,
        ranks: Sequence[int] | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        """`size`: WORLD_SIZE; `ranks`: those really started (None: all); `arguments`: see
        `argument`.
        """
        self.ranks = list(range(size) if ranks is None else ranks)
        self.cases = [case.__name__ for case in cases]
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.folder = Path(self._folder.name)
        plan = {
            "file": str(Path(cases[0].__code__.co_filename).resolve()),
            "cases": self.cases,
            "size": size,
            "ranks": self.ranks,
            "port": _free_port(),
            "arguments": arguments or {},
        }
        (self.folder / "plan.json").write_text(json.dumps(plan))
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(self.folder)],
            env=os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
        )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None or self.alive():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._folder.cleanup()

    def pid(self, rank: int) -> int:
        """The process of a rank; waits for it to exist."""
        path = self.folder / "pids.json"
        self.until(path.exists, 60)
        return int(json.loads(path.read_text())[str(rank)])

    def mark(self, rank: int, name: str, timeout: float = 60) -> None:
        """Wait until a rank has called `reached(name)`."""
        self.until((self.folder / f"{name}.{rank}").exists, timeout)

    def until(self, condition: Callable[[], bool], timeout: float) -> None:
        """Wait for a condition while the launch runs; TimeoutError with the ranks' output."""
        stop = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > stop or self.process.poll() is not None:
                raise TimeoutError("\n".join(f"rank {r}: {self.stderr(r)}" for r in self.ranks))
            time.sleep(0.01)

    def statuses(self, timeout: float = 60) -> dict[int, int]:
        """Exit status by rank (negative: the signal), of all ranks; TimeoutError when one still
        runs.
        """
        path = self.folder / "statuses.json"
        stop = time.monotonic() + timeout
        while not path.exists():
            if time.monotonic() > stop:
                raise TimeoutError("\n".join(f"rank {r}: {self.stderr(r)}" for r in self.ranks))
            time.sleep(0.01)
        return {int(rank): status for rank, status in json.loads(path.read_text()).items()}

    def status(self, rank: int, timeout: float = 60) -> int:
        """Exit status of one rank while others may still run."""
        path = self.folder / f"status.{rank}"
        self.until(lambda: path.exists() or (self.folder / "statuses.json").exists(), timeout)
        return int(path.read_text())

    def stderr(self, rank: int) -> str:
        """What a rank wrote to stderr so far."""
        path = self.folder / f"stderr.{rank}"
        return path.read_text() if path.exists() else ""

    def alive(self) -> list[int]:
        """Ids of processes of the launch that still exist, zombies aside."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
            if int(group) == self.process.pid and state != "Z":
                found.append(int(entry.name))
        return found

    def result(self, case: str, rank: int) -> dict[str, Any]:
        """What a case returned on a rank."""
        stem = self.folder / f"{case}.{rank}"
        values = json.loads(stem.with_name(stem.name + ".json").read_text())
        return values | safetensors.torch.load(
            stem.with_name(stem.name + ".safetensors").read_bytes()
        )


def run_cases(
    size: int,
    cases: Sequence[Case],
    *,
    timeout: float = 120,
    arguments: dict[str, Any] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Run the cases on `size` ranks; {case name: [result of rank 0, of rank 1, …]}.

    AssertionError with the rank's traceback when a rank fails, TimeoutError past `timeout` seconds.
    """
    with Launch(size, cases, arguments=arguments) as launch:
        statuses = launch.statuses(timeout)
        failed = {rank: launch.stderr(rank) for rank, status in statuses.items() if status}
        assert not failed, "\n".join(f"rank {r}: {text}" for r, text in failed.items())
        return {case: [launch.result(case, rank) for rank in launch.ranks] for case in launch.cases}


def reached(name: str) -> None:
    """In a case: tell the parent's `mark` that this rank has come here."""
    (_child_folder() / f"{name}.{os.environ['RANK']}").touch()


def argument(name: str) -> Any:
    """In a case: a value of the launch's `arguments`."""
    return json.loads((_child_folder() / "plan.json").read_text())["arguments"][name]


def _child_folder() -> Path:
    return Path(os.environ["RANKS_FOLDER"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _load(file: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _run_rank(rank: int, plan: dict[str, Any], module: Any, folder: Path) -> int:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(plan["size"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(plan["port"]),
        "RANKS_FOLDER": str(folder),
    }
    output = os.open(folder / f"stderr.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    for case in plan["cases"]:
        try:
            values = getattr(module, case)() or {}
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            return 1
        tensors = {k: v.contiguous() for k, v in values.items() if isinstance(v, torch.Tensor)}
        rest = {k: v for k, v in values.items() if k not in tensors}
        (folder / f"{case}.{rank}.safetensors").write_bytes(safetensors.torch.save(tensors))
        (folder / f"{case}.{rank}.json").write_text(json.dumps(rest))
    return 0


def _main(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    module = _load(plan["file"])
    children = {}
    for rank in plan["ranks"]:
        pid = os.fork()
        if pid == 0:
            os._exit(_run_rank(rank, plan, module, folder))
        children[pid] = rank
    _publish(folder / "pids.json", {rank: pid for pid, rank in children.items()})
    statuses = {}
    while children:
        pid, status = os.wait()
        rank = children.pop(pid)
        statuses[rank] = os.waitstatus_to_exitcode(status)
        _publish(folder / f"status.{rank}", statuses[rank])
    _publish(folder / "statuses.json", statuses)


def _publish(path: Path, value: Any) -> None:
    """Whole or not at all: the parent polls for the file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value))
    part.rename(path)


if __name__ == "__main__":
    sys.modules["ranks"] = sys.modules["__main__"]
    _main(Path(sys.argv[1]))
