"""The HTTP API: one handler for each endpoint of ``wire.endpoints``, and two WebSockets.

Who asks is known before a handler runs: by certificate over TLS, by user over the Unix socket. Errors leave as a
:class:`limosa.model.migration.Fault`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

from limosa import __version__
from limosa.background import to_its_end
from limosa.errors import Conflict, InvalidInput, LimosaError, NotFound, NotPermitted
from limosa.host import audit, console
from limosa.host.faults import internal
from limosa.host.memory import meminfo_mib
from limosa.host.openapi import document
from limosa.host.services import Services
from limosa.host.session import Session
from limosa.model import reading
from limosa.model.base import Model
from limosa.model.migration import Migration, Side
from limosa.model.vm import Vm
from limosa.network.addresses import own_addresses
from limosa.security import expiry
from limosa.security.identity import Identity
from limosa.transport.advise import advise
from limosa.wire import api, endpoints, versions
from limosa.wire.endpoints import ENDPOINTS, Endpoint, Role
from limosa.wire.parsing import parse

MAX_BODY_BYTES = 4 * 1024 * 1024
#: What a handler is given: the request's body, and the parameters in its path.
Handler = Callable[[Any, dict[str, str]], Awaitable[Model]]


def application(services: Services) -> Starlette:
    """The API of a host."""
    handlers = Handlers(services)
    table = handlers.table()
    host = services.parts.name
    routes: list[BaseRoute] = [_route(endpoint, table[endpoint], host) for endpoint in ENDPOINTS if not endpoint.stream]
    routes += [
        Route(endpoints.WATCH_MIGRATION.path, handlers.watch, methods=["GET"]),
        Route("/v1/openapi.json", handlers.openapi, methods=["GET"]),
        WebSocketRoute(endpoints.PEER_PATH, handlers.peer),
        WebSocketRoute(endpoints.CONSOLE_PATH, handlers.console),
    ]
    app = Starlette(
        routes=routes, exception_handlers={LimosaError: _on_error, HTTPException: _on_http, Exception: _on_bug}
    )
    app.router.redirect_slashes = False  # a path that is not in the document does not exist
    return app


class Handlers:
    """What each request does."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def table(self) -> dict[Endpoint[Any, Any], Handler]:
        """A handler for every endpoint that is no stream."""
        return {
            endpoints.HOST: self.host,
            endpoints.ADVICE: self.advice,
            endpoints.SETTINGS: self.settings,
            endpoints.CHANGE_SETTINGS: self.change_settings,
            endpoints.LOCATIONS: self.locations,
            endpoints.MOVE_DISKS: self.move_disks,
            endpoints.RELEASE_IMAGE: self.release_image,
            endpoints.SIGHTINGS: self.sightings,
            endpoints.LEFTOVERS: self.leftovers,
            endpoints.CLEAN: self.clean,
            endpoints.IMAGE_USES: self.image_uses,
            endpoints.LIST_VMS: self.list_vms,
            endpoints.CREATE_VM: self.create_vm,
            endpoints.SHOW_VM: self.show_vm,
            endpoints.DELETE_VM: self.delete_vm,
            endpoints.START_VM: self._act(self._services.parts.vms.start),
            endpoints.STOP_VM: self._act(self._services.parts.vms.stop),
            endpoints.SHUTDOWN_VM: self._act(self._services.parts.vms.shutdown),
            endpoints.RESET_VM: self._act(self._services.parts.vms.reset),
            endpoints.PAUSE_VM: self._act(self._services.parts.vms.pause),
            endpoints.RESUME_VM: self._act(self._services.parts.vms.resume),
            endpoints.CHECK: self.check,
            endpoints.MOVE: self.move,
            endpoints.LIST_MIGRATIONS: self.list_migrations,
            endpoints.SHOW_MIGRATION: self.show_migration,
            endpoints.CANCEL_MIGRATION: self.cancel_migration,
            endpoints.LIMIT_MIGRATION: self.limit_migration,
            endpoints.RESOLVE_MIGRATION: self.resolve_migration,
        }

    async def host(self, _: api.Empty, __: dict[str, str]) -> api.HostStatus:
        """The host as it sees itself."""
        services = self._services
        inspector = services.parts.inspector
        network = await inspector.network()
        return api.HostStatus(
            name=services.parts.name,
            limosa=__version__,
            protocol=(versions.OLDEST, versions.NEWEST),
            qemu=".".join(str(part) for part in inspector.capabilities.version),
            accelerator=inspector.capabilities.accelerators[0],
            cpus=services.cpus,
            memory_total_mib=meminfo_mib("MemTotal"),
            memory_available_mib=inspector.memory_available_mib(),
            switches=await inspector.switches(),
            addresses=tuple(own.address for own in own_addresses(network.nics) if own.interface != "lo"),
            vms=len(services.parts.vms.all()),
            outgoing=services.outgoing.under_way,
            incoming=services.incoming.under_way,
            time=time.time(),
            network=network,
            certificate_until=inspector.certificate_until(),
        )

    async def advice(self, _: api.Empty, __: dict[str, str]) -> api.Advice:
        """Which transport suits the host, and what is misconfigured."""
        name, inspector = self._services.parts.name, self._services.parts.inspector
        page = self._services.parts.page.now
        route, findings = advise(
            name,
            await inspector.network(),
            post_copy=page.convergence.post_copy,
            capped=page.bandwidth_mbit_per_s > 0,
            listen=inspector.listen,
        )
        expires = expiry.findings(name, inspector.certificate_until(), time.time())
        return api.Advice(name=name, transport=route.transport, why=route.why, findings=(*expires, *findings))

    async def settings(self, _: api.Empty, __: dict[str, str]) -> api.SettingsPage:
        """The settings page."""
        return api.SettingsPage(settings=self._services.parts.page.now)

    async def change_settings(self, change: api.SettingsChange, _: dict[str, str]) -> api.SettingsPage:
        """Change settings, all or none."""
        return api.SettingsPage(settings=await self._services.parts.page.change(change.values))

    async def locations(self, _: api.Empty, __: dict[str, str]) -> api.LocationList:
        """Where images can lie."""
        return api.LocationList(locations=await self._services.parts.storage.locations())

    async def move_disks(self, request: api.DiskMoveRequest, _: dict[str, str]) -> Migration:
        """Move disks to another location."""
        return await self._services.disk_moves.move(request)

    async def release_image(self, request: api.ReleaseRequest, _: dict[str, str]) -> api.Empty:
        """Take the lease on an image from a dead host."""
        await self._services.parts.leasing.release(request.image, request.dead)
        return api.Empty()

    async def sightings(self, _: api.Empty, __: dict[str, str]) -> api.SightingList:
        """Who else sees the locations."""
        locations = await self._services.parts.storage.locations()
        seen, silent = await self._services.neighbours.who_sees(locations)
        return api.SightingList(sightings=seen, silent=dict(silent))

    async def leftovers(self, _: api.Empty, __: dict[str, str]) -> api.LeftoverList:
        """What crashes left behind."""
        return api.LeftoverList(leftovers=await self._services.leftovers.look())

    async def clean(self, request: api.CleanRequest, _: dict[str, str]) -> api.CleanReport:
        """Remove some of it; what has begun is carried through, whether or not the caller stays to hear of it."""
        return await asyncio.shield(self._services.leftovers.clean(request.paths))

    async def image_uses(self, request: api.ImagesSought, _: dict[str, str]) -> api.ImageUses:
        """For another host."""
        return api.ImageUses(uses=await self._services.leftovers.uses(request.images))

    async def list_vms(self, _: api.Empty, __: dict[str, str]) -> api.VmList:
        """All VMs."""
        vms = self._services.parts.vms
        return api.VmList(vms=tuple(vms.view(hosted) for hosted in vms.all()))

    async def create_vm(self, new: api.NewVm, _: dict[str, str]) -> Vm:
        """Create a VM."""
        return self._services.parts.vms.view(await self._services.parts.vms.create(new))

    async def show_vm(self, _: api.Empty, path: dict[str, str]) -> Vm:
        """One VM."""
        return self._services.parts.vms.view(self._services.parts.vms.get(path["vm"]))

    async def delete_vm(self, _: api.Empty, path: dict[str, str]) -> api.Empty:
        """Forget a VM."""
        vms = self._services.parts.vms
        await to_its_end(vms.delete(vms.get(path["vm"])))
        return api.Empty()

    def _act(self, act: Callable[[Any], Awaitable[None]]) -> Handler:
        async def handler(_: api.Empty, path: dict[str, str]) -> Vm:
            hosted = self._services.parts.vms.get(path["vm"])
            # Once begun it is carried through, whether or not the caller stays to hear of it.
            await asyncio.shield(act(hosted))
            return self._services.parts.vms.view(hosted)

        return handler

    async def check(self, request: api.CheckRequest, _: dict[str, str]) -> api.CheckReport:
        """Preflight."""
        return await self._services.outgoing.check(request)

    async def move(self, request: api.MoveRequest, _: dict[str, str]) -> Model:
        """Begin a move."""
        return await to_its_end(self._services.outgoing.move(request))

    async def list_migrations(self, _: api.Empty, __: dict[str, str]) -> api.MigrationList:
        """Moves from here, and landings that have not ended."""
        leaving, landing = self._services.views.list(), self._services.incoming.migrations()
        return api.MigrationList(migrations=tuple(landing + leaving))

    async def show_migration(self, _: api.Empty, path: dict[str, str]) -> Model:
        """One move."""
        migration = path["migration"]
        return self._services.incoming.show(migration) or self._services.views.show(migration)

    async def cancel_migration(self, _: api.Empty, path: dict[str, str]) -> Model:
        """Cancel a move."""
        self._check_conducted(path["migration"])
        of_disks = await self._services.disk_moves.cancel(path["migration"])
        return of_disks or await self._services.outgoing.cancel(path["migration"])

    async def limit_migration(self, request: api.LimitRequest, path: dict[str, str]) -> Migration:
        """Cap a move that is under way."""
        migration, cap = path["migration"], request.bandwidth_mbit_per_s
        self._check_conducted(migration)
        return await self._services.disk_moves.limit(migration, cap) or await self._services.outgoing.limit(
            migration, cap
        )

    def _check_conducted(self, migration: str) -> None:
        """Raise :class:`Conflict` if it is another host that conducts this move."""
        landing = self._services.incoming.show(migration)
        if landing is not None:
            raise Conflict(
                f"the move of VM '{landing.vm}' is controlled by host '{landing.source}'",
                todo=f"ask that host: limosa --host {landing.source} migration ...",
                vm=landing.vm,
                host=landing.source,
            )

    async def resolve_migration(self, request: api.ResolveRequest, path: dict[str, str]) -> Model:
        """A person's word."""
        migration = path["migration"]
        if self._services.incoming.show(migration) is not None:
            return await self._services.incoming.resolve(migration, Side(request.owner))
        return await self._services.outgoing.resolve(migration, Side(request.owner))

    async def watch(self, request: Request) -> Response:
        """One move, a line at each change."""
        _authorise(request.scope, Role.VIEWER, self._services.parts.name)
        migration = request.path_params["migration"]
        changes = self._services.incoming.watch(migration)
        if changes is None:
            self._services.views.show(migration)
            changes = self._services.views.watch(migration)

        async def lines() -> AsyncIterator[bytes]:
            async for view in changes:
                yield msgspec.json.encode(view) + b"\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def openapi(self, request: Request) -> Response:
        """The OpenAPI document."""
        _authorise(request.scope, Role.VIEWER, self._services.parts.name)
        return Response(msgspec.json.encode(document()), media_type="application/json")

    async def peer(self, socket: WebSocket) -> None:
        """A session with a source host."""
        identity = _identity(socket.scope)
        if identity is None or identity.role is not Role.HOST:
            await socket.close(code=4403, reason="only hosts may open peer sessions")
            return
        await socket.accept()
        await Session(socket, identity, self._services.incoming).serve()

    async def console(self, socket: WebSocket) -> None:
        """A VM's serial console."""
        identity = _identity(socket.scope)
        told = audit.Asked(socket.scope, identity)
        hosted = self._services.parts.vms.find(socket.path_params["vm"])
        if identity is None or identity.role_at(self._services.parts.name) < Role.OPERATOR:
            told.is_answered(NotPermitted.code)
            await socket.close(code=4403, reason="the console needs the role operator")
        elif hosted is None or hosted.machine is None:
            told.is_answered(NotFound.code)
            await socket.close(code=4404, reason="no such VM runs here")
        else:
            told.is_answered("ok")
            await socket.accept()
            await console.relay(socket, self._services.parts.files.sockets(hosted.config) / "console.sock")


def _route(endpoint: Endpoint[Any, Any], handler: Handler, host: str) -> Route:
    decoder = reading.decoder(endpoint.request)

    async def answer(request: Request) -> Response:
        with audit.asked(request.scope, _identity(request.scope), endpoint.role) as told:
            role = _authorise(request.scope, endpoint.role, host)
            told.body = parse(await _body(request), decoder, "the request")
            reply = await handler(told.body, dict(request.path_params))
        return Response(msgspec.json.encode(_shown_to(role, reply)), media_type="application/json")

    return Route(endpoint.path, answer, methods=[endpoint.method])


def _identity(scope: Any) -> Identity | None:
    identity: Identity | None = scope["state"].get("identity")
    return identity


def _shown_to(role: Role, reply: Model) -> Model:
    """What of a reply is for that role."""
    match reply:
        case Vm() if role < Role.OPERATOR:
            return reply.for_viewers()
        case api.VmList() if role < Role.OPERATOR:
            return api.VmList(vms=tuple(vm.for_viewers() for vm in reply.vms))
    return reply


def _authorise(scope: Any, role: Role, host: str) -> Role:
    """The role that who asks has at this host. Raises :class:`NotPermitted` if it is less than ``role``."""
    identity = _identity(scope)
    if identity is None:
        raise NotPermitted(
            "this connection has not identified itself", todo="use a certificate made by 'limosa ca issue'"
        )
    if (has := identity.role_at(host)) >= role:
        return has
    needed = role.name.lower()
    if has is Role.HOST:
        raise NotPermitted(
            f"host '{identity.name}' may not do this on host '{host}'",
            why="a host's certificate is only for commands on that host, and for what hosts ask one another",
            todo=f"use a person's, made with 'limosa ca issue NAME --role {needed}' and copied to ~/.config/limosa",
            host=host,
        )
    raise NotPermitted(
        f"'{identity.name}' is {has.name.lower()} and may not do this",
        todo=f"use a certificate with the role {needed}",
    )


async def _body(request: Request) -> bytes:
    data = bytearray()
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_BODY_BYTES:
                raise InvalidInput("the request is too large", why=f"more than {MAX_BODY_BYTES} bytes")
    except ClientDisconnect as error:
        raise InvalidInput("the request was cut off") from error
    return bytes(data) or b"{}"


def _fault(error: LimosaError) -> Response:
    body = msgspec.json.encode(error.fault())
    return Response(body, status_code=error.http_status, media_type="application/json")


async def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, LimosaError)
    return _fault(error)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _fault(NotFound(f"there is no {request.method} {request.url.path}", todo="see /v1/openapi.json"))
    response.status_code = error.status_code
    return response


async def _on_bug(request: Request, error: Exception) -> Response:
    return _fault(internal(error, audit.request_line(request.scope)))
