"""The host's network: switches (Linux bridges) and taps for VMs, the NICs and addresses moves go through, and the
kernel's path manager for Multipath TCP.

Everything is asked and set through netlink (``netlink``), by a thread of its own so that the event loop never waits for
the kernel's big network lock. A tap does not outlive the process that made it, see ``taps``.
"""
