"""`pytest bench`: what --benchmark-save stores, and that a comparison with it can fail."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def bench(storage: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """One kernel's benchmarks."""
    command = [sys.executable, "-m", "pytest", "bench/test_kernels.py", "-k", "silu_mul"]
    command += ["-p", "no:cacheprovider", f"--benchmark-storage=file://{storage}", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    storage = tmp_path_factory.mktemp("baselines")
    done = bench(storage, "--benchmark-save=NAME")
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = storage.rglob("*.json")
    assert file.name == "0001_NAME.json"
    return file


def test_a_stored_run_is_small_and_names_no_host_or_folder(saved):
    text = saved.read_text()
    stored = json.loads(text)
    assert stored["benchmarks"] and "torch" in stored["machine_info"]
    assert all("data" not in x["stats"] for x in stored["benchmarks"]), "every round is stored"
    assert len(text) < 4096 * (1 + len(stored["benchmarks"]))
    assert socket.gethostname() not in re.findall(r"[\w.-]+", text)
    assert not re.search(r'"/|"[A-Z]:', text), "an absolute path"
    assert {"node", "release", "project"}.isdisjoint(stored["machine_info"] | stored["commit_info"])


def test_ranks_without_gpus_are_refused_in_one_line():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "bench/ranks.py", "--tp", "2"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    said = "bench/ranks.py: needs 2 GPUs, this machine has 0: add --tiny for CPU ranks\n"
    assert (done.returncode, done.stderr) == (2, said)


def elsewhere(saved: Path, folder: Path, change: float) -> Path:
    """The run as another Python stored it, its times multiplied."""
    stored = json.loads(saved.read_text())
    for one in stored["benchmarks"]:
        for name in ("min", "max", "mean", "median", "q1", "q3"):
            one["stats"][name] *= change
    run = folder / "Linux-CPython-3.99-64bit" / saved.name
    run.parent.mkdir()
    run.write_text(json.dumps(stored))
    return folder


@pytest.mark.parametrize(("change", "slower"), [(1e-3, True), (1e3, False)])
def test_a_comparison_fails_when_a_median_has_grown(saved, tmp_path, change, slower):
    storage = elsewhere(saved, tmp_path, change)
    done = bench(storage, "--benchmark-compare", "--benchmark-compare-fail=median:5%")
    assert (done.returncode != 0) == slower, done.stdout + done.stderr
    assert ("Performance has regressed" in done.stdout + done.stderr) == slower


@pytest.mark.parametrize("which", ["--benchmark-compare", "--benchmark-compare=0002"])
def test_a_comparison_with_nothing_is_refused(saved, tmp_path, which):
    storage = elsewhere(saved, tmp_path, 1.0) if "=" in which else tmp_path
    done = bench(storage, which, "--benchmark-compare-fail=median:5%")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert "nothing stored in" in done.stderr
