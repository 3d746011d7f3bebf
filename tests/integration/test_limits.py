"""Limits, block ends, queues and leaving clients over HTTP: each on every endpoint, streaming and not."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import datetime
import json
import re
import socket
import time
from collections.abc import Callable, Iterator

import anthropic
import httpx
import openai
import pytest

from contract.blocks import BORDER_GRACE_S, Block
from contract.entitlements import BlockTime, PledgeStatus, PoolStatus
from tests.integration.calls import CALLS, Call, assert_refused
from tests.integration.conftest import (
    MAX_QUEUED,
    QUEUE_TIMEOUT_S,
    SLOTS,
    RunningNode,
    Seat,
    wait_for,
)

pytestmark = pytest.mark.vllm

each_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
# Waiting for a timeout takes its time: one provider each, both modes.
streams_and_not = pytest.mark.parametrize(
    "call", [call for call in CALLS if call.name.startswith(("chat", "messages"))], ids=lambda call: call.name
)


@contextlib.contextmanager
def all_slots_taken(node: RunningNode) -> Iterator[Seat]:
    """A seat entitled to every slot of the engine, using them all."""
    hog = node.new_seat(quantity=SLOTS)
    # Plain answers of 8,000 tokens: they hold their slots for longer than any test, and cost the client
    # nothing until it hangs up.
    body = json.dumps({"model": "demo", "prompt": "x", "max_tokens": 8000, "ignore_eos": True})
    request = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {hog.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    )
    with contextlib.ExitStack() as connections:
        for _ in range(SLOTS):
            connection = connections.enter_context(socket.create_connection(("127.0.0.1", node.port)))
            connection.sendall(request.encode())
        wait_for(lambda: node.seat_stats(hog)["in_flight"] == SLOTS)
        yield hog
    node.drop_seat(hog)


@each_call
def test_request_limit(node: RunningNode, call: Call) -> None:
    seat = node.new_seat(rpm_limit=2)
    answers = [call.post(node.url, seat.key) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    refused = answers[-1]
    assert_refused(call, refused, 429, "rate_limit_exceeded", "rate_limit_error")
    # Two requests a minute: the next one fits when half a minute has refilled.
    assert 20 < int(refused.headers["retry-after"]) <= 30
    if call.provider == "openai":
        assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
        assert answers[0].headers["x-ratelimit-remaining-requests"] == "1"
        assert re.fullmatch(r"(\d+m)?[\d.]+m?s", refused.headers["x-ratelimit-reset-requests"])
    else:
        assert answers[0].headers["anthropic-ratelimit-requests-limit"] == "2"
        assert answers[0].headers["anthropic-ratelimit-requests-remaining"] == "1"
        reset = datetime.datetime.fromisoformat(refused.headers["anthropic-ratelimit-requests-reset"])
        assert 20 < (reset - datetime.datetime.now(datetime.UTC)).total_seconds() <= 61
    node.drop_seat(seat)


@each_call
def test_token_limit(node: RunningNode, call: Call) -> None:
    seat = node.new_seat(tpm_limit=100)
    first = call.post(node.url, seat.key, max_tokens=60)
    second = call.post(node.url, seat.key, max_tokens=60)
    assert first.status_code == 200
    assert_refused(call, second, 429, "rate_limit_exceeded", "rate_limit_error")
    assert "tokens per min" in second.text
    assert int(second.headers["retry-after"]) >= 1
    node.drop_seat(seat)


def test_retry_after_is_when_the_retry_is_admitted(node: RunningNode) -> None:
    call = CALLS[2]
    seat = node.new_seat(tpm_limit=200)
    first, second = (call.post(node.url, seat.key, max_tokens=100) for _ in range(2))
    assert (first.status_code, second.status_code) == (200, 429)
    time.sleep(int(second.headers["retry-after-ms"]) / 1000)
    assert call.post(node.url, seat.key, max_tokens=100).status_code == 200
    node.drop_seat(seat)


def test_concurrent_requests_cannot_pass_the_token_limit(node: RunningNode) -> None:
    seat = node.new_seat(tpm_limit=200, quantity=SLOTS)
    call = CALLS[2]
    with concurrent.futures.ThreadPoolExecutor(SLOTS) as pool:
        answers = list(pool.map(lambda _: call.post(node.url, seat.key, max_tokens=60), range(SLOTS)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200, 200, 200, *[429] * (SLOTS - 3)]
    node.drop_seat(seat)


def test_request_larger_than_the_token_limit_is_not_worth_a_retry(node: RunningNode) -> None:
    seat = node.new_seat(tpm_limit=5)
    refused = CALLS[0].post(node.url, seat.key, prompt="many words " * 20)
    assert_refused(CALLS[0], refused, 429, "rate_limit_exceeded", "")
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers
    node.drop_seat(seat)


def test_prompts_times_n_count_as_that_many_requests_all_or_none(node: RunningNode) -> None:
    seat = node.new_seat(rpm_limit=5)
    body = {"model": "demo", "prompt": ["a", "b"], "n": 2, "max_tokens": 1}
    first = httpx.post(f"{node.url}/v1/completions", headers=seat.headers, json=body)
    assert first.status_code == 200, first.text
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    second = httpx.post(f"{node.url}/v1/completions", headers=seat.headers, json=body)
    assert second.status_code == 429
    assert "Requested 4" in second.text
    assert node.seat_stats(seat)["dispatched"] == 4
    assert node.seat_stats(seat)["rejected"] == 4
    node.drop_seat(seat)


@pytest.mark.parametrize("n", [9, 1_000, 1_000_000_000])
def test_huge_n_is_refused(node: RunningNode, seat: Seat, n: int) -> None:
    body = {"model": "demo", "prompt": "a", "n": n, "max_tokens": 1}
    answer = httpx.post(f"{node.url}/v1/completions", headers=seat.headers, json=body)
    assert answer.status_code in (400, 429), answer.text
    assert "retry-after" not in answer.headers


def clock_time(moment: float) -> int:
    return int(moment % 86_400)


@each_call
def test_outside_its_block_a_key_is_429_with_the_next_start(node: RunningNode, call: Call) -> None:
    now = time.time()
    # A one-minute block that starts in two hours; the seconds of a day wrap at midnight.
    start = clock_time(now + 7200) % 86_000
    seat = node.new_seat(blocks=(BlockTime(block=Block.NIGHT, starts=start, ends=start + 60),))
    refused = call.post(node.url, seat.key)
    assert_refused(call, refused, 429, "outside_reserved_block", "rate_limit_error")
    assert refused.headers["x-should-retry"] == "false"
    wait = int(refused.headers["retry-after"])
    assert abs((now + wait) % 86_400 - start) < 5
    opens = round(now + (start - now) % 86_400)
    assert datetime.datetime.fromtimestamp(opens, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S") in refused.text
    node.drop_seat(seat)


def ending_block(seconds: float) -> tuple[BlockTime, ...]:
    now = clock_time(time.time())
    if now + seconds >= 86_400:
        time.sleep(86_400 - now + 1)
        now = clock_time(time.time())
    return (BlockTime(block=Block.NIGHT, starts=0, ends=int(now + seconds)),)


@streams_and_not
def test_block_end_refuses_what_is_queued_and_lets_what_runs_finish(node: RunningNode, call: Call) -> None:
    with all_slots_taken(node) as hog:
        seat = node.new_seat(blocks=ending_block(2))
        began = time.monotonic()
        refused = call.post(node.url, seat.key)
        assert_refused(call, refused, 429, "outside_reserved_block", "rate_limit_error")
        assert time.monotonic() - began < 2 + BORDER_GRACE_S + 1
        assert node.seat_stats(hog)["in_flight"] == SLOTS
        assert node.seat_stats(seat)["evicted"] == 1
        node.drop_seat(seat)

    seat = node.new_seat(blocks=ending_block(1))
    body = {"model": "demo", "prompt": "x", "max_tokens": 4000, "ignore_eos": True}
    answer = httpx.post(f"{node.url}/v1/completions", headers=seat.headers, json=body, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 4000
    wait_for(lambda: call.post(node.url, seat.key).status_code == 429)
    node.drop_seat(seat)


@each_call
def test_full_queue_is_503_with_a_time_to_come_back(node: RunningNode, call: Call) -> None:
    with all_slots_taken(node):
        seat = node.new_seat()
        with concurrent.futures.ThreadPoolExecutor(MAX_QUEUED) as pool:
            queued = [pool.submit(call.post, node.url, seat.key) for _ in range(MAX_QUEUED)]
            wait_for(lambda: node.seat_stats(seat)["queued"] == MAX_QUEUED)
            refused = call.post(node.url, seat.key)
            assert_refused(call, refused, 503, "queue_full", "overloaded_error")
            assert int(refused.headers["retry-after"]) >= 1
            node.drop_seat(seat)
            assert {waiting.result().status_code for waiting in queued} == {401}


@streams_and_not
def test_queue_timeout_is_503(node: RunningNode, call: Call) -> None:
    """A stream has been answered 200 by then, and kept alive: its refusal is a typed event."""
    with all_slots_taken(node):
        seat = node.new_seat()
        began = time.monotonic()
        answer = call.post(node.url, seat.key)
        assert QUEUE_TIMEOUT_S <= time.monotonic() - began < QUEUE_TIMEOUT_S + 2
        if not call.stream:
            assert_refused(call, answer, 503, "queue_timeout", "overloaded_error")
            assert int(answer.headers["retry-after"]) >= 1
        else:
            assert answer.status_code == 200
            assert "text/event-stream" in answer.headers["content-type"]
            events = [line for line in answer.text.splitlines() if line.startswith("data: {")]
            error = json.loads(events[-1].removeprefix("data: "))["error"]
            assert error.get("code") == "queue_timeout" or error.get("type") == "overloaded_error"
        assert node.seat_stats(seat)["evicted"] == 1
        node.drop_seat(seat)


def test_sdks_raise_a_late_refusal_as_their_own_error(node: RunningNode) -> None:
    with all_slots_taken(node):
        seat = node.new_seat()
        with pytest.raises(openai.APIError, match="queue"):
            list(
                openai.OpenAI(base_url=f"{node.url}/v1", api_key=seat.key, max_retries=0).completions.create(
                    model="demo", prompt="x", stream=True
                )
            )
        client = anthropic.Anthropic(base_url=f"{node.url}/anthropic", api_key=seat.key, max_retries=0)
        with (
            pytest.raises(anthropic.APIStatusError, match="queue"),
            client.messages.stream(
                model="demo", max_tokens=5, messages=[{"role": "user", "content": "hi"}]
            ) as stream,
        ):
            stream.until_done()
        node.drop_seat(seat)


@each_call
def test_leaving_the_queue_frees_the_place(node: RunningNode, call: Call) -> None:
    with all_slots_taken(node):
        seat = node.new_seat()
        leave_while(node, call, seat, lambda stats: stats["queued"] == 1)
        wait_for(lambda: node.seat_stats(seat)["queued"] == 0)
        assert node.seat_stats(seat)["canceled"] == 1
        node.drop_seat(seat)


@each_call
def test_leaving_a_running_request_frees_its_slot(node: RunningNode, seat: Seat, call: Call) -> None:
    leave_while(node, call, seat, lambda stats: stats["in_flight"] == 1 and stats["output_tokens"] > 0)
    wait_for(lambda: node.seat_stats(seat)["in_flight"] == 0)
    # By the engine's own count too: it does not go on for nobody.
    wait_for(lambda: engine_running(node) == 0)


def engine_running(node: RunningNode) -> float:
    metrics = httpx.get(f"{node.stats_url}/metrics").text
    [shown] = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", metrics, re.MULTILINE)
    return float(shown)


def leave_while(
    node: RunningNode, call: Call, seat: Seat, condition: Callable[[dict[str, float]], bool]
) -> None:
    """Open a connection, wait for the condition on the seat's counters, and hang up."""

    async def hang_up() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            header = {"x-api-key": seat.key}
            body = call.body(prompt="x", max_tokens=6000)

            def ask() -> asyncio.Task[httpx.Response]:
                return asyncio.create_task(client.post(node.url + call.path, headers=header, json=body))

            request = ask()
            while not condition(await asyncio.to_thread(node.seat_stats, seat)):
                if request.done():
                    # Messages has no ignore_eos, so random weights may end an answer early.
                    assert "end_turn" in request.result().text, request.result().text
                    request = ask()
                await asyncio.sleep(0.02)
            request.cancel()

    asyncio.run(asyncio.wait_for(hang_up(), 30))


def test_past_due_is_402_and_comes_back_with_the_payment(node: RunningNode) -> None:
    seat = node.new_seat(status=PledgeStatus.PAST_DUE)
    for call in (CALLS[0], CALLS[6]):
        refused = call.post(node.url, seat.key)
        assert_refused(call, refused, 402, "pledge_past_due", "billing_error")
        assert refused.headers["x-should-retry"] == "false"
    node.pledges[node.pledges.index(seat.pledge)] = seat.pledge = seat.pledge.model_copy(
        update={"status": PledgeStatus.ACTIVE}
    )
    node.publish_and_wait()
    assert CALLS[0].post(node.url, seat.key).status_code == 200
    node.drop_seat(seat)


def test_paused_pool_is_503(node: RunningNode, seat: Seat) -> None:
    node.pool_status = PoolStatus.PAUSED
    node.publish_and_wait()
    for call in (CALLS[0], CALLS[6]):
        refused = call.post(node.url, seat.key)
        assert_refused(call, refused, 503, "pool_not_live", "overloaded_error")
    node.pool_status = PoolStatus.ACTIVE
    node.publish_and_wait()
    assert CALLS[0].post(node.url, seat.key).status_code == 200


def test_bad_entitlements_are_refused_and_the_last_good_ones_stay(node: RunningNode, seat: Seat) -> None:
    good = node.entitlements.read_text()
    older = json.loads(good) | {"revision": 1, "pledges": []}
    for bad in ("", "{", "null", good[:-40], json.dumps(older)):
        node.entitlements.write_text(bad)
        time.sleep(0.6)
        assert CALLS[0].post(node.url, seat.key).status_code == 200
    node.entitlements.unlink()
    time.sleep(0.6)
    assert CALLS[0].post(node.url, seat.key).status_code == 200
    node.publish_and_wait()


def test_counting_tokens_counts_as_a_request(node: RunningNode) -> None:
    seat = node.new_seat(rpm_limit=1)
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
    url = f"{node.url}/anthropic/v1/messages/count_tokens"
    assert httpx.post(url, headers=seat.headers, json=body).status_code == 200
    assert httpx.post(url, headers=seat.headers, json=body).status_code == 429
    node.drop_seat(seat)


def test_nothing_is_left_after_all_clients_left(node: RunningNode) -> None:
    wait_for(lambda: all(seat["queued"] == seat["in_flight"] == 0 for seat in node.all_seat_stats()))
    metrics = httpx.get(f"{node.stats_url}/metrics").text
    assert "boosts_in_flight_sequences 0.0" in metrics
    assert "boosts_queued_requests 0.0" in metrics
    wait_for(lambda: engine_running(node) == 0)
