"""The outcome of a run of transports, and the page ``docs/benchmarks-transports.md``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks import pages
from benchmarks.measurements import Compared, Cut, Drained, Streamed, Trip
from benchmarks.pages import Outcome
from benchmarks.transport_targets import (
    DRAIN_CPU,
    DRAIN_WALL,
    DRAIN_WIRE,
    OTHERS,
    SPEED,
    TRIP_FIGURES,
    by_cell,
    of_part,
)

_METHOD = """\
All moves are Limosa's, with TLS, turn by turn in one run; `multifd-zstd` is QEMU's own compression (level 1, two
channels, TLS), driven by a bare QMP script. Guests: *busy*, 1 GiB, of which 600 MiB are filled (one third random, the
rest text that repeats itself every 128 KiB, so that any compression finds it, but no page of it comes twice) and
20 MiB/s of that rewritten, a third with random bytes; *small*, 512 MiB, of which 128 MiB are filled the same way, for
a line that the busy one would outrun; *Debian*, 512 MiB, Debian 12 with systemd, sshd and some services, booted from
memory, idle. Figures are medians, in brackets the range. Where guests are emulated on the few cores that also carry
the copy, ranges are wide.

- *Wall time*: from the start of the command to its end. *Transfer time*: QEMU's own total time.
- *Other VMs*: one-processor VMs that count, as many as the machine has processors (busy), half as many, or none (idle).
  Their work is what they have counted from the beginning to the end of the command.
- *Speed of the transfer*: bytes of QEMU's stream over the transfer time. *Calibrated links*: what plain TCP streams,
  one on each NIC, brought of payload in that lab before.
- *NIC cut*: the plug is pulled out of one of two NICs of one of the hosts between a tenth and six tenths of the move.
  *Stall*: the longest time in which Limosa, which looks every 0.2 s, saw no more sent.
- *Drain*: VMs of the Debian image, each booted by itself and left alone for a while. `limosa move --all` with its
  default limits; `virsh migrate` without TLS, one after the other and all at once; `multifd-zstd` all at once.
- *Throughput*: random bytes from one host to the other over a link without a limit, by TCP and through two relays.
- *Processor time*: of daemons, relays, QEMUs (the guests' own work included) and the command.
- *Memory compared*: all of the guest's memory at the source and at the destination after everything was sent and before
  it runs there.
"""


class Report(Outcome, frozen=True):
    """A whole run: every single measurement, from which ``rows`` follow."""

    trips: tuple[Trip, ...] = ()
    streams: tuple[Streamed, ...] = ()
    drains: tuple[Drained, ...] = ()
    cuts: tuple[Cut, ...] = ()
    compared: tuple[Compared, ...] = ()


def page(report: Report, only: Sequence[str] = ()) -> str:
    """The page that is published. ``only``: the parts that were measured, if not all."""
    title, command, file = "Benchmarks of transports", "transports", "docs/benchmarks-transports.md"
    if only:
        title, command = f"{title}: {', '.join(only)}", f"{command} --only {','.join(only)}"
        file = f"docs/benchmarks-{'-'.join(only)}.md"
    head = pages.head(report, title=title, command=command, file=file, method=_METHOD)
    return "\n".join([*head, *pages.targets(report.rows), *_measured(report), *pages.others(report.rows), ""])


def _measured(report: Report) -> Iterator[str]:
    more = {"busy": (OTHERS,), "nics": (SPEED,)}
    for part in dict.fromkeys(trip.part for trip in report.trips):
        for (link, load, guest), trips in by_cell(of_part(report.trips, part)).items():
            title = f"{part.capitalize()}: {guest}, {link}, other VMs {load}"
            yield from pages.columns(title, trips, (*TRIP_FIGURES, *more.get(part, ())))
    drains = {
        by: [drain for drain in report.drains if drain.by == by] for by in dict.fromkeys(d.by for d in report.drains)
    }
    if drains:
        yield from pages.columns("Drain", drains, (DRAIN_WALL, DRAIN_WIRE, DRAIN_CPU))
