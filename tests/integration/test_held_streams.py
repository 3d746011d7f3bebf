"""Held, preempted and resumed streams of a whole node: what each client gets, beside a tight pace."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from contract.blocks import BORDER_GRACE_S, DAY_S
from tests.integration.conftest import (
    SLOTS,
    RunningNode,
    Seat,
    free_port,
    start_serving,
    stop_group,
    wait_for,
)
from tests.integration.test_limits import ending_block, engine_running

pytestmark = [pytest.mark.vllm, pytest.mark.alone]


@dataclass
class Answer:
    """What one streamed request brought."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    finish_reasons: dict[int, str] = field(default_factory=dict)
    by_choice: dict[int, list[int]] = field(default_factory=dict)
    at: list[float] = field(default_factory=list)
    """When its tokens came."""
    began: float = 0.0

    @property
    def rate(self) -> float:
        return len(self.at[1:]) / (self.at[-1] - self.at[0])


def body(number: int, *, output: int = 300, **more: Any) -> dict[str, Any]:
    """Requests differ by number. Not by seeds: vLLM on a CPU dies of a seeded prompt in several pieces."""
    return {
        "model": "demo",
        "prompt": f"def f{number}(x):" + " x" * (number % 7),
        "max_tokens": output,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "temperature": 0.0,
        **more,
    }


class Clients:
    """Streams of one node, all on one event loop."""

    def __init__(self, node: RunningNode, client: httpx.AsyncClient) -> None:
        self.node = node
        self.client = client

    async def stream(self, seat: Seat, request: dict[str, Any], answer: Answer | None = None) -> Answer:
        answer = answer or Answer()
        answer.began = time.monotonic()
        url = self.node.url + ("/v1/chat/completions" if "messages" in request else "/v1/completions")
        async with self.client.stream("POST", url, headers=seat.headers, json=request) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    self._read(json.loads(line.removeprefix("data: ")), answer)
        return answer

    @staticmethod
    def _read(chunk: dict[str, Any], answer: Answer) -> None:
        assert "error" not in chunk, chunk
        for choice in chunk["choices"]:
            new = choice.get("token_ids") or []
            answer.token_ids += new
            answer.by_choice.setdefault(choice["index"], []).extend(new)
            answer.at += [time.monotonic()] * len(new)
            answer.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            if choice.get("logprobs"):
                answer.logprobs += choice["logprobs"]["token_logprobs"]
            if choice.get("finish_reason"):
                answer.finish_reasons[choice["index"]] = choice["finish_reason"]

    async def metric(self, name: str) -> float:
        text = (await self.client.get(f"{self.node.stats_url}/metrics")).text
        [value] = re.findall(rf"^{name} (\S+)$", text, re.MULTILINE)
        return float(value)

    async def until(self, condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not await condition():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)

    async def watch(self, name: str, seen: list[float]) -> None:
        while True:
            seen.append(await self.metric(name))
            await asyncio.sleep(0.02)


def on_node(node: RunningNode, run: Callable[[Clients], Any]) -> Any:
    async def main() -> Any:
        limits = httpx.Limits(max_connections=100)
        # A machine that has become slower than the pace runs its streams one by one.
        async with httpx.AsyncClient(timeout=60, limits=limits) as client, asyncio.timeout(180):
            return await run(Clients(node, client))

    return asyncio.run(main())


@pytest.fixture(scope="module")
def step_node(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Iterator[RunningNode]:
    """8 slots, and a KV cache that holds 8 sequences of 700 tokens, not of 1,400."""
    node = RunningNode(tmp_path_factory.mktemp("steps"), free_port(), free_port(), demo_model)
    node.publish()
    flags = f"--max-num-seqs {SLOTS} --max-model-len 2048 --block-size 32 --num-gpu-blocks-override 200"
    process = start_serving(node, engine_flags=tuple(flags.split()))
    try:
        yield node
    finally:
        stop_group(process)


TIGHT = 1.2
"""A guarantee of so many times what one stream makes alone leaves a full batch no room, not even where others
use the machine while that is measured."""


@pytest.fixture
def solo_tok_s(step_node: RunningNode) -> float:
    """What one stream makes alone, anew for each test: a shared machine's speed drifts over minutes."""
    seat = step_node.new_seat()

    async def measure(clients: Clients) -> float:
        return max([(await clients.stream(seat, body(0, output=400))).rate for _ in range(3)])

    rate: float = on_node(step_node, measure)
    step_node.drop_seat(seat)
    return rate


@pytest.fixture
def sell(step_node: RunningNode) -> Iterator[Callable[..., Seat]]:
    """A seat with its guarantee, for one test."""
    seats = []

    def new(guarantee_tok_s: float, **terms: Any) -> Seat:
        step_node.guarantee_tok_s = guarantee_tok_s
        seats.append(step_node.new_seat(**terms))
        return seats[-1]

    yield new
    step_node.guarantee_tok_s = 5.0
    for seat in seats:
        step_node.drop_seat(seat)
    wait_for(lambda: all(s["in_flight"] == 0 for s in step_node.all_seat_stats()))


async def alone(clients: Clients, seat: Seat, requests: list[dict[str, Any]]) -> list[Answer]:
    return [await clients.stream(seat, request) for request in requests]


async def started(clients: Clients, seat: Seat, requests: list[dict[str, Any]]) -> list[asyncio.Task[Answer]]:
    """The requests on their way, each past its first token: a tight pace lets no further prompt begin."""
    answers = [Answer() for _ in requests]
    running = [
        asyncio.create_task(clients.stream(seat, request, answer))
        for request, answer in zip(requests, answers, strict=True)
    ]

    async def all_began() -> bool:
        return all(answer.at or answer.text for answer in answers)

    await clients.until(all_began)
    return running


async def beside(
    clients: Clients, hog: Seat, owed: Seat, requests: list[dict[str, Any]], owed_request: dict[str, Any]
) -> tuple[list[Answer], Answer, list[float]]:
    """The hog's requests all at once, and the owed one once they run; the numbers held meanwhile."""
    seen: list[float] = []
    watcher = asyncio.create_task(clients.watch("boosts_held_sequences", seen))
    running = await started(clients, hog, requests)
    answer = await clients.stream(owed, owed_request)
    answers = list(await asyncio.gather(*running))
    watcher.cancel()
    return answers, answer, seen


def test_held_streams_all_finish_with_the_same_tokens_as_alone(
    step_node: RunningNode, solo_tok_s: float, sell: Callable[..., Seat]
) -> None:
    hog, owed = sell(TIGHT * solo_tok_s), sell(TIGHT * solo_tok_s)
    requests = [body(number) for number in range(SLOTS - 1)]

    async def run(clients: Clients) -> None:
        expected = await alone(clients, hog, [*requests, body(99, output=600)])
        answers, answer, held = await beside(clients, hog, owed, requests, body(99, output=600))
        assert max(held) > 0
        assert [len(each.token_ids) for each in answers] == [300] * len(requests)
        for got, wanted in zip([*answers, answer], expected, strict=True):
            assert got.token_ids == wanted.token_ids

    on_node(step_node, run)
    assert step_node.seat_stats(hog)["held_s"] > 0
    assert step_node.seat_stats(owed)["held_s"] == 0


def test_an_owed_arrival_takes_a_slot_and_the_preempted_one_completes(
    step_node: RunningNode, solo_tok_s: float, sell: Callable[..., Seat]
) -> None:
    hog, owed = sell(0.3 * solo_tok_s), sell(0.3 * solo_tok_s)
    requests = [body(number, output=600) for number in range(SLOTS)]

    async def run(clients: Clients) -> None:
        expected = await alone(clients, hog, requests)
        before = await clients.metric("boosts_preempted_sequences_total")
        running = [asyncio.create_task(clients.stream(hog, request)) for request in requests]
        await asyncio.sleep(0.3)
        assert await clients.metric("boosts_in_flight_sequences") == SLOTS
        answer = await clients.stream(owed, body(50, output=20))
        first_token_s = answer.at[0] - answer.began
        answers = await asyncio.gather(*running)
        assert await clients.metric("boosts_preempted_sequences_total") > before
        # The first place that a hog would have left by itself came much later.
        assert answer.at[0] + 2 * first_token_s < min(each.at[-1] for each in answers)
        assert first_token_s < 0.5
        for got, wanted in zip(answers, expected, strict=True):
            assert got.token_ids == wanted.token_ids

    on_node(step_node, run)


def test_full_kv_cache_never_slows_an_owed_stream_for_borrowed_ones(
    step_node: RunningNode, solo_tok_s: float, sell: Callable[..., Seat]
) -> None:
    """8 streams of 1,400 tokens are almost twice what the KV cache holds."""
    hog, owed = sell(0.2 * solo_tok_s), sell(0.2 * solo_tok_s)
    requests = [body(number, output=1_400) for number in range(SLOTS - 1)]

    async def run(clients: Clients) -> None:
        before = await clients.metric("boosts_preempted_sequences_total")
        answers, answer, _ = await beside(clients, hog, owed, requests, body(60, output=1_400))
        assert await clients.metric("boosts_preempted_sequences_total") > before
        assert [len(each.token_ids) for each in answers] == [1_400] * len(requests)
        assert len(answer.token_ids) == 1_400
        # A preempted stream stands still until there is KV cache again.
        gaps = [b - a for a, b in zip(answer.at, answer.at[1:], strict=False)]
        assert max(gaps) < 0.5
        assert answer.at[-1] < max(each.at[-1] for each in answers)

    on_node(step_node, run)


def test_structured_output_stays_valid_while_held(
    step_node: RunningNode, solo_tok_s: float, sell: Callable[..., Seat]
) -> None:
    hog, owed = sell(TIGHT * solo_tok_s), sell(TIGHT * solo_tok_s)
    pattern = r"name: [a-z]{10}; numbers:( [0-9]{3},){120} end"
    chats = [
        {
            "model": "demo",
            "messages": [{"role": "user", "content": f"number {number}"}],
            "max_tokens": 1_500,
            "stream": True,
            "temperature": 1.0,
            "structured_outputs": {"regex": pattern},
        }
        for number in range(SLOTS - 1)
    ]

    async def run(clients: Clients) -> None:
        answers, _, held = await beside(clients, hog, owed, chats, body(70, output=800))
        assert max(held) > 0
        for each in answers:
            assert each.finish_reasons == {0: "stop"}
            assert re.fullmatch(pattern, each.text)

    on_node(step_node, run)


def test_clients_that_leave_while_held_leave_nothing_behind(
    step_node: RunningNode, solo_tok_s: float, sell: Callable[..., Seat]
) -> None:
    # More than the machine can do, so that all that is borrowed stays held.
    hog, owed = sell(0.9 * solo_tok_s), sell(0.9 * solo_tok_s)

    async def run(clients: Clients) -> None:
        running = [
            asyncio.create_task(clients.stream(hog, body(number, output=1_500)))
            for number in range(SLOTS - 1)
        ]
        await asyncio.sleep(0.2)
        paced = asyncio.create_task(clients.stream(owed, body(80, output=1_500)))

        async def some_held() -> bool:
            return await clients.metric("boosts_held_sequences") > 0

        async def none_in_flight() -> bool:
            return await clients.metric("boosts_in_flight_sequences") == 0

        async def none_held() -> bool:
            return await clients.metric("boosts_held_sequences") == 0

        await clients.until(some_held)
        for task in [*running, paced]:
            task.cancel()
        await asyncio.gather(*running, paced, return_exceptions=True)
        await clients.until(none_in_flight)
        await clients.until(none_held)
        fresh = await asyncio.gather(*(clients.stream(hog, body(n, output=50)) for n in range(SLOTS)))
        assert [len(each.token_ids) for each in fresh] == [50] * SLOTS

    on_node(step_node, run)
    wait_for(lambda: engine_running(step_node) == 0)


def test_shared_prefixes_while_held(
    step_node: RunningNode, solo_tok_s: float, sell: Callable[..., Seat]
) -> None:
    hog, owed = sell(TIGHT * solo_tok_s), sell(TIGHT * solo_tok_s)
    prefix = "import os\n" * 100
    requests = [body(number, prompt=f"{prefix} # {number}", output=300) for number in range(SLOTS - 1)]

    async def run(clients: Clients) -> None:
        expected = await alone(clients, hog, requests)
        cached = await clients.metric("boosts_cached_tokens_total")
        answers, answer, held = await beside(clients, hog, owed, requests, body(90, output=500))
        assert await clients.metric("boosts_cached_tokens_total") > cached
        assert max(held) > 0
        assert len(answer.token_ids) == 500
        for got, wanted in zip(answers, expected, strict=True):
            assert got.token_ids == wanted.token_ids

    on_node(step_node, run)


def test_logprobs_stop_strings_and_two_answers_while_held(
    step_node: RunningNode, solo_tok_s: float, sell: Callable[..., Seat]
) -> None:
    hog, owed = sell(TIGHT * solo_tok_s), sell(TIGHT * solo_tok_s)
    requests = [
        body(1, output=200, logprobs=3),
        body(3, output=200, logprobs=1),
        body(2, output=200, n=2, temperature=1.0),
        body(4, output=200, stop=["e", "zzz"], include_stop_str_in_output=True),
        body(6, output=200, n=2, logprobs=1, temperature=1.0),
    ]

    async def run(clients: Clients) -> None:
        expected = await alone(clients, hog, requests)
        answers, _, held = await beside(clients, hog, owed, requests, body(91, output=500))
        assert max(held) > 0
        for place in (0, 1, 3):
            assert answers[place].by_choice == expected[place].by_choice
            assert answers[place].finish_reasons == expected[place].finish_reasons
        for got in (answers[0], answers[1]):
            assert len(got.logprobs) == 200
        assert set(answers[2].by_choice) == {0, 1}
        assert answers[3].text.endswith("e") or answers[3].finish_reasons == {0: "length"}
        assert len(answers[2].by_choice[0]) == len(answers[2].by_choice[1]) == 200

    on_node(step_node, run)


def test_streams_whose_block_ends_finish_and_are_owed_nothing_more(
    step_node: RunningNode, solo_tok_s: float, sell: Callable[..., Seat]
) -> None:
    guarantee_tok_s = TIGHT * solo_tok_s
    # A pool has one guarantee: when the other seat is sold, this one has the same.
    hog = sell(5.0)

    async def run(clients: Clients) -> tuple[Seat, float]:
        requests = [body(number, output=1_500) for number in range(1, SLOTS - 1)]
        running = await started(clients, hog, requests)
        blocks = ending_block(1)
        closes = time.time() // DAY_S * DAY_S + blocks[0].ends + BORDER_GRACE_S
        ending = sell(guarantee_tok_s, blocks=blocks)
        # The last second of a block's grace; the stream takes longer.
        await asyncio.sleep(closes - 1.0 - time.time())
        paced = asyncio.create_task(clients.stream(ending, body(92, output=1_900)))
        answers = await asyncio.gather(paced, *running)
        assert len(answers[0].token_ids) == 1_900
        assert [len(each.token_ids) for each in answers[1:]] == [1_500] * len(requests)
        return ending, answers[0].at[-1] - answers[0].at[0]

    ending, took_s = on_node(step_node, run)
    # What it still made once its block was over, nobody owed it, and it gave way to who is owed.
    stats = step_node.seat_stats(ending)
    assert 0 < stats["owed_tokens"] / guarantee_tok_s < 0.75 * took_s
    assert stats["held_s"] > 0
