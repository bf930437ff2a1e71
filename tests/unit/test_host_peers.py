"""Calling another host: at which address, why not, in words, and what becomes of a session whose connection dies."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosedError
from websockets.frames import Close

from harness.landings import VM
from limosa.errors import DestinationLost, HostNotTrusted, HostUnreachable, LimosaError
from limosa.host import calling, peers
from limosa.host.calling import Call, Caller, why_broken
from limosa.host.peers import RemotePeer
from limosa.model import reading
from limosa.model.network import HostNetwork, HostNic, NicAddress
from limosa.security import ca, tls
from limosa.wire import peer as say
from limosa.wire.encoding import encode

WITHIN_S = 20.0
MIGRATION = "abcdefghijkl"
PREPARE = say.Prepare(
    migration=MIGRATION, vm=VM, accelerator="kvm", running=True, transport="tcp", credentials=None, post_copy=False
)
PREPARED = say.Prepared(address="127.0.0.1", port=1, token="0" * 32)
ATTACH = say.Attach(migration=MIGRATION, goes_on=True)
INCOMING = say.Standing(state=say.DestinationState.INCOMING)
RUNNING = say.Running(resumed_at=None)


def play(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(WITHIN_S):
            await scenario

    asyncio.run(limited())


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``host1`` calls with."""
    folder = tmp_path_factory.mktemp("pki")
    ca.create_authority(folder / "ca")
    ca.issue_host(folder / "ca", "host1", [], folder / "host1")
    return folder / "host1"


class Calls(Caller):
    """Calls at addresses of which some answer, and each says how long it was waited before."""

    def __init__(self, pki: Path, **answers: Call | LimosaError) -> None:
        super().__init__("host2", lambda: "configured:16600", "host1", pki)
        self.answers = answers
        self.called: list[str] = []

    async def _call(self, address: str, after_s: float, context: ssl.SSLContext) -> Call:
        await asyncio.sleep(after_s)
        self.called.append(address)
        answer = self.answers.get(address.split(":", maxsplit=1)[0])
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, LimosaError):
            raise answer
        return cast(Call, answer)


def made(over: list[Call] | None = None) -> Call:
    """A call that is among ``over`` when it was hung up."""
    hung_up: list[Call] = over if over is not None else []
    call: Call
    transport = SimpleNamespace(abort=lambda: hung_up.append(call))
    call = Call(cast(Any, SimpleNamespace(transport=transport)), "host2", 1)
    return call


def test_nobody_is_there(pki: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    caller = Caller("host9", lambda: f"127.0.0.1:{port}", "host1", pki)
    with pytest.raises(HostUnreachable) as caught:
        asyncio.run(caller.call())
    assert str(caught.value) == f"host 'host9' cannot be reached at 127.0.0.1:{port}: Connection refused"


def test_its_certificate_has_expired(pki: Path, tmp_path: Path) -> None:
    ca.issue_host(pki.with_name("ca"), "host2", [], tmp_path, life=-ca.BACK / 2)

    async def scenario() -> None:
        context = tls.server_context(tmp_path)
        async with await asyncio.start_server(lambda *_: None, "127.0.0.1", ssl=context) as server:
            address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            with pytest.raises(HostNotTrusted, match=r"certificate of host 'host2' at .* has expired") as no:
                await Caller("host2", lambda: address, "host1", pki).call()
            assert "limosa ca issue host2" in no.value.todo

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (socket.gaierror(-2, "Name or service not known"), "its name cannot be looked up (Name or service not known)"),
        (TimeoutError(), "no answer in time"),
    ],
)
def test_other_reasons(fault: OSError, why: str) -> None:
    assert calling.why_unreachable(fault) == why


def test_the_configured_address_is_taken_if_it_answers_at_once(pki: Path) -> None:
    async def scenario() -> None:
        configured = made()
        caller = Calls(pki, configured=configured, second=made())
        caller.learn(("second",))
        assert await caller.call() is configured
        assert caller.called == ["configured:16600"]

    play(scenario())


def test_where_the_configured_address_is_silent_another_is_called_at_the_same_port(
    pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calling, "HEAD_START_S", 0.001)

    async def scenario() -> None:
        second = made()
        caller = Calls(pki, second=second)
        caller.learn(("configured", "fd00::2", "second"))
        assert await caller.call() is second
        assert caller.called == ["configured:16600", "[fd00::2]:16600", "second:16600"]

    play(scenario())


def test_of_two_that_answer_one_is_hung_up() -> None:
    async def scenario() -> None:
        over: list[Call] = []
        ours, late = made(over), made(over)

        async def answers(call: Call) -> Call:
            return call

        assert await calling._first([answers(ours), answers(late)]) is ours
        await asyncio.sleep(0)
        assert over == [late]

    play(scenario())


def test_if_none_answers_it_is_told_why_the_configured_one_does_not(pki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calling, "HEAD_START_S", 0.001)

    async def scenario() -> None:
        caller = Calls(pki, configured=HostUnreachable("configured"), second=HostUnreachable("second"))
        caller.learn(("second",))
        with pytest.raises(HostUnreachable, match="configured"):
            await caller.call()

    play(scenario())


class There:
    """A destination. Its connections are counted, and what is said over each is kept."""

    def __init__(self, attached: say.FromDestination | None = INCOMING) -> None:
        self.answers: dict[type[Any], say.FromDestination | None] = {
            say.Prepare: PREPARED,
            say.Attach: attached,
            say.TakeOver: RUNNING,
        }
        self.heard: list[list[say.FromSource]] = []
        self.connections: list[ServerConnection] = []
        self.learned: tuple[str, ...] = ()
        self.told: list[str] = []
        #: may be called
        self.is_reachable = asyncio.Event()
        self.is_reachable.set()
        #: why it refuses further calls
        self.refuses: HostUnreachable | None = None
        self.calls = 0
        self.uri = ""

    async def serve(self, connection: ServerConnection) -> None:
        heard: list[say.FromSource] = []
        self.heard.append(heard)
        self.connections.append(connection)
        async for data in connection:
            message: say.FromSource = reading.decode(cast(bytes, data), cast(Any, say.FromSource))
            heard.append(message)
            if (answer := self.answers.get(type(message))) is not None:
                await connection.send(encode(answer))

    async def call(self) -> Call:
        self.calls += 1
        await self.is_reachable.wait()
        if self.refuses is not None:
            raise self.refuses
        return Call(await connect(self.uri, compression=None, proxy=None), "host2", 1)

    def learn(self, addresses: Sequence[str]) -> None:
        self.learned = tuple(addresses)

    async def peer(self) -> RemotePeer:
        """A session in which memory is copied."""
        peer = await peers.dial(cast(Any, self), self.told.append)
        assert await peer.prepare(PREPARE, lambda _: None, cast(Any, None)) == PREPARED
        return peer

    def cut(self) -> None:
        """The connection ends without a word."""
        self.connections[-1].transport.abort()

    async def has_heard(self, *messages: say.FromSource) -> None:
        """Wait until this is all that came over the newest connection."""
        while self.heard[-1] != list(messages):  # noqa: ASYNC110 - play() bounds it
            await asyncio.sleep(0.001)

    async def has_connections(self, count: int) -> None:
        while len(self.heard) < count:  # noqa: ASYNC110 - play() bounds it
            await asyncio.sleep(0.001)

    async def has_calls(self, count: int) -> None:
        while self.calls < count:  # noqa: ASYNC110 - play() bounds it
            await asyncio.sleep(0.001)


@asynccontextmanager
async def there(attached: say.FromDestination | None = INCOMING) -> AsyncIterator[There]:
    destination = There(attached)
    async with serve(destination.serve, "127.0.0.1", 0, compression=None) as server:
        destination.uri = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
        yield destination


@pytest.mark.parametrize("how", ["without a word", "because nothing of ours came there"])
def test_a_session_goes_on_over_another_connection(how: str) -> None:
    async def scenario() -> None:
        async with there() as destination:
            peer = await destination.peer()
            if how == "without a word":
                destination.cut()
            else:
                await destination.connections[-1].close(1011, "keepalive ping timeout")
            await destination.has_connections(2)
            await destination.has_heard(ATTACH)
            await peer.announce(("10.0.0.2",))
            await peer.disks_whole()
            assert await peer.take_over() == RUNNING
            said = say.Announce(addresses=("10.0.0.2",)), say.DisksWhole(), say.TakeOver()
            await destination.has_heard(ATTACH, *said)
            assert not peer.lost.done()
            assert destination.told == ["the session with host 'host2' broke; connecting again", ""]
            await peer.close()

    play(scenario())


def test_it_is_called_again_while_a_link_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "AGAIN_EVERY_S", 0.001)

    async def scenario() -> None:
        async with there() as destination:
            peer = await destination.peer()
            destination.refuses = HostUnreachable("Network is unreachable")
            destination.cut()
            await destination.has_calls(4)
            destination.answers[say.Attach] = None
            destination.refuses = None
            await destination.has_connections(2)
            await destination.has_heard(ATTACH)
            destination.answers[say.Attach] = INCOMING
            destination.cut()  # and that of the call that was taken, too
            await destination.has_connections(3)
            await destination.has_heard(ATTACH)
            assert await peer.take_over() == RUNNING
            assert destination.told == ["the session with host 'host2' broke; connecting again", ""]
            await peer.close()

    play(scenario())


def test_what_is_said_meanwhile_is_said_afterwards_and_the_word_once() -> None:
    async def scenario() -> None:
        async with there() as destination:
            peer = await destination.peer()
            destination.is_reachable.clear()
            destination.cut()
            while not destination.told:  # noqa: ASYNC110 - play() bounds it
                await asyncio.sleep(0.001)
            whole, word = asyncio.ensure_future(peer.disks_whole()), asyncio.ensure_future(peer.take_over())
            await asyncio.sleep(0)
            assert not whole.done()
            destination.is_reachable.set()
            assert await word == RUNNING
            await whole
            assert destination.heard[0] == [PREPARE]
            assert destination.heard[1:] == [[ATTACH, say.DisksWhole(), say.TakeOver()]]
            await peer.close()

    play(scenario())


def test_news_come_over_the_new_connection() -> None:
    async def scenario() -> None:
        async with there() as destination:
            peer = await destination.peer()
            offers = peer.offers()
            nic = HostNic(
                name="eth0",
                index=2,
                kind="physical",
                up=True,
                carrier=True,
                mtu=1500,
                addresses=(NicAddress(address="10.0.0.2", prefix=24), NicAddress(address="10.0.1.2", prefix=24)),
            )
            for number in (1, 2):
                await destination.has_connections(number)
                while len(destination.told) < 2 * (number - 1):  # noqa: ASYNC110 - play() bounds it
                    await asyncio.sleep(0.001)
                network = HostNetwork(nics=(msgspec.structs.replace(nic, index=number),))
                await destination.connections[-1].send(encode(say.Offered(network=network, addresses=("10.0.1.2",))))
                assert (await anext(offers)).network == network
                destination.cut()
            assert destination.learned == ("10.0.1.2", "10.0.0.2")
            await peer.close()

    play(scenario())


def test_a_lost_qemu_is_told_over_the_new_connection() -> None:
    async def scenario() -> None:
        async with there() as destination:
            peer = await destination.peer()
            destination.cut()
            await destination.has_connections(2)
            await destination.has_heard(ATTACH)
            await destination.connections[-1].send(encode(say.Lost(fault=DestinationLost("QEMU ended").fault())))
            destination.cut()
            with pytest.raises(DestinationLost):
                await peer.lost
            with pytest.raises(DestinationLost):
                await peer.take_over()
            assert len(destination.heard) == 2
            await peer.close()

    play(scenario())


@pytest.mark.parametrize("state", [say.DestinationState.GONE, say.DestinationState.UNKNOWN])
def test_it_has_ended_if_the_destination_awaits_nothing_any_more(state: say.DestinationState) -> None:
    async def scenario() -> None:
        async with there(say.Standing(state=state)) as destination:
            peer = await destination.peer()
            destination.cut()
            with pytest.raises(HostUnreachable, match="the session with host 'host2' broke"):
                await peer.lost
            assert destination.told[-1] == ""
            with pytest.raises(HostUnreachable):
                await peer.disks_whole()
            assert len(destination.heard) == 2
            await destination.connections[-1].wait_closed()

    play(scenario())


@pytest.mark.parametrize("refusal", [None, HostUnreachable("host 'host2' is silent", why="Network is unreachable")])
def test_it_has_ended_if_the_destination_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refusal: HostUnreachable | None
) -> None:
    monkeypatch.setattr(peers, "AGAIN_WITHIN_S", 0.05)
    caplog.set_level(logging.WARNING, peers.__name__)

    async def scenario() -> None:
        async with there() as destination:
            peer = await destination.peer()
            destination.refuses = refusal
            if refusal is None:
                destination.is_reachable.clear()
            destination.cut()
            await destination.has_calls(2)
            word = asyncio.ensure_future(peer.take_over())
            with pytest.raises(HostUnreachable, match="the session with host 'host2' broke: the connection was cut"):
                await peer.lost
            with pytest.raises(HostUnreachable):
                await word
            assert destination.heard == [[PREPARE]]
            assert str(refusal or "no answer") in caplog.text

    play(scenario())


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ConnectionClosedError(None, None), "the connection was cut"),
        (ConnectionClosedError(None, Close(1011, "keepalive ping timeout")), "it does not answer any more"),
        (ConnectionClosedError(Close(1011, "keepalive ping timeout"), None), "it did not hear from this host"),
        (ConnectionClosedError(Close(1012, ""), Close(1012, ""), rcvd_then_sent=True), "it closed the session"),
        (ConnectionClosedError(Close(1008, "too many"), Close(1008, "too many"), rcvd_then_sent=True), "too many"),
        (ConnectionClosedError(None, Close(1009, "frame too big")), "what it said is not valid: frame too big"),
    ],
)
def test_why_a_session_ended_is_said_in_plain_words(error: ConnectionClosedError, why: str) -> None:
    assert why_broken(error) == why


def test_it_says_so_if_another_connection_is_not_trusted() -> None:
    async def scenario() -> None:
        async with there() as destination:
            peer = await destination.peer()
            destination.refuses = HostNotTrusted("host 'host2' cannot be called", why="host.pem has expired")
            destination.cut()
            with pytest.raises(HostNotTrusted, match=r"host.pem has expired"):
                await peer.lost
            with pytest.raises(HostNotTrusted):
                await peer.take_over()
            assert destination.calls == 2

    play(scenario())


def test_who_hears_last_of_its_end_does_not_wait_for_another_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with there(say.Standing(state=say.DestinationState.GONE)) as destination:
            peer = await destination.peer()

            async def send(data: bytes) -> None:
                await asyncio.wait({peer.lost})
                raise ConnectionClosedError(None, None)

            monkeypatch.setattr(peer._connection, "send", send)
            saying = asyncio.ensure_future(peer.disks_whole())
            await asyncio.sleep(0)
            destination.cut()
            with pytest.raises(HostUnreachable):
                await saying

    play(scenario())


def test_before_everything_is_prepared_it_ends_with_its_connection() -> None:
    async def scenario() -> None:
        async with there() as destination:
            destination.answers[say.Prepare] = None
            peer = await peers.dial(cast(Any, destination), destination.told.append)
            preparing = asyncio.ensure_future(peer.prepare(PREPARE, lambda _: None, cast(Any, None)))
            await destination.has_connections(1)
            await destination.has_heard(PREPARE)
            destination.cut()
            with pytest.raises(HostUnreachable):
                await preparing
            assert (len(destination.heard), destination.told) == (1, [])

    play(scenario())


def test_when_the_word_was_given_it_ends_with_its_connection() -> None:
    async def scenario() -> None:
        async with there() as destination:
            destination.answers[say.TakeOver] = None
            peer = await destination.peer()
            word = asyncio.ensure_future(peer.take_over())
            await destination.has_heard(PREPARE, say.TakeOver())
            destination.cut()
            with pytest.raises(HostUnreachable):
                await word
            assert (len(destination.heard), destination.told) == (1, [])

    play(scenario())


@pytest.mark.parametrize("how", ["with a word", "nonsense", "by ourselves"])
def test_it_ends_with_a_connection_that_did_not_just_die(how: str) -> None:
    async def scenario() -> None:
        async with there() as destination:
            peer = await destination.peer()
            match how:
                case "with a word":
                    await destination.connections[-1].close(1012)
                case "nonsense":
                    await destination.connections[-1].send(b"nonsense")
                case _:
                    await peer.close()
            with pytest.raises(HostUnreachable):
                await peer.lost
            assert (len(destination.heard), destination.told) == (1, [])
            await peer.close()

    play(scenario())


def test_a_session_that_is_closed_while_another_connection_is_made_leaves_none() -> None:
    async def scenario() -> None:
        async with there(None) as destination:
            peer = await destination.peer()
            destination.cut()
            await destination.has_connections(2)
            await destination.has_heard(ATTACH)
            await peer.close()
            await destination.connections[-1].wait_closed()
            with pytest.raises(HostUnreachable, match="the session was closed"):
                await peer.lost

    play(scenario())
