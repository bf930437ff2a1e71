"""How a guest's bytes travel from QEMU to QEMU."""
