"""How the way of a move is printed."""

from __future__ import annotations

import msgspec
import pytest

from limosa.cli.routes import say_route
from limosa.model.route import Path, Route


def test_what_each_path_has_carried_over_how_many_connections(capsys: pytest.CaptureFixture[str]) -> None:
    bare = Path(here="10.0.0.1", there="10.0.0.2", nic_here="a", nic_there="b")
    used = msgspec.structs.replace(bare, speed_mbit_per_s=1000, connections=2, sent_bytes=3 << 30)
    paths = (used, msgspec.structs.replace(bare, connections=1), bare)
    say_route(Route(transport="multichannel", paths=paths))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  a 10.0.0.1 to b 10.0.0.2, 1000 Mbit/s, 2 connections, 3.0 GiB sent",
        "  a 10.0.0.1 to b 10.0.0.2, 1 connection",
        "  a 10.0.0.1 to b 10.0.0.2",
    ]
