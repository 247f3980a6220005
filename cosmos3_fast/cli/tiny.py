"""Write a complete tiny checkpoint with random weights, for trying things out."""

from __future__ import annotations

import argparse

from cosmos3_fast.cli.output import require_folder, writing
from cosmos3_fast.testing import make_tiny_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder and the seed of the weights."""
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)


def main(args: argparse.Namespace) -> None:
    """Write it and say where."""
    require_folder("DIR", args.folder)
    with writing(args.folder):
        make_tiny_checkpoint(args.folder, seed=args.seed)
    print(f"wrote a tiny checkpoint to {args.folder}")
