#!/usr/bin/python3
"""A pretended ``lvm``: as much of the real one as Limosa asks for, with its state in ``state.json`` beside it.

It keeps no data and makes no devices. ``tests/contract/test_lvm.py`` holds it to what the real one does.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
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
            rows = [
                row for row in volume_rows(state) if not asked.select or asked.select == f'lv_name="{row["lv_name"]}"'
            ]
            report("lv", rows, asked.options)
        case "lvcreate":
            create(state, asked)
        case "lvremove":
            if state["lvs"].pop(volume, None) is None:
                fail(f'Failed to find logical volume "{group}/{volume}"')
    STATE.write_text(json.dumps(state))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    for flag in ("--yes", "--nosuffix"):
        parser.add_argument(flag, action="store_true")
    for option in (
        "reportformat",
        "units",
        "options",
        "select",
        "addtag",
        "name",
        "type",
        "thinpool",
        "virtualsize",
        "size",
    ):
        parser.add_argument(f"--{option}")
    parser.add_argument("what")
    return parser


def create(state: dict[str, Any], asked: argparse.Namespace) -> None:
    if asked.name in state["lvs"] or asked.name == POOL:
        fail(f'Logical Volume "{asked.name}" already exists in volume group "{GROUP}"')
    if asked.name.startswith(("snapshot", "pvmove")):
        fail('Names starting "snapshot" are reserved. Please choose a different LV name.', status=3)
    thin = asked.type == "thin"
    size = -(-int((asked.virtualsize if thin else asked.size).removesuffix("b")) // EXTENT) * EXTENT
    if not thin and size > free(state):
        fail(f'Volume group "{GROUP}" has insufficient free space')
    state["lvs"][asked.name] = {"size": size, "thin": thin, "tag": asked.addtag}


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
    pool = row(POOL, state["pool"], "0.00", "thin,pool", "", state["zero"], 0)
    return [pool] + [
        row(
            name,
            lv["size"],
            "0.00" if lv["thin"] else "",
            "thin,sparse" if lv["thin"] else "linear",
            lv["tag"],
            "",
            minor,
        )
        for minor, (name, lv) in enumerate(state["lvs"].items(), 1)
    ]


def row(name: str, size: int, percent: str, layout: str, tags: str, zero: str, minor: int) -> dict[str, str]:
    return {
        "lv_name": name,
        "lv_size": str(size),
        "data_percent": percent,
        "lv_layout": layout,
        "lv_tags": tags,
        "zero": zero,
        "lv_kernel_major": "253",
        "lv_kernel_minor": str(minor),
    }


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
