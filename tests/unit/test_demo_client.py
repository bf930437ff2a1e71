"""The demo's client against servers of our own: what it times, and that it calls a failure a failure."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import pairwise

import pytest

from demo import client
from demo.client import Client, Observed

OK = b"HTTP/1.1 200 OK\r\n\r\nok"
Serve = Callable[[socket.socket], None]


@contextmanager
def server(serve: Serve) -> Iterator[tuple[str, int]]:
    """A server that does the same with each connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    stream, _ = listener.accept()
                    threading.Thread(target=converse, args=(stream,), daemon=True).start()

        def converse(stream: socket.socket) -> None:
            with closing(stream), suppress(OSError):
                serve(stream)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def echo(stream: socket.socket) -> None:
    while data := stream.recv(4096):
        stream.sendall(data)


def answer(reply: bytes) -> Serve:
    def serve(stream: socket.socket) -> None:
        stream.recv(4096)
        stream.sendall(reply)

    return serve


def say_nothing(stream: socket.socket) -> None:
    while stream.recv(4096):
        pass


def ask(
    http: Serve, messages: Serve = echo, until: Callable[[Observed], bool] = lambda seen: len(seen.requests) > 2
) -> Observed:
    """What a client saw that asked until ``until``, or a failure."""
    with server(http) as http_address, server(messages) as echo_address:
        asker = Client(http_address, echo_address)
        asker.start()
        wait_until(lambda: until(asker.observed) or bool(asker.observed.failures))
        return asker.stop()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.Requests, "every_s", 0.02)
    monkeypatch.setattr(client, "PATIENCE_S", 0.5)


def test_every_answer_is_timed_and_nothing_fails() -> None:
    seen = ask(answer(OK), until=lambda seen: len(seen.requests) > 5 and len(seen.messages) > 20)
    assert seen.failures == []
    for answers in (seen.requests, seen.messages):
        assert all(one.latency_s > 0 for one in answers)
    assert all(before.answered_at <= after.answered_at for before, after in pairwise(seen.messages))


def test_questions_go_out_while_others_wait_for_their_answer() -> None:
    gate = threading.Event()
    begun = threading.Semaphore(0)

    def serve(stream: socket.socket) -> None:
        stream.recv(4096)
        begun.release()
        gate.wait(5)
        stream.sendall(OK)

    with server(serve) as http, server(echo) as messages:
        asker = Client(http, messages)
        asker.start()
        for _ in range(4):
            assert begun.acquire(timeout=5)
        gate.set()
        assert len(asker.stop().requests) >= 4


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (b"HTTP/1.1 500 Oh\r\n\r\nok", "a wrong answer"),
        (b"HTTP/1.1 200 OK\r\n\r\no", "a wrong answer"),
        (b"", "a wrong answer"),
    ],
)
def test_a_wrong_answer_has_failed(reply: bytes, why: str) -> None:
    seen = ask(answer(reply))
    assert why in seen.failures[0].why
    assert seen.requests == []


def test_an_answer_that_does_not_come_has_failed() -> None:
    seen = ask(say_nothing)
    assert "no answer within" in seen.failures[0].why


def test_nobody_there_has_failed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    with server(echo) as messages:
        asker = Client(address, messages)
        asker.start()
        wait_until(lambda: bool(asker.observed.failures))
        assert "Connection refused" in asker.stop().failures[0].why


@pytest.mark.parametrize(
    ("serve", "why"),
    [
        (lambda stream: stream.recv(4096), "closed the connection"),
        (lambda stream: stream.sendall(bytes(7) + b"\1"), "something else"),
        (say_nothing, "silent"),
    ],
)
def test_a_lasting_connection_that_breaks_has_failed_once(serve: Serve, why: str) -> None:
    seen = ask(answer(OK), serve, until=lambda _: False)
    assert [failure for failure in seen.failures if why in failure.why] == seen.failures
    assert len(seen.failures) == 1


def test_a_lasting_connection_that_is_not_made_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    with pytest.raises(ConnectionRefusedError):
        Client(address, address).start()
