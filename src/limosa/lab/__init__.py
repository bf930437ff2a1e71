"""A fabric of hosts on one machine, to try Limosa in a minute, to test it and to measure it.

``plan`` says what a lab consists of and where it is, ``wiring`` makes hosts of network namespaces with NICs of a
given speed, ``daemons`` starts a host daemon in each, ``lifecycle`` puts them together and takes them away without a
trace, ``image`` and ``initramfs`` build the small Linux guest that runs in it, ``hosts`` finds a lab host's socket by
its name.
"""
