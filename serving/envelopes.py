"""How each provider's API says no, and how it shows limits.

Sources: OpenAI and Anthropic API references, and what their SDKs (openai 3.54, anthropic 2.12) do
with it: both retry 408, 409, 429 and >= 500 unless `x-should-retry` says otherwise.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from scheduler.seats import LimitReading

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class ApiError:
    """An error before it is put into a provider's envelope."""

    status: int
    code: str | None
    message: str
    type: str = "invalid_request_error"
    """OpenAI's `type`; Anthropic's follows from the status."""
    param: str | None = None
    retry_after_s: float | None = None
    should_retry: bool | None = None
    """None leaves it to the SDK's own rule for the status."""

    def headers(self) -> Headers:
        headers: Headers = []
        if self.retry_after_s is not None:
            # Rounded up: a retry on time must not come early.
            headers.append((b"retry-after", str(max(1, math.ceil(self.retry_after_s))).encode()))
            milliseconds = max(1, math.ceil(self.retry_after_s * 1000))
            headers.append((b"retry-after-ms", str(milliseconds).encode()))
        if self.should_retry is not None:
            headers.append((b"x-should-retry", str(self.should_retry).lower().encode()))
        return headers


class Provider(Protocol):
    """One API family's conventions."""

    request_id_header: bytes

    def error_body(self, error: ApiError, request_id: str) -> bytes: ...

    def stream_error(self, error: ApiError, request_id: str, sent: bytes) -> bytes:
        """The error as the last event of a stream of which `sent` has gone out."""
        ...

    def keep_alive(self) -> bytes:
        """An event that clients skip."""
        ...

    def limit_headers(self, requests: LimitReading, tokens: LimitReading, now: float) -> Headers:
        """`now` in seconds since the epoch."""
        ...

    def engine_error(self, status: int, body: Mapping[str, Any]) -> ApiError:
        """vLLM's own error, in the form it has on this API's paths."""
        ...


class OpenAI:
    """`/v1/*`."""

    request_id_header = b"x-request-id"

    def error_body(self, error: ApiError, request_id: str) -> bytes:
        return _json({"error": self._fields(error)})

    def stream_error(self, error: ApiError, request_id: str, sent: bytes) -> bytes:
        return b"data: " + self.error_body(error, request_id) + b"\n\ndata: [DONE]\n\n"

    def keep_alive(self) -> bytes:
        return b": waiting for a slot\n\n"

    def limit_headers(self, requests: LimitReading, tokens: LimitReading, now: float) -> Headers:
        headers: Headers = []
        for name, reading in ((b"requests", requests), (b"tokens", tokens)):
            headers.append((b"x-ratelimit-limit-" + name, str(reading.limit).encode()))
            headers.append((b"x-ratelimit-remaining-" + name, str(reading.remaining).encode()))
            headers.append((b"x-ratelimit-reset-" + name, go_duration(reading.reset_s).encode()))
        return headers

    def engine_error(self, status: int, body: Mapping[str, Any]) -> ApiError:
        return _engine_error(status, body.get("error"))

    @staticmethod
    def _fields(error: ApiError) -> dict[str, str | None]:
        return {"message": error.message, "type": error.type, "param": error.param, "code": error.code}


class OpenAIResponses(OpenAI):
    """`/v1/responses`: the same envelope, but streams are typed events."""

    def stream_error(self, error: ApiError, request_id: str, sent: bytes) -> bytes:
        event = {"type": "error", "sequence_number": sent.count(b"event: response.")} | {
            name: value for name, value in self._fields(error).items() if name != "type"
        }
        return b"event: error\ndata: " + _json(event) + b"\n\n"


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class Anthropic:
    """`/anthropic/v1/*`."""

    request_id_header = b"request-id"

    def error_body(self, error: ApiError, request_id: str) -> bytes:
        fallback = "api_error" if error.status >= 500 else "invalid_request_error"
        kind = _ANTHROPIC_TYPES.get(error.status, fallback)
        detail = {"type": kind, "message": error.message}
        return _json({"type": "error", "error": detail, "request_id": request_id})

    def stream_error(self, error: ApiError, request_id: str, sent: bytes) -> bytes:
        return b"event: error\ndata: " + self.error_body(error, request_id) + b"\n\n"

    def keep_alive(self) -> bytes:
        return b'event: ping\ndata: {"type": "ping"}\n\n'

    def limit_headers(self, requests: LimitReading, tokens: LimitReading, now: float) -> Headers:
        headers: Headers = []
        for name, reading in ((b"requests", requests), (b"tokens", tokens)):
            prefix = b"anthropic-ratelimit-" + name
            headers.append((prefix + b"-limit", str(reading.limit).encode()))
            headers.append((prefix + b"-remaining", str(reading.remaining).encode()))
            headers.append((prefix + b"-reset", rfc3339(now + reading.reset_s).encode()))
        return headers

    def engine_error(self, status: int, body: Mapping[str, Any]) -> ApiError:
        return _engine_error(status, body.get("error"))


def go_duration(seconds: float) -> str:
    """A Go duration as OpenAI prints it: `12ms`, `1.5s`, `6m0s`, `1h0m0s`; rounded up to milliseconds."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    shown = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if minutes == 0:
        return shown
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{shown}" if hours else f"{minutes}m{shown}"


def rfc3339(timestamp: float) -> str:
    """UTC, whole seconds, rounded up."""
    moment = datetime.datetime.fromtimestamp(math.ceil(timestamp), datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _engine_error(status: int, detail: object) -> ApiError:
    """vLLM names its error types after Python classes and puts the status into `code`."""
    fields = detail if isinstance(detail, Mapping) else {}
    message = str(fields.get("message") or "The engine could not answer this request.")
    param = fields.get("param")
    if status >= 500:
        return ApiError(status, "engine_error", message, type="server_error")
    code = "model_not_found" if status == 404 else None
    return ApiError(status, code, message, param=None if param is None else str(param))


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
