"""What is worth saying about a host's network before it matters: facts in, findings out; pure.

``advise`` looks at one host by itself, as ``limosa host advise`` shows it; ``between`` at both ends of a route, for
preflight. ``docs/errors.md`` lists the codes.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network

import msgspec

from limosa.model.finding import Finding
from limosa.model.network import Carried, HostNetwork, HostNic, NicAddress
from limosa.model.route import Path, Route
from limosa.settings.address import split_address
from limosa.transport import rdma
from limosa.transport.choice import Ends, choose, contradicts, is_allowed
from limosa.transport.teams import BY_PORT, HASHING, IN_TURN, ONE_MEMBER

#: Below it a page that a guest waits for in post-copy comes noticeably late behind those that are sent anyway.
POST_COPY_MBIT_PER_S = 1000


def advise(
    name: str, network: HostNetwork, *, post_copy: bool, capped: bool = False, listen: Sequence[str] = ()
) -> tuple[Route, tuple[Finding, ...]]:
    """The transport that suits moves to a host alike, with its reason, and what is set wrongly here.

    ``post_copy`` is allowed; ``capped``: guest memory has a cap on bandwidth on every network; ``listen``: the setting
    of ``host.toml``.
    """
    rules = (
        _networks(network),
        _links(network),
        _not_listened_on(network, listen),
        _slower_than_said(network),
        _multipath(network),
        _same_network(network),
        *(_team(network, nic) for nic in network.nics),
        _slow(network) if post_copy else iter(()),
        _locking(network),
    )
    suits = _suits(name, network, capped=capped, post_copy=post_copy)
    return suits, tuple(finding for rule in rules for finding in rule)


def between(ends: Ends, route: Route) -> tuple[Finding, ...]:
    """What is wrong with the paths of a route; none of it keeps a move from succeeding."""
    return tuple(finding for path in route.paths for finding in _mtus(ends, path.here, path.there))


def not_by_rdma(route: Route) -> Finding:
    """RDMA was wanted, and this is the way instead."""
    todo = "see 'limosa host advise' on both hosts"
    return Finding.warning("rdma-not-used", f"the move goes by {route.transport}: {route.why}", todo)


def loses_long_packets(ends: Ends, path: Path, *, only: bool) -> Finding:
    """A trial connection over this path stood and did not carry what takes packets of full length. ``only``: nothing
    else leads there."""
    sides = ((ends.here, path.here, ends.source), (ends.there, path.there, ends.destination))
    words = [f"{_with_mtu(network, address)} on host '{host}'" for network, address, host in sides]
    say = Finding.error if only else Finding.warning
    return say(
        "long-packets-lost",
        f"long packets do not arrive between {' and '.join(words)}"
        + ("" if only else ", so the move avoids that path"),
        "set the MTU on both ends to what the switches between forward, or find out why packets are lost there",
    )


def _with_mtu(network: HostNetwork, address: str) -> str:
    nic = network.nic_of(address)
    return f"{nic.name} (MTU {nic.mtu})" if nic is not None else address


def _suits(name: str, network: HostNetwork, *, capped: bool, post_copy: bool) -> Route:
    """The choice for a move to another host with the same NICs, each on the same network as ours."""
    twin = msgspec.structs.replace(network, nics=tuple(_twin(nic) for nic in network.nics if nic.kind != "loopback"))
    network = msgspec.structs.replace(network, carried=tuple(_at_best(network)))
    offered = [own.address for nic in twin.nics for own in nic.addresses if is_allowed(own.address, network.allowed)]
    route = choose(Ends(name, "another", network, twin, offered, capped=capped, post_copy=post_copy), "auto")
    why = route.why if route.paths else "this host has no address through which moves may go"
    return msgspec.structs.replace(route, paths=(), why=why)


def _twin(nic: HostNic) -> HostNic:
    addresses = (msgspec.structs.replace(own, address=_neighbour(own.address)) for own in nic.addresses)
    return msgspec.structs.replace(nic, addresses=tuple(addresses))


def _at_best(network: HostNetwork) -> Iterator[Carried]:
    """What moves got from each address of ours to its network, as if it had been to the twin. Others may have slower
    NICs, so the most counts."""
    for nic in network.nics:
        for own in nic.addresses:
            inside = _network_of(own)
            measured = [
                one for one in network.carried if one.here == own.address and ipaddress.ip_address(one.there) in inside
            ]
            if measured:
                best = max(measured, key=lambda one: (not one.old, one.mbit_per_s))
                yield msgspec.structs.replace(best, there=_neighbour(own.address))


def _neighbour(address: str) -> str:
    parsed = ipaddress.ip_address(address)
    return str(type(parsed)(int(parsed) ^ 1))


def _usable(network: HostNetwork) -> Iterator[tuple[HostNic, NicAddress]]:
    """NICs that may carry moves, each with its allowed addresses."""
    for nic in network.nics:
        for own in nic.addresses:
            parsed = ipaddress.ip_address(own.address)
            local = parsed.is_loopback or parsed.is_link_local
            if nic.carrier and not local and is_allowed(own.address, network.allowed):
                yield nic, own


def _network_of(own: NicAddress) -> IPv4Network | IPv6Network:
    return ipaddress.ip_network(f"{own.address}/{own.prefix}", strict=False)


def _networks(network: HostNetwork) -> Iterator[Finding]:
    own = [address.address for nic in network.nics for address in nic.addresses]
    for allowed in network.allowed:
        if not any(is_allowed(address, (allowed,)) for address in own):
            yield Finding.warning(
                "network-without-address",
                f"'migration_networks' allows {allowed}, in which this host has no address",
                "give a NIC an address there, or take the network out of the setting",
            )


def _links(network: HostNetwork) -> Iterator[Finding]:
    for nic in network.nics:
        if nic.up and not nic.carrier and nic.kind != "bridge" and (nic.addresses or nic.master):
            yield Finding.warning("no-link", f"{nic.name} is up and has no link", "check its cable and the switch port")


def _not_listened_on(network: HostNetwork, listen: Sequence[str]) -> Iterator[Finding]:
    """NICs over which no session of two daemons can go on. Guest memory has listeners of its own."""
    asked = [split_address(text) for text in listen]
    try:
        places = {ipaddress.ip_address(host) for host, _ in asked}
    except ValueError:
        return  # a name, and where that leads is not looked up
    anywhere = {place.version for place in places if place.is_unspecified}
    heard = {
        network.uplink_of(nic).name
        for nic in network.nics
        for one in map(ipaddress.ip_address, (own.address for own in nic.addresses))
        if one in places or (one.version in anywhere and not one.is_link_local)
    }
    deaf: dict[str, str] = {}
    for nic, own in _usable(network):
        if network.uplink_of(nic).name not in heard and network.leads_out(nic):
            deaf.setdefault(nic.name, own.address)
    if places and deaf:
        same_port = ", with the same port" if any(port for _, port in asked) else ""
        yield Finding.warning(
            "nic-without-listener",
            f"the daemon does not listen on {' and '.join(deaf)}: if the NIC dies over which two daemons speak, a move "
            "to this host ends, though it could go on there",
            f"add {' and '.join(deaf.values())} to 'listen' in host.toml{same_port}, and restart the daemon; VMs go on",
        )


def _slower_than_said(network: HostNetwork) -> Iterator[Finding]:
    for path in network.carried:
        nic = network.nic_of(path.here)
        if nic is not None and nic.speed_mbit_per_s and contradicts(path, nic.speed_mbit_per_s):
            yield Finding.warning(
                "network-slower-than-nic",
                f"{nic.name} reports {nic.speed_mbit_per_s} Mbit/s, but a move to {path.there} got {path.mbit_per_s}",
                "check that host's NIC, the switches and cables between, and what else uses them",
            )


def _multipath(network: HostNetwork) -> Iterator[Finding]:
    networks = {_network_of(own): network.uplink_of(nic).name for nic, own in _usable(network)}
    if len(set(networks.values())) > 1 and not network.mptcp:
        yield Finding.warning(
            "multipath-off",
            f"this host has NICs on {len(networks)} networks, but Multipath TCP is off in its kernel",
            "sysctl net.mptcp.enabled=1",
        )


def _same_network(network: HostNetwork) -> Iterator[Finding]:
    names: defaultdict[IPv4Network | IPv6Network, dict[str, None]] = defaultdict(dict)
    for nic, own in _usable(network):
        names[_network_of(own)][nic.name] = None
    for where, nics in names.items():
        if len(nics) > 1:
            yield Finding.warning(
                "nics-on-one-network",
                f"{' and '.join(nics)} are all on {where}: the kernel sends through one of them only",
                "put each on a network of its own, bond them, or set up policy routing",
            )


def _team(network: HostNetwork, nic: HostNic) -> Iterator[Finding]:
    """Bonds and teams that spread nothing, or spread it wrongly."""
    if nic.bond_mode in HASHING and nic.hash_policy not in BY_PORT:
        yield Finding.warning(
            "bond-hashes-by-host",
            f"{nic.name} chooses the member by host ({nic.hash_policy}): all that goes to one host takes one member",
            f"ip link set {nic.name} type bond xmit_hash_policy layer3+4",
        )
    if nic.bond_mode in IN_TURN:
        yield Finding.warning(
            "bond-reorders",
            f"{nic.name} sends packets round-robin ({nic.bond_mode}): they arrive out of order and TCP repeats many",
            "use a bond of mode 802.3ad with layer3+4, or separate networks and multichannel",
        )
    if nic.bond_mode in ONE_MEMBER:
        yield Finding.warning(
            "bond-uses-one-member",
            f"{nic.name} sends through one member and keeps the others as spares ({nic.bond_mode})",
            "use a bond of mode 802.3ad with layer3+4 if the switch can, or separate networks and multichannel",
        )
    if nic.kind == "team" and nic.bond_mode not in (*IN_TURN, *ONE_MEMBER):
        mode = f"in mode {nic.bond_mode} by unknown rules" if nic.bond_mode else "by unknown rules"
        yield Finding.warning(
            "team-not-understood",
            f"{nic.name} chooses its members {mode}: a move makes one connection over it, which may take one member",
            "use a bond of mode 802.3ad with layer3+4, or separate networks and multichannel",
        )
    if members := rdma.team_members(network, nic):
        yield Finding.warning(
            "team-of-rdma",
            f"{nic.name} is a team of NICs with RDMA devices ({', '.join(members)}), and RDMA does not go through it",
            f"take them out of {nic.name} and give each a network of its own",
        )


def _slow(network: HostNetwork) -> Iterator[Finding]:
    fastest = max((nic.speed_mbit_per_s or 0 for nic, _ in _usable(network)), default=0)
    if 0 < fastest < POST_COPY_MBIT_PER_S:
        yield Finding.warning(
            "slow-for-post-copy",
            f"post-copy is allowed, but the fastest NIC has {fastest} Mbit/s: the guest would often wait for memory",
            "limosa host settings convergence.post_copy off",
        )


def _locking(network: HostNetwork) -> Iterator[Finding]:
    if network.lockable_mib is not None and any(nic.rdma for nic in network.nics):
        yield Finding.warning(
            "rdma-locks-little",
            f"this host has RDMA devices, but QEMU may lock {network.lockable_mib} MiB of memory only",
            "run the daemon with CAP_SYS_RESOURCE, or with 'LimitMEMLOCK=infinity'",
        )


def _mtus(ends: Ends, here: str, there: str) -> Iterator[Finding]:
    near, far = ends.here.nic_of(here), ends.there.nic_of(there)
    if near is not None and far is not None and near.mtu != far.mtu:
        yield Finding.warning(
            "mtu-differs",
            f"{near.name} on host '{ends.source}' has an MTU of {near.mtu}, {far.name} on host '{ends.destination}' "
            f"of {far.mtu}",
            "set the same on both ends and on the switches between",
        )
