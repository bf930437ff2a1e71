"""The leases of this host's VMs: taken for a QEMU that is to write, given back when it has ended, handed on in moves.

Only images that are written need one, and only where the file system's locks do not reach other hosts, or it is not
known that they do (:func:`limosa.storage.leases.is_needed`). A share can hang, so all of this is done in threads.

What a move does follows :mod:`limosa.migration.ownership` and adds a second bar: the source promises the lease before
the destination builds anything; the destination claims it, by one rename that is prepared, before it writes that it
continues the guest; a source that gets the guest back reclaims it before the guest goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial

from limosa.background import apart, in_full
from limosa.errors import Conflict, LimosaError
from limosa.model.facts import LeaseConflict
from limosa.model.vm import VmConfig
from limosa.storage import leases
from limosa.storage.leases import Change, Lease, Rule

_log = logging.getLogger(__name__)


class Leasing:
    """The leases of one host. ``boot`` identifies this run of its kernel, ``machine`` the machine; ``is_shared`` tells
    of an image whether an administrator says that other hosts see it."""

    def __init__(self, host: str, boot: str, machine: str, is_shared: Callable[[str], bool]) -> None:
        self._is_shared = is_shared
        self._host = host
        self._boot = boot
        self._machine = machine

    async def take(self, config: VmConfig, only: Collection[str] | None = None) -> None:
        """Before a QEMU is started, or an image is made its (``only`` these paths). Raises
        :class:`limosa.errors.ImageLeased` and ``StorageError``; then those taken now are given back."""
        taken: list[Rule] = []

        def work() -> None:
            images = _written(config) if only is None else only
            for rule in self._rules(config, images, begun=images):
                leases.change(rule.image, rule.take)
                taken.append(rule)

        try:
            await in_full(work)
        except LimosaError as error:
            error.vm, error.host = config.name, self._host
            await in_full(_quietly, lambda: [(rule, rule.give_back) for rule in taken])
            raise

    async def give_back(self, config: VmConfig, only: Collection[str] | None = None) -> None:
        """When the VM's QEMU has ended, or left these images. Never fails: what is not given back stays ours."""
        if not config.disks:
            return
        await in_full(_quietly, lambda: [(rule, rule.give_back) for rule in self._rules(config, only)])

    async def conflicts(self, config: VmConfig, migration: str) -> tuple[LeaseConflict, ...]:
        """The images of a running VM of which :meth:`promise` would fail, if ``migration`` promised them now."""

        def work() -> tuple[LeaseConflict, ...]:
            found = (_conflict(rule, migration) for rule in self._rules(config))
            return tuple(conflict for conflict in found if conflict is not None)

        return await apart(work) if config.disks else ()

    async def promise(self, config: VmConfig, destination: str, migration: str, copied: Collection[str]) -> None:
        """``destination`` may claim the images by that migration, but for those that are ``copied``."""
        await self._change(config, lambda rule: lambda now: rule.promise(now, destination, migration), copied)

    async def reclaim(self, config: VmConfig, migration: str) -> None:
        """The guest is this source's again, by the rules of ownership. Raises if it cannot be told to the others."""
        await self._change(config, lambda rule: lambda now: rule.reclaim(now, migration))

    async def withdraw(self, config: VmConfig, migration: str) -> None:
        """As :meth:`reclaim`, for a guest that has died. Never fails."""
        await in_full(_quietly, lambda: [(rule, _withdrawn(rule, migration)) for rule in self._rules(config)])

    def landing(self, config: VmConfig, source: str, migration: str, made: Collection[str]) -> LandingLeases:
        """Those of a VM that is to land here, where ``made`` are images that were made for it."""
        return LandingLeases(partial(self._rules, begun=made), config, source, migration, made)

    async def release(self, image: str, dead: str) -> None:
        """A person says that ``dead`` does not run a VM on the image. Raises :class:`Conflict` if ``dead`` is this
        host, which knows by itself, and not another machine of its name; and :class:`ImageLeased`."""

        def release(now: Lease) -> Lease:
            if dead == self._host and now.machine in ("", self._machine):
                raise Conflict(
                    f"host '{dead}' is not dead: it is this one",
                    why="a daemon returns leases automatically when their QEMUs have ended",
                    todo="stop the VM",
                    host=dead,
                )
            return leases.release(now, image, dead)

        await in_full(leases.change, image, release)

    async def _change(
        self, config: VmConfig, how: Callable[[Rule], Callable[[Lease], Lease]], but: Collection[str] = ()
    ) -> None:
        def work() -> None:
            for rule in self._rules(config):
                if rule.image not in but:
                    leases.change(rule.image, how(rule))

        await in_full(work)

    def _rules(self, config: VmConfig, only: Collection[str] | None = None, begun: Collection[str] = ()) -> list[Rule]:
        """One for each image that needs a lease. Of those that are ``begun`` to be written now it is asked where they
        lie; what is written already keeps what it began with."""
        asked = _written(config) if only is None else only
        needed = [path for path in asked if leases.is_needed(path, begun=path in begun, served=self._is_shared(path))]
        return [Rule(path, self._host, self._boot, config.uuid, self._machine) for path in needed]


class LandingLeases:
    """The leases of one VM that lands."""

    def __init__(
        self,
        rules: Callable[[VmConfig], list[Rule]],
        config: VmConfig,
        source: str,
        migration: str,
        made: Collection[str],
    ) -> None:
        self._rules_of = rules
        self._config = config
        self._source = source
        self._migration = migration
        self._made = made
        self._prepared: list[Change] | None = None
        self._to_close: list[Change] = []

    async def prepare(self) -> None:
        """Take those of the images made here; see that the others are promised, and prepare to claim them."""

        def work() -> None:
            self._prepared = []
            for rule in self._rules_of(self._config):
                if rule.image in self._made:
                    leases.change(rule.image, rule.take)
                else:
                    self._prepared.append(Change(rule.image, rule.claim(leases.read(rule.image), self._migration)))

        await in_full(work)

    async def claim(self) -> None:
        """Make them this host's, in the blackout: a rename and a look for each. Raises :class:`ImageLeased`; some may
        be claimed then, which :meth:`hand_back` mends."""
        if self._prepared == []:
            return  # not even a thread: most VMs have none
        await in_full(self._claim)

    def _claim(self) -> None:
        prepared, self._prepared = self._prepared, None
        self._to_close += prepared or []
        if prepared is None or not all(change.make() for change in prepared):
            # After a restart, or if it was not as it had been promised.
            for rule in self._others():
                leases.change(rule.image, self._claimed(rule))

    async def settle(self) -> None:
        """Remove what is of no use any more, when there is time."""
        to_close, self._to_close = self._to_close, []
        if to_close:
            await in_full(_close, to_close)

    async def hand_back(self) -> None:
        """What was prepared here is destroyed and the guest never ran here: what was claimed is the source's. Never
        fails; a source that is told so reclaims it by itself."""

        def work() -> None:
            _close([*(self._prepared or ()), *self._to_close])
            self._prepared, self._to_close = None, []
            _quietly(lambda: [(rule, self._handed_back(rule)) for rule in self._others()])

        await in_full(work)

    def _others(self) -> list[Rule]:
        """Those of images the source has, too. Raises :class:`limosa.errors.StorageError`."""
        return [rule for rule in self._rules_of(self._config) if rule.image not in self._made]

    def _claimed(self, rule: Rule) -> Callable[[Lease], Lease]:
        return lambda now: rule.claim(now, self._migration)

    def _handed_back(self, rule: Rule) -> Callable[[Lease], Lease]:
        return lambda now: rule.hand_back(now, self._source, self._migration)


def _written(config: VmConfig) -> list[str]:
    return [disk.path for disk in config.disks if not disk.read_only]


def _conflict(rule: Rule, migration: str) -> LeaseConflict | None:
    try:
        rule.promise(leases.read(rule.image), rule.host, migration)
    except LimosaError as error:
        return LeaseConflict(image=rule.image, why=error.why or error.what, todo=error.todo)
    return None


def _close(changes: Sequence[Change]) -> None:
    for change in changes:
        change.close()


def _quietly(changes: Callable[[], list[tuple[Rule, Callable[[Lease], Lease]]]]) -> None:
    """Make changes that nobody waits for; those that cannot be made are logged."""
    try:
        wanted = changes()
    except LimosaError as error:
        _log.error("a lease stays as it is: %s", error)
        return
    for rule, how in wanted:
        try:
            leases.change(rule.image, how)
        except LimosaError as error:
            _log.error("the lease on %s stays as it is: %s", rule.image, error)


def _withdrawn(rule: Rule, migration: str) -> Callable[[Lease], Lease]:
    return lambda now: rule.withdraw(now, migration)
