"""What may be asked: the routes of the public port, and which body fields reach the engine.

Pure functions over a path and a parsed JSON body. Everything that is not in `ROUTES` is 404, so a
route that a newer vLLM adds stays shut until it is listed here.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serving.envelopes import Anthropic, ApiError, OpenAI, OpenAIResponses, Provider

MAX_PROMPTS = 256


class Kind(enum.Enum):
    """What a route costs: nothing, one request of the request limit, or a place in the queue."""

    FREE = "free"
    COUNTED = "counted"
    GENERATING = "generating"


@dataclass(frozen=True, slots=True)
class Route:
    method: str
    engine_path: str
    """Where vLLM serves it."""
    provider: Provider
    kind: Kind


OPENAI, OPENAI_RESPONSES, ANTHROPIC = OpenAI(), OpenAIResponses(), Anthropic()

ROUTES: Mapping[str, Route] = {
    "/v1/models": Route("GET", "/v1/models", OPENAI, Kind.FREE),
    "/v1/chat/completions": Route("POST", "/v1/chat/completions", OPENAI, Kind.GENERATING),
    "/v1/completions": Route("POST", "/v1/completions", OPENAI, Kind.GENERATING),
    "/v1/responses": Route("POST", "/v1/responses", OPENAI_RESPONSES, Kind.GENERATING),
    "/anthropic/v1/messages": Route("POST", "/v1/messages", ANTHROPIC, Kind.GENERATING),
    "/anthropic/v1/messages/count_tokens": Route(
        "POST", "/v1/messages/count_tokens", ANTHROPIC, Kind.COUNTED
    ),
}

DROPPED_FIELDS = frozenset(
    {
        # Scheduling, identity and transport inside the engine: not a client's to set.
        "priority",
        "request_id",
        "session_id",
        "cache_salt",
        "stream_interval",
        "kv_transfer_params",
        "ec_transfer_params",
        "vllm_xargs",
        # Pre-processed media and media loaders' arguments (PYSEC-2026-2303, CVE-2026-5497).
        "mm_payload",
        "mm_processor_kwargs",
        "media_io_kwargs",
        "return_mm_kwargs",
        # Engine internals that other tenants' traffic would show in, or that cost without being metered.
        "routed_experts_prompt_start",
        "watermarking",
        "enable_response_messages",
    }
)
"""Left out silently: SDKs and proxies add some of these on their own, and none changes an answer."""

REFUSED_FIELDS: Mapping[str, str] = {
    "use_beam_search": "beam search runs many sequences that no limit counts; use `n` and `temperature`",
    "background": "answers are not kept; stream the response instead",
    "store": "answers are not kept; leave `store` out or set it to false",
    "previous_response_id": "answers are not kept; send the conversation in `input`",
    "previous_input_messages": "send the conversation in `input`",
    "conversation": "answers are not kept; send the conversation in `input`",
    "prompt_logprobs": "it needs memory that grows with prompt length times vocabulary; use `logprobs`",
    "prompt_embeds": "send text or token ids",
    "chat_template": "the model's own chat template is used",
}
"""Refused by name when set to anything but null or false: ignoring them would change the answer."""

CLIENT_TOOL_TYPES = frozenset({"function", "custom"})
"""Tools that the client runs. All others (web search, code interpreter, mcp, ...) need a tool server."""


def parse_route(method: str, path: str) -> Route | ApiError:
    """The route for a request line, or the 404 or 405 to answer."""
    route = ROUTES.get(path)
    if route is None:
        return ApiError(404, "unknown_url", f"Unknown request URL: {method} {path}.")
    if method != route.method:
        return ApiError(
            405, "method_not_allowed", f"{path} takes {route.method}, not {method}.", should_retry=False
        )
    return route


def provider_of(path: str) -> Provider:
    """Whose envelope an error on `path` has."""
    return ANTHROPIC if path.startswith("/anthropic/") else OPENAI


def clean_body(body: object) -> dict[str, Any] | ApiError:
    """The fields that may reach the engine, or the 400 to answer."""
    if not isinstance(body, dict):
        return ApiError(400, None, "The request body must be a JSON object.")
    for field, advice in REFUSED_FIELDS.items():
        value = body.get(field)
        if not (value is None or value is False):
            return ApiError(
                400, "unsupported_parameter", f"`{field}` is not supported: {advice}.", param=field
            )
    refusal = (
        _refuse_server_tools(body.get("tools"))
        or _refuse_prompts(body.get("prompt"))
        or _refuse_echoed_logprobs(body)
    )
    if refusal is not None:
        return refusal
    return {name: value for name, value in body.items() if name not in DROPPED_FIELDS}


def count_prompts(body: Mapping[str, Any]) -> int:
    """How many prompts a clean body holds: `prompt` may be a string, token ids, or a list of either."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return len(prompt)
    return 1


def _refuse_prompts(prompt: object) -> ApiError | None:
    """A list has to be all strings, all token ids, or all lists of token ids: what vLLM would make of
    anything else is not what would be counted."""
    if not isinstance(prompt, list):
        return None
    if not (
        all(isinstance(part, str) for part in prompt)
        or _are_token_ids(prompt)
        or all(isinstance(part, list) and part and _are_token_ids(part) for part in prompt)
    ):
        return ApiError(
            400, None, "`prompt` must be a string, token ids, or a list of one of these.", param="prompt"
        )
    prompts = count_prompts({"prompt": prompt})
    if prompts <= MAX_PROMPTS:
        return None
    return ApiError(
        400, None, f"{prompts} prompts in one request; at most {MAX_PROMPTS} are taken.", param="prompt"
    )


def _are_token_ids(parts: list[object]) -> bool:
    return all(type(part) is int for part in parts)


def _refuse_echoed_logprobs(body: Mapping[str, Any]) -> ApiError | None:
    """vLLM answers `echo` with `logprobs` by computing prompt logprobs."""
    if body.get("echo") and body.get("logprobs") is not None:
        return ApiError(
            400,
            "unsupported_parameter",
            f"`logprobs` with `echo` is not supported: {REFUSED_FIELDS['prompt_logprobs']}.",
            param="logprobs",
        )
    return None


def _refuse_server_tools(tools: object) -> ApiError | None:
    for position, tool in enumerate(tools if isinstance(tools, list) else ()):
        # Anthropic's client tools carry no type at all.
        kind = tool.get("type", "function") if isinstance(tool, dict) else "function"
        if not isinstance(kind, str) or kind not in CLIENT_TOOL_TYPES:
            return ApiError(
                400,
                "unsupported_parameter",
                f"Tools of type `{kind}` need a tool server, and this node has none; only tools that your "
                f"own program runs are supported ({', '.join(sorted(CLIENT_TOOL_TYPES))}).",
                param=f"tools[{position}].type",
            )
    return None
