"""The cloud-init seed, read back."""

from __future__ import annotations

import io
import time

import pycdlib
import pytest

from limosa.model.vm import CloudInit
from limosa.storage import seed


def read(image: bytes) -> tuple[str, dict[str, str]]:
    """Label and files of an image."""
    iso = pycdlib.PyCdlib()
    iso.open_fp(io.BytesIO(image))
    label = iso.pvd.volume_identifier.decode().strip()
    files = {}
    for child in iso.list_children(joliet_path="/"):
        if child.is_file():
            name = child.file_identifier().decode("utf-16-be")
            output = io.BytesIO()
            iso.get_file_from_iso_fp(output, joliet_path=f"/{name}")
            files[name] = output.getvalue().decode()
    iso.close()
    return label, files


def test_what_the_guest_finds() -> None:
    cloud_init = CloudInit(user_data="#cloud-config\nüml: 1\n", meta_data="a: 1\n", network_config="version: 2\n")
    assert read(seed.make(cloud_init, instance="i", host_name="h")) == (
        "cidata",
        {"user-data": "#cloud-config\nüml: 1\n", "meta-data": "a: 1\n", "network-config": "version: 2\n"},
    )


def test_meta_data_is_made_where_there_is_none() -> None:
    _, files = read(seed.make(CloudInit(user_data="x"), instance="i-1", host_name="web1"))
    assert files == {"user-data": "x", "meta-data": "instance-id: i-1\nlocal-hostname: web1\n"}


def test_the_same_contents_give_the_same_bytes_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = set()
    for now in (1_000_000_000.0, 1_700_000_000.0):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        made.add(seed.make(CloudInit(user_data="x" * 5000), instance="i", host_name="h"))
    assert len(made) == 1


def test_large_user_data() -> None:
    text = "x" * (512 * 1024)
    assert read(seed.make(CloudInit(user_data=text), instance="i", host_name="h"))[1]["user-data"] == text
