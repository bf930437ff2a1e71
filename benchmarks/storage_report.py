"""The outcome of a run of moves of disks, and the page ``docs/benchmarks-storage.md``."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import pages
from benchmarks.figures import METHOD
from benchmarks.pages import Outcome
from benchmarks.storage_targets import COPY_WALL, FIGURES, Copied, DiskMeasured, OverlaySent, by_label

_METHOD = """\
A guest of 256 MiB, with a qcow2 disk of 8 GiB of which 2 GiB are used (one half random, one half text that zstd makes
four times smaller), writes 5 MiB/s of random bytes onto it. It moves back and forth between two hosts that share no
storage, by `limosa move` and by `virsh migrate --live --copy-storage-all`, and between two folders of a host, by
`limosa storage move` and by `virsh blockcopy --pivot`, turn by turn in one run with the same QEMU. `qemu-img convert`
and `nbdcopy` copy the same image at rest. All go past the page cache. Figures are medians, in brackets the range.
Where guests are emulated on the few cores that also carry the copy, ranges are wide.

- *Wall time*: from the start of the command to its end. *Transfer time*: from the beginning of the disk's copy to the
  end of memory's.
- *Link used*: bytes that passed the migration NICs, in both directions with all headers, of those that plain TCP
  streams brought over them in that time before the run.
- *Disk above an image that both hosts have*: an overlay of 256 MiB above 2 GiB; what QEMU says it has sent of memory is
  taken off the bytes that the source sent.
"""


class Report(Outcome, frozen=True):
    """A whole run: every single measurement, from which ``rows`` follow."""

    moves: tuple[DiskMeasured, ...]
    copies: tuple[Copied, ...]
    overlays: tuple[OverlaySent, ...]


def page(report: Report) -> str:
    """The page that is published."""
    file = "docs/benchmarks-storage.md"
    head = pages.head(report, title="Benchmarks of storage", command="storage", file=file, method=_METHOD + METHOD)
    return "\n".join([*head, *pages.targets(report.rows), *_measured(report), *pages.others(report.rows), ""])


def _measured(report: Report) -> Iterator[str]:
    for link in dict.fromkeys(move.link for move in report.moves):
        moves = by_label([move for move in report.moves if move.link == link])
        yield from pages.columns(f"To another host, {link}", moves, FIGURES)
    copies = {
        by: [copy for copy in report.copies if copy.by == by] for by in dict.fromkeys(c.by for c in report.copies)
    }
    yield from pages.columns("To another folder", copies, (COPY_WALL,))
