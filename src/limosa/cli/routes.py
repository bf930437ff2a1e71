"""How commands print the path of a move and what becomes of disks."""

from __future__ import annotations

from collections.abc import Iterable

from limosa.cli.output import say
from limosa.model.route import Compressed, Path, Route
from limosa.model.storage import DiskAction, DiskPlan, LayerPlan
from limosa.model.units import format_bytes, format_seconds
from limosa.wire.api import Expected


def say_route(route: Route) -> None:
    """The transport with its reason, a line for each path, and what was compressed."""
    say(f"transport: {route.transport}" + (f" ({route.why})" if route.why else ""))
    for path in route.paths:
        say(f"  {_end(path.nic_here, path.here)} to {_end(path.nic_there, path.there)}{_figures(path)}")

    if route.compressed is not None:
        say(f"  {_compressed(route.compressed)}")


def _compressed(made: Compressed) -> str:
    ratio = f" (1 to {made.ratio:.1f})" if made.ratio else ""
    sizes = f"{format_bytes(made.raw_bytes)} sent as {format_bytes(made.sent_bytes)}{ratio}"
    return f"{sizes}, {made.cpu_s:.1f} s of processor time to compress, {made.connections} connections"


def say_disks(plans: Iterable[DiskPlan], layers: Iterable[LayerPlan] = ()) -> None:
    """A line for each disk, and for each backing file that is sent too."""
    for plan in plans:
        if plan.action is DiskAction.STAY:
            say(f"disk {plan.disk}: {plan.why}" if plan.location else f"disk {plan.disk}: stays, {plan.why}")
        else:
            size = f"about {format_bytes(plan.expected_bytes)} of {format_bytes(plan.virtual_bytes)}"
            say(f"disk {plan.disk}: {plan.why}, {size}, as {plan.path}")
    for layer in layers:
        size = format_bytes(layer.expected_bytes)
        say(f"backing file {layer.origin}: sent {layer.why}, about {size}, as {layer.file.path}")


def say_expected(expected: Expected) -> None:
    """How much there is to send, how long that takes and how long the blackout may be."""
    sizes = f"{format_bytes(expected.memory_bytes)} of memory"
    if expected.disk_bytes:
        sizes = f"{format_bytes(expected.disk_bytes)} of disks and {sizes}"
    if expected.seconds is None:
        time = "the time is unknown, because the speed of the network is"
    else:
        time = f"about {format_seconds(expected.seconds)} at {expected.mbit_per_s} Mbit/s if the guest writes little"
    say(f"to send: about {sizes}; {time}")
    first, budget = expected.first_downtime_ms, expected.blackout_budget_ms
    more = f", up to {budget:g} ms if the guest writes too fast for that" if budget > first else ""
    last = ", and then by post-copy" if expected.post_copy else ""
    say(f"blackout: {first:g} ms planned for memory{more}{last}; devices and hand-over take some more")


def _end(nic: str, address: str) -> str:
    return " ".join(part for part in (nic, address) if part) or "as routed"


def _figures(path: Path) -> str:
    speed = f", {path.speed_mbit_per_s} Mbit/s" if path.speed_mbit_per_s else ""
    count = f", {path.connections} connection{'s' if path.connections > 1 else ''}" if path.connections else ""
    return speed + count + (f", {format_bytes(path.sent_bytes)} sent" if path.sent_bytes else "")
