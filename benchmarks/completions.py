"""OpenAI streaming completions as the load generator asks for them and reads them.

Token counts come from the server's usage, which every event carries (`continuous_usage_stats`). Pieces of
text are never counted, because tokens of a model with random weights can decode to nothing and one event can
carry several tokens.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import aiohttp

PROMPT_TOKEN_IDS = range(100, 1000)
"""Prompts are random ids from here: past special tokens and inside every vocabulary worth measuring."""

_TAIL_BYTES = 4096
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)(?=[,}\s])')


@dataclass(frozen=True, slots=True)
class Target:
    """Where a client sends its requests."""

    base_url: str
    model: str
    api_key: str = ""


def completion_body(model: str, prompt: Sequence[int], max_tokens: int) -> bytes:
    """A streaming completion of exactly `max_tokens` tokens, greedy, with usage in every event."""
    return json.dumps(
        {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    ).encode()


def post_completion(
    session: aiohttp.ClientSession, target: Target, body: bytes
) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
    """Send a completion; the answer is there from its headers on. Raises aiohttp.ClientError."""
    headers = {"content-type": "application/json"}
    if target.api_key:
        headers["authorization"] = f"Bearer {target.api_key}"
    return session.post(f"{target.base_url}/v1/completions", data=body, headers=headers)


async def send_each_length(target: Target, longest: int) -> None:
    """One prompt of every length from 1 to `longest` tokens, one after the other, for one token each.

    Raises aiohttp.ClientError when one is not answered.
    """
    rng = random.Random(longest)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=120)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for length in range(1, longest + 1):
            body = completion_body(target.model, rng.choices(PROMPT_TOKEN_IDS, k=length), 1)
            async with post_completion(session, target, body) as answer:
                text = await answer.text()
                if answer.status != 200:
                    raise aiohttp.ClientError(f"{length} tokens: HTTP {answer.status} {text[:500]}")


class StreamTail:
    """The last kilobytes of an event stream, from which its newest usage or error can be read.

    Reads may cut events anywhere. An event longer than the tail is not understood.
    """

    __slots__ = ("_bytes",)

    def __init__(self) -> None:
        self._bytes = b""

    def feed(self, chunk: bytes) -> None:
        self._bytes = chunk if len(chunk) >= _TAIL_BYTES else (self._bytes + chunk)[-_TAIL_BYTES:]

    def output_tokens(self) -> int:
        """Completion tokens by the newest usage seen; 0 before there is one."""
        found = _COMPLETION_TOKENS.findall(self._bytes)
        return int(found[-1]) if found else 0

    def has_token(self) -> bool:
        """Whether a token has come: keep-alive comments and empty events are none."""
        return any(event.get("choices") for event in self.events())

    def error(self) -> str | None:
        """The message of the last error event."""
        errors = [event["error"] for event in self.events() if "error" in event]
        if not errors:
            return None
        return str(errors[-1].get("message", errors[-1])) if isinstance(errors[-1], dict) else str(errors[-1])

    def events(self) -> list[dict[str, Any]]:
        """Whole JSON events in the tail; its first line may be the end of a cut one and is then left out."""
        events = []
        for line in self._bytes.split(b"\n")[:-1]:
            if not line.startswith(b"data: {"):
                continue
            try:
                event = json.loads(line[6:])
            except ValueError:
                continue
            if isinstance(event, dict):
                events.append(event)
        return events
