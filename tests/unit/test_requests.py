"""What may be asked: routes, dropped and refused fields, counting prompts."""

from __future__ import annotations

from typing import Any

import pytest

from serving.envelopes import ApiError
from serving.requests import (
    DROPPED_FIELDS,
    MAX_PROMPTS,
    REFUSED_FIELDS,
    clean_body,
    count_prompts,
    parse_route,
)


@pytest.mark.parametrize("path", ["/v1/pause", "/metrics", "/v1/models/", "/V1/models", "/anthropic", ""])
def test_unknown_paths_are_404(path: str) -> None:
    answer = parse_route("GET", path)
    assert isinstance(answer, ApiError)
    assert answer.status == 404


def test_known_path_with_another_method_is_405() -> None:
    answer = parse_route("DELETE", "/v1/models")
    assert isinstance(answer, ApiError)
    assert answer.status == 405


@pytest.mark.parametrize("field", sorted(DROPPED_FIELDS))
def test_engine_fields_are_dropped(field: str) -> None:
    assert clean_body({"model": "m", field: "x"}) == {"model": "m"}


@pytest.mark.parametrize("field", sorted(REFUSED_FIELDS))
def test_unsupported_fields_are_refused_by_name_and_harmless_when_off(field: str) -> None:
    refused = clean_body({field: "x"})
    assert isinstance(refused, ApiError)
    assert refused.param == field
    assert field in refused.message
    for off in (None, False):
        assert isinstance(clean_body({field: off}), dict)


@pytest.mark.parametrize("body", [None, [], "x", 5])
def test_bodies_that_are_no_objects_are_refused(body: object) -> None:
    assert isinstance(clean_body(body), ApiError)


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("a", 1), ([], 1), ([1, 2, 3], 1), (["a", "b"], 2), ([[1], [2, 3]], 2), (["a"], 1), (None, 1)],
)
def test_prompts_are_counted(prompt: Any, count: int) -> None:
    assert count_prompts({"prompt": prompt}) == count


def test_too_many_prompts_are_refused() -> None:
    assert isinstance(clean_body({"prompt": ["a"] * (MAX_PROMPTS + 1)}), ApiError)
    assert isinstance(clean_body({"prompt": ["a"] * MAX_PROMPTS}), dict)


@pytest.mark.parametrize(
    "prompt", [[1.0, 2.0], [1, "a"], ["a", 1], [[1], "a"], [[]], [["a"]], [True, 2], [None], [{}]]
)
def test_lists_that_vllm_would_read_otherwise_are_refused(prompt: Any) -> None:
    refused = clean_body({"prompt": prompt})
    assert isinstance(refused, ApiError)
    assert refused.param == "prompt"


def test_prompt_logprobs_are_refused_by_any_name() -> None:
    assert isinstance(clean_body({"prompt_logprobs": 0}), ApiError)
    assert isinstance(clean_body({"echo": True, "logprobs": 0}), ApiError)
    assert isinstance(clean_body({"echo": True, "logprobs": None}), dict)
    assert isinstance(clean_body({"logprobs": 5}), dict)


@pytest.mark.parametrize(
    "tool",
    [{"type": "function"}, {"type": "custom"}, {"name": "anthropic's have no type", "input_schema": {}}],
)
def test_tools_of_the_client_pass(tool: dict[str, Any]) -> None:
    assert isinstance(clean_body({"tools": [tool]}), dict)


@pytest.mark.parametrize(
    "kind", ["web_search", "code_interpreter", "mcp", "computer_20250124", None, 5, ["x"], "\ud800"]
)
def test_tools_of_a_server_are_refused(kind: object) -> None:
    refused = clean_body({"tools": [{"type": "function"}, {"type": kind}]})
    assert isinstance(refused, ApiError)
    assert refused.param == "tools[1].type"
