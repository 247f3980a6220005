"""The command `cosmos3-fast`: argv lives here alone."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from cosmos3_fast.cli import bench, check, demo, info, run, tiny
from cosmos3_fast.cli.ending import INTERRUPTED, interruptible, leave
from cosmos3_fast.cli.output import SaidError, line, say

COMMANDS = {
    "run": run,
    "info": info,
    "check": check,
    "bench": bench,
    "demo": demo,
    "make-tiny": tiny,
}


def parser() -> argparse.ArgumentParser:
    """The whole command's parser; each subcommand adds its own flags."""
    top = argparse.ArgumentParser(
        prog="cosmos3-fast", description="Fast, exact inference of Cosmos3 robot policies."
    )
    top.add_argument("-v", "--verbose", action="store_true", help="log what the engine does")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        sub = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(sub)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 with one line on stderr for bad input: in a launch from
    every process that has it, before any of them ends. 130 when it was interrupted.
    """
    args = _parsed(argv)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        with interruptible(line(args.command, "interrupted")):
            return _status(args)
    except KeyboardInterrupt:
        say(args.command, "interrupted")
        return INTERRUPTED


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    try:
        return parser().parse_args(argv)
    except SystemExit as end:
        if end.code:
            leave(2)
        raise


def _status(args: argparse.Namespace) -> int:
    try:
        COMMANDS[args.command].main(args)
        return 0
    except SaidError:
        pass  # its line is on stderr
    except (ValueError, ImportError, FloatingPointError) as error:
        say(args.command, error)
    return leave(2)
