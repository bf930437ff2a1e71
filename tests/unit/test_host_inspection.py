"""Facts about a VM whose files lie where nobody answers."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_preflight import VM

from limosa.errors import StorageError
from limosa.host import inspection
from limosa.host.inspection import Inspector
from limosa.host.looks import Looks


def test_it_is_said_and_one_thread_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    comes_back, asked = threading.Event(), []

    def identify(path: str, *_: Any, **__: Any) -> None:
        asked.append(path)
        comes_back.wait()

    monkeypatch.setattr(inspection, "identify", identify)
    storage = SimpleNamespace(places=SimpleNamespace(shared=dict, own="/own"))
    nobody = cast(Any, None)
    daemon = cast(Any, SimpleNamespace(name="host2"))
    inspector = Inspector(daemon, nobody, nobody, nobody, nobody, cast(Any, storage), nobody, nobody, None)
    inspector._looks = Looks(0.05)

    async def scenario() -> None:
        for _ in range(3):
            with pytest.raises(StorageError, match="files of VM") as caught:
                await inspector._files(VM)
            assert "does not answer" in caught.value.why
        assert asked == [VM.disks[0].path]
        comes_back.set()

    asyncio.run(scenario())
