"""What all commands have in common on the command line: --host, --json, help with examples."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Callable, Sequence
from typing import NoReturn

#: What a command does: gets its arguments, returns the exit code (or raises a LimosaError).
Run = Callable[[argparse.Namespace], int]
Commands = argparse._SubParsersAction  # the type of add_subparsers() has no public name


class CommandParser(argparse.ArgumentParser):
    """The parser of all commands, a noun or a verb: what it does not know it refuses itself, with its own usage."""

    def error(self, message: str) -> NoReturn:
        """As the base does, and says what to do."""
        super().error(f"{message}\n  to do: see '{self.prog} --help'")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """As the base does; nothing is left over. Raises ``SystemExit``."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Fills prose to the width of the terminal; a paragraph with an indented line, as of examples, stays as it is.
    What commands do stands beside them, however long their names are."""

    def add_argument(self, action: argparse.Action) -> None:
        """The base forgets how far the names of commands are indented."""
        super().add_argument(action)
        for below in self._iter_indented_subactions(action):
            width = len(self._format_action_invocation(below)) + self._current_indent
            self._action_max_length = max(self._action_max_length, width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(one if "\n  " in one else textwrap.fill(one, width) for one in paragraphs)


def add_global_options(parser: argparse.ArgumentParser, *, top: bool = False, with_host: bool = True) -> None:
    """``--host`` and ``--json``, which may stand before the noun or after the verb."""
    # A verb's parser must not put its default over what stood before the noun.
    if with_host:
        parser.add_argument(
            "--host",
            metavar="HOST",
            default=None if top else argparse.SUPPRESS,
            help="the host to connect to; see 'limosa --help'",
        )
    parser.add_argument(
        "--json", action="store_true", default=False if top else argparse.SUPPRESS, help="print JSON, one object a line"
    )


def add_noun(
    commands: Commands[argparse.ArgumentParser], name: str, help_text: str
) -> Commands[argparse.ArgumentParser]:
    """A noun, to which verbs are added."""
    parser = commands.add_parser(
        name,
        help=help_text,
        description=_sentence(help_text),
        epilog=f"'limosa {name} VERB --help' has examples.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    return parser.add_subparsers(metavar="VERB", required=True)


def add_command(
    commands: Commands[argparse.ArgumentParser],
    name: str,
    help_text: str,
    run: Run,
    *,
    examples: Sequence[str],
    notes: str = "",
    local: bool = False,
    also: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """A verb, or a noun that is a command itself. ``examples`` are command lines without ``limosa``; one that is
    ``local`` speaks with no host; ``also`` are other names for it."""
    lines = ["examples:", *(f"  limosa {example}" for example in examples)]
    parser = commands.add_parser(
        name,
        aliases=also,
        help=help_text,
        description=_sentence(help_text) + ("\n\n" + notes if notes else ""),
        epilog="\n".join(lines),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_global_options(parser, with_host=not local)
    parser.set_defaults(run=run)
    return parser


def absolute(path: str) -> str:
    """A path as a host is given it. Not resolved: the host may reach it by links that this machine has not."""
    return os.path.abspath(path)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
