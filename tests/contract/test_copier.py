"""What Limosa relies on in a QEMU without a guest that copies the disks of a stopped VM."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

import pytest

from limosa.migration.mirrors import Mirrors
from limosa.qemu.copier import Copier
from limosa.qemu.protocol import ImageFile
from limosa.settings.host import ConvergencePolicy

pytestmark = pytest.mark.qemu

QEMU = Path("/usr/bin/qemu-system-x86_64")
DATA = os.urandom(1024 * 1024)


async def look() -> None:
    pass


@pytest.mark.parametrize("given_up", [False, True])
def test_a_disk_is_copied_or_given_up_and_nobodys_writes_have_to_be_slowed(*, given_up: bool) -> None:
    async def scenario(folder: Path) -> None:
        old, new = folder / "old.raw", folder / "new.raw"
        old.write_bytes(DATA)
        new.write_bytes(bytes(len(DATA)))
        images = [ImageFile(str(path), "raw", direct=False) for path in (old, new)]
        copier = await Copier.launch(QEMU, {"vda": images[0]}, folder / "run", folder / "log", None)
        try:
            await copier.copy_to_file("vda", "tag", images[1], 0, whole=True)
            await copier.slow_writes("vda", 64 * 1024)
            async with asyncio.timeout(20):
                await Mirrors(copier, ["vda"], ConvergencePolicy(patience_s=20)).until_ready(look)
            if given_up:
                await copier.drop_copy("vda", "tag")
            else:
                await copier.settle_copy("vda")
                await copier.pivot("vda")
            assert await copier.copies() == {}
        finally:
            await copier.quit()
        assert old.read_bytes() == new.read_bytes() == DATA

    with tempfile.TemporaryDirectory(prefix="limosa-") as folder:
        asyncio.run(scenario(Path(folder)))
