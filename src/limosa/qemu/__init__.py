"""One QEMU process: its command line, its life, its QMP session, what its program can do.

QEMU's own names of states and parameters stay in this room.
"""
