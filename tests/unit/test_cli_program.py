"""The whole command line: every command parses, has help with an example; errors and exit codes; quick start."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from standin import StandIn

from limosa.cli.main import main
from limosa.cli.output import clean
from limosa.cli.program import NOUNS, build_parser
from limosa.errors import Conflict, StorageError
from limosa.wire.api import VmList
from limosa.wire.endpoints import LIST_VMS


def leaves(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Every command with its parser."""
    choices = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not choices:
        yield path, parser
    for name, below in (choices[0] if choices else {}).items():
        yield from leaves(below, (*path, name))


COMMANDS = dict(leaves(build_parser()))


def examples(parser: argparse.ArgumentParser) -> list[str]:
    lines = (parser.epilog or "").splitlines()
    return [line.strip() for line in lines if line.strip().startswith("limosa ")]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_examples_that_parse(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*path, "--help"]) == 0
    text = capsys.readouterr().out
    assert COMMANDS[path].description
    assert examples(COMMANDS[path]), "an example in the epilog"
    assert all(example in text for example in examples(COMMANDS[path]))
    for example in examples(COMMANDS[path]):
        words = shlex.split(example.split(" > ")[0])[1:]
        parsed = build_parser().parse_args(words)
        assert callable(parsed.run)


@pytest.mark.parametrize("words", [[], ["storage"]])
def test_what_commands_do_stands_beside_them(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    listed = capsys.readouterr().out.partition("positional arguments:\n")[2].partition("\n\n")[0].splitlines()[1:]
    assert all(re.match(r"    \S.*  +\S| {10,}\S", line) for line in listed), listed


def test_who_writes_what_is_no_command_is_told_where_to_look(capsys: pytest.CaptureFixture[str]) -> None:
    for words, where in (([], "limosa"), (["vm"], "limosa vm"), (["vm", "list", "--x"], "limosa vm list")):
        assert main(words) == 2
        assert capsys.readouterr().err.endswith(f"\n  to do: see '{where} --help'\n")


@pytest.mark.parametrize("noun", ["vm", "migration", "storage", "ca"])
def test_ls_is_list(noun: str) -> None:
    assert COMMANDS[noun, "ls"] is COMMANDS[noun, "list"]


def test_every_option_has_help() -> None:
    for path, parser in COMMANDS.items():
        for action in parser._actions:
            if action.option_strings and not action.required and not action.choices:
                assert action.help, f"{path} {action.option_strings}"


@pytest.mark.parametrize("noun", NOUNS)
def test_one_noun_alone_is_the_same_as_among_all(noun: str) -> None:
    alone = dict(leaves(build_parser([noun])))
    assert alone.keys() == {path for path in COMMANDS if NOUNS[path[0]] == NOUNS[noun]}


def test_help_names_every_noun(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^    {noun}\s", text, re.MULTILINE) for noun in NOUNS)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nope"],
        ["vm"],
        ["vm", "nope"],
        ["--host"],
        ["move", "web1"],
        ["vm", "list", "--jso"],
        ["vm", "create", "web1", "--disk=--"],
    ],
)
def test_what_does_not_parse_is_invalid_input(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "usage: limosa" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        (["vm", "list", "--state=running"], "limosa vm list"),
        (["vm", "--quiet", "list"], "limosa vm"),
        (["--quiet", "vm", "list"], "limosa"),
        (["check", "web1", "db1", "--to", "host2"], "limosa check"),
    ],
)
def test_what_is_not_known_is_refused_with_the_usage_of_the_command(
    words: list[str], usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"usage: {usage} [-h]")


@pytest.mark.parametrize("path", [(), *((noun,) for noun in NOUNS), *COMMANDS], ids=" ".join)
def test_help_fits_a_terminal(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but examples, which are there to be copied."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*path, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80 and not line.startswith("  limosa ")] == []


def test_global_options_stand_anywhere() -> None:
    for words in (["--host", "host1", "--json", "vm", "list"], ["vm", "list", "--json", "--host=host1"]):
        parsed = build_parser().parse_args(words)
        assert (parsed.host, parsed.json) == ("host1", True)
    assert build_parser().parse_args(["vm", "list"]).json is False


@pytest.fixture
def socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIMOSA_SOCKET", str(tmp_path / "s"))
    return tmp_path / "s"


def raises(error: BaseException) -> Callable[..., None]:
    def answer(*_: object, **__: object) -> None:
        raise error

    return answer


def test_an_error_is_three_lines_a_code_and_an_exit_code(socket: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = Conflict("it is so", why="it was so", todo="change it\x1b[2J")
    with StandIn(socket, {LIST_VMS: raises(error)}):
        assert main(["vm", "list"]) == 5
        assert capsys.readouterr().err.splitlines() == [
            "limosa: it is so: it was so",
            "  to do: change it\N{REPLACEMENT CHARACTER}[2J",
            "  code: conflict",
        ]
        assert main(["vm", "list", "--json"]) == 5
        fault = json.loads(capsys.readouterr().out)["error"]
    assert (fault["code"], fault["what"], fault["why"]) == ("conflict", "it is so", "it was so")


def test_no_daemon_says_what_to_do(socket: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vm", "list"]) == 7
    assert "no host daemon answers" in (text := capsys.readouterr().err)
    assert "systemctl start limosa-host" in text


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limosa.cli.vm.client_of", raises(KeyboardInterrupt()))
    assert main(["vm", "list"]) == 130


def test_a_reader_that_leaves_is_no_error(socket: Path) -> None:
    with StandIn(socket, {LIST_VMS: lambda _: VmList(vms=())}):
        process = subprocess.Popen(
            [sys.executable, "-c", "import limosa.cli.main as m; m.console_script()", "vm", "list"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait() == 141
        process.stderr.close()


@pytest.mark.parametrize("words", [["vm", "list"], ["completion", "bash"]])
def test_output_to_a_full_disk_is_an_error_without_a_traceback(socket: Path, words: list[str]) -> None:
    with StandIn(socket, {LIST_VMS: lambda _: VmList(vms=())}), Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", "import limosa.cli.main as m; m.console_script()", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == StorageError.exit_code
    assert done.stderr.startswith("limosa: this command could not write all that it had to: No space left on device\n")
    assert "Traceback" not in done.stderr


def test_an_empty_host_is_not_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--host", "", "vm", "list"]) == 2
    assert "--host names no host" in capsys.readouterr().err


def test_terminal_escapes_do_not_get_through() -> None:
    assert (
        clean("a\x1b]0;x\x07\nb\x9bc")
        == "a\N{REPLACEMENT CHARACTER}]0;x" + "\N{REPLACEMENT CHARACTER}" * 2 + "b\N{REPLACEMENT CHARACTER}c"
    )


HEAVY = {
    "rich",
    "ssl",
    "asyncio",
    "cryptography",
    "pyroute2",
    "websockets",
    "typing_extensions",
    "http.client",
    "email",
}


@pytest.mark.parametrize(
    "words", ["vm list", "move web1 --to host2 --detach", "check web1 --to host2", "migration list"]
)
def test_commands_load_nothing_heavy(words: str, tmp_path: Path) -> None:
    code = f"import sys; from limosa.cli.main import main; main({words.split()}); print(*sys.modules)"
    environment = {"LIMOSA_SOCKET": str(tmp_path / "nobody"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    loaded = set(done.stdout.split())
    assert "limosa.client.host" in loaded
    assert loaded & HEAVY == set()
