#!/usr/bin/python3
"""A pretended ``lvm``: as much of the real one as Limosa asks for, with its state in ``state.json`` beside it.

It keeps no data and makes no devices. ``tests/contract/test_volumes.py`` holds it to what the real one does.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

STATE = Path(__file__).with_name("state.json")
EXTENT = 4 * 1024 * 1024
GROUP = "bulk"
POOL = "thin"


def initial(size_bytes: int, pool_bytes: int) -> dict[str, Any]:
    """The state of a group with a thin pool in it and nothing else."""
    return {
        "size": size_bytes,
        "pool": pool_bytes,
        "partial": "",
        "permissions": "writeable",
        "zero": "zero",
        "lvs": {},
    }


def main(words: list[str]) -> None:
    """One command, like the real one: one at a time."""
    asked = arguments().parse_args(words)
    with Path(__file__).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        do(json.loads(STATE.read_text()), asked)


def do(state: dict[str, Any], asked: argparse.Namespace) -> None:
    group, _, volume = asked.what.partition("/")
    if group != GROUP:
        fail(f'Volume group "{group}" not found', f"Cannot process volume group {group}")
    match asked.command:
        case "vgs":
            report("vg", [group_row(state)], asked.options)
        case "lvs":
            report("lv", [row for row in volume_rows(state) if is_meant(row, asked.select)], asked.options)
        case "lvcreate":
            create(state, asked)
        case "lvchange":
            for row in volume_rows(state):
                if row["lv_name"] != POOL and is_meant(row, asked.select):
                    retag(state["lvs"][row["lv_name"]]["tags"], asked)
        case "lvremove":
            if state["lvs"].get(volume, {}).get("open"):
                fail(f"Logical volume {group}/{volume} in use.")
            if state["lvs"].pop(volume, None) is None:
                fail(f'Failed to find logical volume "{group}/{volume}"')
            state["lvs"] = {name: lv for name, lv in state["lvs"].items() if lv.get("origin") != volume}
    STATE.write_text(json.dumps(state))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    for flag in ("--yes", "--nosuffix", "--snapshot"):
        parser.add_argument(flag, action="store_true")
    for option in (
        "reportformat",
        "units",
        "options",
        "select",
        "config",
        "deltag",
        "name",
        "type",
        "thinpool",
        "virtualsize",
        "size",
    ):
        parser.add_argument(f"--{option}")
    parser.add_argument("--addtag", action="append", default=[])
    parser.add_argument("what")
    return parser


def create(state: dict[str, Any], asked: argparse.Namespace) -> None:
    if asked.name in state["lvs"] or asked.name == POOL:
        fail(f'Logical Volume "{asked.name}" already exists in volume group "{GROUP}"')
    if asked.name.startswith(("snapshot", "pvmove")):
        fail('Names starting "snapshot" are reserved. Please choose a different LV name.', status=3)
    thin = asked.type == "thin"
    wanted = int((asked.virtualsize if thin else asked.size).removesuffix("b"))
    if wanted % 512:
        fail(f"Size is not a multiple of 512. Try using {wanted // 512 * 512}", status=3)
    size = -(-wanted // EXTENT) * EXTENT
    if not thin and size > free(state):
        fail(f'Volume group "{GROUP}" has insufficient free space')
    made = {"size": size, "thin": thin, "tags": asked.addtag, "made": int(time.time())}
    state["lvs"][asked.name] = made | ({"origin": asked.what.partition("/")[2]} if asked.snapshot else {})


def is_meant(row: dict[str, str], select: str | None) -> bool:
    """Whether a volume is what the selection, by name and one tag at most, is about."""
    wanted = re.fullmatch(r'lv_name="([^"]*)"(?: && lv_tags=\{"([^"]*)"\})?', select or f'lv_name="{row["lv_name"]}"')
    assert wanted is not None, select
    return row["lv_name"] == wanted[1] and wanted[2] in (None, *row["lv_tags"].split(","))


def retag(tags: list[str], asked: argparse.Namespace) -> None:
    tags[:] = sorted({*tags, *asked.addtag} - {asked.deltag})


def free(state: dict[str, Any]) -> int:
    return int(state["size"] - state["pool"] - sum(lv["size"] for lv in state["lvs"].values() if not lv["thin"]))


def group_row(state: dict[str, Any]) -> dict[str, str]:
    return {
        "vg_size": str(state["size"]),
        "vg_free": str(free(state)),
        "vg_extent_size": str(EXTENT),
        "vg_permissions": state["permissions"],
        "vg_partial": state["partial"],
        "pv_name": "/dev/nowhere",
    }


def volume_rows(state: dict[str, Any]) -> list[dict[str, str]]:
    thin = {"data_percent": "0.00", "lv_layout": "thin,sparse"}
    pool = thin | {"lv_layout": "thin,pool", "zero": state["zero"], "lv_role": "private"}
    return [row(POOL, state["pool"], 0, **pool)] + [
        row(
            name,
            lv["size"],
            minor,
            **(thin if lv["thin"] else {}),
            lv_role=role_of(name, state["lvs"]),
            lv_tags=",".join(lv["tags"]),
            lv_time=str(lv["made"]),
            lv_device_open=lv.get("open", ""),
        )
        for minor, (name, lv) in enumerate(state["lvs"].items(), 1)
    ]


def role_of(name: str, lvs: dict[str, Any]) -> str:
    if "origin" in lvs[name]:
        return "public,snapshot,thicksnapshot"
    has_snapshots = any(lv.get("origin") == name for lv in lvs.values())
    return str(lvs[name].get("role", "public,origin,thickorigin" if has_snapshots else "public"))


def row(name: str, size: int, minor: int, **others: str) -> dict[str, str]:
    return {
        "lv_name": name,
        "lv_size": str(size),
        "lv_time": "0",
        "data_percent": "",
        "lv_layout": "linear",
        "lv_role": "public",
        "lv_tags": "",
        "zero": "",
        "lv_kernel_major": "253",
        "lv_kernel_minor": str(minor),
        "lv_device_open": "",
    } | others


def report(kind: str, rows: list[dict[str, str]], options: str) -> None:
    fields = options.split(",")
    print(json.dumps({"report": [{kind: [{field: row[field] for field in fields} for row in rows]}]}))


def fail(*words: str, status: int = 5) -> NoReturn:
    for line in words:
        print(f"  {line}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    assert os.environ["LC_ALL"] == "C", "numbers and messages would be another language's"
    main(sys.argv[1:])
