"""One QEMU process: its command line, its life, its QMP session, what its program can do.

``machine`` is the door: a running QEMU in domain words, with ``protocol`` as its type. Behind it, ``arguments`` and
``cpu`` make the command line (pure), ``process`` starts and watches, ``folder`` keeps the sockets, ``monitor`` speaks
QMP, ``credentials`` hands over TLS material, ``statistics`` reads QEMU's figures. ``capabilities`` asks a QEMU program
what it can do. QEMU's own names of states and parameters stay in this room.
"""
