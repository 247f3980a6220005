"""Requests in, robot commands out: what stands between a user and the engine.

`Cosmos3PolicyProcessor` is put together from small frozen callables, one file each: `images` reads
frames, `canvas` places them, `prompt` writes the caption, `actions` and `stats` convert action
rows, `domains` holds the embodiments, `views` and `droid` the DROID recipe.
"""

from cosmos3_fast.processor.actions import parse_actions, read_actions, write_actions
from cosmos3_fast.processor.domains import DOMAINS, resolve_domain_id, resolve_raw_action_dim
from cosmos3_fast.processor.droid import DROID
from cosmos3_fast.processor.policy import Cosmos3PolicyProcessedInputs, Cosmos3PolicyProcessor
from cosmos3_fast.processor.views import compose_droid_views

__all__ = [
    "DOMAINS",
    "DROID",
    "Cosmos3PolicyProcessedInputs",
    "Cosmos3PolicyProcessor",
    "compose_droid_views",
    "parse_actions",
    "read_actions",
    "resolve_domain_id",
    "resolve_raw_action_dim",
    "write_actions",
]
