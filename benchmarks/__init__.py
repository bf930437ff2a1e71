"""What is measured, and how: run by ``scripts/benchmark`` from the repository's folder.

``moves`` compares live migration by Limosa with ``virsh migrate --live`` and with a bare QMP script, the floor;
``storage`` compares moves of disks with ``virsh`` and with programs that copy images at rest; ``transports`` compares
ways for guest memory with each other, with QEMU's own compression and with ``virsh``. Everything is done in one run and
turn by turn, in labs made for it. ``systems`` has a module for each that takes part, ``gap`` the client that watches
the guest from outside, ``ground`` the lab and its meters, ``turn`` what is done in a turn. ``targets``,
``storage_targets`` and ``transport_targets`` say what is to be reached; ``report``, ``storage_report`` and
``transport_report`` have the pages.

Parts of ``transports``: ``cells`` (moves of one guest, metered by ``trips``, with ``neighbours`` at work), ``relayed``,
``drains`` (of ``debian`` guests), ``cuts``, and ``likeness``, for which ``witness`` compares guest memory.

What is measured is measured in the same way for all: wall time and processor time by this process and the kernel,
bytes by the counters of the migration NICs, the client's gap by the kernel's time stamps, the blackout by those of
QEMU's STOP and RESUME events, the transfer of memory by QEMU's own total time of the migration.
"""
