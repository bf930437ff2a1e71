"""The journal: what a crash may cut, and what must not pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from limosa.errors import StateError
from limosa.migration.journal import Header, Journal
from limosa.migration.ownership import SourceStep
from limosa.model.migration import Fault, Side
from limosa.model.vm import VmConfig

VM = VmConfig(
    name="web1",
    uuid="7b0b7d3c-57b8-4f5c-9d5e-2d2f3f1e2a10",
    memory_mib=64,
    cpus=1,
    machine="pc-q35-10.0",
    cpu="x86-64-v2",
)
HEADER = Header(
    migration="abcdefghijkl",
    side=Side.SOURCE,
    vm=VM,
    accelerator="tcg",
    source="host1",
    destination="host2",
    address="host2",
    accepted_at=1.0,
    boot="b",
)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal.begin(tmp_path, HEADER)
    journal.record(SourceStep.PREPARING, 2.0)
    journal.record(SourceStep.UNDOING, 3.0, durable=False, fault=Fault(code="cancelled", what="no"))
    journal.close()
    return journal


def test_it_reads_back_what_was_written(journal: Journal) -> None:
    loaded = Journal.load(journal.path)
    assert loaded.header == HEADER
    assert [record.step for record in loaded.records] == ["preparing", "undoing"]
    assert loaded.records[1].fault == Fault(code="cancelled", what="no")


def test_it_is_for_its_owner_only(journal: Journal) -> None:
    assert journal.path.stat().st_mode & 0o777 == 0o600


def test_a_cut_last_line_never_happened_at_any_length(journal: Journal) -> None:
    whole = journal.path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for length in range(last, len(whole)):
        journal.path.write_bytes(whole[:length])
        loaded = Journal.load(journal.path)
        assert loaded.step == "preparing"
        assert journal.path.stat().st_size == last


def test_writing_goes_on_after_a_cut(journal: Journal) -> None:
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-5])
    loaded = Journal.load(journal.path)
    loaded.record(SourceStep.UNDONE, 4.0)
    loaded.close()
    assert [record.step for record in Journal.load(journal.path).records] == ["preparing", "undone"]


@pytest.mark.parametrize("damage", [b"", b"\n", b"{}\n", b"\xff\xfe\n", b'{"migration": 1}\n{}\n'])
def test_other_damage_is_an_error_and_the_file_is_left(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "abcdefghijkl.source.jsonl"
    path.write_bytes(damage)
    with pytest.raises(StateError):
        Journal.load(path)
    assert path.read_bytes() == damage


def test_damage_in_the_middle_is_an_error(journal: Journal) -> None:
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole.replace(b'"preparing"', b'"preparing'))
    with pytest.raises(StateError):
        Journal.load(journal.path)


def test_two_journals_of_one_move_cannot_begin(journal: Journal) -> None:
    before = journal.path.read_bytes()
    with pytest.raises(StateError):
        Journal.begin(journal.path.parent, HEADER)
    assert journal.path.read_bytes() == before
