"""The four generating endpoints as data, so that every rule can be tried on each, streaming and not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True)
class Call:
    """One endpoint in one mode."""

    name: str
    path: str
    provider: str
    stream: bool

    def body(self, *, prompt: str = "hello there", max_tokens: int = 4) -> dict[str, Any]:
        body: dict[str, Any] = {"model": "demo", "stream": self.stream}
        if self.path == "/v1/completions":
            body |= {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
        elif self.path == "/v1/responses":
            body |= {"input": prompt, "max_output_tokens": max_tokens, "ignore_eos": True}
        else:
            body |= {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens}
            if self.provider == "openai":
                body["ignore_eos"] = True
        return body

    def post(self, url: str, key: str, **options: Any) -> httpx.Response:
        """Send it and read the whole answer."""
        headers = {"x-api-key": key} if self.provider == "anthropic" else {"Authorization": f"Bearer {key}"}
        return httpx.post(url + self.path, headers=headers, json=self.body(**options), timeout=60)


CALLS = [
    Call(f"{name}-{'stream' if stream else 'plain'}", path, provider, stream)
    for name, path, provider in (
        ("chat", "/v1/chat/completions", "openai"),
        ("completions", "/v1/completions", "openai"),
        ("responses", "/v1/responses", "openai"),
        ("messages", "/anthropic/v1/messages", "anthropic"),
    )
    for stream in (False, True)
]


def assert_refused(call: Call, answer: httpx.Response, status: int, code: str, anthropic_type: str) -> None:
    """The status, in the provider's own envelope, with the request's id."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    if call.provider == "openai":
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["code"] == code
        assert answer.headers["x-request-id"].startswith("req_")
    else:
        assert body["type"] == "error"
        assert body["error"]["type"] == anthropic_type
        assert body["error"]["message"]
        assert body["request_id"] == answer.headers["request-id"]
