"""A process on each side that carries QEMU's migration streams, and compresses with processor time nobody wants.

::

    QEMU ─socketpair─► sender ═══════ forward carrier: guest memory ══════► receiver ─socketpair─► QEMU
         ◄───────────    │    ◄══════ backward carrier: return path ══════      │    ◄───────────
                         │ shared memory, tickets
                      worker (SCHED_IDLE)

- ``frames``: what is said on a carrier, byte by byte (``docs/relay-format.md``). Pure.
- ``queue``: what waits for the carrier and what of it is worth compressing; ``pace``: what that is judged by. Pure.
- ``worker``: the process that compresses, and its ``priority``; ``codec``: the two ends of its stream, of which
  ``pages`` leaves out what was sent before.
- ``carrier``: one connection between the two relays, TLS or not; ``plug``: one socket to a QEMU.
- ``session``: how two relays agree on a path. ``lanes``: what is in place of both carriers where there may be several
  paths, and ``joining``: how more of them come; ``blocks``: what goes over which, again if need be, and in order. Pure.
- ``sender``, ``receiver``: the two sides of a session; ``process``: what a daemon starts.
- ``control``: what daemon and relay say to each other; ``client``: the daemon's side of it.
- ``outbound``, ``inbound``: a session as the daemons know it; ``carriers`` and ``doorway``: its connections.

One relay serves one pair of hosts in one direction and all VMs that move between them meanwhile, so that alike VMs are
sent once. It ends with its carriers and with its daemon; every stream through it then ends too, in which case QEMU
fails the move cleanly.
"""
