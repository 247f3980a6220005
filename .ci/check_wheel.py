"""Import the installed wheel from a folder that holds no sources, and run one op of the extension.

python check_wheel.py SITE      SITE: where the wheel was installed
"""

import sys
from importlib.metadata import distribution
from pathlib import Path

import torch

import cosmos3_fast
from cosmos3_fast import _C, ops
from cosmos3_fast.kernels import reference

site = Path(sys.argv[1]).resolve()
for module in (cosmos3_fast, _C, reference):
    assert site in Path(module.__file__).resolve().parents, f"{module.__file__} is not of the wheel"
for name in ("py.typed", "_C.pyi"):
    assert (site / "cosmos3_fast" / name).is_file(), f"the wheel lacks {name}"
assert not (site / "kernels").exists(), "the wheel holds a top-level package `kernels`"

frames = torch.randint(0, 256, (2, 3, 5, 3), dtype=torch.uint8)
assert torch.equal(ops.image_to_tensor(frames), reference.image_to_tensor(frames))

package = distribution("cosmos3-fast")
print(f"{package.name} {package.version} from {site}: imports, CUDA {_C.has_cuda}")
