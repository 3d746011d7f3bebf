"""The load generator against a small real server that streams as vLLM does."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from benchmarks.completions import StreamTail, Target, send_each_length
from benchmarks.load import ClosedLoop, Lengths, Paced, Phase, Visits, run_phase

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _event(tokens: int, text: str = "") -> bytes:
    event = {
        "choices": [{"index": 0, "text": text}],
        "usage": {"prompt_tokens": 4, "completion_tokens": tokens},
    }
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def _last_event(tokens: int) -> bytes:
    event = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": tokens}}
    return b"data: " + json.dumps(event).encode() + b"\n\ndata: [DONE]\n\n"


@asynccontextmanager
async def _server(handler: Handler) -> AsyncIterator[Target]:
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        port = runner.addresses[0][1]
        yield Target(f"http://127.0.0.1:{port}", "demo", "key")
    finally:
        await runner.cleanup()


async def _stream(request: web.Request) -> web.StreamResponse:
    """As many tokens as asked for, two per event, all of empty text, after a keep-alive comment."""
    body: dict[str, Any] = await request.json()
    answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await answer.prepare(request)
    await answer.write(b": keep-alive\n\n")
    await asyncio.sleep(0.02)
    for tokens in range(2, body["max_tokens"] + 1, 2):
        await answer.write(_event(tokens))
        await asyncio.sleep(0.002)
    await answer.write(_last_event(body["max_tokens"]))
    return answer


def _closed(target: Target, **changes: Any) -> ClosedLoop:
    settings: dict[str, Any] = {
        "name": "noisy",
        "target": target,
        "connections": 3,
        "input_tokens": Lengths(4, 8),
        "output_tokens": Lengths(10, 20),
        "seed": "1",
    }
    return ClosedLoop(**(settings | changes))


def _paced(target: Target, **changes: Any) -> Paced:
    settings: dict[str, Any] = {
        "name": "quiet",
        "target": target,
        "interval_s": 0.05,
        "input_tokens": Lengths(4, 8),
        "output_tokens": Lengths(4, 4),
        "seed": "1",
        "pacing": "fixed",
    }
    return Paced(**(settings | changes))


async def _run(*clients: ClosedLoop | Paced, window_s: float = 0.3) -> Phase:
    return await run_phase(clients, warm_s=0.05, window_s=window_s, drain_s=1.0)


async def test_tokens_are_counted_by_usage_not_by_text_or_events() -> None:
    async with _server(_stream) as target:
        phase = await _run(_closed(target), _paced(target))
    finished = [record for record in phase.records if record.ok]
    assert finished
    assert all(record.output_tokens == record.max_tokens for record in finished)
    assert all(record.status == 200 for record in finished)


async def test_garbage_of_before_is_left_alone_during_a_phase() -> None:
    frozen = []

    async def handler(request: web.Request) -> web.StreamResponse:
        frozen.append(gc.get_freeze_count())
        return await _stream(request)

    async with _server(handler) as target:
        await _run(_closed(target))
    assert min(frozen) > 1000
    assert gc.get_freeze_count() == 0


async def test_a_keep_alive_comment_is_no_first_token() -> None:
    async with _server(_stream) as target:
        phase = await _run(_paced(target))
    waits = [record.ttft_s for record in phase.records]
    assert all(wait is not None and wait >= 0.02 for wait in waits)


async def test_a_windows_service_counts_streams_that_are_still_running() -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        for tokens in range(1, 100):
            await answer.write(_event(tokens))
            await asyncio.sleep(0.01)
        return answer

    async with _server(endless) as target:
        client = _closed(target, connections=2, output_tokens=Lengths(500, 500))
        phase = await run_phase([client], warm_s=0.1, window_s=0.3)
    assert all(record.cut for record in phase.records)
    # Two streams of at most one token per 10 ms, of which the warm-up's do not count.
    assert 10 <= phase.served["noisy"].output_tokens <= 62
    assert phase.served["noisy"].output_tokens < sum(record.output_tokens for record in phase.records)
    assert phase.served["noisy"].input_tokens == 0


@pytest.mark.alone
async def test_paced_requests_go_out_on_time_whatever_becomes_of_earlier_ones() -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.3)
        return await _stream(request)

    async with _server(slow) as target:
        phase = await _run(_paced(target), window_s=0.25)
    dues = sorted(record.due_s for record in phase.records)
    assert dues == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25], abs=1e-6)
    assert all(record.ok and record.sent_s - record.due_s < 0.2 for record in phase.records)


async def test_a_refusal_is_recorded_with_its_status_and_retry_after() -> None:
    async def refuse(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=429, text="too many", headers={"retry-after": "7"})

    async with _server(refuse) as target:
        phase = await _run(_closed(target), window_s=0.1)
    # One each: a refused stream does not come straight back.
    assert len(phase.records) == 3
    assert all((r.status, r.error, r.retry_after_s) == (429, "too many", 7.0) for r in phase.records)
    assert phase.served["noisy"].output_tokens == 0


async def test_an_error_inside_the_stream_is_recorded() -> None:
    async def break_off(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(_event(1) + b'data: {"error":{"message":"timed out","code":503}}\n\n')
        return answer

    async with _server(break_off) as target:
        phase = await _run(_paced(target), window_s=0.1)
    assert {record.error for record in phase.records} == {"timed out"}


async def test_a_stream_that_ends_early_is_an_error() -> None:
    async def stop_short(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(_event(1) + _last_event(1))
        return answer

    async with _server(stop_short) as target:
        phase = await _run(_paced(target), window_s=0.1)
    assert {record.error for record in phase.records} == {"the stream ended early"}


async def test_no_server_is_an_error_and_not_an_exception() -> None:
    phase = await _run(_paced(Target("http://127.0.0.1:9", "demo")), window_s=0.1)
    assert phase.records
    assert all(record.status == 0 and record.error for record in phase.records)


async def test_a_client_sends_at_most_its_number_of_requests() -> None:
    async with _server(_stream) as target:
        phase = await _run(_paced(target, max_requests=2), _closed(target, max_requests=3))
    assert len([record for record in phase.records if record.client == "quiet"]) == 2
    assert len([record for record in phase.records if record.client == "noisy"]) == 3


async def test_the_same_seed_sends_the_same_requests() -> None:
    async def lengths() -> list[tuple[int, int]]:
        async with _server(_stream) as target:
            phase = await _run(_closed(target, max_requests=6))
        return sorted((record.input_tokens, record.max_tokens) for record in phase.records)

    assert await lengths() == await lengths()


def test_poisson_pace_keeps_its_mean() -> None:
    client = _paced(Target("", ""), pacing="poisson", interval_s=0.5, max_requests=2000)
    assert list(client.due_times())[-1] == pytest.approx(1000, rel=0.1)


def test_usage_is_read_from_events_cut_anywhere() -> None:
    stream = (
        b": keep-alive\n\n" + b"".join(_event(tokens, "x" * 100) for tokens in range(1, 60)) + _last_event(59)
    )
    for size in (1, 7, 333, 5000, len(stream)):
        tail = StreamTail()
        for start in range(0, len(stream), size):
            tail.feed(stream[start : start + size])
        assert tail.output_tokens() == 59


def test_generated_text_is_not_taken_for_usage() -> None:
    tail = StreamTail()
    tail.feed(_event(3) + _event(4, 'say "completion_tokens": 999,')[:-30])
    assert tail.output_tokens() == 3


def test_a_cut_number_is_not_read() -> None:
    tail = StreamTail()
    tail.feed(_event(12))
    tail.feed(b'data: {"usage":{"completion_tokens":1')
    assert tail.output_tokens() == 12


@pytest.mark.alone
async def test_a_visiting_client_is_there_only_during_its_visits() -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        for tokens in itertools.count(1):
            await answer.write(_event(tokens))
            await asyncio.sleep(0.01)
        raise AssertionError

    async with _server(endless) as target:
        client = _closed(target, connections=2, visits=Visits(idle_s=0.1, busy_s=0.2))
        phase = await _run(client, window_s=0.6)
    starts = sorted(record.sent_s for record in phase.records)
    assert starts == pytest.approx([0.1, 0.1, 0.4, 0.4], abs=0.08)
    assert all(record.cut for record in phase.records)
    assert all(record.finished_s - record.sent_s < 0.3 for record in phase.records if record.finished_s)


async def test_a_timeline_has_every_read_with_its_tokens() -> None:
    async with _server(_stream) as target:
        client = _closed(target, connections=1, max_requests=1, timeline=True)
        phase = await _run(client, window_s=0.4)
    (record,) = phase.records
    assert record.timeline is not None
    assert record.timeline[0][0] == record.first_token_s
    assert record.timeline[-1][1] == record.max_tokens
    assert record.timeline == sorted(record.timeline)


async def test_no_timeline_is_kept_of_a_crowd() -> None:
    async with _server(_stream) as target:
        phase = await _run(_closed(target, max_requests=3), window_s=0.2)
    assert all(record.timeline is None for record in phase.records)


async def test_samples_grow_to_what_was_served() -> None:
    async with _server(_stream) as target:
        phase = await run_phase([_closed(target)], warm_s=0.1, window_s=0.4, sample_s=0.1)
    moments = [sample.at_s for sample in phase.samples]
    tokens = [sample.served["noisy"].output_tokens for sample in phase.samples]
    assert moments == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5][: len(moments)], abs=0.06)
    assert len(moments) >= 4
    assert tokens == sorted(tokens)
    assert tokens[0] == 0 < tokens[-1]


async def test_requests_that_nobody_awaits_do_not_prolong_the_phase() -> None:
    async def never(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(5)
        return await _stream(request)

    async with _server(never) as target:
        began = asyncio.get_running_loop().time()
        phase = await run_phase([_paced(target, awaited=False)], warm_s=0.0, window_s=0.2, drain_s=5.0)
        assert asyncio.get_running_loop().time() - began < 2.0
    assert phase.records
    assert all(record.cut for record in phase.records)


async def test_each_length_is_sent_once_and_for_one_token() -> None:
    asked: list[tuple[int, int]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        asked.append((len(body["prompt"]), body["max_tokens"]))
        return await _stream(request)

    async with _server(handler) as target:
        await send_each_length(target, 5)
    assert asked == [(length, 1) for length in range(1, 6)]


async def test_a_length_that_is_refused_is_no_length_met() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.headers["authorization"] == "Bearer key"
        return web.json_response({"error": "too long"}, status=400)

    async with _server(handler) as target:
        with pytest.raises(aiohttp.ClientError, match=r"1 tokens: HTTP 400 .*too long"):
            await send_each_length(target, 1)
