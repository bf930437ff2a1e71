"""How teams of NICs (``kind`` team, not bond) work, by the kernel's generic netlink family ``team``.

A team is a kernel module that leaves its policy to a daemon (teamd), so rtnetlink knows nothing of it. The mode is an
option of the team. By what its ``loadbalance`` mode hashes is a program for the kernel's packet filter, which is
nobody's to read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from pyroute2.netlink import NLM_F_REQUEST, genlmsg, nla
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import AsyncGenericNetlinkSocket, GenericNetlinkSocket

from limosa.network.netlink import attribute

# From linux/if_team.h.
_FAMILY, _VERSION = "team", 1
_OPTIONS_GET = 2


class TeamMessage(genlmsg):  # type: ignore[misc]
    """A request for the options of a team, and each part of the answer."""

    prefix = "TEAM_ATTR_"
    nla_map = (
        ("TEAM_ATTR_UNSPEC", "none"),
        ("TEAM_ATTR_TEAM_IFINDEX", "uint32"),
        ("TEAM_ATTR_LIST_OPTION", "Options"),
        ("TEAM_ATTR_LIST_PORT", "hex"),
    )

    class Options(nla):  # type: ignore[misc]
        """All of them."""

        prefix = "TEAM_ATTR_ITEM_"
        nla_map = (("TEAM_ATTR_ITEM_OPTION_UNSPEC", "none"), ("TEAM_ATTR_ITEM_OPTION", "Option"))

        class Option(nla):  # type: ignore[misc]
            """One. Of what type its value is depends on its name."""

            prefix = "TEAM_ATTR_OPTION_"
            nla_map = (
                ("TEAM_ATTR_OPTION_UNSPEC", "none"),
                ("TEAM_ATTR_OPTION_NAME", "asciiz"),
                ("TEAM_ATTR_OPTION_CHANGED", "flag"),
                ("TEAM_ATTR_OPTION_TYPE", "uint8"),
                ("TEAM_ATTR_OPTION_DATA", "cdata"),
                ("TEAM_ATTR_OPTION_REMOVED", "flag"),
                ("TEAM_ATTR_OPTION_PORT_IFINDEX", "uint32"),
                ("TEAM_ATTR_OPTION_ARRAY_INDEX", "uint32"),
            )


def modes(teams: Iterable[int]) -> dict[int, str]:
    """The mode of each of these teams, by the kernel's number, in the kernel's words (``activebackup``).

    Those of which it says nothing are left out: the family is only for who may administer the network. Blocks.
    """
    found = {}
    for index in teams:
        # A socket and a loop for each request, as in ``mptcp``.
        with suppress(NetlinkError, OSError), _Teams(use_event_loop=asyncio.SelectorEventLoop()) as socket:
            if mode := mode_of(socket.options(index)):
                found[index] = mode
    return found


def mode_of(answers: Iterable[Any]) -> str:
    """The mode in the answers about one team; empty if it is not among them."""
    for answer in answers:
        options = attribute(answer, "TEAM_ATTR_LIST_OPTION")
        for option in options.get_attrs("TEAM_ATTR_ITEM_OPTION") if options is not None else ():
            if attribute(option, "TEAM_ATTR_OPTION_NAME") == "mode":
                value: bytes = attribute(option, "TEAM_ATTR_OPTION_DATA") or b""
                return value.rstrip(b"\0").decode(errors="replace")
    return ""


class _AsyncTeams(AsyncGenericNetlinkSocket):  # type: ignore[misc]
    async def setup_endpoint(self) -> None:
        """Be bound to the family, which is looked up for each request."""
        if getattr(self.local, "transport", None) is None:
            await super().setup_endpoint()
            await self.bind(_FAMILY, TeamMessage)

    async def options(self, index: int) -> Any:
        request = TeamMessage()
        request["cmd"], request["version"] = _OPTIONS_GET, _VERSION
        request["attrs"] = [("TEAM_ATTR_TEAM_IFINDEX", index)]
        return await self.nlm_request(request, msg_type=self.prid, msg_flags=NLM_F_REQUEST)


class _Teams(GenericNetlinkSocket):  # type: ignore[misc]
    async_class = _AsyncTeams

    def options(self, index: int) -> Iterable[Any]:
        """The answers about one team."""
        answers: tuple[Any, ...] = self._run_sync_cleanup(self.asyncore.options, index)
        return answers
