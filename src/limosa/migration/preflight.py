"""May this VM move to that host? Facts in, findings out; pure.

All rules are asked, so that an administrator sees everything at once. ``docs/errors.md`` lists the codes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from limosa.model.facts import DestinationFacts, VmFacts
from limosa.model.finding import Finding, Severity
from limosa.model.vm import VmConfig
from limosa.qemu import cpu
from limosa.security import expiry
from limosa.storage.identity import same_file
from limosa.transport.choice import is_allowed

#: Older ones lack a return path that can be relied on, or late-block-activate with inactive images.
OLDEST_QEMU = (7, 2, 0)
#: Before it, a QEMU that emulates loses guest writes during a live migration (pages that stay in the emulated TLB).
OLDEST_EMULATING_QEMU = (9, 0, 0)
CLOCK_SKEW_S = 5.0


def check(
    vm: VmConfig,
    source: str,
    here: VmFacts,
    there: DestinationFacts,
    *,
    clock_skew_s: float,
    reachable: bool,
    copied: Collection[str] = (),
    relayed: bool = False,
) -> tuple[Finding, ...]:
    """Everything that stands against moving ``vm``, errors first. Of a move to the host it is on, only that.

    ``clock_skew_s``: the destination's clock less the source's; ``reachable``: whether a trial connection to the
    destination's first address succeeded; ``copied``: files that need not be seen there, because they are copied;
    ``relayed``: relays are to carry memory.
    """
    if source == there.host:
        # Whatever else was found says of the VM itself that it is in its own way.
        return (Finding.error("same-host", f"the VM is on host '{source}' already", "choose another host"),)
    rules = (
        _hosts(source, here, there),
        _programs(vm, here, there),
        _places(vm, there),
        _files(vm, here, there, copied),
        _leases(here, copied),
        _network(here, there, reachable),
        _encryption(source, here, there),
        _post_copy(here, there, relayed),
        _clock(there, clock_skew_s),
        expiry.findings(source, here.certificate_until, there.time - clock_skew_s),
        expiry.findings(there.host, there.certificate_until, there.time),
        _devices(vm),
    )
    found = [finding for rule in rules for finding in rule]
    return tuple(sorted(found, key=lambda finding: finding.severity is not Severity.ERROR))


def _hosts(source: str, here: VmFacts, there: DestinationFacts) -> Iterator[Finding]:
    todo = "limosa --host {} host settings live_migration true"
    if not here.live_migration:
        yield Finding.error("migration-off", f"live migration is off on host '{source}'", todo.format(source))
    if not there.live_migration:
        yield Finding.error("migration-off", f"live migration is off on host '{there.host}'", todo.format(there.host))
    if not here.running:
        yield Finding.error("vm-not-running", "the VM does not run", "start it, or move its files while it is stopped")


def _programs(vm: VmConfig, here: VmFacts, there: DestinationFacts) -> Iterator[Finding]:
    for what, qemu in (("source", here.qemu), (f"host '{there.host}'", there.qemu)):
        if qemu < OLDEST_QEMU:
            yield Finding.error(
                "qemu-too-old", f"QEMU {_version(qemu)} on {what} is too old", "upgrade to QEMU 7.2 or newer"
            )
        elif here.accelerator == "tcg" and qemu < OLDEST_EMULATING_QEMU:
            yield Finding.error(
                "emulation-unsafe",
                f"QEMU {_version(qemu)} on {what} loses guest writes when a guest it emulates moves",
                "upgrade to QEMU 9.0 or newer, or use hardware virtualisation",
            )
    if there.qemu[:2] < here.qemu[:2]:
        yield Finding.error(
            "qemu-older",
            f"QEMU {_version(there.qemu)} on host '{there.host}' is older than {_version(here.qemu)} here",
            "a VM can only move to the same or a newer QEMU; upgrade the destination",
        )
    if here.accelerator not in there.accelerators:
        yield Finding.error(
            "accelerator-missing",
            f"the VM runs with {here.accelerator}, which host '{there.host}' does not offer",
            "choose a host with it; a running guest cannot change it",
        )
    if not there.machine_known:
        yield Finding.error(
            "machine-unknown",
            f"host '{there.host}' does not know the machine type {vm.machine}",
            "upgrade QEMU there, or recreate the VM with an older machine type",
        )
    yield from _processor(vm, here, there)


def _processor(vm: VmConfig, here: VmFacts, there: DestinationFacts) -> Iterator[Finding]:
    missing = sorted({*there.cpu_missing, *(set(here.cpu_features) - set(there.cpu_features))})
    if not there.cpu_known:
        yield Finding.error(
            "cpu-unknown",
            f"host '{there.host}' does not know the CPU model {vm.cpu}",
            "use a portable model such as x86-64-v2",
        )
    elif here.accelerator not in there.accelerators:
        return  # which is said already, and leaves nothing to compare
    elif cpu.is_the_hosts(vm.cpu) and not (here.cpu_features and there.cpu_features):
        yield Finding.error(
            "cpu-features-missing",
            f"whether host '{there.host}' has all features of the CPU model {vm.cpu} is unknown: one of the hosts does "
            "not report what it offers",
            "use the same release of Limosa on both, or give the VM a portable CPU model such as x86-64-v2",
        )
    elif missing:
        yield Finding.error(
            "cpu-features-missing",
            f"host '{there.host}' lacks {', '.join(missing)} of the CPU model {vm.cpu}",
            "choose another host, or give the VM a more modest CPU model",
        )


def _places(vm: VmConfig, there: DestinationFacts) -> Iterator[Finding]:
    for switch in there.switches_missing:
        yield Finding.error(
            "switch-missing",
            f"host '{there.host}' has no virtual switch '{switch}'",
            f"create a bridge of that name there: ip link add {switch} type bridge",
        )
    if there.memory_available_mib < vm.memory_mib:
        yield Finding.error(
            "memory-short",
            f"the VM needs {vm.memory_mib} MiB, host '{there.host}' has {there.memory_available_mib} MiB available",
            "move another VM away from it first, or choose another host",
        )
    if there.name_taken:
        yield Finding.error(
            "name-taken",
            f"host '{there.host}' has a VM named '{vm.name}'",
            "delete one of them, or create it anew under another name",
        )
    if there.uuid_taken:
        yield Finding.error("uuid-taken", f"host '{there.host}' has a VM with UUID {vm.uuid}", "delete the copy")
    if vm.firmware == "uefi" and not there.firmware_available:
        yield Finding.error(
            "firmware-missing", f"host '{there.host}' has no UEFI firmware", "install the package ovmf there"
        )


def _files(vm: VmConfig, here: VmFacts, there: DestinationFacts, copied: Collection[str]) -> Iterator[Finding]:
    ours = {identity.path: identity for identity in here.files}
    theirs = {identity.path: identity for identity in there.files}
    writable = {disk.path for disk in vm.disks if not disk.read_only}
    below = {identity.path: identity.below for identity in here.files if identity.below}
    for path in dict.fromkeys([*vm.host_files(), *below]):
        if path in copied or below.get(path) in copied:
            continue
        if path not in theirs:
            yield Finding.error(
                "file-not-visible",
                f"host '{there.host}' does not see {path}",
                "put it on storage both hosts share, under the same path",
            )
        elif path not in ours or not same_file(ours[path], theirs[path]):
            yield Finding.error(
                "file-not-same",
                f"{path} on host '{there.host}' is not the same file as here",
                "mount the same storage on both, or name it the same with 'limosa storage add NAME PATH --shared'",
            )
        elif path in writable and not theirs[path].writable:
            yield Finding.error(
                "file-not-writable",
                f"host '{there.host}' may not write to {path}",
                "give QEMU's user there write access",
            )


def _leases(here: VmFacts, copied: Collection[str]) -> Iterator[Finding]:
    for conflict in here.leases:
        if conflict.image not in copied:
            yield Finding.error(
                "image-leased", f"{conflict.image} cannot be handed to another host: {conflict.why}", conflict.todo
            )


def _network(here: VmFacts, there: DestinationFacts, reachable: bool) -> Iterator[Finding]:
    if not any(is_allowed(address, here.network.allowed) for address in there.addresses):
        yield Finding.error(
            "no-migration-network",
            f"host '{there.host}' has no address on a network that both hosts allow to carry moves",
            "see 'migration_networks' in 'limosa host settings' on both hosts",
        )
    elif there.trial_port == 0:
        yield Finding.error(
            "ports-taken",
            f"every port of 'migration_ports' is taken on host '{there.host}'",
            "widen the range, or wait until other moves have ended",
        )
    elif not reachable:
        yield Finding.error(
            "port-blocked",
            f"no connection to {there.addresses[0]} port {there.trial_port} of host '{there.host}'",
            "open 'migration_ports' of that host in the firewall between the two; if it is on no network of this host, "
            "make sure that it is routed over one of 'migration_networks'",
        )


def _encryption(source: str, here: VmFacts, there: DestinationFacts) -> Iterator[Finding]:
    if there.network.encrypt and not here.network.encrypt:
        yield Finding.error(
            "not-encrypted",
            f"host '{there.host}' accepts only encrypted memory, and 'encrypt' is off on host '{source}'",
            f"limosa --host {source} host settings encrypt true",
        )


def _post_copy(here: VmFacts, there: DestinationFacts, relayed: bool) -> Iterator[Finding]:
    if here.post_copy and there.post_copy_possible and relayed:
        # What a relay had on its way is lost with it, which QEMU cannot send again.
        yield Finding.warning(
            "post-copy-not-possible",
            "post-copy is allowed, but relays carry this move, and the guest would be lost with one that fails; "
            "the move goes on without post-copy",
            "--transport auto or tcp, if post-copy is needed",
        )
    if here.post_copy and not there.post_copy_possible:
        yield Finding.warning(
            "post-copy-not-possible",
            f"post-copy is allowed, but host '{there.host}' cannot receive a VM that way; the move goes on without it",
            "let QEMU's user open /dev/userfaultfd there, see packaging/60-limosa-userfaultfd.rules",
        )


def _clock(there: DestinationFacts, skew_s: float) -> Iterator[Finding]:
    if abs(skew_s) > CLOCK_SKEW_S:
        direction = "ahead of" if skew_s > 0 else "behind"
        yield Finding.warning(
            "clock-skew",
            f"the clock of host '{there.host}' is {abs(skew_s):.0f} s {direction} this one's",
            "synchronise both with NTP: certificates and logs rely on it",
        )


def _devices(vm: VmConfig) -> Iterator[Finding]:
    for device in vm.host_devices:
        yield Finding.error(
            "local-device",
            f"the VM uses the host's {device.kind.upper()} device {device.address}",
            "detach it; a device of one host cannot move to another",
        )


def _version(qemu: tuple[int, int, int]) -> str:
    return ".".join(str(part) for part in qemu)
