"""What can go wrong around a request: keys, queues, disconnects, slow readers, failing passes, the end."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
from live import Stream, serving

from checkpoints import MAX_POSITION, load
from moe_lightning import SamplingParams
from moe_lightning.engine.request import RequestOutput
from moe_lightning.server.app import Settings
from moe_lightning.server.desk import Desk
from moe_lightning.server.engine_thread import Ticket, Update
from moe_lightning.server.limits import Limits
from moe_lightning.server.responses import EventStream

LONG = {"prompt": "the fox", "max_tokens": MAX_POSITION, "ignore_eos": True, "temperature": 0}
SHORT = {"prompt": "the fox", "max_tokens": 3, "ignore_eos": True, "temperature": 0}
COMPLETIONS = "/v1/completions"
KEY = "sk-a-key-of-some-length"


def server_of(mixtral, limits=None, **settings):
    return serving(load(mixtral, max_num_seqs=2), Settings(limits=limits or Limits(), **settings))


def connections(server):
    """uvicorn's, open by now."""
    return server.server.server_state.connections


@pytest.fixture(scope="module")
def locked(mixtral):
    with server_of(mixtral, api_key=KEY) as server:
        yield server


class TestKey:
    @pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer wrong", "Bearer é", f"Basic {KEY}", KEY])
    def test_nothing_is_answered_without_the_key(self, locked, given, caplog):
        headers = {} if given is None else {"Authorization": given.encode("latin-1")}
        with caplog.at_level(logging.DEBUG):
            for method, path in (
                ("POST", COMPLETIONS), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/get_server_info"),
                ("GET", "/openapi.json"), ("GET", "/nothing"),
            ):  # fmt: skip
                status, answer, body = locked.send(method, path, SHORT if method == "POST" else None, headers)
                assert status == 401
                assert answer["www-authenticate"] == "Bearer"
                assert KEY.encode() not in body
        assert KEY not in caplog.text

    def test_the_key_opens_everything_and_is_shown_nowhere(self, locked, caplog):
        headers = {"Authorization": f"Bearer {KEY}"}
        with caplog.at_level(logging.DEBUG):
            assert locked.send("POST", COMPLETIONS, SHORT, headers)[0] == 200
            for path in ("/get_server_info", "/metrics", "/openapi.json", "/"):
                status, _, body = locked.send("GET", path, headers=headers)
                assert status == 200
                assert KEY.encode() not in body
        assert KEY not in caplog.text

    @pytest.mark.parametrize("path", ["/health", "/health/ready", "/"])
    def test_probes_and_the_empty_page_need_no_key(self, locked, path):
        assert locked.send("GET", path)[0] == 200


class TestQueue:
    def test_what_does_not_fit_is_refused_with_a_time_and_the_others_are_answered(self, mixtral, alone):
        limits = Limits(max_queue=2)
        with server_of(mixtral, limits) as server, ThreadPoolExecutor(4) as threads:
            with server.held():
                running = [threads.submit(server.post, COMPLETIONS, SHORT) for _ in range(4)]
                server.until(lambda: server.desk.num_interactive == 4)
                for body in (SHORT, {**SHORT, "stream": True}):
                    status, headers, data = server.send("POST", COMPLETIONS, body)
                    assert status == 429
                    assert int(headers["retry-after"]) >= 1
                    assert "4 answers are in work" in json.loads(data)["error"]["message"]
                assert server.send("POST", "/generate", {"text": "a"})[0] == 429
            (want,) = alone.generate(["the fox"], _params(3), use_tqdm=False)
            for answer in running:
                assert answer.result()[1]["choices"][0]["text"] == want.outputs[0].text
            assert server.post(COMPLETIONS, SHORT)[0] == 200

    def test_prompts_longer_than_all_that_may_wait_are_refused(self, mixtral):
        with server_of(mixtral, Limits(max_queued_tokens=10)) as server, ThreadPoolExecutor(1) as threads:
            body = {"prompt": [3] * 8, "max_tokens": 1}
            with server.held():
                running = threads.submit(server.post, COMPLETIONS, body)
                server.until(lambda: server.desk.num_interactive == 1)
                status, answer = server.post(COMPLETIONS, body)
                assert status == 429
                assert "prompts of 8 tokens are in work and 10 is the most" in answer["error"]["message"]
            assert running.result()[0] == 200

    def test_a_request_larger_than_the_queue_is_taken_when_there_is_no_other(self, mixtral):
        with server_of(mixtral, Limits(max_queue=1)) as server:
            status, body = server.post(COMPLETIONS, {**SHORT, "n": 8})
            assert (status, len(body["choices"])) == (200, 8)

    def test_more_requests_than_connections_are_refused(self, mixtral):
        with server_of(mixtral, Limits(max_connections=1)) as server, ThreadPoolExecutor(1) as threads:
            with server.held():
                running = threads.submit(server.post, COMPLETIONS, SHORT)
                server.until(lambda: server.desk.num_interactive == 1)
                status, headers, _ = server.send("GET", "/v1/models")
                assert (status, "retry-after" in headers) == (503, True)
                server.until(lambda: len(connections(server)) == 1)
                assert server.send("GET", "/health")[0] == 200, "a busy server lives"
            assert running.result()[0] == 200

    def test_connections_that_ask_for_nothing_have_a_bound_too(self, mixtral):
        with server_of(mixtral, Limits(max_connections=1, head_seconds=600)) as server:
            idle = [socket.create_connection(("127.0.0.1", server.port), timeout=120) for _ in range(2)]
            server.until(lambda: len(connections(server)) == 2)
            third = server.open_stream(COMPLETIONS, SHORT)
            with suppress(ConnectionError):  # the server closes it
                assert third.rest() == b""
            third.close()
            idle.pop().close()
            server.until(lambda: len(connections(server)) == 1)
            assert server.post(COMPLETIONS, SHORT)[0] == 200, "its place is free again"
            idle.pop().close()

    def test_background_work_goes_behind_interactive_requests_and_waits_for_places(self, mixtral):
        order = []
        with server_of(mixtral) as server, ThreadPoolExecutor(1) as threads:
            step = server.engine.step

            def noted():
                outputs = step()
                order.extend(output.prompt for output in outputs)
                return outputs

            server.engine.step = noted
            with server.held() as held:
                jobs = [server.background(COMPLETIONS, {**SHORT, "max_tokens": 9}, str(i)) for i in range(9)]
                server.until(lambda: server.desk.num_background == 4)  # twice what runs at once
                held.let_pass(1)
                asked = threads.submit(server.post, COMPLETIONS, {**SHORT, "prompt": "a dog"})
                server.until(lambda: server.desk.num_interactive == 1)
            assert asked.result()[0] == 200
            answers = [job.result(120) for job in jobs]
        assert [status for status, _ in answers] == [200] * 9
        assert len({body["choices"][0]["text"] for _, body in answers}) == 1
        assert order.index("a dog") <= 2, "two may have been running before it came"

    def test_background_work_is_taken_up_in_the_order_in_which_it_came(self, mixtral, monkeypatch):
        with server_of(mixtral) as server:
            service, seen = server.app.state.service, []
            work = service.work

            def noted(url, body, request_id, **more):
                seen.append(request_id)
                return work(url, body, request_id, **more)

            monkeypatch.setattr(service, "work", noted)
            jobs = [server.background(COMPLETIONS, SHORT, str(i)) for i in range(30)]
            assert [job.result(120)[0] for job in jobs] == [200] * 30
        assert seen == [str(i) for i in range(30)]

    def test_background_work_that_is_cancelled_leaves_waiting_or_running(self, mixtral):
        with server_of(mixtral) as server:
            with server.held() as held:
                jobs = [server.background(COMPLETIONS, LONG, str(i)) for i in range(9)]
                server.until(lambda: server.desk.num_background == 4)
                held.let_pass(2)
                for job in jobs:
                    job.cancel()
                server.until(lambda: server.desk.num_background == 0)
            server.until(lambda: server.engine.num_unfinished == 0)
            assert server.post(COMPLETIONS, SHORT)[0] == 200

    def test_bad_background_bodies_take_no_place_from_those_that_wait(self, mixtral):
        with server_of(mixtral) as server:
            with server.held():
                running = [server.background(COMPLETIONS, SHORT, str(i)) for i in range(4)]
                server.until(lambda: server.desk.num_background == 4)
                bad = [server.background(COMPLETIONS, {"prompt": ""}, str(i)) for i in range(9)]
                last = server.background(COMPLETIONS, SHORT, "last")
            assert [job.result(120)[0] for job in running] == [200] * 4
            assert [job.result(120)[0] for job in bad] == [400] * 9
            assert last.result(120)[0] == 200

    def test_no_more_background_bodies_are_tokenized_than_have_a_place(self, mixtral, monkeypatch):
        with server_of(mixtral) as server:
            service, seen = server.app.state.service, []
            work = service.work

            def counted(url, body, request_id, **more):
                seen.append(server.desk.num_background)
                return work(url, body, request_id, **more)

            monkeypatch.setattr(service, "work", counted)
            with server.held():
                jobs = [server.background(COMPLETIONS, SHORT, str(i)) for i in range(9)]
                server.until(lambda: len(seen) >= 4)
                assert server.post("/tokenize", {"prompt": "x" * 2**17})[0] == 200  # behind what is tokenized
                assert len(seen) == server.desk.num_background == 4
            assert [job.result(120)[0] for job in jobs] == [200] * 9
            server.until(lambda: server.desk.num_background == 0)

    def test_a_background_body_gets_the_status_and_body_that_the_endpoint_gives(self, live):
        for url, body in (
            (COMPLETIONS, {**SHORT, "n": 2, "seed": 1, "temperature": 1}),
            (COMPLETIONS, {"prompt": "a", "tools": [1]}),
            (COMPLETIONS, {"prompt": "a", "model": "gpt-9"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "temperature": 0}),
        ):
            status, direct = live.post(url, body)
            got = live.background(url, body).result(120)
            assert got[0] == status
            for answer in (direct, got[1]):
                answer.pop("id", None)
                answer.pop("created", None)
            assert got[1] == direct
        assert live.background(COMPLETIONS, {**SHORT, "stream": True}).result(120)[0] == 400


class TestConnections:
    def test_a_client_that_goes_frees_what_it_waited_for(self, live):
        with live.held():
            for body in (LONG, {**LONG, "stream": True}):
                stream = live.open_stream(COMPLETIONS, body)
                live.until(lambda: live.desk.num_interactive == 1)
                stream.close()
                live.until(lambda: live.desk.num_interactive == 0)
        live.until(lambda: live.engine.num_unfinished == 0)

    def test_a_silent_stream_sends_comments(self, mixtral):
        with server_of(mixtral, Limits(keep_alive_seconds=0.05)) as server:
            with server.held():
                stream = server.open_stream(COMPLETIONS, {**SHORT, "stream": True})
                stream.until(b": keep-alive\n\n")
                assert b"data:" not in stream.data
            assert "".join(e["choices"][0]["text"] for e in stream.events())

    def test_a_slow_reader_holds_up_nobody_and_gets_everything(self, live, alone):
        body = {**LONG, "n": 4, "logprobs": 20}
        slow = Stream(live.port, COMPLETIONS, {**body, "stream": True}, receive_buffer=4096)
        slow.until(b"data:")
        for _ in range(3):
            assert live.post(COMPLETIONS, SHORT)[0] == 200
        live.until(lambda: live.engine.num_unfinished == 0)  # the engine did not wait for the reader
        live.until(lambda: live.desk.num_interactive == 0)  # nor holds what is not read a place
        assert len(slow.data) < 2**20
        texts = dict.fromkeys(range(4), "")
        for event in slow.events():
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
        (want,) = alone.generate(["the fox"], _params(MAX_POSITION), use_tqdm=False)
        assert set(texts.values()) == {want.outputs[0].text}

    def test_a_place_is_free_once_the_engine_is_done_whoever_reads(self, alone):
        tickets, aborted = [], []
        engine = SimpleNamespace(broken=None, submit=tickets.extend, abort=aborted.extend)
        desk = Desk(engine, Limits(), 1)
        request = alone.completion_request("a", "the fox", _params(2))

        def news(finished):
            output = RequestOutput("a", None, request.prompt_token_ids, finished=finished)
            tickets[0].deliver(Update(output, []))

        async def read_once():
            stream = desk.stream([request])
            reading = asyncio.ensure_future(anext(stream))
            while not tickets:
                await asyncio.sleep(0)
            news(finished=False)
            await reading
            assert desk.num_interactive == 1
            news(finished=True)
            assert desk.num_interactive == 0, "the reader has not come back"
            await stream.aclose()

        asyncio.run(asyncio.wait_for(read_once(), 120))
        assert (desk.num_interactive, aborted) == (0, [])

    def test_a_reader_who_takes_nothing_loses_its_stream(self):
        ended = []

        async def events():
            try:
                while True:
                    yield [{"a": 1}]
            finally:
                ended.append(True)

        async def for_ever():
            await asyncio.Event().wait()

        async def send(message):
            if message["type"] == "http.response.body":
                await for_ever()

        async def respond():
            await asyncio.wait_for(EventStream(events(), 0.01)({"type": "http"}, for_ever, send), 120)

        asyncio.run(respond())
        assert ended

    def test_the_clients_request_id_comes_back_if_a_header_can_hold_it(self, live):
        _, headers, _ = live.send("GET", "/health", headers={"X-Request-Id": "mine-1"})
        assert headers["x-request-id"] == "mine-1"
        for given in ("", "a b", "x" * 129):
            _, headers, _ = live.send("GET", "/health", headers={"X-Request-Id": given})
            assert headers["x-request-id"].startswith("req_")

    def test_one_request_id_twice_at_a_time_is_answered_twice(self, live):
        body = {**SHORT, "temperature": 1.0}
        with live.held() as held, ThreadPoolExecutor(2) as threads:
            both = [
                threads.submit(live.send, "POST", COMPLETIONS, body, {"X-Request-Id": "one"})
                for _ in range(2)
            ]
            live.until(lambda: live.desk.num_interactive == 2)
            held.free()
            first, second = (json.loads(each.result()[2]) for each in both)
        assert first["id"] != second["id"]
        assert first["choices"] == second["choices"], "the id decides the draws"

    @pytest.mark.parametrize("path", [COMPLETIONS, "/v1/batches"])
    def test_a_body_that_does_not_come_is_not_waited_for_forever(self, mixtral, tmp_path, path):
        with (
            server_of(mixtral, Limits(body_seconds=0.05), data_dir=tmp_path) as server,
            socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection,
        ):
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert b"408" in connection.recv(65536)

    @pytest.mark.parametrize("is_declared", [True, False])
    def test_a_body_that_is_too_large_is_refused(self, mixtral, is_declared):
        with server_of(mixtral, Limits(max_body_bytes=1000)) as server:
            body = json.dumps({"prompt": "x" * 1000}).encode()
            with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
                length = f"Content-Length: {len(body)}" if is_declared else "Transfer-Encoding: chunked"
                head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}"
                data = body if is_declared else f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
                connection.sendall(head.encode() + b"\r\n\r\n" + data)
                assert b"413" in connection.recv(65536)


class TestFailures:
    def test_a_pass_that_fails_ends_its_requests_alone(self, mixtral, monkeypatch):
        with server_of(mixtral) as server:
            step = server.engine.step

            def fail():
                monkeypatch.setattr(server.engine, "step", step)
                raise RuntimeError("something secret")

            monkeypatch.setattr(server.engine, "step", fail)
            status, headers, data = server.send("POST", COMPLETIONS, SHORT)
            assert (status, "retry-after" in headers) == (503, True)
            assert b"secret" not in data
            assert b"Traceback" not in data
            assert server.post(COMPLETIONS, SHORT)[0] == 200
            assert server.send("GET", "/health")[0] == 200

    def test_an_engine_that_fails_again_and_again_is_out_of_order(self, mixtral, monkeypatch):
        with server_of(mixtral) as server:
            monkeypatch.setattr(server.engine, "step", lambda: 1 / 0)
            statuses = [server.post(COMPLETIONS, SHORT)[0] for _ in range(4)]
            assert statuses == [503] * 4
            for path in ("/health", "/health/ready"):
                assert server.send("GET", path)[0] == 503
            assert server.get("/get_server_info")[1]["status"] == "broken"
            assert server.engine.num_unfinished == 0

    @pytest.mark.parametrize("what", ["command", "on_change", "peek", "add", "abort"])
    def test_whatever_fails_outside_of_a_pass_ends_all_requests_and_is_seen(self, mixtral, monkeypatch, what):
        def fail(*_):
            raise KeyError("something secret")

        with server_of(mixtral) as server, server.held() as held, ThreadPoolExecutor(1) as threads:
            thread = server.app.state.engine
            stream = server.open_stream(COMPLETIONS, {**LONG, "stream": True})
            assert held.has_begun.wait(120), "the stream is in the pass"
            whole = threads.submit(server.send, "POST", COMPLETIONS, LONG)
            server.until(lambda: server.desk.num_interactive == 2)
            if what == "on_change":
                monkeypatch.setattr(thread, "_on_change", fail)
            elif what == "command":
                thread.call(fail)
            else:
                monkeypatch.setattr(server.engine, what, fail)
                if what == "add":
                    thread.submit([Ticket(None, fail)])
                elif what == "abort":
                    thread.abort_all()
            held.let_pass(2)
            assert stream.events()[-1]["error"]["code"] == "aborted"
            status, _, data = whole.result()
            assert (status, json.loads(data)["error"]["code"]) == (503, "aborted")
            assert b"secret" not in data
            for path in ("/health", "/health/ready"):
                assert server.send("GET", path)[0] == 503
            assert server.post(COMPLETIONS, SHORT)[0] == 503
            assert server.desk.num_interactive == 0

    def test_a_stream_whose_pass_fails_ends_with_the_error(self, mixtral, monkeypatch):
        with server_of(mixtral) as server, server.held() as held:
            stream = server.open_stream(COMPLETIONS, {**LONG, "stream": True})
            held.let_pass(8)
            stream.until(b"data:")
            monkeypatch.setattr(held, "_step", lambda: 1 / 0)
            held.let_pass(1)
            last = stream.events()[-1]
            assert last["error"]["code"] == "aborted"

    def test_a_bug_in_an_endpoint_shows_no_stack(self, live, monkeypatch):
        monkeypatch.setattr(live.app.state.service, "work", lambda *_, **__: {}["something secret"])
        status, _, data = live.send("POST", COMPLETIONS, SHORT)
        assert status == 500
        assert json.loads(data)["error"]["code"] == "internal_error"
        assert b"secret" not in data


class TestEnd:
    def test_running_requests_finish_and_nothing_new_is_taken(self, mixtral, alone):
        with server_of(mixtral) as server:
            with server.held():
                stream = server.open_stream(COMPLETIONS, {**SHORT, "stream": True})
                server.until(lambda: server.desk.num_interactive == 1)
                server.server.handle_exit(signal.SIGTERM, None)
                server.until(lambda: server.desk.is_closing)
                assert server.background(COMPLETIONS, SHORT).result(120)[0] == 503
            text = "".join(event["choices"][0]["text"] for event in stream.events())
            (want,) = alone.generate(["the fox"], _params(3), use_tqdm=False)
            assert text == want.outputs[0].text

    def test_what_takes_longer_than_it_may_is_told_so(self, mixtral):
        with server_of(mixtral, Limits(shutdown_seconds=0.05)) as server, ThreadPoolExecutor(1) as threads:
            with server.held() as held:
                stream = server.open_stream(COMPLETIONS, {**LONG, "stream": True})
                whole = threads.submit(server.send, "POST", COMPLETIONS, LONG)
                server.until(lambda: server.desk.num_interactive == 2)
                server.server.handle_exit(signal.SIGTERM, None)
                server.until(lambda: server.desk.is_closing)
                # The engine looks at what it was told after each pass; all would take half a thousand.
                server.until(lambda: held.let_pass(1) or server.desk.num_interactive == 0)
            assert stream.events()[-1]["error"]["code"] == "aborted"
            status, _, data = whole.result()
            assert (status, json.loads(data)["error"]["code"]) == (503, "aborted")


def _params(n):
    return SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
