"""``limosa storage leftovers`` and ``clean``: what is shown, what is asked, and what is sent then."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from standin import Answers, StandIn

from limosa.cli.main import main
from limosa.errors import Conflict
from limosa.model.storage import Leftover
from limosa.wire import endpoints
from limosa.wire.api import CleanReport, CleanRequest, LeftoverList

OLD = Leftover(
    path="/srv/fast/web1-vda.abcdefabcdef.qcow2",
    location="fast",
    vm="web1",
    disk="vda",
    migration="abcdefabcdef",
    size_bytes=3 << 20,
    changed_at=0.0,
    host="alpha",
    proof=("no process has it open",),
)
KEPT = msgspec.structs.replace(
    OLD, path="/srv/fast/db1-vda.fedcbafedcba.raw", proof=(), doubts=("it carries no mark\x1b[2J",)
)


BELOW = msgspec.structs.replace(OLD, path="/srv/fast/golden.abcdefabcdef-1.raw", vm=None, disk=None)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setenv("LIMOSA_SOCKET", str(tmp_path / "s"))
    monkeypatch.chdir("/srv")
    answers: Answers = {
        endpoints.LEFTOVERS: lambda _: LeftoverList(leftovers=(KEPT, OLD)),
        endpoints.CLEAN: lambda _: CleanReport(removed=(OLD,)),
    }
    with StandIn(tmp_path / "s", answers) as standin:
        yield standin


def answer(monkeypatch: pytest.MonkeyPatch, words: str) -> list[str]:
    """Answer from a terminal. Gives the questions."""
    questions: list[str] = []

    def ask(question: str) -> str:
        questions.append(question)
        return words

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", ask)
    return questions


def asked_to_remove(host: StandIn) -> list[CleanRequest]:
    return [
        msgspec.json.decode(body, type=CleanRequest) for endpoint, _, body in host.seen if endpoint is endpoints.CLEAN
    ]


def test_they_are_shown_with_proof_or_doubts(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["storage", "leftovers"]) == 0
    shown = capsys.readouterr().out
    assert OLD.path in shown
    assert "3.0 MiB, last written " in shown
    assert "disk vda of VM 'web1', named by move abcdefabcdef on host 'alpha'" in shown
    assert "- no process has it open" in shown
    assert "stays, because" in shown
    assert "\x1b" not in shown
    assert shown.endswith("1 image (3.0 MiB) may be removed: limosa storage clean\n")
    assert main(["storage", "leftovers", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["path"] for line in lines] == [KEPT.path, OLD.path]


def test_of_a_file_below_disks_no_vm_is_known(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    host.answers[endpoints.LEFTOVERS] = lambda _: LeftoverList(leftovers=(BELOW,))
    assert main(["storage", "leftovers"]) == 0
    assert "a backing file, named by move abcdefabcdef on host 'alpha'" in capsys.readouterr().out


def test_what_was_shown_is_removed(
    host: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = answer(monkeypatch, "y")
    assert main(["storage", "clean"]) == 0
    assert questions == ["Remove 1 image (3.0 MiB)? [y/N] "]
    assert asked_to_remove(host) == [CleanRequest(paths=(OLD.path,))]
    shown = capsys.readouterr().out
    assert "no process has it open" in shown
    assert shown.endswith(" removed\n3.0 MiB freed\n")


@pytest.mark.parametrize("words", ["", "n", "nothing"])
def test_nothing_is_removed_without_a_yes(host: StandIn, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    answer(monkeypatch, words)
    assert main(["storage", "clean"]) == 0
    assert asked_to_remove(host) == []


def test_a_script_must_say_yes(host: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    assert main(["storage", "clean"]) == 2
    assert asked_to_remove(host) == []
    assert main(["storage", "clean", "--yes", "fast/../fast/web1-vda.abcdefabcdef.qcow2"]) == 0
    assert main(["storage", "clean", "--yes"]) == 0
    assert asked_to_remove(host) == [CleanRequest(paths=(OLD.path,)), CleanRequest()]


def test_json_is_all_that_is_printed_and_nobody_is_asked(
    host: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = answer(monkeypatch, "y")
    assert main(["storage", "clean", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["todo"] == "give --yes"
    host.answers[endpoints.LEFTOVERS] = lambda _: LeftoverList(leftovers=(KEPT,))
    assert main(["storage", "clean", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"removed": [], "kept": []}
    assert questions == []
    assert asked_to_remove(host) == []


def test_what_is_no_leftover_the_host_refuses(host: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = answer(monkeypatch, "y")
    main(["storage", "clean", "/srv/own.raw"])
    assert questions == []
    assert asked_to_remove(host) == [CleanRequest(paths=("/srv/own.raw",))]


def test_what_stays_after_all(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    host.answers[endpoints.CLEAN] = lambda _: CleanReport(removed=(), kept=(KEPT,))
    assert main(["storage", "clean", "--yes"]) == Conflict.exit_code
    assert f"{KEPT.path} stays: it carries no mark" in capsys.readouterr().err


def test_there_is_nothing(host: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    host.answers[endpoints.LEFTOVERS] = lambda _: LeftoverList(leftovers=())
    for verb in ("leftovers", "clean"):
        assert main(["storage", verb]) == 0
        assert capsys.readouterr().out == "there is no image that may be removed\n"
