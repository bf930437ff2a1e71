"""Which transport a move takes, over which NICs, and why: facts of both hosts in, a route out; pure.

A *path* leads from a NIC here to the NIC there that is on the same network, and counts only if both hosts allow that
network. Several NICs of a host on one network are one path: the kernel sends everything for a network through one of
them, unless an administrator has set up policy routing. So are several VLANs, or bridges, on one NIC.

Several paths are one Multipath TCP connection, or, where that is missing on one side or the NICs are unequal, one TCP
connection each, over which relays spread the stream (*striped*: 011-striping).

Of several networks, what is not spread over them takes the one that comes first in the destination's
``migration_networks``: its administrator has said so, whatever the NICs' speeds. Without that setting it takes the
fastest. Where no network is common, the source's routing decides, as far as the network it leads to is allowed here,
too.

What guides ``auto``: more NICs are faster as long as the NICs are what a move waits for. One stream of QEMU's fills a
NIC of some gigabits by itself; beyond that the processor is the limit, and then plain TCP, which costs less of it, is
the faster one (measured on links without a limit: 006-transports). What is encrypted goes through relays anyway, whose
TLS costs less than QEMU's, and which compress as far as that is faster; what is not, where the NICs are slower than a
processor compresses. Where post-copy is allowed it takes no relays: a broken stream of QEMU's own can be mended in
post-copy, what a relay had on its way is lost with it. Nor does ``multichannel`` then, where Multipath TCP is possible.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec

from limosa.model.network import Carried, HostNetwork, HostNic, smallest_network
from limosa.model.route import Path, Route
from limosa.transport import rdma
from limosa.transport.relay.control import MAX_LANES
from limosa.transport.teams import spreads

#: A NIC of this speed is not what one stream waits for.
FAST_MBIT_PER_S = 10_000
#: How many times slower than the fastest a NIC may be for Multipath TCP. A connection's parts arrive in order, so that
#: the others wait for what a slow one still has in its queue: 500 and 100 Mbit/s were slower than 500 alone (measured).
SLOWER = 2
#: What relays spread over several NICs on a few processors; a NIC of this speed carries that alone.
SPREAD_MBIT_PER_S = 2500
#: What one processor compresses in a second, with what is left of it: a faster network carries more as it is.
OUTRUN_MBIT_PER_S = 2000
#: The kernel adds eight further connections to the first.
MOST_PATHS = 9
#: Connections in all where there is a team; one less than there may be, for a NIC that appears. Their ports are chance,
#: so that of two members one stays unused in one of 128 moves.
STREAMS = 8


@dataclass(frozen=True)
class Ends:
    """Both hosts of a move. ``offered`` are the destination's addresses for guest memory, in its order."""

    source: str
    destination: str
    here: HostNetwork
    there: HostNetwork
    offered: Sequence[str]
    #: what keeps relays from working together, in words; empty if nothing does
    no_relay: str = ""
    #: what keeps this move from RDMA, whatever devices there are; empty if nothing does
    no_rdma: str = ""
    #: whether a cap on bandwidth counts what is sent over any network, which it does before compression
    capped: bool = False
    #: the VM's, 0 where none is meant
    memory_mib: int = 0
    #: whether the move may end in post-copy
    post_copy: bool = False


def choose(ends: Ends, asked: str, blocked: Collection[str] = ()) -> Route:
    """The route for ``asked`` (``auto``, ``tcp``, ``multichannel``, ``compression``, ``rdma``).

    ``blocked`` are addresses of the destination to which no connection can be made. The route has no path if no
    address is left.
    """
    if asked not in ("auto", "rdma"):
        return _asked(ends, asked, blocked)
    ends = _for_post_copy(ends)
    direct = _direct(ends, blocked)
    ways = rdma.paths(ends.here, ends.there, direct)
    sides = ends.source, ends.destination, ends.here, ends.there
    capped = "a cap on bandwidth is set, which QEMU does not enforce with RDMA" if _is_capped(ends, ways[:1]) else ""
    reason = ends.no_rdma or capped or rdma.against(*sides, direct, ends.memory_mib)
    if asked == "auto" and not reason and rdma.is_emulated(ends.here, ends.there, ways[0]):
        reason = "the kernel emulates the RDMA device, and TCP costs less"
    if not reason:
        words = "it was asked for" if asked == "rdma" else f"{ways[0].nic_here} and {ways[0].nic_there} have RDMA"
        return Route(transport="rdma", paths=ways[:1], why=_except(words, blocked))
    other = _fastest(ends, blocked)
    # Most hosts have no RDMA and need not hear of it.
    tell = asked == "rdma" or ways
    return msgspec.structs.replace(other, why=f"{other.why}; not rdma: {reason}") if tell else other


def _for_post_copy(ends: Ends) -> Ends:
    """The same without relays if post-copy is allowed."""
    if not ends.post_copy or ends.no_relay:
        return ends
    return replace(ends, no_relay="post-copy is allowed, and the guest would be lost with a relay that fails")


def _fastest(ends: Ends, blocked: Collection[str]) -> Route:
    """The fastest route where QEMU is given sockets."""
    bare = _without_compression(ends, "auto", blocked)
    if not bare.paths:
        return bare
    outrun = _outrun(bare.paths)
    if doubt := _against_compression(ends, bare.paths) or ("" if ends.here.encrypt else outrun):
        return msgspec.structs.replace(bare, why=f"{bare.why}; not compressed: {doubt}")
    faster = f"a processor compresses faster than {_speed(bare.paths)} Mbit/s"
    why = f"{'relays encrypt faster than QEMU' if outrun else faster}; {bare.why}"
    # Where it is the processors a move waits for, VMs would wait for one another in a relay they share.
    return msgspec.structs.replace(_relayed(ends, bare, outrun, why), alone=bool(outrun))


def _relayed(ends: Ends, bare: Route, outrun: str, why: str) -> Route:
    """The route with relays that compress. Over one path they stripe, too, where another may come up in mid-move and
    join; not where the one is more than they compress."""
    (first, *others) = bare.paths
    may_grow = not others and first.here != "" and not bare.is_multipath and not outrun and _may_come_up(ends)
    return msgspec.structs.replace(bare, transport="compression", striped=bare.striped or may_grow, why=why)


def _may_come_up(ends: Ends) -> bool:
    """Whether a host has a NIC that lacks nothing but a link, or nothing but an address. Others are unused for good."""
    return any(
        nic.carrier != _has_address(nic)
        for side in (ends.here, ends.there)
        for nic in side.nics
        if nic.up and not nic.master and nic.kind != "bridge" and all(one.lower != nic.name for one in side.nics)
    )


def _has_address(nic: HostNic) -> bool:
    return any(not ipaddress.ip_address(own.address).is_link_local for own in nic.addresses)


def _asked(ends: Ends, asked: str, blocked: Collection[str]) -> Route:
    """The route for ``tcp``, ``multichannel`` or ``compression``, as far as that is possible."""
    if asked != "compression":
        # All NICs were asked for, and relays only where nothing else takes all.
        without = asked == "multichannel" and not _multipath_off(ends)
        return _without_compression(_for_post_copy(ends) if without else ends, asked, blocked)
    bare = _without_compression(ends, "auto", blocked)
    if not bare.paths:
        return bare
    if ends.no_relay:
        return msgspec.structs.replace(bare, why=f"compression is not possible: {ends.no_relay}; {bare.why}")
    doubt = _against_compression(ends, bare.paths) or _outrun(bare.paths)
    words = f"it was asked for, but {doubt}" if doubt else "it was asked for"
    return _relayed(ends, bare, _outrun(bare.paths), _except(words, blocked))


def _against_compression(ends: Ends, paths: Sequence[Path]) -> str:
    """Why relays cannot compress, or gain nothing by it however fast these paths are, in words; empty if they may."""
    capped = "the cap on bandwidth counts what is sent before it is compressed" if _is_capped(ends, paths) else ""
    return ends.no_relay or capped


def _is_capped(ends: Ends, paths: Sequence[Path]) -> bool:
    """Whether a cap counts what is sent over these paths; one for another network does not."""
    return ends.capped or any(ends.here.cap_to(path.there) for path in paths)


def _outrun(paths: Sequence[Path]) -> str:
    """Why compressing gains nothing over these paths, in words; empty if it may."""
    for path in paths:
        if not path.speed_mbit_per_s:
            return f"the speed of {path.nic_here or path.there} is not known"
    total = _speed(paths)
    return f"a processor does not compress faster than {total} Mbit/s" if total > OUTRUN_MBIT_PER_S else ""


def _speed(paths: Sequence[Path]) -> int:
    """That of all paths together, as far as it is known."""
    return sum(path.speed_mbit_per_s or 0 for path in paths)


def _without_compression(ends: Ends, asked: str, blocked: Collection[str]) -> Route:
    """The route for ``auto``, ``tcp`` or ``multichannel`` where QEMU is given sockets and nothing is compressed. Relays
    may carry it nevertheless, if it is striped."""
    single, several = _single(ends, blocked), _several(ends, blocked)
    if not single:
        return Route(transport="tcp", why=f"there is no path to host '{ends.destination}'")
    why_striped = _why_striped(ends, several)
    reason = "it was asked for" if asked == "tcp" else _against(ends, several, why_striped)
    if asked == "auto":
        reason = reason or _not_worth(ends, several, why_striped)
    if reason:
        why = _except("; ".join(filter(None, (reason, _preferred(ends, single)))), blocked)
        return Route(transport="tcp", paths=single[:1], why=why)
    if not why_striped:
        several = _with_streams(ends, _alike(several) if asked == "auto" else several)
    several = _sharing(ends, several)
    words = [_gain(several) if asked == "auto" else "it was asked for"]
    words += [f"one stream for each network, because {why_striped}"] if why_striped else []
    why = _except("; ".join(words), blocked)
    return Route(transport="multichannel", paths=several, striped=bool(why_striped), why=why)


def _why_striped(ends: Ends, several: Sequence[Path]) -> str:
    """Why relays are to spread the stream over these paths instead of Multipath TCP, in words; empty: they are not."""
    if ends.no_relay or not 1 < len(several) <= MAX_LANES:
        return ""
    if off := _multipath_off(ends):
        return off
    # One connection would have to be content with the least of them.
    if any(ends.here.cap_to(path.there) for path in several):
        return "there are caps by network"
    speeds = [path.speed_mbit_per_s or 0 for path in several]
    # One connection would use one member of a team.
    if min(speeds) == 0 or any(_has_team(ends, path) for path in several):
        return ""
    if len(_alike(several)) < len(several) and max(speeds) < SPREAD_MBIT_PER_S:
        return "the NICs are unequal"
    by_relays = ends.here.encrypt and sum(speeds) <= SPREAD_MBIT_PER_S
    return "the relays that encrypt it fill the NICs better that way" if by_relays else ""


def _gain(several: Sequence[Path]) -> str:
    if len(several) > 1:
        return f"{len(several)} NICs together have {_speed(several)} Mbit/s"
    return f"{several[0].streams} connections use all members of the team, which has {_speed(several)} Mbit/s"


def _with_streams(ends: Ends, several: Sequence[Path]) -> tuple[Path, ...]:
    """The same, with as many connections over each as its teams need."""
    streams = max(1, STREAMS // len(several))
    return tuple(msgspec.structs.replace(path, streams=streams) if _has_team(ends, path) else path for path in several)


def _has_team(ends: Ends, path: Path) -> bool:
    near, far = ends.here.nic_of(path.here), ends.there.nic_of(path.there)
    return (near is not None and spreads(ends.here, near)) or (far is not None and spreads(ends.there, far))


def _against(ends: Ends, several: Sequence[Path], why_striped: str) -> str:
    """What makes several paths impossible, in words; empty if nothing does."""
    if not several:
        return f"no NIC here is on a network of host '{ends.destination}'"
    off = "" if why_striped else _multipath_off(ends)
    return f"{off}, and relays cannot spread it: {ends.no_relay}" if off and ends.no_relay and len(several) > 1 else off


def _multipath_off(ends: Ends) -> str:
    off = [name for name, side in ((ends.source, ends.here), (ends.destination, ends.there)) if not side.mptcp]
    hosts = " and ".join(f"host '{name}'" for name in off)
    return f"Multipath TCP is off on {hosts}" if off else ""


def _not_worth(ends: Ends, several: Sequence[Path], why_striped: str) -> str:
    """Why one connection is as good as several, in words; empty if it is not."""
    has_team = _has_team(ends, several[0])
    if len(several) == 1 and not has_team:
        return f"{several[0].nic_here} is the only NIC that leads there"
    speeds = [path.speed_mbit_per_s for path in several if path.speed_mbit_per_s]
    if len(speeds) < len(several):
        silent = next(path for path in several if not path.speed_mbit_per_s)
        return f"the speed of {silent.nic_here} is not known"
    if len(several) > 1 and _speed(_sharing(ends, several)) <= speeds[0]:
        return f"a cap counts for all NICs together, and {several[0].nic_here} carries as much alone"
    if max(speeds) >= FAST_MBIT_PER_S:
        return f"one stream does not fill a NIC of {max(speeds)} Mbit/s"
    if why_striped and max(speeds) >= SPREAD_MBIT_PER_S:
        return f"relays do not carry more than a NIC of {max(speeds)} Mbit/s, and {why_striped}"
    if len(_alike(several)) == 1 and not why_striped and not has_team:
        return f"a NIC of {max(speeds)} Mbit/s would wait for the others, which are more than {SLOWER} times slower"
    return ""


def _preferred(ends: Ends, single: Sequence[Path]) -> str:
    """That an administrator prefers another network than the fastest for one stream, in words; else empty."""
    first, fastest = single[0], max(path.speed_mbit_per_s or 0 for path in single)
    if (first.speed_mbit_per_s or 0) == fastest:
        return ""
    return f"it goes over {first.nic_here}, whose network host '{ends.destination}' prefers"


def _sharing(ends: Ends, paths: Sequence[Path]) -> tuple[Path, ...]:
    """The same, each with its share of a cap that counts for several of them, as lanes have it (``shares``)."""
    networks = [smallest_network(path.there, ends.here.caps_mbit_per_s) for path in paths]
    shared = []
    for path, network in zip(paths, networks, strict=True):
        cap = ends.here.cap_to(path.there)
        share = max(1, cap // networks.count(network)) if cap else None
        speeds = [speed for speed in (path.speed_mbit_per_s, share) if speed is not None]
        shared.append(msgspec.structs.replace(path, speed_mbit_per_s=min(speeds, default=None)))
    return tuple(shared)


def _alike(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Those not so slow that the fastest would wait for them."""
    fastest = max((path.speed_mbit_per_s or 0 for path in paths), default=0)
    return tuple(path for path in paths if SLOWER * (path.speed_mbit_per_s or 0) >= fastest)


def _except(words: str, blocked: Collection[str]) -> str:
    return f"{words}; no working connection to {', '.join(sorted(blocked))}" if blocked else words


def _single(ends: Ends, blocked: Collection[str]) -> tuple[Path, ...]:
    """Where one stream may go, best first: over a common network, else wherever the source's routing leads."""
    direct = tuple(_direct(ends, blocked))
    open_ = (address for address in ends.offered if address not in blocked)
    return direct or tuple(_routed(ends, address) for address in open_ if is_allowed(address, ends.here.allowed))


def _several(ends: Ends, blocked: Collection[str]) -> tuple[Path, ...]:
    """One path for each network, each with NICs of its own, all of the best one's IP version."""
    return tuple(_add_paths(ends, [], _direct(ends, blocked))[:MOST_PATHS])


def spread(ends: Ends, kept: Sequence[Path], refused: Collection[tuple[str, str]]) -> tuple[Path, ...]:
    """Where relays are to spread a stream that goes over the paths ``kept`` already: over these, and over what is
    possible on other NICs, except from one address to another that is ``refused``."""
    possible = [path for path in _direct(ends, ()) if (path.here, path.there) not in refused]
    return tuple(_add_paths(ends, list(kept), possible)[:MAX_LANES])


def _add_paths(ends: Ends, chosen: list[Path], possible: Sequence[Path]) -> list[Path]:
    taken = {end for path in chosen for end in _uplinks(ends, path)}
    for path in possible:
        uplinks = _uplinks(ends, path)
        if taken.isdisjoint(uplinks) and (not chosen or _version(path.there) == _version(chosen[0].there)):
            chosen.append(path)
            taken |= uplinks
    return chosen


def _uplinks(ends: Ends, path: Path) -> set[tuple[str, str]]:
    """The NIC by which a path leaves here, and the one by which it arrives there."""
    sides = ("here", ends.here, path.nic_here), ("there", ends.there, path.nic_there)
    return {
        (side, next((network.uplink_of(nic).name for nic in network.nics if nic.name == name), name))
        for side, network, name in sides
    }


def _direct(ends: Ends, blocked: Collection[str]) -> list[Path]:
    """All paths over common networks: in the order of the destination's networks, the faster ones first in each."""
    found = [
        path
        for address in ends.offered
        if address not in blocked and (path := direct_path(ends.here, ends.there, address)) is not None
    ]
    order = {path.there: place for place, path in enumerate(found)}

    def rank(path: Path) -> tuple[int, int, int]:
        return _preference(path.there, ends.there.allowed), -(path.speed_mbit_per_s or 0), order[path.there]

    return sorted(found, key=rank)


def direct_path(here: HostNetwork, there: HostNetwork, address: str) -> Path | None:
    """The path to an address of the other host from the fastest NIC here that is on its network; None if none is."""
    far = there.nic_of(address)
    if far is None or not far.carrier or not is_allowed(address, here.allowed):
        return None
    paths = [_path(here, near, own, far, address) for near, own in _neighbours(here, address)]
    return max(paths, key=lambda path: path.speed_mbit_per_s or 0, default=None)


def _neighbours(here: HostNetwork, address: str) -> Iterator[tuple[HostNic, str]]:
    """NICs here that are on the network of an address, each with its own address there."""
    for nic in here.nics:
        for own in nic.addresses:
            network = ipaddress.ip_network(f"{own.address}/{own.prefix}", strict=False)
            usable = nic.carrier and own.address != address and is_allowed(own.address, here.allowed)
            if usable and ipaddress.ip_address(address) in network:
                yield nic, own.address


def _path(here: HostNetwork, near: HostNic, own: str, far: HostNic, address: str) -> Path:
    speeds = near.speed_mbit_per_s, far.speed_mbit_per_s
    slower = None if None in speeds else min(speed for speed in speeds if speed is not None)
    speed = _real(slower, here.carried_to(own, address))
    if cap := here.cap_to(address):
        speed = min(cap, speed or cap)
    return Path(here=own, there=address, nic_here=near.name, nic_there=far.name, speed_mbit_per_s=speed)


def _real(said: int | None, carried: Carried | None) -> int | None:
    """A path's speed by what its NICs say and what a move got through it. What TCP and TLS cost makes it no slower."""
    if said is None:
        return carried.mbit_per_s if carried is not None else None
    return carried.mbit_per_s if carried is not None and contradicts(carried, said) else said


def contradicts(carried: Carried, said: int) -> bool:
    """Whether a network is so much slower than a NIC says (Mbit/s) that the NIC is not believed. What was found long
    ago may be mended, and a path that is not taken would never be measured again."""
    return not carried.old and carried.mbit_per_s * SLOWER < said


def _routed(ends: Ends, address: str) -> Path:
    far = ends.there.nic_of(address)
    return Path(here="", there=address, nic_there=far.name if far is not None else "")


def connected(network: HostNetwork) -> tuple[str, ...]:
    """Networks that a host has an address in with which it may send or receive a move."""
    found = {
        str(ipaddress.ip_network(f"{own.address}/{own.prefix}", strict=False)): None
        for nic in network.nics
        for own in nic.addresses
        if nic.kind != "loopback" and is_allowed(own.address, network.allowed)
    }
    return tuple(found)


def is_allowed(address: str, networks: Sequence[str]) -> bool:
    """Whether an address lies in one of these networks; any does if there are none."""
    return not networks or _preference(address, networks) < len(networks)


def _preference(address: str, networks: Sequence[str]) -> int:
    """The place of the first network an address lies in; their number if in none."""
    parsed = ipaddress.ip_address(address)
    places = (place for place, network in enumerate(networks) if parsed in ipaddress.ip_network(network))
    return next(places, len(networks))


def _version(address: str) -> int:
    return ipaddress.ip_address(address).version
