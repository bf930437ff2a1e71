"""Steering moves from outside: settings as brakes, and waiting for a view of a move."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from harness.hosts import Host, tiny
from limosa.errors import Conflict
from limosa.model.migration import Migration, Outcome
from limosa.wire import api, endpoints
from limosa.wire.endpoints import Endpoint

#: So slow that a Linux guest would take minutes.
BRAKE = {"bandwidth_mbit_per_s": 1}


def change(host: Host, values: Mapping[str, object]) -> None:
    """Change settings of a host; None puts a default back."""
    host.client.call(endpoints.CHANGE_SETTINGS, api.SettingsChange(values=dict(values)))


@contextmanager
def settings(host: Host, values: Mapping[str, object]) -> Iterator[None]:
    """Other settings during the block; afterwards they are what they were."""
    page = msgspec.to_builtins(host.client.call(endpoints.SETTINGS).settings)
    before = {key: functools.reduce(dict.__getitem__, key.split("."), page) for key in values}
    change(host, values)
    try:
        yield
    finally:
        change(host, before)


@contextmanager
def looking(look: Callable[[], None], *, pause_s: float = 0.0) -> Iterator[None]:
    """Calls ``look`` in a thread of its own, as often as there is time for, during the block."""
    over = threading.Event()

    def look_on() -> None:
        while not over.is_set():
            look()
            over.wait(pause_s)

    thread = threading.Thread(target=look_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def does_not_fit(host: Host, vm: str, *acts: Endpoint[Any, Any]) -> None:
    """Each of these acts is refused in the VM's state."""
    for act in acts:
        with pytest.raises(Conflict):
            host.client.call(act, vm=vm)


def views(host: Host, migration: str) -> Iterator[Migration]:
    """Every view of a move until it has ended."""
    yield from host.client.stream(endpoints.WATCH_MIGRATION, migration=migration)


def follow(host: Host, migration: str, until: Callable[[Migration], bool]) -> Migration:
    """The first view of a move of which ``until`` is true; it must not end before."""
    for view in views(host, migration):
        if until(view):
            return view
    raise AssertionError(f"it ended before: {view.outcome} in {view.phase}, {view.fault}")


def move(source: Host, vm: str, destination: Host) -> Migration:
    """Move a VM; it must arrive."""
    migration = source.outcome(source.move(vm, destination.name).id)
    assert migration.outcome is Outcome.COMPLETED, migration.fault
    return migration


def slow(name: str) -> api.NewVm:
    """A VM that takes half a minute to move under the brake: even its empty pages must be named, in 9 bytes each."""
    return msgspec.structs.replace(tiny(name), memory_mib=2048)


def remove(host: Host, *names: str) -> None:
    """Stop VMs and forget them."""
    for name in names:
        host.client.call(endpoints.STOP_VM, vm=name)
        host.client.call(endpoints.DELETE_VM, vm=name)
