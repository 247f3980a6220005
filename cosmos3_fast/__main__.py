"""`python -m cosmos3_fast` is the command `cosmos3-fast`.

`python -m` and `torchrun -m` put the current folder on sys.path. In a clone's root that makes the
project's folder `kernels` look like PyPI's package of that name, which transformers and diffusers
import when they see it: it refuses, and they fail. So that entry goes before anything looks.
"""

import sys
from pathlib import Path


def forget_clone(paths: list[str]) -> list[str]:
    """`paths` without the clone's root that holds this package, if it lies in one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "setup.py").is_file() or not (root / "kernels").is_dir():
        return paths
    return [path for path in paths if Path(path).resolve() != root]


if __name__ == "__main__":
    sys.path[:] = forget_clone(sys.path)
    from cosmos3_fast.cli import main

    sys.exit(main())
