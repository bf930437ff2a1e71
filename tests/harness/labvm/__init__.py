"""Small VMs with Debian's own kernel, for what the kernel of the machine at hand may not have: bonding, RDMA.

::

    with running_vms("a", "b", cables=2) as (a, b):      # eth0 and eth1 of each are joined by a cable
        a.run("modprobe-free: all modules are loaded")
        a.plug("eth0", in_=False)                        # the cable is out; both ends see it

They are emulated, so they need no hardware virtualisation and nothing the machine does not have; QEMU runs nested
inside them as it would on a host. The machine's own root is theirs too, read-only below a layer in memory: what is
installed and checked out here is there. What they write is gone with them.

``image`` builds kernel and initramfs, ``vm`` runs a VM, ``agent`` runs inside.
"""

from harness.labvm.vm import LabVm, running_vms

__all__ = ["LabVm", "running_vms"]
