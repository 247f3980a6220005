"""Packages and the CMake build of `cosmos3_fast._C`; everything static stands in pyproject.toml.

`CMAKE_ARGS` joins the configure command: `CMAKE_ARGS=-DCOSMOS3_WITH_CUDA=OFF pip install .`
"""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TOOLS = {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}  # package -> where it says its program is


def tool(name: str) -> str:
    """The program of the build requirement's package, else the one on PATH: an environment
    without a network, where isolation is off, may have only that.
    """
    try:
        return str(Path(getattr(importlib.import_module(name), TOOLS[name])) / name)
    except ImportError:
        found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"cosmos3_fast._C is built with {name}; pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Build every extension with CMake and Ninja, into the place setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = ROOT / self.get_ext_fullpath(ext.name)
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *(tool("cmake"), "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run([tool("cmake"), "--build", str(build)], check=True)
        if not target.is_file():
            raise RuntimeError(f"CMake built no {target}")


setup(
    packages=[
        "cosmos3_fast",
        "cosmos3_fast.cli",
        "cosmos3_fast.kernels",
        "cosmos3_fast.layers",
        "cosmos3_fast.ops",
        "cosmos3_fast.processor",
        "cosmos3_fast.testing",
        "cosmos3_fast.vae",
    ],
    # Never a top-level package `kernels`: that would overwrite the one of that name on PyPI.
    package_dir={"cosmos3_fast.kernels": "kernels"},
    package_data={"cosmos3_fast": ["_C.pyi", "py.typed"]},
    ext_modules=[Extension("cosmos3_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
