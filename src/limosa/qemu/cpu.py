"""CPU models: what Limosa's words mean to QEMU.

``x86-64-v2`` and ``x86-64-v3`` are the levels of the x86-64 psABI as portable baselines: QEMU's ``qemu64``, which has
nothing a host could lack, plus the features the level names. Neither KVM on any processor of that level nor QEMU's
emulation (since 7.2) lacks one of them, so a VM with a baseline moves between all of those. ``enforce`` makes QEMU
refuse to start where a feature is missing, instead of quietly showing the guest another processor.
"""

from __future__ import annotations

BASE = "qemu64"
#: Models without a list of features: the guest sees what the processor it was started on, or QEMU's emulation, has.
_WHATEVER_THERE_IS = ("host", "max")

_V2 = ("cx16", "lahf-lm", "pni", "popcnt", "sse4.1", "sse4.2", "ssse3")
_V3 = (*_V2, "abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave")

#: Features of each baseline beyond ``qemu64``.
BASELINES: dict[str, tuple[str, ...]] = {"x86-64-v2": _V2, "x86-64-v3": _V3}


def parse(cpu: str) -> tuple[str, dict[str, bool]]:
    """QEMU's model and the features to switch, from a ``CpuModel`` such as ``x86-64-v2,+aes``; the last word wins."""
    model, *changes = cpu.split(",")
    features: dict[str, bool] = {}
    if model in BASELINES:
        # AMD's nested virtualisation is part of qemu64, and neither of the levels nor of Intel's processors.
        features = {"svm": False} | dict.fromkeys(BASELINES[model], True)
        model = BASE
    for change in changes:
        features[change[1:]] = change[0] == "+"
    return model, features


def is_the_hosts(cpu: str) -> bool:
    """Whether it is the host that decides which features the guest sees, so that knowing the model says nothing."""
    return parse(cpu)[0] in _WHATEVER_THERE_IS


def argument(cpu: str) -> str:
    """The value of ``-cpu``."""
    model, features = parse(cpu)
    switches = [f"{name}={'on' if on else 'off'}" for name, on in features.items()]
    return ",".join([model, *switches, "enforce=on"])
