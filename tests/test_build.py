"""The extension and the packages: with and without nvcc, and what a wheel and an sdist hold."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cosmos3_fast
from cosmos3_fast import _C

ROOT = Path(__file__).resolve().parents[1]
OFF = {"CMAKE_ARGS": "-DCOSMOS3_WITH_CUDA=OFF"}


def python(*arguments: object, cwd: Path, **environment: str) -> str:
    """Run this interpreter and return its output; AssertionError with that if it fails.

    Coverage stays out: it would count the copies of the package as files of their own.
    """
    inherited = {key: value for key, value in os.environ.items() if "COVERAGE" not in key}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=550,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the sources alone: nothing built, nothing of this folder's leftovers."""
    folder = tmp_path_factory.mktemp("source") / "tree"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").write_text("# cosmos3-fast\n")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("cosmos3_fast", "kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    return folder


@pytest.fixture(scope="module")
def sdist(source) -> Path:
    call = "from setuptools import build_meta as b; b.build_sdist('dist')"
    python("-c", call, cwd=source)
    (found,) = (source / "dist").glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """A wheel made from the sdist, without nvcc."""
    folder = tmp_path_factory.mktemp("from-sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    call = "from setuptools import build_meta as b; b.build_wheel('dist')"
    python("-c", call, cwd=tree, **OFF)
    (found,) = (tree / "dist").glob("*.whl")
    return found


def modules(folder: Path, package: str) -> set[str]:
    return {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for path in folder.rglob("*")
        if path.suffix in (".py", ".pyi") or path.name == "py.typed"
    }


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    (extension,) = {name for name in names if name.endswith(".so")}
    assert extension.startswith("cosmos3_fast/_C.")
    expected = modules(ROOT / "cosmos3_fast", "cosmos3_fast")
    assert names - {extension} == expected | modules(ROOT / "kernels", "cosmos3_fast/kernels")


def test_the_source_folder_says_that_it_is_not_the_installed_package(source):
    """`python -m` in a clone finds it before an installation that is not editable."""
    code = """
import sys
sys.meta_path[:] = [one for one in sys.meta_path if "editable" not in repr(one).lower()]
try:
    import cosmos3_fast
except ImportError as error:
    print(error)
"""
    said = python("-c", code, cwd=source)
    assert said.startswith(f"{source / 'cosmos3_fast'} is the source folder")
    assert "pip install -e ." in said


def test_the_wheel_says_its_licence_its_needs_and_its_command(wheel):
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert f"Version: {cosmos3_fast.__version__}\n" in metadata
    needs = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    core = {line.split()[1].partition(">")[0].rstrip(";") for line in needs if "extra" not in line}
    assert " ".join(sorted(core)) == "numpy pillow safetensors torch tqdm transformers triton"
    assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    entry = archive.read(f"{info}/entry_points.txt").decode()
    assert "cosmos3-fast = cosmos3_fast.cli:main" in entry


def test_the_sdist_holds_what_the_build_reads(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CMakeLists.txt", "LICENSE", "pyproject.toml", "setup.py"} <= names
    tests = {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")}
    assert tests <= names
    sources = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    assert sources <= names and not {name for name in names if name.endswith(".so")}


CPU_ONLY = """
from cosmos3_fast import _C
from cosmos3_fast.kernels import reference
import torch
assert _C.__file__.startswith({site!r}) and reference.__file__.startswith({site!r})
assert _C.has_cuda is False
frames = torch.arange(210, dtype=torch.uint8).view(1, 2, 35, 3)
out = torch.full((210,), torch.nan)
_C.image_to_tensor(frames.data_ptr(), out.data_ptr(), 210, -1, 0)
assert torch.equal(out.view(1, 2, 35, 3).permute(3, 0, 1, 2), reference.image_to_tensor(frames))
try:
    _C.image_to_tensor(frames.data_ptr(), out.data_ptr(), 210, 0, 0)
except RuntimeError as error:
    assert "no CUDA kernels" in str(error), error
else:
    raise AssertionError("a module without CUDA took device 0")
print("ran")
"""


def test_a_build_without_nvcc_runs_the_cpu_twins_and_says_so(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = CPU_ONLY.format(site=str(site))
    assert python("-c", script, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()[-1] == "ran"


@pytest.mark.skipif(not _C.has_cuda, reason="this build has no CUDA kernels")
def test_the_cuda_build_carries_its_runtime_and_needs_no_torch(tmp_path):
    needed = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("torch", "c10", "cudart", "libcuda.") if name in needed], needed
    call = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_C', {_C.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(module.has_cuda)"
    )
    assert python("-c", call, cwd=tmp_path).split() == ["True"]


def test_kernels_are_one_package_wherever_python_starts(tmp_path):
    call = "from cosmos3_fast.kernels import reference as r, rms_norm; print(r.__file__)"
    for folder in (ROOT, tmp_path):
        assert Path(python("-c", call, cwd=folder).strip()) == ROOT / "kernels" / "reference.py"


def test_a_top_level_package_named_kernels_refuses_to_load():
    spec = importlib.util.spec_from_file_location("kernels", ROOT / "kernels" / "__init__.py")
    with pytest.raises(ImportError, match=r"cosmos3_fast\.kernels"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_stub_names_what_the_extension_holds():
    body = ast.parse((ROOT / "cosmos3_fast" / "_C.pyi").read_text()).body
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    values = {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
    assert functions | values == {name for name in dir(_C) if not name.startswith("_")}
    assert all(callable(getattr(_C, name)) for name in functions)
