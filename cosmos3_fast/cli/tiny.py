"""Write a complete tiny checkpoint with random weights, for trying things out."""

from __future__ import annotations

import argparse

from cosmos3_fast.cli.output import require_folder, tell, writing
from cosmos3_fast.testing import make_tiny_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder and the seed of the weights."""
    add = parser.add_argument
    add("folder", metavar="DIR", help="an empty or new folder, or an earlier tiny checkpoint")
    add("--seed", type=int, default=0, help="of the weights (default: 0)")


def main(args: argparse.Namespace) -> None:
    """Write it and say where."""
    require_folder("DIR", args.folder)
    with writing(args.folder):
        make_tiny_checkpoint(args.folder, seed=args.seed)
    tell(f"wrote a tiny checkpoint to {args.folder}")
