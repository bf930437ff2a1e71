"""What a QEMU program can do: judged from an answer, and asked of a real one."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import msgspec
import pytest

from limosa.errors import QemuError
from limosa.model.vm import Accelerator
from limosa.qemu import capabilities
from limosa.qemu.capabilities import CpuOffer, QemuCapabilities, probe

QEMU = Path("/usr/bin/qemu-system-x86_64")

CAPABILITIES = QemuCapabilities(
    key="",
    version=(10, 0, 2),
    text="10.0.2",
    machines={"pc-q35-10.0": False, "pc-q35-2.4": True},
    default_machine="pc-q35-10.0",
    accelerators=("kvm", "tcg"),
    cpus={
        "kvm": CpuOffer(
            models={"qemu64": ("svm",), "Skylake-Client": ("hle", "rtm"), "host": ()},
            features=("aes", "cx16", "lahf-lm", "migratable", "pni", "popcnt", "sse4.1", "sse4.2", "ssse3"),
            seen=("aes", "cx16", "lahf-lm", "pni"),
        ),
        "tcg": CpuOffer(models={"qemu64": ()}, features=(), seen=()),
    },
    post_copy=True,
    post_copy_reason="",
)


@pytest.mark.parametrize(
    ("cpu", "answer"),
    [
        ("x86-64-v2", (True, ())),
        ("x86-64-v2,+aes", (True, ())),
        ("x86-64-v2,+lahf_lm,+avx2", (True, ("avx2",))),
        ("qemu64", (True, ("svm",))),
        ("qemu64,-svm", (True, ())),
        ("Skylake-Client,-hle", (True, ("rtm",))),
        ("Pentium-MMX", (False, ())),
    ],
)
def test_a_processor_is_offered_or_what_is_missing(cpu: str, answer: tuple[bool, tuple[str, ...]]) -> None:
    assert CAPABILITIES.supports(cpu) == answer


def test_the_accelerator_can_be_named() -> None:
    assert CAPABILITIES.supports("x86-64-v2", "tcg")[1]


@pytest.mark.parametrize(
    ("cpu", "accelerator", "seen"),
    [
        ("host", "kvm", ("aes", "cx16", "lahf-lm", "pni")),
        ("max,-lahf_lm,-aes", "kvm", ("cx16", "pni")),
        ("qemu64", "kvm", ()),
        ("host", "tcg", ()),
    ],
)
def test_what_a_guest_sees_where_its_model_leaves_it_to_the_host(
    cpu: str, accelerator: Accelerator, seen: tuple[str, ...]
) -> None:
    assert CAPABILITIES.features_seen(cpu, accelerator) == seen


def test_machines() -> None:
    assert CAPABILITIES.knows_machine("pc-q35-2.4")
    assert not CAPABILITIES.knows_machine("pc-q35-11.0")


@pytest.mark.qemu
def test_a_real_program(tmp_path: Path) -> None:
    cache = tmp_path / "qemu.json"
    found = asyncio.run(probe(QEMU, cache))
    assert found.version >= (7, 2, 0)
    assert found.text.startswith(".".join(map(str, found.version)))
    assert "tcg" in found.accelerators
    assert found.knows_machine(found.default_machine)
    assert found.default_machine.startswith("pc-q35-")
    for level in (2, 3):
        assert found.supports(f"x86-64-v{level}", "tcg") == (True, ())
    seen = found.features_seen("max", "tcg")
    assert {"avx2", "lahf-lm", "sse4.2"} <= set(seen) < set(found.cpus["tcg"].features)
    assert not {"migratable", "sse4-2"} & set(seen)
    assert found.post_copy == (found.post_copy_reason == "")
    assert msgspec.json.decode(cache.read_bytes(), type=QemuCapabilities) == found


@pytest.mark.qemu
def test_the_answer_is_remembered_until_something_changes(tmp_path: Path) -> None:
    cache = tmp_path / "qemu.json"
    program = tmp_path / "qemu"
    program.symlink_to(QEMU)
    found = asyncio.run(probe(program, cache))
    kept = msgspec.structs.replace(found, text="remembered")
    cache.write_bytes(msgspec.json.encode(kept))
    assert asyncio.run(probe(program, cache)).text == "remembered"
    program.unlink()
    program.write_text(f'#!/bin/sh\nexec {QEMU} "$@"\n')
    program.chmod(0o755)
    assert asyncio.run(probe(program, cache)).text == found.text


@pytest.mark.qemu
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"key": 1}', b"\xff\xfe"])
def test_a_damaged_memory_is_made_anew(tmp_path: Path, content: bytes) -> None:
    cache = tmp_path / "qemu.json"
    cache.write_bytes(content)
    assert asyncio.run(probe(QEMU, cache)).version >= (7, 2, 0)
    assert cache.stat().st_size > 1000


@pytest.mark.qemu
def test_the_guest_that_tries_kvm_works_where_guests_do(tmp_path: Path) -> None:
    """Else no host would ever be found to have KVM."""
    rom = tmp_path / "rom"
    rom.write_bytes(capabilities._GUEST_ROM)
    machine = ["-nodefaults", "-display", "none", "-machine", "q35", "-accel", "tcg", "-m", "16", "-bios", str(rom)]
    ended = subprocess.run([QEMU, *machine, "-device", "isa-debug-exit,iobase=0xf4"], check=False, timeout=20)
    assert ended.returncode == capabilities._GUEST_RAN


def test_no_such_program(tmp_path: Path) -> None:
    with pytest.raises(QemuError, match="cannot be used"):
        asyncio.run(probe(tmp_path / "qemu", tmp_path / "cache"))


@pytest.mark.parametrize("program", ["/bin/true", "/etc/hostname"])
def test_another_program(tmp_path: Path, program: str) -> None:
    with pytest.raises(QemuError):
        asyncio.run(probe(Path(program), tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
