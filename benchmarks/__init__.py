"""What is measured, and how: run by ``scripts/benchmark`` from the repository's folder.

``moves`` compares live migration by Limosa with ``virsh migrate --live`` and with a bare QMP script, the floor, all in
one run and turn by turn, in a lab made for it. ``systems`` has one module for each of the three, ``gap`` the client
that watches the guest from outside, ``ground`` the lab and its meters, ``targets`` what is to be reached, ``report``
the tables.

What is measured is measured in the same way for all: wall time and processor time by this process and the kernel,
bytes by the counters of the migration NIC, the client's gap by the kernel's time stamps, the blackout by those of
QEMU's STOP and RESUME events, the transfer by QEMU's own total time of the migration.
"""
