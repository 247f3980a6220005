"""What a stored figure says about where it was measured; never the host's name."""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "diffusers")


def machine() -> dict[str, str]:
    """GPU (or "cpu"), its memory, and the versions of what runs on it."""
    found = {"gpu": "cpu", "processor": platform.machine(), "python": platform.python_version()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
        }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def script_command(launcher: Sequence[str], argv: Sequence[str]) -> str:
    """A script's command line as typed at the repository's root: `launcher`, then argv, whose first
    word becomes the script in its folder.
    """
    script = Path(argv[0]).resolve()
    return shlex.join([*launcher, f"{script.parent.name}/{script.name}", *argv[1:]])


def folder_name() -> str:
    """The GPU's name as a folder: "nvidia-h200", or "cpu-x86_64"."""
    found = machine()
    name = found["gpu"] if found["gpu"] != "cpu" else f"cpu-{found['processor']}"
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")
