"""The command `cosmos3-fast`: argv lives here alone."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

from cosmos3_fast.cli import bench, check, demo, info, run, tiny
from cosmos3_fast.cli.ending import INTERRUPTED, interruptible, leave
from cosmos3_fast.cli.flags import join_numbers, require_names
from cosmos3_fast.cli.output import AboveBars, SaidError, line, say, tell

COMMANDS = {
    "run": run,
    "info": info,
    "check": check,
    "bench": bench,
    "demo": demo,
    "make-tiny": tiny,
}


class _Parser(argparse.ArgumentParser):
    """argparse's own help ends well where nobody gets it."""

    def print_help(self, file: Any = None) -> None:
        if file is None:
            tell(self.format_help(), end="")
        else:
            super().print_help(file)


def parser() -> argparse.ArgumentParser:
    """The whole command's parser; each subcommand adds its own flags."""
    top = _Parser(
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
    every process that has it, before any of them ends. 130 when it was interrupted, 141 when
    whoever read its output has gone.
    """
    args = _parsed(argv)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        handlers=[AboveBars()],
    )
    try:
        with interruptible(line(args.command, "interrupted")):
            return perform(args)
    except KeyboardInterrupt:
        say(args.command, "interrupted")
        return INTERRUPTED


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    try:
        return parser().parse_args(join_numbers(sys.argv[1:] if argv is None else argv))
    except SystemExit as end:
        if end.code:
            leave(2)
        raise
    except ValueError as error:  # of _Parser.print_help
        raise SystemExit(say("--help", error).status) from error


def perform(args: argparse.Namespace) -> int:
    """Run a parsed command; its status. KeyboardInterrupt passes."""
    try:
        require_names(args)
        COMMANDS[args.command].main(args)
        return 0
    except SaidError as said:
        return leave(said.status)  # its line is on stderr
    except (ValueError, ImportError, FloatingPointError) as error:
        return leave(say(args.command, error).status)
