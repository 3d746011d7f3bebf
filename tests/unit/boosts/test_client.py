"""The client against a small server that behaves badly."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from boosts.client import Client, Refused, Unreachable

Handler = Callable[[BaseHTTPRequestHandler], None]


class Stub:
    """Answers each request with the next of `answers`."""

    def __init__(self) -> None:
        self.answers: list[Handler] = []
        self.idempotency_keys: list[str | None] = []
        stub = self

        class Requests(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stub.idempotency_keys.append(self.headers["Idempotency-Key"])
                stub.answers.pop(0)(self)

            do_POST = do_GET  # noqa: N815 - http.server's names

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def hang_up(request: BaseHTTPRequestHandler) -> None:
    request.close_connection = True
    request.connection.close()


def answer(status: int, body: bytes) -> Handler:
    def send(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return send


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    yield stub
    stub.close()


@pytest.fixture
def client(stub: Stub) -> Iterator[Client]:
    with Client(stub.url + "/", "mk_any") as client:
        yield client


def test_a_post_without_an_answer_is_sent_once_more_with_the_same_key(stub: Stub, client: Client) -> None:
    stub.answers = [hang_up, answer(200, b'{"success": true, "data": {"id": "1"}}')]
    assert client.subscribe("demo", ["night"], 1)["id"] == "1"
    first, second = stub.idempotency_keys
    assert first is not None
    assert first == second
    stub.answers = [answer(200, b'{"success": true, "data": {"id": "2"}}')]
    client.subscribe("demo", ["night"], 1)
    assert stub.idempotency_keys[-1] != first


def test_a_post_is_not_sent_a_third_time(stub: Stub, client: Client) -> None:
    stub.answers = [hang_up, hang_up]
    with pytest.raises(Unreachable, match=stub.url):
        client.subscribe("demo", ["night"], 1)
    assert len(stub.idempotency_keys) == 2


def test_a_get_has_no_idempotency_key_and_is_sent_once(stub: Stub, client: Client) -> None:
    stub.answers = [hang_up]
    with pytest.raises(Unreachable):
        client.pools()
    assert stub.idempotency_keys == [None]


@pytest.mark.parametrize("body", [b"<html>Bad gateway</html>", b"{}", b"[]", b'{"success": false}'])
def test_what_is_no_envelope_is_told_as_such(stub: Stub, client: Client, body: bytes) -> None:
    stub.answers = [answer(502, body)]
    with pytest.raises(Refused, match="does not answer like a control plane") as refused:
        client.pools()
    assert (refused.value.status, refused.value.code) == (502, "http_502")


def test_a_refusal_carries_code_message_and_details(stub: Stub, client: Client) -> None:
    body = b'{"success": false, "error": {"code": "sold_out", "message": "No.", "details": {"blocks": []}}}'
    stub.answers = [answer(409, body)]
    with pytest.raises(Refused, match=r"No\.") as refused:
        client.subscribe("demo", ["night"], 1)
    assert (refused.value.status, refused.value.code) == (409, "sold_out")
    assert refused.value.details == {"blocks": []}
