"""Which host a command speaks with."""

from __future__ import annotations

import argparse
import os

from limosa.client.host import HostClient
from limosa.client.route import Route, UnixRoute, configuration_folders, find_route, is_known, local_route
from limosa.errors import InvalidInput


def client_of(arguments: argparse.Namespace) -> HostClient:
    """A client of the host that ``--host`` or the environment names. Nothing is connected yet."""
    return HostClient(route_of(arguments))


def route_of(arguments: argparse.Namespace) -> Route:
    """The way to the host; see :mod:`limosa.client.route` for the order in which it is looked for."""
    environment = os.environ
    if arguments.host == "":  # as a variable of a script that is not set: this machine would be a guess
        raise InvalidInput("--host names no host", todo="name one, or leave --host out for this machine")
    if arguments.host is None and environment.get("LIMOSA_SOCKET"):
        return local_route(environment)
    name = arguments.host or environment.get("LIMOSA_HOST")
    if not name:
        return local_route(environment)
    folders = configuration_folders(environment)
    # What somebody wrote down of a name goes before a lab that happens to have it.
    lab = _lab_route(name) if not is_known(name, folders) else None
    return lab or find_route(name, folders)


def name_there(arguments: argparse.Namespace, host: str) -> str:
    """Another host's name, as a person gives it, for the host that a command speaks with: in a lab both may say
    ``LAB-host2``."""
    from limosa.lab.hosts import lab_of, name_within  # noqa: PLC0415 - only for commands that name another host

    route = route_of(arguments)
    return name_within(lab_of(route.path), host) if isinstance(route, UnixRoute) else host


def _lab_route(name: str) -> UnixRoute | None:
    from limosa.lab.hosts import lab_of, socket_of  # noqa: PLC0415 - only for commands with --host

    path = socket_of(name, within=lab_of(os.environ.get("LIMOSA_SOCKET")))
    if path is None:
        return None
    *_, lab, host, _ = path.parts
    return UnixRoute(str(path), start=f"limosa lab restart {host} --name {lab}")
