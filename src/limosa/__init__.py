"""Limosa: live migration for QEMU/KVM virtual machines.

The rooms, from the bottom up: ``model`` (nouns), ``errors``, ``settings``, ``wire`` (what daemons and clients say),
``security`` and ``client``, then ``qemu``, ``storage`` and ``network`` (the outside world), ``transport`` (how a
guest's bytes travel), ``migration`` (moving one VM), ``host`` (the daemon), ``lab`` and ``cli``.
``docs/architecture.md`` draws them.
"""

__version__ = "0.1.0"
