"""Moving from the command line: exit codes, JSON, several at once, broken connections, what is shown."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console
from standin import Answers, StandIn

from limosa.cli import display, follow, move
from limosa.cli.main import main
from limosa.errors import (
    Cancelled,
    Conflict,
    HostUnreachable,
    LimosaError,
    MigrationFailed,
    NotFound,
    OwnerUnknown,
    PreflightRefused,
)
from limosa.model.finding import Finding, Severity
from limosa.model.migration import Fault, Migration, Outcome, Phase, Progress, Side
from limosa.model.storage import DiskAction, DiskPlan
from limosa.model.vm import Vm, VmConfig, VmState
from limosa.wire.api import CheckReport, Expected, MigrationList, MoveRequest, VmList
from limosa.wire.endpoints import (
    CANCEL_MIGRATION,
    CHECK,
    LIST_MIGRATIONS,
    LIST_VMS,
    MOVE,
    RESOLVE_MIGRATION,
    SHOW_MIGRATION,
    WATCH_MIGRATION,
)

DISK = DiskPlan(
    disk="vda",
    action=DiskAction.COPY,
    path="/images/web1.qcow2",
    format="qcow2",
    virtual_bytes=20 << 30,
    expected_bytes=3 << 30,
)
FINDING = Finding(code="switch-missing", severity=Severity.ERROR, what="no switch 'lan'", todo="add it")


def shown(vm: str, **changes: Any) -> Migration:
    values: dict[str, Any] = {
        "id": vm.ljust(12, "0"),
        "vm": vm,
        "source": "host1",
        "destination": "host2",
        "side": Side.SOURCE,
        "transport": "tcp",
        "phase": Phase.COPY,
        "outcome": Outcome.UNDER_WAY,
        "progress": Progress(),
        "accepted_at": 1.0,
    }
    return Migration(**(values | changes))


def completed(vm: str) -> Migration:
    phases = {"build-up": 0.1, "copy": 2.0, "synchronise": 0.2, "switchover": 0.02, "tear-down": 0.01}
    return shown(vm, outcome=Outcome.COMPLETED, phases=phases, total_s=2.33, blackout_ms=6.2)


class Host(StandIn):
    """A stand-in that moves VMs; ``endings`` says how each move ends (default: completed)."""

    def __init__(self, path: Path) -> None:
        answers: Answers = {
            MOVE: self.move,
            WATCH_MIGRATION: self.watch,
            LIST_MIGRATIONS: self.list,
            CHECK: self.check,
        }
        super().__init__(path, answers)
        self.endings: dict[str, Migration | Exception] = {}
        self.moves: list[MoveRequest] = []
        self.breaks = 0
        self.mbit_per_s: int | None = 1000

    def move(self, request: MoveRequest) -> Migration:
        self.moves.append(request)
        ending = self.endings.get(request.vm)
        if isinstance(ending, Exception):
            raise ending
        return shown(request.vm, phase=Phase.BUILD_UP)

    def watch(self, _: object, migration: str) -> Iterator[Migration]:
        vm = migration.rstrip("0")
        yield shown(vm, progress=Progress(percent=50, transferred_bytes=1, note="the guest writes a lot"))
        if self.breaks:
            self.breaks -= 1
            raise ConnectionAbortedError
        ending = self.endings.get(vm) or completed(vm)
        assert isinstance(ending, Migration)
        yield ending

    def list(self, _: object) -> MigrationList:
        return MigrationList(migrations=(shown("web1"), completed("db1"), completed("webserver123")))

    def show(self, _: object, migration: str) -> Migration:
        if migration != "web100000000":
            raise NotFound(f"no migration {migration}")
        return shown("web1")

    def check(self, request: MoveRequest) -> CheckReport:
        possible = request.vm == "web1"
        return CheckReport(
            vm=request.vm,
            source="host1",
            destination="host2",
            possible=possible,
            findings=() if possible else (FINDING,),
            disks=(DISK,),
            expected=Expected(
                disk_bytes=3 << 30,
                memory_bytes=1 << 30,
                mbit_per_s=self.mbit_per_s,
                seconds=34.4 if self.mbit_per_s else None,
                first_downtime_ms=2,
                blackout_budget_ms=60,
            ),
        )


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("LIMOSA_SOCKET", str(tmp_path / "s"))
    monkeypatch.setattr(follow, "_RETRY_S", 0.01)
    with Host(tmp_path / "s") as host:
        yield host


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("quietly", [[], ["--json"]])
def test_ctrl_c_tells_what_has_ended_and_that_the_others_go_on(
    host: Host, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quietly: list[str]
) -> None:
    def events(*those: tuple[str, follow.Event]) -> Callable[..., Iterator[tuple[str, follow.Event]]]:
        def interrupted(names: list[str], begin: object) -> Iterator[tuple[str, follow.Event]]:
            yield from those
            raise KeyboardInterrupt

        return interrupted

    refused = ("db1", PreflightRefused((FINDING,), vm="db1", host="host2"))
    monkeypatch.setattr(move, "follow_all", events(("web1", shown("web1")), refused))
    assert main(["move", "web1", "db1", "--to", "host2", *quietly]) == 130
    err = capsys.readouterr().err
    assert "limosa: VM 'db1' cannot move to host 'host2'" in err
    assert "the other moves go on" in err
    monkeypatch.setattr(move, "follow_all", events(refused))
    assert main(["move", "db1", "--to", "host2", *quietly]) == 130
    assert "go on" not in capsys.readouterr().err


def test_an_error_names_the_vm_it_is_about(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    lost = Fault(code="destination-lost", what="the session broke", vm="web1")
    host.endings["web1"] = shown("web1", outcome=Outcome.FAILED, fault=lost)
    host.endings["web2"] = HostUnreachable("no answer")
    host.endings["web3"] = Conflict("VM 'web3' is stopped", vm="web3")
    assert main(["move", "web1", "web2", "web3", "--to", "host2"]) != 0
    err = capsys.readouterr().err.splitlines()
    assert "limosa: VM 'web1': the session broke" in err
    assert "limosa: VM 'web2': no answer" in err
    assert "limosa: VM 'web3' is stopped" in err


def test_a_move_with_its_lines_and_table(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["move", "web1", "--to", "host2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == ["web1: build-up", "web1: copy, 50 %, the guest writes a lot", "web1: completed"]
    assert "BLACKOUT" in out[3]
    assert "6.2 ms" in out[4]


def test_a_note_with_other_figures_is_no_new_line(capsys: pytest.CaptureFixture[str]) -> None:
    plain = display.PlainDisplay()
    notes = ("writes 2.5 MiB/s, slowed by 20 %", "writes 117 KiB/s, slowed by 20 %", "writes 2.5 MiB/s, slowed by 40 %")
    for note in notes:
        plain.show(shown("web1", progress=Progress(note=f"the guest {note}")))
    assert [line[-4:] for line in capsys.readouterr().out.splitlines()] == ["20 %", "40 %"]


def test_a_narrow_terminal_gets_sentences_instead_of_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "_terminal_columns", lambda: 60)
    display.say_summary([completed("web1")])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    assert " ".join(line.strip() for line in lines).startswith("web1: completed, host1 to host2; total 2.3 s, build-up")


def test_json_is_one_object_for_each_vm_at_its_end(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.endings["db1"] = Conflict("it moves already", vm="db1")
    assert main(["move", "web1", "db1", "app1", "--to", "host2", "--json"]) == Conflict.exit_code
    found = objects(capsys.readouterr().out)
    assert {one["vm"]: one["outcome"] for one in found if "vm" in one} == {"web1": "completed", "app1": "completed"}
    assert [one["error"]["code"] for one in found if "error" in one] == ["conflict"]


def test_options_reach_the_host(host: Host) -> None:
    words = ["--transport", "rdma", "--bandwidth", "500", "--blackout-budget", "20", "--no-post-copy", "--detach"]
    words += ["--storage", "vda=fast, vdb=bulk", "--keep", "--rdma-pin-all"]
    assert main(["move", "web1", "--to", "host2", *words]) == 0
    assert msgspec.to_builtins(host.moves[0].options) == {
        "transport": "rdma",
        "bandwidth_mbit_per_s": 500,
        "blackout_budget_ms": 20,
        "post_copy": False,
        "rdma_pin_all": True,
        "storage": {"vda": "fast", "vdb": "bulk"},
        "chain": "keep",
        "keep": True,
    }
    assert [endpoint for endpoint, _, _ in host.seen] == [MOVE]


def test_a_connection_that_breaks_does_not_end_the_watching(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.breaks = 2
    assert main(["move", "web1", "--to", "host2", "--json"]) == 0
    assert objects(capsys.readouterr().out)[0]["outcome"] == "completed"
    assert len(host.moves) == 1


def test_a_daemon_that_is_away_is_spoken_of_once(
    host: Host, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "_SILENT_S", 0)
    watch, refusals = host.watch, [HostUnreachable("no answer")] * 3

    def away(request: object, migration: str) -> Iterator[Migration]:
        if refusals:
            raise refusals.pop()
        return watch(request, migration)

    host.answers[WATCH_MIGRATION] = away
    assert main(["move", "web1", "--to", "host2"]) == 0
    out = capsys.readouterr().out
    assert out.count("web1: build-up, the daemon of host 'host1' does not answer; trying again\n") == 1
    assert "web1: completed" in out


def test_a_host_that_stays_away_is_unreachable(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "PATIENCE_S", 0.05)
    host.answers[WATCH_MIGRATION] = lambda *_, **__: b""
    assert main(["move", "web1", "--to", "host2", "--json"]) == 7


def test_a_refusal_shows_all_findings(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.endings["web1"] = PreflightRefused((FINDING,), vm="web1", host="host2")
    assert main(["move", "web1", "--to", "host2"]) == 6
    err = capsys.readouterr().err
    assert "error: no switch 'lan' [switch-missing]" in err
    assert "to do: add it" in err


@pytest.mark.parametrize(
    ("outcome", "fault", "code"),
    [
        (Outcome.CANCELLED, Cancelled("cancelled").fault(), 9),
        (Outcome.CANCELLED, None, 9),
        (Outcome.FAILED, Fault(code="not-converging", what="it writes too fast"), 8),
        (Outcome.UNRESOLVED, Fault(code="owner-unknown", what="nobody knows"), 10),
    ],
)
def test_how_a_move_ended_is_the_exit_code(
    host: Host, outcome: Outcome, fault: Fault | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    host.endings["web1"] = shown("web1", outcome=outcome, fault=fault)
    assert main(["move", "web1", "--to", "host2"]) == code
    assert (fault is None) or fault.what in capsys.readouterr().err
    assert main(["move", "web1", "--to", "host2", "--json"]) == code


def test_all_moves_what_runs_or_is_paused(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    def vm(name: str, state: VmState) -> Vm:
        uuid = "00000000-0000-0000-0000-000000000000"
        config = VmConfig(name=name, uuid=uuid, memory_mib=64, cpus=1, machine="pc-q35-10.0", cpu="x86-64-v2")
        return Vm(config=config, state=state, host="host1")

    vms = (
        vm("web1", VmState.RUNNING),
        vm("db1", VmState.STOPPED),
        vm("app1", VmState.PAUSED),
        vm("x1", VmState.CRASHED),
    )
    host.answers[LIST_VMS] = lambda _: VmList(vms=vms)
    assert main(["move", "--all", "--to", "host2"]) == 0
    assert {request.vm for request in host.moves} == {"web1", "app1"}
    assert "not moved (not running): db1, x" in capsys.readouterr().err
    host.answers[LIST_VMS] = lambda _: VmList(vms=())
    assert main(["move", "--all", "--to", "host2"]) == 0
    assert "nothing to move" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--to", "host2"],
        ["web1", "--all", "--to", "host2"],
        ["../x", "--to", "host2"],
        ["web1", "--to", "a b"],
        ["web1", "--to", "host2", "--bandwidth", "-1"],
        ["web1", "--to", "host2", "--blackout-budget", "nan"],
    ],
)
def test_bad_input_never_reaches_the_host(host: Host, words: list[str]) -> None:
    assert main(["move", *words]) == 2
    assert host.seen == []


def test_check_tells_everything(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "web1", "--to", "host2"]) == 0
    assert main(["check", "db1", "--to", "host2"]) == 6
    out = capsys.readouterr().out
    assert "VM 'web1' can move" in out
    assert "VM 'db1' cannot move" in out
    assert "[switch-missing]" in out
    assert "about 3.0 GiB of 20.0 GiB, as /images/web1.qcow2" in out
    assert out.count("to send: about 3.0 GiB of disks and 1.0 GiB of memory; about 34.4 s at 1000 Mbit/s") == 1
    assert (
        "blackout: 2 ms planned for memory, up to 60 ms if the guest writes too fast for that; devices and hand-over"
        in out
    )
    host.mbit_per_s = None
    main(["check", "web1", "--to", "host2"])
    assert "the time is unknown" in capsys.readouterr().out


def test_check_and_move_are_asked_the_same(host: Host) -> None:
    options = ["--keep", "--no-post-copy", "--bandwidth", "300", "--blackout-budget", "20", "--storage", "vda=fast"]
    main(["check", "web1", "--to", "host2", *options])
    main(["move", "web1", "--to", "host2", *options, "--detach", "--json"])
    (_, _, checked), (_, _, moved) = host.seen
    assert json.loads(checked) == json.loads(moved)
    asked = json.loads(checked)["options"]
    assert (asked["keep"], asked["post_copy"], asked["bandwidth_mbit_per_s"]) == (True, False, 300)


def test_a_move_under_way_is_shown_with_its_figures(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    under_way = shown("web1", progress=Progress(percent=40, transferred_bytes=9, remaining_s=7, note="it is slow"))
    host.answers[LIST_MIGRATIONS] = lambda _: MigrationList(migrations=(under_way,))
    assert main(["migration", "show", "web1"]) == 0
    assert capsys.readouterr().out.endswith("\ncopy, 40 %, 7.0 s left, it is slow\n")


@pytest.fixture
def in_utc() -> Iterator[None]:
    """The clock here is that of Greenwich."""
    with pytest.MonkeyPatch.context() as changes:
        changes.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("in_utc")
def test_the_list_says_since_when(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    moves = (shown("web1", accepted_at=1.7e9), completed("web2"))
    host.answers[LIST_MIGRATIONS] = lambda _: MigrationList(migrations=moves)
    assert main(["migration", "list"]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["ID", "VM", "SOURCE", "DESTINATION", "ASKED", "FOR", "STATE", "DONE", "NOTE"]
    assert "2023-11-14 22:13:20  copy" in first
    assert "1970-01-01 00:00:01  completed" in second


def test_the_list_can_be_of_some_vms_and_of_what_has_not_ended(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    asks = shown("db2", outcome=Outcome.UNRESOLVED)
    moves = (shown("web1"), completed("web1"), shown("web2"), asks)
    host.answers[LIST_MIGRATIONS] = lambda _: MigrationList(migrations=moves)

    def listed(*words: str) -> list[tuple[str, str]]:
        assert main(["migration", "list", *words, "--json"]) == 0
        return [(one["vm"], one["outcome"]) for one in objects(capsys.readouterr().out)]

    assert listed("web1") == [("web1", "under-way"), ("web1", "completed")]
    assert listed("--under-way") == [("web1", "under-way"), ("web2", "under-way"), ("db2", "unresolved")]
    assert listed("--under-way", "web2", "db1") == [("web2", "under-way")]


def test_watching_a_landing_that_failed_says_where_the_reason_is(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    host.endings["web1"] = shown("web1", outcome=Outcome.FAILED, progress=Progress(note="see the source"))
    assert main(["migration", "watch", "web1"]) == 8
    assert capsys.readouterr().err == "see the source\n"


def test_watch_and_cancel_by_name_of_the_vm(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migration", "watch", "web1", "--json"]) == 0
    assert [one["outcome"] for one in objects(capsys.readouterr().out)] == ["under-way", "under-way", "completed"]
    host.answers[CANCEL_MIGRATION] = lambda _, migration: shown("web1", outcome=Outcome.CANCELLED)
    assert main(["migration", "cancel", "web1"]) == 0
    assert host.seen[-1][1] == {"migration": "web100000000"}
    assert main(["migration", "cancel", "nope"]) == 4


@pytest.mark.parametrize(
    ("outcome", "fault", "code"),
    [
        (Outcome.CANCELLED, Cancelled("it was cancelled"), 0),
        (Outcome.COMPLETED, None, Conflict.exit_code),
        (Outcome.UNRESOLVED, OwnerUnknown("nobody can know"), OwnerUnknown.exit_code),
        (Outcome.FAILED, MigrationFailed("the cable was cut"), MigrationFailed.exit_code),
    ],
)
def test_a_cancel_is_done_only_if_the_move_was_cancelled(
    host: Host, outcome: Outcome, fault: LimosaError | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = {"web1": fault, "db1": Cancelled("it was cancelled")}
    ends = {"web1": outcome, "db1": Outcome.CANCELLED}

    def cancel(_: object, migration: str) -> Migration:
        vm = migration.rstrip("0")
        told = faults[vm]
        return shown(vm, outcome=ends[vm], fault=told.fault() if told is not None else None)

    host.answers[CANCEL_MIGRATION] = cancel
    assert main(["migration", "cancel", "web1", "db1", "--json"]) == code
    first, second = objects(capsys.readouterr().out)
    assert ("error" in first) is (code != 0)
    assert (second["vm"], second["outcome"]) == ("db1", "cancelled")


def test_a_cancel_goes_on_after_one_that_is_not_known(host: Host) -> None:
    host.answers[CANCEL_MIGRATION] = lambda _, migration: shown("web1", outcome=Outcome.CANCELLED)
    assert main(["migration", "cancel", "nope", "web1"]) == 4
    assert host.seen[-1][0] is CANCEL_MIGRATION


def test_each_cancel_that_failed_is_reported(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migration", "cancel", "nope", "neither", "--json"]) == 4
    out, err = capsys.readouterr()
    for text in (out, err):
        assert ("'nope'" in text, "'neither'" in text) == (True, True)


def test_a_move_of_known_identity_is_asked_for_alone(host: Host) -> None:
    host.answers[SHOW_MIGRATION] = host.show
    assert main(["migration", "show", "web100000000"]) == 0
    assert [endpoint for endpoint, _, _ in host.seen] == [SHOW_MIGRATION]
    assert main(["migration", "show", "webserver123"]) == 0  # which a VM may be called
    assert [endpoint for endpoint, _, _ in host.seen[1:]] == [SHOW_MIGRATION, LIST_MIGRATIONS]


def test_resolve_says_the_owner(host: Host) -> None:
    host.answers[RESOLVE_MIGRATION] = lambda _, migration: completed("web1")
    assert main(["migration", "resolve", "web1", "--owner", "destination"]) == 0
    assert json.loads(host.seen[-1][2]) == {"owner": "destination"}
    assert main(["migration", "resolve", "web1", "--owner", "me"]) == 2


def test_hosts_of_a_lab_have_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limosa.lab.hosts.RUN", tmp_path)
    path = tmp_path / "t1" / "host1" / "api.sock"
    path.parent.mkdir(parents=True)
    with Host(path) as host:
        for destination in ("host2", "t1-host2", "t2-host2", "10.0.0.1"):
            assert main(["--host", "t1-host1", "move", "web1", "--to", destination, "--detach"]) == 0
    assert [move.destination for move in host.moves] == ["host2", "host2", "t2-host2", "10.0.0.1"]


@pytest.fixture
def drawn() -> Callable[..., str]:
    """What a live display draws on a terminal."""

    def draw(live: display.LiveDisplay, *, width: int = 160, height: int = 24) -> str:
        live._console = Console(file=io.StringIO(), width=width, height=height)
        live._console.print(live._draw())
        assert isinstance(live._console.file, io.StringIO)
        return live._console.file.getvalue()

    return draw


def test_the_bar_never_goes_back_and_says_why(drawn: Callable[..., str]) -> None:
    live = display.LiveDisplay(["web1", "db1"])
    assert "requested" in drawn(live)
    live.show(shown("web1", progress=Progress(percent=70)))
    note = "it writes more than the link carries\x1b[2J"
    live.show(
        shown("web1", progress=Progress(percent=60, rate_bytes_per_s=2**20, iteration=3, remaining_s=2, note=note))
    )
    live.show_event("db1", Conflict("no"))
    text = drawn(live)
    assert "70 %" in text
    assert "1.0 MiB/s, pass 3, 2.0 s left" in text
    assert "it writes more than the link carries" in text
    assert "\x1b" not in text
    assert "conflict" in text


def test_a_narrow_terminal_has_the_figures_below_the_bar_which_stays_where_it_is(drawn: Callable[..., str]) -> None:
    slow = "the guest writes 14.9 MiB/s, the network carries 18.5 MiB/s; its processors are slowed by up to 80 %"
    progress = Progress(
        iteration=10,
        rate_bytes_per_s=2.0**24,
        dirty_rate_bytes_per_s=2.0**24,
        throttle_percent=99,
        remaining_s=0.1,
        note=slow,
    )
    live = display.LiveDisplay(["web1"])
    live.show(shown("web1"))
    before = drawn(live, width=80).splitlines()
    live.show(shown("web1", phase=Phase.SYNCHRONISE, progress=progress))
    first, *below = [line.strip() for line in drawn(live, width=80).splitlines()]
    assert first.index("0 %") == before[0].index("0 %")
    assert below[0] == "16.0 MiB/s, dirty 16.0 MiB/s, pass 10, guest slowed 99 %, under 1 s left"
    assert " ".join(below[1:]) == slow
    assert len(below) == 3


def test_of_more_moves_than_lines_those_that_do_something_are_drawn(drawn: Callable[..., str]) -> None:
    names = [f"vm{number}" for number in range(40)]
    live = display.LiveDisplay(names)
    for name in names[:20]:
        live.show(completed(name))
    live.show(shown("vm20"))
    live.show_event("vm21", Conflict("no"))
    for place, name in enumerate(names[22:], 1):
        live.show(shown(name, phase=Phase.WAITING, place=place, progress=Progress(note="waits")))
    lines = [line.strip() for line in drawn(live, height=12).splitlines()]
    assert [line.split()[:2] for line in lines[:3]] == [["vm20", "copy"], ["vm21", "conflict"], ["vm22", "waiting,"]]
    assert len(lines) == 12
    assert lines[-1] == "and 29 more: 9 waiting, 20 completed"


def test_a_place_in_line_is_shown_and_another_is_no_new_line(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    plain = display.PlainDisplay()
    for place in (2, 1):
        waits = shown("web1", phase=Phase.WAITING, place=place, progress=Progress(note="waits for other moves"))
        plain.show(waits)
    assert capsys.readouterr().out == "web1: waiting, place 2, waits for other moves\n"
    host.answers[LIST_MIGRATIONS] = lambda _: MigrationList(migrations=(waits,))
    assert main(["migration", "list"]) == 0
    assert "waiting, place 1" in capsys.readouterr().out
