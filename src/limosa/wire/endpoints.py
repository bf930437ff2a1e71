"""Every request of the HTTP API, once.

The server binds a handler to each, the client calls them, the OpenAPI document lists them: none can drift.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Generic, TypeVar

import msgspec

from limosa.model.base import Model
from limosa.model.migration import Migration
from limosa.model.vm import Vm
from limosa.wire import api

Request = TypeVar("Request", bound=Model)
Reply = TypeVar("Reply", bound=Model)


class Role(IntEnum):
    """What a certificate allows; each includes those before it. At its own host that of a host is an operator's."""

    #: what hosts ask of one another
    HOST = 1
    VIEWER = 2
    OPERATOR = 3


class Endpoint(msgspec.Struct, Generic[Request, Reply], frozen=True):
    """One request. ``path`` has its parameters in braces; ``stream`` replies with one JSON object a line."""

    method: str
    path: str
    request: type[Request]
    reply: type[Reply]
    role: Role
    summary: str
    stream: bool = False


HOST = Endpoint("GET", "/v1/host", api.Empty, api.HostStatus, Role.VIEWER, "The host as it sees itself")
ADVICE = Endpoint(
    "GET", "/v1/advice", api.Empty, api.Advice, Role.VIEWER, "Which transport suits the host, and what is misconfigured"
)
SETTINGS = Endpoint("GET", "/v1/settings", api.Empty, api.SettingsPage, Role.VIEWER, "The settings page")
CHANGE_SETTINGS = Endpoint(
    "PATCH", "/v1/settings", api.SettingsChange, api.SettingsPage, Role.OPERATOR, "Change settings, all or none"
)

LIST_VMS = Endpoint("GET", "/v1/vms", api.Empty, api.VmList, Role.VIEWER, "All VMs of the host")
CREATE_VM = Endpoint("POST", "/v1/vms", api.NewVm, Vm, Role.OPERATOR, "Create a VM; it is not started")
SHOW_VM = Endpoint("GET", "/v1/vms/{vm}", api.Empty, Vm, Role.VIEWER, "One VM")
DELETE_VM = Endpoint(
    "DELETE", "/v1/vms/{vm}", api.Empty, api.Empty, Role.OPERATOR, "Forget a stopped VM; its disks are kept"
)
START_VM = Endpoint("POST", "/v1/vms/{vm}/start", api.Empty, Vm, Role.OPERATOR, "Start a VM")
STOP_VM = Endpoint("POST", "/v1/vms/{vm}/stop", api.Empty, Vm, Role.OPERATOR, "Pull the VM's plug")
SHUTDOWN_VM = Endpoint("POST", "/v1/vms/{vm}/shutdown", api.Empty, Vm, Role.OPERATOR, "Press the VM's power button")
RESET_VM = Endpoint("POST", "/v1/vms/{vm}/reset", api.Empty, Vm, Role.OPERATOR, "Press the VM's reset button")
PAUSE_VM = Endpoint("POST", "/v1/vms/{vm}/pause", api.Empty, Vm, Role.OPERATOR, "Pause a VM")
RESUME_VM = Endpoint("POST", "/v1/vms/{vm}/resume", api.Empty, Vm, Role.OPERATOR, "Resume a paused VM")

LOCATIONS = Endpoint(
    "GET", "/v1/storage", api.Empty, api.LocationList, Role.HOST, "Where images can lie, and how much space there is"
)
MOVE_DISKS = Endpoint(
    "POST",
    "/v1/storage/moves",
    api.DiskMoveRequest,
    Migration,
    Role.OPERATOR,
    "Move disks of a VM, running or not, to another location of the host",
)
SIGHTINGS = Endpoint(
    "GET", "/v1/storage/hosts", api.Empty, api.SightingList, Role.VIEWER, "Which other hosts see which locations"
)
LEFTOVERS = Endpoint(
    "GET", "/v1/storage/leftovers", api.Empty, api.LeftoverList, Role.VIEWER, "Images that moves left behind"
)
CLEAN = Endpoint(
    "POST",
    "/v1/storage/removals",
    api.CleanRequest,
    api.CleanReport,
    Role.OPERATOR,
    "Remove images that moves left behind and that nobody uses",
)
IMAGE_USES = Endpoint(
    "POST", "/v1/storage/uses", api.ImagesSought, api.ImageUses, Role.HOST, "Who uses these images on shared storage"
)
RELEASE_IMAGE = Endpoint(
    "POST",
    "/v1/storage/releases",
    api.ReleaseRequest,
    api.Empty,
    Role.OPERATOR,
    "Release the lease that a dead host holds on a shared image",
)

CHECK = Endpoint("POST", "/v1/checks", api.CheckRequest, api.CheckReport, Role.VIEWER, "Preflight: could this VM move?")
MOVE = Endpoint(
    "POST", "/v1/migrations", api.MoveRequest, Migration, Role.OPERATOR, "Move a running VM to another host"
)
LIST_MIGRATIONS = Endpoint(
    "GET", "/v1/migrations", api.Empty, api.MigrationList, Role.VIEWER, "Current and past moves, newest first"
)
SHOW_MIGRATION = Endpoint("GET", "/v1/migrations/{migration}", api.Empty, Migration, Role.VIEWER, "One move")
WATCH_MIGRATION = Endpoint(
    "GET",
    "/v1/migrations/{migration}/watch",
    api.Empty,
    Migration,
    Role.VIEWER,
    "One move, a line at each change until it ends",
    stream=True,
)
CANCEL_MIGRATION = Endpoint(
    "POST", "/v1/migrations/{migration}/cancel", api.Empty, Migration, Role.OPERATOR, "Cancel a move; the VM stays"
)
LIMIT_MIGRATION = Endpoint(
    "POST",
    "/v1/migrations/{migration}/limit",
    api.LimitRequest,
    Migration,
    Role.OPERATOR,
    "Cap the bandwidth of a move that is under way",
)
RESOLVE_MIGRATION = Endpoint(
    "POST",
    "/v1/migrations/{migration}/resolve",
    api.ResolveRequest,
    Migration,
    Role.OPERATOR,
    "Say who owns a VM when its hosts cannot know",
)

#: WebSockets, outside the table because they have no one request and reply.
CONSOLE_PATH = "/v1/vms/{vm}/console"
PEER_PATH = "/v1/peer"

ENDPOINTS: tuple[Endpoint[Model, Model], ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Endpoint)
)
