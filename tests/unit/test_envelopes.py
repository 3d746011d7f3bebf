"""What each provider's clients read in headers and bodies."""

from __future__ import annotations

import json

import pytest

from scheduler.seats import LimitReading
from serving.envelopes import Anthropic, ApiError, OpenAI, OpenAIResponses, Provider, go_duration, rfc3339

ERROR = ApiError(429, "rate_limit_exceeded", "slow down", type="requests", retry_after_s=1.2)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0s"),
        (0.0121, "13ms"),
        (0.012, "12ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (59.9996, "1m0s"),
        (360, "6m0s"),
        (90.25, "1m30.25s"),
        (3600, "1h0m0s"),
    ],
)
def test_go_durations_read_like_openais(seconds: float, shown: str) -> None:
    assert go_duration(seconds) == shown


def test_rfc3339_is_rounded_up_to_whole_seconds() -> None:
    assert rfc3339(1_800_000_000.2) == "2027-01-15T08:00:01Z"


def test_retry_after_is_rounded_up_and_exact_in_milliseconds() -> None:
    assert ERROR.headers() == [(b"retry-after", b"2"), (b"retry-after-ms", b"1200")]


def test_openai_error_body() -> None:
    body = json.loads(OpenAI().error_body(ERROR, "req_1"))
    fields = {"message": "slow down", "type": "requests", "param": None, "code": "rate_limit_exceeded"}
    assert body == {"error": fields}


def test_anthropic_error_body() -> None:
    body = json.loads(Anthropic().error_body(ERROR, "req_1"))
    detail = {"type": "rate_limit_error", "message": "slow down"}
    assert body == {"type": "error", "error": detail, "request_id": "req_1"}


@pytest.mark.parametrize("provider", [OpenAI(), OpenAIResponses(), Anthropic()])
def test_stream_errors_are_whole_events_with_json_data(provider: Provider) -> None:
    events = provider.stream_error(ERROR, "req_1", b"").decode()
    assert events.endswith("\n\n")
    [first, *_] = [line for line in events.splitlines() if line.startswith("data: ")]
    assert "slow down" in str(json.loads(first.removeprefix("data: ")))


def test_responses_errors_are_numbered_after_the_events_that_went_out() -> None:
    sent = b"event: response.created\ndata: {}\n\nevent: response.in_progress\ndata: {}\n\n"
    event = OpenAIResponses().stream_error(ERROR, "req_1", sent)
    assert json.loads(event.split(b"data: ")[1])["sequence_number"] == 2


def test_limit_headers() -> None:
    requests, tokens = LimitReading(60, 59, 1.0), LimitReading(1000, 0, 360.0)
    openai = dict(OpenAI().limit_headers(requests, tokens, 0.0))
    assert openai[b"x-ratelimit-remaining-requests"] == b"59"
    assert openai[b"x-ratelimit-reset-tokens"] == b"6m0s"
    anthropic = dict(Anthropic().limit_headers(requests, tokens, 0.0))
    assert anthropic[b"anthropic-ratelimit-tokens-limit"] == b"1000"
    assert anthropic[b"anthropic-ratelimit-tokens-reset"] == b"1970-01-01T00:06:00Z"


@pytest.mark.parametrize("provider", [OpenAI(), Anthropic()])
@pytest.mark.parametrize("body", [{}, {"error": "text"}, {"error": {"message": None}}])
def test_an_engine_error_without_a_message_still_says_something(
    provider: Provider, body: dict[str, object]
) -> None:
    assert provider.engine_error(500, body).message
