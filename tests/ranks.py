"""Ranks on CPU for tests: one launch of plain processes that runs many cases.

A case is a function of a test module without arguments; it returns {name: tensor or JSON value}.
The parent gets every rank's results and compares them:

    results = run_cases(4, [case_sum, case_gather])
    results["case_sum"][rank]["x"]

One server process per pytest session imports torch and the package once. Each launch is a fork of
it in its own process group, which loads the test module and forks the ranks; they carry torchrun's
environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). A hard limit ends the whole
group. `Launch` is for tests that end ranks themselves.
"""

from __future__ import annotations

import contextlib
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

_server: subprocess.Popen[bytes] | None = None
Case = Callable[[], "dict[str, Any] | None"]
# A test must never use NVLink multicast, on whatever machine it runs.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "TORCH_CPP_LOG_LEVEL": "FATAL",
    # torch looks up the name of 127.0.0.1 at every connection: 5 s where DNS does not answer.
    "RES_OPTIONS": "timeout:1 attempts:1",
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
        self.leader = _fork_leader(self.folder)

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        while self.alive():
            with contextlib.suppress(ProcessLookupError):  # they ended while we looked
                os.killpg(self.leader, signal.SIGKILL)
            time.sleep(0.01)
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
        """Wait for a condition; TimeoutError with the ranks' output, also once all have ended."""
        stop = time.monotonic() + timeout
        ended = self.folder / "statuses.json"
        while not condition():
            if time.monotonic() > stop or ended.exists():
                if condition():
                    return
                said = [f"rank {rank}: {self.stderr(rank)}" for rank in self.ranks]
                leader = self.folder / "leader"
                raise TimeoutError(
                    "\n".join([*said, leader.read_text() if leader.exists() else ""])
                )
            time.sleep(0.01)

    def statuses(self, timeout: float = 60) -> dict[int, int]:
        """Exit status by rank (negative: the signal), of all ranks; TimeoutError while one runs."""
        path = self.folder / "statuses.json"
        self.until(path.exists, timeout)
        return {int(rank): status for rank, status in json.loads(path.read_text()).items()}

    def status(self, rank: int, timeout: float = 60) -> int:
        """Exit status of one rank while others may still run."""
        path = self.folder / f"status.{rank}"
        self.until(path.exists, timeout)
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
            if int(group) == self.leader and state != "Z":
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


def _fork_leader(folder: Path) -> int:
    """Ask the server, started at the first call, for a launch; the id of its process group."""
    global _server
    if _server is None or _server.poll() is not None:
        _server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            env=os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
    assert _server.stdin is not None and _server.stdout is not None
    _server.stdin.write(f"{folder}\n".encode())
    _server.stdin.flush()
    return int(_server.stdout.readline())


def _serve() -> None:
    """Server: one launch for each folder named on stdin, until its end."""
    import pytest  # noqa: F401

    import cosmos3_fast.engine  # noqa: F401  # so that no rank has to

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.write(write, b"x")  # now its id names a process group
            try:
                _lead(Path(line.strip()))
            finally:
                os._exit(0)
        os.read(read, 1)
        os.close(read)
        os.close(write)
        print(pid, flush=True)


def _lead(folder: Path) -> None:
    output = os.open(folder / "leader", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(target, stream)
    children: dict[int, int] = {}
    statuses: dict[int, int] = {}
    try:
        plan = json.loads((folder / "plan.json").read_text())
        module = _load(plan["file"])
        for rank in plan["ranks"]:
            pid = os.fork()
            if pid == 0:
                os._exit(_run_rank(rank, plan, module, folder))
            children[pid] = rank
        _publish(folder / "pids.json", {rank: pid for pid, rank in children.items()})
        while children:
            pid, status = os.wait()
            rank = children.pop(pid)
            statuses[rank] = os.waitstatus_to_exitcode(status)
            _publish(folder / f"status.{rank}", statuses[rank])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    _publish(folder / "statuses.json", statuses)


def _publish(path: Path, value: Any) -> None:
    """Whole or not at all: the parent polls for the file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value))
    part.rename(path)


if __name__ == "__main__":
    sys.modules["ranks"] = sys.modules["__main__"]
    _serve()
