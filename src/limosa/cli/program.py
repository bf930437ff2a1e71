"""The whole command line: which module has which noun, errors, exit codes.

Only the module of the noun that is asked for is imported; all of them for ``--help`` and completion.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import itertools
import os
import sys
from collections.abc import Iterable, Sequence

from limosa import __version__
from limosa.cli.arguments import CommandParser, HelpFormatter, add_global_options
from limosa.cli.output import report, warn
from limosa.errors import InvalidInput, LimosaError, StorageError

#: Which module of this package registers which noun, in the order of the help.
NOUNS = {
    "vm": "vm",
    "move": "move",
    "check": "move",
    "migration": "migration",
    "storage": "storage",
    "host": "host",
    "ca": "ca",
    "lab": "lab",
    "completion": "completion",
}

_EPILOG = """\
which host:
  --host NAME   a host in hosts.toml in ~/.config/limosa or /etc/limosa, of a
                lab on this machine, or in DNS; all except lab hosts use
                mutual TLS; put client.pem, client.key and ca.pem in the
                same folder
  otherwise     $LIMOSA_SOCKET, $LIMOSA_HOST, or this machine's own daemon

exit codes: 0 done, 1 internal error, 2 invalid input, 3 not permitted,
  4 not found, 5 conflict, 6 refused by preflight, 7 host unreachable,
  8 migration failed, 9 cancelled, 10 owner unknown, 11 QEMU, 12 storage,
  13 network, 14 state or certificate file damaged, missing or expired;
  130 interrupted. docs/errors.md has all codes.

examples:
  limosa vm create web1 --memory 2G --cpus 2 --disk web1.qcow2 --switch lan --start
  limosa move web1 --to host2
"""


def build_parser(nouns: Iterable[str] = tuple(NOUNS)) -> argparse.ArgumentParser:
    """The parser with the commands of some nouns."""
    parser = CommandParser(
        prog="limosa",
        description="Live migration for QEMU/KVM virtual machines.",
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"limosa {__version__}")
    add_global_options(parser, top=True)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=CommandParser)
    for module in dict.fromkeys(NOUNS[noun] for noun in nouns):
        importlib.import_module(f"limosa.cli.{module}").register(commands)
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command that is asked for. Raises ``SystemExit`` after printing help, version or what is wrong."""
    noun = _noun_of(arguments)
    parser = build_parser([noun] if noun in NOUNS else NOUNS)
    for word in itertools.takewhile(lambda word: word != "--", arguments):
        option, _, value = word.partition("=")
        if option.startswith("--") and value == "--":
            # Before Python 3.13 argparse would take it for the mark that ends the options, and hand on a list.
            parser.error(f"argument {option}: '--' is not a value")
    return parser.parse_args(arguments)


def execute(parsed: argparse.Namespace) -> int:
    """Run a command; returns its exit code. Errors are printed here and nowhere else."""
    try:
        code: int | None = parsed.run(parsed)
        sys.stdout.flush()
    except LimosaError as error:
        return report(error, as_json=parsed.json)
    except KeyboardInterrupt:
        warn("")
        return 130
    except BrokenPipeError:
        _drop_output()  # the reader of a pipe has seen enough
        return 141
    except OSError as fault:
        if fault.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _drop_output()
        return report(StorageError("this command could not write all that it had to", why=fault.strerror or str(fault)))
    except UnicodeEncodeError as fault:
        return report(InvalidInput("an argument is not valid text", why=str(fault)), as_json=parsed.json)
    return code or 0


def _drop_output() -> None:
    """What is still buffered must not complain when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _noun_of(arguments: Sequence[str]) -> str:
    """The first argument that is no option and no option's value."""
    words = iter(arguments)
    for word in words:
        if word == "--host":
            next(words, None)
        elif not word.startswith("-"):
            return word
    return ""
