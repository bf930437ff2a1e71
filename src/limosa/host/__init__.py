"""The host daemon: it owns the VMs of one host, moves them to other hosts and receives them.

``serve`` starts it; ``vms`` keeps the VMs; ``outgoing`` and ``incoming`` run the two scripts of ``migration``;
``peers`` and ``session`` are the two ends of the conversation between hosts; ``api`` is what clients see.
"""
