"""Clients that do nothing, or next to nothing: their connections end."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
from live import serving

from moe_lightning.server.app import Settings
from moe_lightning.server.idle import IdleConnections
from moe_lightning.server.limits import Limits

LIMITS = Limits(head_seconds=10, write_seconds=100)


class Cycle:
    response_complete = False


class Connection:
    """As uvicorn's: the last request, and what of its response is not sent."""

    def __init__(self) -> None:
        self.cycle = None
        self.unsent = 0
        self.transport = SimpleNamespace(get_write_buffer_size=lambda: self.unsent)

    def ask(self) -> None:
        self.cycle = Cycle()

    def answer(self, unsent: int = 0) -> None:
        self.cycle.response_complete, self.unsent = True, unsent


def test_a_connection_without_a_whole_head_is_ended_once_its_time_is_over():
    idle, connection = IdleConnections(LIMITS), Connection()
    assert [bool(idle.look([connection], now)) for now in (5, 10, 14.9, 15)] == [False, False, False, True]


def test_the_time_begins_anew_after_each_response_and_stands_still_while_the_server_works():
    idle, connection = IdleConnections(LIMITS), Connection()
    for start in (0, 1000, 2000):
        assert not idle.look([connection], start + 5)
        connection.ask()
        assert not any(idle.look([connection], start + later) for later in (10, 500))
        connection.answer()
        assert not idle.look([connection], start + 998)
    assert not idle.look([connection], 3005)
    connection.ask()
    connection.answer()  # between two looks
    assert not idle.look([connection], 3008)
    assert idle.look([connection], 3018) == [connection]


@pytest.mark.parametrize("is_complete", [False, True])
def test_a_reader_has_its_own_time_which_begins_anew_when_it_takes_something(is_complete):
    idle, connection, other = IdleConnections(LIMITS), Connection(), Connection()
    connection.ask()
    connection.cycle.response_complete, connection.unsent = is_complete, 1000
    assert not any(idle.look([connection, other], now) for now in (0, 9))
    connection.unsent -= 1
    assert idle.look([connection, other], 50) == [other]
    assert not idle.look([connection], 149)
    assert idle.look([connection], 150) == [connection]


def test_what_is_closed_is_forgotten():
    idle, connection = IdleConnections(LIMITS), Connection()
    assert not idle.look([connection], 0)
    assert not idle.look([], 20)
    assert not idle.look([connection], 21)


def keep_silent(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client, suppress(ConnectionError):
        assert client.recv(1) == b""


@pytest.fixture(scope="module")
def hasty(alone):
    with serving(alone, Settings(limits=Limits(head_seconds=0.5))) as server:
        yield server


def drip(port: int, start: bytes) -> None:
    """Send a beginning, then byte by byte until the server ends it; one that never does fails by pytest's limit."""
    with socket.create_connection(("127.0.0.1", port)) as client, suppress(ConnectionError):
        client.settimeout(0.02)
        client.sendall(start)
        while True:
            client.sendall(b"x")
            with suppress(TimeoutError):
                if not client.recv(4096):
                    return


def test_clients_that_send_nothing_or_drip_bytes_are_cut_off_and_others_are_answered(hasty):
    head = b"GET /health HTTP/1.1\r\nHost: x\r\nDripping: "
    refused = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: a/b\r\nContent-Length: 1000000\r\n\r\n"
    with ThreadPoolExecutor(3) as threads:
        ends = [threads.submit(drip, hasty.port, start) for start in (head, refused)]
        ends.append(threads.submit(keep_silent, hasty.port))
        for end in ends:
            end.result()
    assert json.loads(hasty.send("GET", "/health")[2]) == {"status": "ok"}
