"""What a destination lets in."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from harness.landings import VM
from limosa.errors import Conflict
from limosa.host.arrival import Arrival
from limosa.security.stream import make_credentials
from limosa.settings.host import HostSettings
from limosa.wire.peer import Prepare, RelayPlace

CREDENTIALS, _ = make_credentials()
CLEAR = Prepare(
    migration="abcdefabcdef", vm=VM, accelerator="kvm", running=True, transport="tcp", credentials=None, post_copy=False
)
PLACE = RelayPlace(session="0" * 32, channel=0, window_log=24, credentials=None, several=False)


def change(**fields: Any) -> Prepare:
    return msgspec.structs.replace(CLEAR, **fields)


@pytest.mark.parametrize("encrypt", [True, False])
@pytest.mark.parametrize(
    ("request_", "encrypted"),
    [
        (CLEAR, False),
        (change(transport="rdma"), False),
        (change(relay=PLACE, transport="compression"), False),
        (change(credentials=CREDENTIALS), True),
        (change(relay=msgspec.structs.replace(PLACE, credentials=CREDENTIALS), transport="compression"), True),
    ],
)
def test_memory_that_would_come_in_clear_is_refused_where_settings_forbid_it(
    encrypt: bool, request_: Prepare, encrypted: bool
) -> None:
    async def scenario() -> None:
        parts = SimpleNamespace(name="host2", page=SimpleNamespace(now=HostSettings(encrypt=encrypt)))
        arrival = Arrival(cast(Any, parts), "host1", "10.0.0.2")
        if encrypt and not encrypted:
            with pytest.raises(Conflict, match="'encrypt' is on at host 'host2'"):
                arrival.begin(request_)
        else:
            arrival.begin(request_)
            arrival.close()

    asyncio.run(scenario())
