"""Every endpoint with the providers' own clients, and nothing but these endpoints."""

from __future__ import annotations

import anthropic
import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.integration.calls import CALLS, Call
from tests.integration.conftest import RunningNode, Seat

pytestmark = pytest.mark.vllm


@pytest.fixture
def openai_client(node: RunningNode, seat: Seat) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{node.url}/v1", api_key=seat.key, max_retries=0)


@pytest.fixture
def anthropic_client(node: RunningNode, seat: Seat) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=f"{node.url}/anthropic", api_key=seat.key, max_retries=0)


def test_openai_chat(openai_client: openai.OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
    answer = openai_client.chat.completions.create(
        model="demo",
        messages=messages,
        max_tokens=5,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    stream = openai_client.chat.completions.create(
        model="demo",
        messages=messages,
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    *_, last = stream
    assert last.usage is not None
    assert last.usage.completion_tokens == 5


def test_a_seed_and_a_prompt_of_several_steps_leave_the_engine_alive(openai_client: openai.OpenAI) -> None:
    # More than one step takes; vLLM's own CPU engine dies of this.
    answer = openai_client.completions.create(
        model="demo", prompt=[number % 1_000 for number in range(7_000)], max_tokens=2, seed=7
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 7_000


def test_openai_completions(openai_client: openai.OpenAI) -> None:
    answer = openai_client.completions.create(
        model="demo", prompt=["a", "b c"], n=2, max_tokens=3, extra_body={"ignore_eos": True}
    )
    assert len(answer.choices) == 4
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    stream = openai_client.completions.create(model="demo", prompt="a", max_tokens=3, stream=True)
    assert [chunk.object for chunk in stream]


def test_openai_responses(openai_client: openai.OpenAI) -> None:
    answer = openai_client.responses.create(
        model="demo", input="hi", max_output_tokens=5, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.output_tokens == 5
    events = openai_client.responses.create(model="demo", input="hi", max_output_tokens=5, stream=True)
    assert [event.type for event in events][-1] in ("response.completed", "response.incomplete")


def test_openai_models(openai_client: openai.OpenAI) -> None:
    assert [model.id for model in openai_client.models.list()] == ["demo"]


def test_anthropic_messages(anthropic_client: anthropic.Anthropic) -> None:
    answer = anthropic_client.messages.create(
        model="demo", max_tokens=5, messages=[{"role": "user", "content": "hi"}]
    )
    assert answer.role == "assistant"
    assert 1 <= answer.usage.output_tokens <= 5
    with anthropic_client.messages.stream(
        model="demo", max_tokens=5, messages=[{"role": "user", "content": "hi"}]
    ) as stream:
        assert stream.get_final_message().role == "assistant"


def test_anthropic_count_tokens(anthropic_client: anthropic.Anthropic) -> None:
    counted = anthropic_client.messages.count_tokens(
        model="demo", messages=[{"role": "user", "content": "hello there"}]
    )
    answer = anthropic_client.messages.create(
        model="demo", max_tokens=1, messages=[{"role": "user", "content": "hello there"}]
    )
    assert counted.input_tokens == answer.usage.input_tokens


def test_wrong_key_is_401_on_both_providers(node: RunningNode) -> None:
    with pytest.raises(openai.AuthenticationError) as openai_error:
        openai.OpenAI(base_url=f"{node.url}/v1", api_key="sk_pool_wrong").models.list()
    assert openai_error.value.code == "invalid_api_key"
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=f"{node.url}/anthropic", api_key="sk_pool_wrong").messages.create(
            model="demo", max_tokens=1, messages=[{"role": "user", "content": "hi"}]
        )


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_without_a_key_nothing_runs(node: RunningNode, call: Call) -> None:
    assert httpx.post(node.url + call.path, json=call.body()).status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        *("/pause", "/resume", "/tokenize", "/detokenize", "/invocations", "/metrics", "/ping", "/health"),
        *("/load", "/version", "/docs", "/openapi.json", "/v1/systemone", "/generative_scoring"),
        *("/v1/chat/completions/batch", "/v1/chat/completions/render", "/v1/responses/resp_1"),
        *("/v1/messages", "/v1/messages/count_tokens", "/inference/v1/generate", "/scale_elastic_ep"),
        *("/v1/completions/", "//v1/completions", "/anthropic/v1/complete", "/"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_everything_else_is_404(node: RunningNode, seat: Seat, method: str, path: str) -> None:
    answer = httpx.request(method, node.url + path, headers=seat.headers, json={})
    assert answer.status_code == 404, answer.text
    assert "error" in answer.json()


def test_wrong_method_is_405(node: RunningNode, seat: Seat) -> None:
    assert httpx.get(f"{node.url}/v1/chat/completions", headers=seat.headers).status_code == 405


def test_engine_errors_come_in_the_providers_envelope(node: RunningNode, seat: Seat) -> None:
    body = {"model": "nope", "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}
    answer = httpx.post(f"{node.url}/v1/chat/completions", headers=seat.headers, json=body)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    answer = httpx.post(f"{node.url}/anthropic/v1/messages", headers=seat.headers, json=body)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"
    assert answer.json()["request_id"]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": "demo"}']
)
def test_garbage_is_400_and_costs_nothing(node: RunningNode, seat: Seat, call: Call, content: bytes) -> None:
    before = node.seat_stats(seat)
    answer = httpx.post(node.url + call.path, headers=seat.headers, content=content)
    assert answer.status_code in (400, 422), answer.text
    assert "error" in answer.json()
    assert node.seat_stats(seat)["dispatched"] == before["dispatched"]


@pytest.mark.parametrize(
    "field",
    [
        {"use_beam_search": True},
        {"background": True},
        {"store": True},
        {"previous_response_id": "resp_1"},
        {"prompt_logprobs": 5},
        {"tools": [{"type": "code_interpreter"}]},
        {"tools": [{"type": "mcp", "server_label": "x"}]},
    ],
    ids=str,
)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_unsupported_features_are_refused_by_name(
    node: RunningNode, seat: Seat, call: Call, field: dict[str, object]
) -> None:
    answer = httpx.post(node.url + call.path, headers=seat.headers, json=call.body() | field)
    assert answer.status_code == 400
    name = next(iter(field))
    assert name in answer.text or "tool server" in answer.text


def test_client_set_scheduling_fields_never_reach_the_engine(node: RunningNode, seat: Seat) -> None:
    # Each of these would be refused by vLLM's own validation if it got there.
    body = {"model": "demo", "prompt": "a", "max_tokens": 1}
    fields = {"priority": "first", "cache_salt": "", "stream_interval": -1, "kv_transfer_params": 5}
    headers = seat.headers | {"X-Vllm-Priority": "zero", "X-data-parallel-rank": "99", "X-Request-Id": "mine"}
    answer = httpx.post(f"{node.url}/v1/completions", headers=headers, json=body | fields)
    assert answer.status_code == 200, answer.text
    assert "mine" not in answer.json()["id"]
