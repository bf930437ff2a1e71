"""The host's network as a VM sees it: switches (Linux bridges), taps on them, and this host's own addresses.

Everything is asked and set through netlink (``netlink``), by a thread of its own so that the event loop never waits for
the kernel's big network lock. Nothing here outlives the process that made it, see ``taps``.
"""
