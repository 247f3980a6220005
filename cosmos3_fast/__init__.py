"""Fast, exact inference of NVIDIA Cosmos3 robot policies on one GPU or a host of them."""

from importlib.util import find_spec

if find_spec("cosmos3_fast.kernels") is None:  # Python looks in its own folder first
    raise ImportError(
        f"{__path__[0]} is the source folder, not the installed package: leave the clone, or "
        "install it there with pip install -e ."
    )

from cosmos3_fast.config import (
    Cosmos3PolicyWNArgs,
    DeviceConfig,
    EngineArgs,
    EngineConfig,
    ParallelConfig,
    RuntimeConfig,
)
from cosmos3_fast.engine import Engine
from cosmos3_fast.processor import (
    DROID,
    Cosmos3PolicyProcessedInputs,
    Cosmos3PolicyProcessor,
    compose_droid_views,
)
from cosmos3_fast.request import MODES, Cosmos3ActionRequest, pixel_to_latent_shape

__version__ = "0.1.0"

__all__ = [
    "DROID",
    "MODES",
    "Cosmos3ActionRequest",
    "Cosmos3PolicyProcessedInputs",
    "Cosmos3PolicyProcessor",
    "Cosmos3PolicyWNArgs",
    "DeviceConfig",
    "Engine",
    "EngineArgs",
    "EngineConfig",
    "ParallelConfig",
    "RuntimeConfig",
    "compose_droid_views",
    "pixel_to_latent_shape",
]
