"""The entry of ``limosa``: prepares a quick start, then hands over to :mod:`limosa.cli.program`."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence

from limosa.quickly import import_msgspec_quickly


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # What is imported stays; looking through it for garbage would take a tenth of a short command's time.
    gc.disable()
    try:
        import_msgspec_quickly()
        from limosa.cli import program  # noqa: PLC0415 - after the line above

        parsed = program.parse(sys.argv[1:] if arguments is None else arguments)
    except SystemExit as ending:  # argparse has printed the help, the version or what is wrong
        return int(ending.code or 0)
    finally:
        gc.enable()
    return program.execute(parsed)


def console_script() -> None:
    """Run one command and leave at once, without the 10 ms in which Python takes itself apart.

    Everything that must be put back (terminals, sockets, files) is put back by the commands themselves.
    """
    code = main()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = code or 1
    os._exit(code)
