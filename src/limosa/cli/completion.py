"""``limosa completion``: completion for shells, made from the parser itself by shtab."""

from __future__ import annotations

import argparse

from limosa.cli.arguments import Commands, add_command


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``completion``."""
    parser = add_command(
        commands,
        "completion",
        "print the completion script for a shell",
        _complete,
        examples=[
            "completion bash > /etc/bash_completion.d/limosa",
            "completion zsh > /usr/share/zsh/site-functions/_limosa",
            "completion fish > /etc/fish/completions/limosa.fish",
        ],
        local=True,
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def _complete(arguments: argparse.Namespace) -> int:
    import shtab  # noqa: PLC0415 - needed only here

    from limosa.cli.program import build_parser  # noqa: PLC0415 - it imports this module

    print(shtab.complete(build_parser(), arguments.shell))
    return 0
