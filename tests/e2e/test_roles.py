"""Who may do what: people with certificates, over mutual TLS, from a machine of the LAN that is no host."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.commands import LIMOSA, Said, run
from harness.hosts import tiny
from harness.labs import LabHost, running_lab
from limosa.model.vm import VmState
from limosa.security import ca
from limosa.wire.endpoints import Role

pytestmark = [pytest.mark.qemu, pytest.mark.lab]


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[LabHost]]:
    """Two hosts with a VM ``vm`` on the first, and certificates for a viewer and for a stranger."""
    with running_lab() as made:
        state = made[0].lab.state
        ca.issue_person(state / "ca", "eve", Role.VIEWER, state / "viewer" / "limosa")
        ca.create_authority(state / "other-ca")
        ca.issue_person(state / "other-ca", "mallory", Role.OPERATOR, state / "stranger" / "limosa")
        # Which authority the hosts belong to anybody may know.
        shutil.copy(state / "client" / "limosa" / "ca.pem", state / "stranger" / "limosa" / "ca.pem")
        for host in made:
            (state / f"of-{host.name}").mkdir()
            (state / f"of-{host.name}" / "limosa").symlink_to(host.folder / "pki")
        made[0].create(tiny("vm"))
        yield made


def as_person(who: str, hosts: list[LabHost], *words: str) -> Said:
    """A command in the client's namespace with that person's certificate.

    The first host is named by its address: by its name this machine's own socket would be found, where all is allowed.
    """
    lab = hosts[0].lab
    place = ["ip", "netns", "exec", lab.client, LIMOSA, "--host", hosts[0].address]
    return run([*place, *words, "--json"], XDG_CONFIG_HOME=str(lab.state / who), PATH="/usr/sbin:/usr/bin:/sbin:/bin")


@pytest.mark.parametrize(
    "words",
    [
        ("vm", "list"),
        ("vm", "show", "vm"),
        ("host", "status"),
        ("host", "settings"),
        ("migration", "list"),
        ("check", "vm", "--to", "host2"),
    ],
    ids=" ".join,
)
def test_a_viewer_may_look(hosts: list[LabHost], words: tuple[str, ...]) -> None:
    said = as_person("viewer", hosts, *words)
    assert said.code == 0, said.error


@pytest.mark.parametrize(
    "words",
    [
        ("move", "vm", "--to", "host2"),
        ("vm", "stop", "vm"),
        ("vm", "pause", "vm"),
        ("vm", "create", "more", "--memory", "32M"),
        ("vm", "delete", "vm"),
        ("host", "settings", "max_outgoing=9"),
    ],
    ids=" ".join,
)
def test_a_viewer_may_change_nothing(hosts: list[LabHost], words: tuple[str, ...]) -> None:
    said = as_person("viewer", hosts, *words)
    assert said.code == 3, said.error
    assert all(one["error"]["code"] == "not-permitted" for one in said.objects)
    assert "'eve' is viewer and may not do this" in said.error
    (vm,) = as_person("viewer", hosts, "vm", "list").objects
    assert (vm["config"]["name"], vm["state"], vm["migration"]) == ("vm", "running", None)


def test_a_viewer_may_not_sit_at_the_console(hosts: list[LabHost]) -> None:
    assert as_person("viewer", hosts, "vm", "console", "vm").code == 3


def test_a_host_commands_itself_and_no_other(hosts: list[LabHost]) -> None:
    assert as_person("of-host1", hosts, "vm", "resume", "vm").code == 0
    for words in (("vm", "stop", "vm"), ("vm", "list"), ("vm", "console", "vm")):
        said = as_person("of-host2", hosts, *words)
        assert said.code == 3, said.error
        assert "host 'host2' may not do this on host 'host1'" in said.error
        assert "limosa ca issue" in said.error


def test_a_stranger_may_not_even_look(hosts: list[LabHost]) -> None:
    said = as_person("stranger", hosts, "vm", "list")
    assert said.code == 7, said.error
    assert "error" in said.object, "no VM was shown"


def test_keys_are_for_their_owner_only(hosts: list[LabHost]) -> None:
    keys: list[Path] = list(hosts[0].lab.state.rglob("*.key"))
    assert len(keys) > 4
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}


def test_an_operator_may_move(hosts: list[LabHost]) -> None:
    said = as_person("client", hosts, "move", "vm", "--to", "host2")
    assert said.code == 0, said.error
    assert said.object["outcome"] == "completed"
    hosts[0].wait_until_bare()
    assert hosts[1].show("vm").state is VmState.RUNNING
